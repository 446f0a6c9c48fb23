"""The executable specification: what both ops compute, token by token, with gradients left to autograd.

Every backend is tested against these two functions. They are slow, and written to be read beside the docstrings of
`selective_scan` and `causal_conv1d`.
"""
from typing import List, Optional

import torch
import torch.nn.functional as F

from .calls import acc_dtype


def selective_scan_naive(
        u: torch.Tensor,
        delta: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        D: Optional[torch.Tensor] = None,
        z: Optional[torch.Tensor] = None,
        delta_bias: Optional[torch.Tensor] = None,
        delta_softplus: bool = True,
        reverse: bool = False,
        residual: bool = False,
        mask_diagonal: bool = False,
) -> torch.Tensor:
    """The selective scan; arguments and result as in `selective_scan`. A scripted (TorchScript) model runs this."""
    dtype, acc = u.dtype, acc_dtype(u.dtype)
    u, delta, A, B, C = u.to(acc), delta.to(acc), A.to(acc), B.to(acc), C.to(acc)
    batch, length, channels = u.shape
    if B.ndim == 3:
        B, C = B.unsqueeze(2), C.unsqueeze(2)
    # (B, L, G, N) -> (B, L, D, N): channel d reads group d // (D / G)
    B = B.repeat_interleave(channels // B.shape[2], dim=2)
    C = C.repeat_interleave(channels // C.shape[2], dim=2)

    dt = delta if delta_bias is None else delta + delta_bias.to(acc)
    if delta_softplus:
        dt = F.softplus(dt, threshold=20.)

    # unbind, since the gradient of an index is as large as what it indexes
    us, dts, Bs, Cs = u.unbind(1), dt.unbind(1), B.unbind(1), C.unbind(1)
    h = torch.zeros(batch, channels, A.shape[1], dtype=acc, device=u.device)
    ys: List[torch.Tensor] = []
    for i in range(length):
        t = length - 1 - i if reverse else i
        if i == 0 and residual:
            h = us[t].unsqueeze(-1).expand_as(h)
        decayed = torch.exp(dts[t].unsqueeze(-1) * A) * h
        h = decayed + (dts[t] * us[t]).unsqueeze(-1) * Bs[t]
        if not mask_diagonal:
            y = (Cs[t] * h).sum(-1)
        elif i > 0:
            y = (Cs[t] * decayed).sum(-1)
        else:
            y = us[t].clone().zero_()  # and not zeros_like, which autograd does not know
        ys.append(y)
    y = torch.stack(ys, dim=1) if length > 0 else u.clone()
    if reverse:
        y = y.flip(1)
    if D is not None:
        y = y + D.to(acc) * u
    if z is not None:
        y = y * F.silu(z.to(acc))
    return y.to(dtype)


def causal_conv1d_naive(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: Optional[torch.Tensor] = None,
        *,
        activation: Optional[str] = 'silu',
        reverse: bool = False,
        centered: bool = False,
) -> torch.Tensor:
    """The depthwise convolution; arguments and result as in `causal_conv1d`."""
    dtype, acc = x.dtype, acc_dtype(x.dtype)
    x, weight = x.to(acc), weight.to(acc)
    length, kernel_size = x.shape[1], weight.shape[1]
    before = (kernel_size - 1) // 2 if centered else kernel_size - 1  # tokens that a token sees before itself
    y = torch.zeros(x.shape, dtype=acc, device=x.device)
    for t in range(length):
        for k in range(kernel_size):
            s = t + before - k if reverse else t - before + k
            if 0 <= s < length:
                y[:, t] += weight[:, k] * x[:, s]
    if bias is not None:
        y = y + bias.to(acc)
    if activation == 'silu':
        y = F.silu(y)
    return y.to(dtype)
