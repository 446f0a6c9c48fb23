"""The hidden attention of scans: the matrix by which a mixer's scan maps its tokens to their outputs.

Given its steps dt, B and C, a scan is linear in u: y[i, d] = sum over j <= i of a[d, i, j] u[j, d] with

    a[d, i, j] = sum over n of C[i, n] exp(A[d, n] (dt[j + 1, d] + ... + dt[i, d])) dt[j, d] B[j, n]

(Ali, Zimerman & Wolf 2025, The Hidden Attention of Mamba Models, https://arxiv.org/abs/2403.01590). D, which adds to
the diagonal, and the gate, which multiplies rows, concern single tokens and are left out: the scan's output is
(a u + D u) silu(z).
"""
from typing import NamedTuple, Optional, Sequence

import torch
import torch.nn.functional as F

from ..layers.mixer import ScanInputs, ScanMixer, step_sizes
from ..layers.ssm import at_least_float32
from ..models.spatialmamba import SpatialMambaMixer

#: Numbers of (tokens, channels, states) to hold at once, in a few tensors.
MAX_NUMBERS = 2 ** 21


def hidden_attention(mixer: ScanMixer, x: torch.Tensor, tokens: Optional[Sequence[int]] = None) -> torch.Tensor:
    """The mean over channels of a mixer's hidden attention, summed over its directions.

    Args:
        mixer: A mixer, in eval mode.
        x: Its input (B, ..., dim) of L tokens.
        tokens: Those whose rows are wanted, by their number in x; None for all.

    Returns:
        (B, L, L), or (B, len(tokens), L), in the order of x. Little more is held on the way: a few tensors of
        `MAX_NUMBERS`, or, for `tokens`, of (B, L, channels).

    Raises:
        ValueError: The mixer's output is no scan, or a token is not there.
    """
    if isinstance(mixer, SpatialMambaMixer):
        raise ValueError(
            'mixer: got a SpatialMambaMixer, which convolves the states between its scan and its output; '
            'needs one whose output is that of its scans')
    total: Optional[torch.Tensor] = None
    for direction, s in enumerate(mixer.project(x)):
        length = s.u.shape[1]
        order = mixer.restore(
            torch.arange(length, device=x.device).view(1, length, 1), direction, list(x.shape)).flatten()
        if tokens is None:
            attention = mean_attention(s)
            if (order[1:] < order[:-1]).any():
                attention = attention[:, order]
        else:
            for token in tokens:
                if not 0 <= token < length:
                    raise ValueError(f'tokens: got {token}, needs numbers from 0 to {length - 1}')
            attention = torch.cat([channel_attention(s, [i]).mean(-1) for i in order[list(tokens)].tolist()], dim=1)
        if (order[1:] < order[:-1]).any():
            attention = attention[:, :, order]
        total = attention if total is None else total + attention
    return total


class _Scan(NamedTuple):
    """What a scan multiplies, with tokens in its order."""
    dt: torch.Tensor  # (B, L, D)
    time: torch.Tensor  # (B, L, D), the sum of dt up to a token, of which only differences count: in float64
    A: torch.Tensor  # (D, N)
    B: torch.Tensor  # (B, L, N)
    C: torch.Tensor  # (B, L, N)


def _in_scan_order(s: ScanInputs) -> _Scan:
    if s.B.ndim == 4:
        raise ValueError(f'B: got shape {tuple(s.B.shape)}, needs (batch, length, states): one group of channels')
    dt, B, C = step_sizes(s), at_least_float32(s.B), at_least_float32(s.C)
    if s.reverse:
        dt, B, C = dt.flip(1), B.flip(1), C.flip(1)
    return _Scan(dt, dt.double().cumsum(1), s.A.to(dt.dtype), B, C)


