"""The ops in plain PyTorch operators, without a loop over tokens: what export to ONNX and torch.func see."""
from typing import List, Optional

import torch
import torch.nn.functional as F

from .calls import ConvCall, ScanCall, acc_dtype


def run_scan(call: ScanCall) -> torch.Tensor:
    """The result of `call`."""
    out = None
    for i, reverse in enumerate(call.reverse):
        *tensors, delta_bias = call.direction(i)
        y = parallel_scan(
            *tensors, call.z, delta_bias, call.delta_softplus, reverse, call.residual, call.mask_diagonal[i])
        out = y if out is None else out + y
    return out


def run_conv(call: ConvCall) -> List[torch.Tensor]:
    """The result of `call`: one output a direction."""
    return [
        conv1d(call.x, w, call.bias[i] if call.bias else None, call.silu, call.reverse[i], call.centered)
        for i, w in enumerate(call.weight)
    ]


def parallel_scan(
        u: torch.Tensor,
        delta: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        D: Optional[torch.Tensor],
        z: Optional[torch.Tensor],
        delta_bias: Optional[torch.Tensor],
        delta_softplus: bool,
        reverse: bool,
        residual: bool,
        mask_diagonal: bool,
) -> torch.Tensor:
    """`selective_scan` by doubling: after step k each state has seen 2^k tokens (Hillis and Steele 1986).

    The pairs (a, b) of h -> a h + b compose to (a a', a b' + b): log2(L) elementwise steps over (B, L, D, N), which
    costs memory and log2(L) times the work, but no division by vanishing products and no operator beyond arithmetic.
    """
    dtype, acc = u.dtype, acc_dtype(u.dtype)
    if B.dim() == 3:
        B, C = B.unsqueeze(2), C.unsqueeze(2)
    groups = B.shape[2]
    if reverse:
        u, delta, B, C = u.flip(1), delta.flip(1), B.flip(1), C.flip(1)
    u, delta, A, B, C = u.to(acc), delta.to(acc), A.to(acc), B.to(acc), C.to(acc)
    dt = delta if delta_bias is None else delta + delta_bias.to(acc)
    if delta_softplus:
        dt = F.softplus(dt)  # threshold 20
    # (B, L, G, D / G, N)
    a = decay = torch.exp(dt.unsqueeze(-1) * A).unflatten(2, [groups, -1])
    b = (dt * u).unsqueeze(-1).unflatten(2, [groups, -1]) * B.unsqueeze(3)
    length = u.shape[1]
    if residual:
        start = u[:, :1].unsqueeze(-1).unflatten(2, [groups, -1])
        b = torch.cat([b[:, :1] + a[:, :1] * start, b[:, 1:]], dim=1)
    step = 1
    while step < length:
        b = b + a * _later(b, step)
        a = a * _later(a, step)
        step *= 2
    if mask_diagonal:
        b = torch.cat([torch.zeros_like(b[:, :1]), decay[:, 1:] * b[:, :-1]], dim=1)
    y = (b * C.unsqueeze(3)).sum(-1).flatten(2)
    if D is not None:
        y = y + D.to(acc) * u
    if reverse:
        y = y.flip(1)
    if z is not None:
        y = y * F.silu(z.to(acc))
    return y.to(dtype)


def _later(x: torch.Tensor, steps: int) -> torch.Tensor:
    """(B, L, G, D / G, N) moved to later tokens, zeros before the first."""
    return F.pad(x[:, :-steps], (0, 0, 0, 0, 0, 0, steps, 0))


def conv1d(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: Optional[torch.Tensor],
        silu: bool,
        reverse: bool,
        centered: bool,
) -> torch.Tensor:
    """`causal_conv1d` by torch's own convolution, channels first."""
    kernel_size = weight.shape[1]
    before = (kernel_size - 1) // 2 if centered else kernel_size - 1
    pad: List[int] = [before, kernel_size - 1 - before]
    if reverse:
        weight = weight.flip(1)
        pad = [kernel_size - 1 - before, before]
    bias_x = bias.to(x.dtype) if bias is not None else None
    y = F.conv1d(F.pad(x.transpose(1, 2), pad), weight.to(x.dtype).unsqueeze(1), bias_x, groups=weight.shape[0])
    if silu:
        y = F.silu(y)
    return y.transpose(1, 2)