def channel_attention(s: ScanInputs, tokens: Sequence[int]) -> torch.Tensor:
    """Rows of the attention of one direction for each channel.

    Args:
        s: What the scan is given.
        tokens: Numbers of the rows, as tokens lie in s.

    Returns:
        (B, len(tokens), L, D); no more than that is held, and (B, L, D) for the row at hand.
    """
    x = _in_scan_order(s)
    batch, length, channels = x.dt.shape
    out = x.dt.new_zeros(batch, len(tokens), length, channels)
    for row, token in zip(out.unbind(1), tokens):
        i = length - 1 - token if s.reverse else token
        row, decay = row[:, :i + 1], (x.time[:, i:i + 1] - x.time[:, :i + 1]).to(row.dtype)
        for n in range(x.A.shape[1]):
            row += _exp(x.A[:, n] * decay) * (x.C[:, i:i + 1, n] * x.B[:, :i + 1, n])[..., None]
        row *= x.dt[:, :i + 1]
        if s.residual:
            row[:, 0] += _from_start(x, i)
        if s.mask_diagonal:
            row[:, i] = 0
    return out.flip(2) if s.reverse else out


def _from_start(x: _Scan, i: int) -> torch.Tensor:
    """What token i sees of a state before the first token that is u of that token (B, D)."""
    return torch.einsum('bn,bdn->bd', x.C[:, i], _exp(x.A * x.time[:, i, :, None].to(x.A.dtype)))


def _exp(x: torch.Tensor) -> torch.Tensor:
    """The exponential of a new tensor of numbers up to 0, in place; where it would underflow, which is slow, 1e-35."""
    return x.clamp_min_(-80.).exp_()


def mean_attention(s: ScanInputs) -> torch.Tensor:
    """The mean over channels of the attention of one direction, (B, L, L) as tokens lie in s.

    Of any 2 h neighbouring tokens, the later half sees the earlier one across the edge between them, and what decays on
    the way is the product of what decays before and after it. So the h x h entries of the matrix are those of a product
    of two matrices, each of h tokens by channels times states and with decays of at most 1; with h = 1, 2, 4, ... all
    pairs of tokens are reached, at the price of L log2(L) exponentials for each channel and state.
    """
    x = _in_scan_order(s)
    batch, length, channels = x.dt.shape
    states = x.A.shape[1]
    whole = 1 << (length - 1).bit_length()
    out = x.dt.new_zeros(batch, whole, whole)
    B, C = (F.pad(t, (0, 0, 0, whole - length)).unsqueeze(3) for t in (x.B, x.C))
    step = max(1, MAX_NUMBERS // (whole * states))
    for part in (slice(d, d + step) for d in range(0, channels, step)):
        A, dt = x.A[part].T.contiguous(), F.pad(x.dt[:, :, part], (0, 0, 0, whole - length)).unsqueeze(2)
        time = x.time[:, :, part]
        time = torch.cat([time, time[:, -1:].expand(-1, whole - length, -1)], dim=1)
        h = 1
        while h < length:
            blocks = (length + h - 1) // (2 * h)  # whose later half is not all padding
            (early, late), (early_dt, _), (early_B, _), (_, late_C) = (
                t[:, :2 * h * blocks].unflatten(1, (blocks, 2, h)).unbind(2) for t in (time, dt, B, C))
            edge = early[:, :, -1:]
            # (B, blocks, h, states, channels), with what is wide last
            after = _exp((late - edge).to(A.dtype).unsqueeze(3) * A).mul_(late_C)
            before = _exp((edge - early).to(A.dtype).unsqueeze(3) * A).mul_(early_B).mul_(early_dt)
            entries = after.flatten(3) @ before.flatten(3).mT  # (B, blocks, h, h)
            _blocks_of(out, 2 * h, blocks)[:, :, h:, :h].add_(entries)
            h *= 2
    out = out[:, :length, :length] / channels
    diagonal = out.diagonal(dim1=1, dim2=2)
    diagonal += (x.B * x.C).sum(-1) * x.dt.mean(-1)
    if s.residual:
        out[:, :, 0] += torch.stack([_from_start(x, i).mean(-1) for i in range(length)], dim=1)
    if s.mask_diagonal:
        diagonal.zero_()
    return out.flip(1, 2) if s.reverse else out


def _blocks_of(matrix: torch.Tensor, size: int, count: int) -> torch.Tensor:
    """The first square blocks on the diagonal of matrices (B, L, L), as (B, count, size, size), a view."""
    blocks = matrix.unflatten(1, (-1, size)).unflatten(3, (-1, size))
    return blocks.diagonal(dim1=1, dim2=3)[..., :count].movedim(-1, 1)
