"""mamba-ssm's and causal-conv1d's functions, run by the ops of this package on any device.

Names, order of arguments and layouts, channels before tokens, are those of mamba-ssm
(https://github.com/state-spaces/mamba), of its forks in the repositories of Vim and VideoMamba, and of causal-conv1d
(https://github.com/Dao-AILab/causal-conv1d). Call these functions, or call `install()` before code that imports them
from there. `python -m timm_ssm SCRIPT` does that.
"""
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from types import ModuleType
from typing import Any, Callable, Dict, Optional, Sequence, Tuple, Union

import torch
import torch.nn.functional as F
from torch import nn

from .ops import bidirectional_selective_scan, causal_conv1d, selective_scan

__all__ = [
    'RMSNorm',
    'bimamba_inner_fn',
    'causal_conv1d_fn',
    'causal_conv1d_update',
    'install',
    'layer_norm_fn',
    'mamba_inner_fn',
    'mamba_inner_fn_no_out_proj',
    'rms_norm_fn',
    'selective_scan_fn',
]


def selective_scan_fn(
        u: torch.Tensor,
        delta: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        D: Optional[torch.Tensor] = None,
        z: Optional[torch.Tensor] = None,
        delta_bias: Optional[torch.Tensor] = None,
        delta_softplus: bool = False,
        return_last_state: bool = False,
) -> Union[torch.Tensor, Tuple[torch.Tensor, torch.Tensor]]:
    """mamba-ssm's selective scan; see `timm_ssm.ops.selective_scan` for what it computes.

    Args:
        u: Input (B, D, L).
        delta: Step size (B, D, L).
        A: State decay, real (D, N).
        B: Input matrix (B, N, L), in groups (B, G, N, L), or the same for all tokens (D, N).
        C: Output matrix, in any of these shapes.
        D: Skip connection (D,).
        z: Gate (B, D, L).
        delta_bias: Bias of delta (D,).
        delta_softplus: Apply softplus to delta.
        return_last_state: Return the state after the last token too. As in mamba-ssm it has no gradient.

    Returns:
        out (B, D, L), or out and the last state (B, D, N).
    """
    if A.is_complex():
        raise ValueError(f'A: got dtype {A.dtype}, needs a real one')
    u, delta = u.mT, delta.mT
    B, C = (_tokens_first(x, u) for x in (B, C))
    z = z if z is None else z.mT
    out = selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus).mT.contiguous()
    return (out, _last_state(u, delta, A, B, delta_bias, delta_softplus)) if return_last_state else out


def _tokens_first(x: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """B or C in mamba-ssm's shapes to (B, L, N) or (B, L, G, N), in the dtype of u (B, L, D)."""
    x = x.to(u.dtype)
    if x.ndim == 2:
        return x.expand(*u.shape[:2], -1, -1)
    return x.mT if x.ndim == 3 else x.permute(0, 3, 1, 2)


@torch.no_grad()
def _last_state(
        u: torch.Tensor,
        delta: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        delta_bias: Optional[torch.Tensor],
        delta_softplus: bool,
) -> torch.Tensor:
    """The state (B, D, N) after the last token of u, delta (B, L, D), B (B, L, [G,] N), 64 tokens at a time."""
    acc = torch.promote_types(u.dtype, torch.float32)
    A = A.to(acc)
    h = A.new_zeros(u.shape[0], *A.shape)
    for u_c, delta_c, B_c in zip(*(x.split(64, dim=1) for x in (u, delta, B))):
        dt = delta_c.to(acc)
        if delta_bias is not None:
            dt = dt + delta_bias.to(acc)
        if delta_softplus:
            dt = F.softplus(dt)
        B_c = B_c.to(acc) if B_c.ndim == 4 else B_c.to(acc).unsqueeze(2)
        B_c = B_c.repeat_interleave(A.shape[0] // B_c.shape[2], dim=2)
        total = dt.sum(1)
        later = total.unsqueeze(1) - dt.cumsum(1)  # the steps after each token
        own = torch.exp(later.unsqueeze(-1) * A) * (dt * u_c.to(acc)).unsqueeze(-1) * B_c
        h = torch.exp(total.unsqueeze(-1) * A) * h + own.sum(1)
    return h


def causal_conv1d_fn(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: Optional[torch.Tensor] = None,
        seq_idx: Union[None, str, torch.Tensor] = None,
        initial_states: Optional[torch.Tensor] = None,
        return_final_states: bool = False,
        final_states_out: Optional[torch.Tensor] = None,
        activation: Optional[str] = None,
) -> Union[torch.Tensor, Tuple[torch.Tensor, torch.Tensor]]:
    """causal-conv1d's convolution; see `timm_ssm.ops.causal_conv1d` for what it computes.

    Args:
        x: Tokens (B, D, L).
        weight: Kernels (D, K).
        bias: Bias (D,).
        seq_idx: None: sequences cannot be packed. A string is taken for the activation, which stood here before
            causal-conv1d 1.2.
        initial_states: Tokens before the first (B, D, K - 1); zeros if None.
        return_final_states: Return the last K - 1 tokens too.
        final_states_out: Tensor to write these to.
        activation: None, 'silu' or 'swish', which are the same.

    Returns:
        out (B, D, L), or out and the last tokens (B, D, K - 1).
    """
    if isinstance(seq_idx, str):
        activation, seq_idx = seq_idx, None
    if seq_idx is not None:
        raise ValueError('seq_idx: packed sequences are not supported, needs None')
    if activation == 'swish':
        activation = 'silu'
    length, before = x.shape[-1], weight.shape[1] - 1
    if initial_states is not None:
        x = torch.cat([initial_states.to(x.dtype), x], dim=-1)
    out = causal_conv1d(x.mT, weight, bias, activation).mT[..., x.shape[-1] - length:].contiguous()
    if not return_final_states:
        return out
    final = F.pad(x, (before, 0))[..., x.shape[-1]:]
    if final_states_out is not None:
        final = final_states_out.copy_(final)
    return out, final


def causal_conv1d_update(
        x: torch.Tensor,
        conv_state: torch.Tensor,
        weight: torch.Tensor,
        bias: Optional[torch.Tensor] = None,
        activation: Optional[str] = None,
) -> torch.Tensor:
    """One token of the convolution: x (B, D) joins the last tokens in conv_state (B, D, K), which changes in place."""
    conv_state.copy_(torch.cat([conv_state[..., 1:], x.unsqueeze(-1).to(conv_state.dtype)], dim=-1))
    out = (conv_state * weight).sum(-1)
    if bias is not None:
        out = out + bias
    if activation not in (None, 'silu', 'swish'):
        raise ValueError(f"activation: got {activation!r}, needs 'silu', 'swish' or None")
    return (F.silu(out) if activation else out).to(x.dtype)


def mamba_inner_fn_no_out_proj(
        xz: torch.Tensor,
        conv1d_weight: torch.Tensor,
        conv1d_bias: Optional[torch.Tensor],
        x_proj_weight: torch.Tensor,
        delta_proj_weight: torch.Tensor,
        A: torch.Tensor,
        B: Optional[torch.Tensor] = None,
        C: Optional[torch.Tensor] = None,
        D: Optional[torch.Tensor] = None,
        delta_bias: Optional[torch.Tensor] = None,
        B_proj_bias: Optional[torch.Tensor] = None,
        C_proj_bias: Optional[torch.Tensor] = None,
        delta_softplus: bool = True,
        checkpoint_lvl: int = 1,
) -> torch.Tensor:
    """`mamba_inner_fn` without the projection at its end (Vim's fork): (B, D, L)."""
    x, z, delta, B, C = _inner(
        xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, A, B, C, B_proj_bias, C_proj_bias)
    return selective_scan(x, delta, A, B, C, D, z, delta_bias, delta_softplus).mT


def mamba_inner_fn(
        xz: torch.Tensor,
        conv1d_weight: torch.Tensor,
        conv1d_bias: Optional[torch.Tensor],
        x_proj_weight: torch.Tensor,
        delta_proj_weight: torch.Tensor,
        out_proj_weight: torch.Tensor,
        out_proj_bias: Optional[torch.Tensor],
        A: torch.Tensor,
        B: Optional[torch.Tensor] = None,
        C: Optional[torch.Tensor] = None,
        D: Optional[torch.Tensor] = None,
        delta_bias: Optional[torch.Tensor] = None,
        B_proj_bias: Optional[torch.Tensor] = None,
        C_proj_bias: Optional[torch.Tensor] = None,
        delta_softplus: bool = True,
        checkpoint_lvl: int = 1,
) -> torch.Tensor:
    """Mamba's mixer after its input projection: convolution with SiLU, projections, gated scan, output projection.

    Args:
        xz: Scanned channels and gate (B, 2 D, L).
        conv1d_weight: Kernels (D, 1, K).
        conv1d_bias: Their bias (D,).
        x_proj_weight: Projection to the step size's rank, B and C (R + 2 N, D); without B or C where these are given.
        delta_proj_weight: Projection of the step size (D, R).
        out_proj_weight: Output projection (C, D).
        out_proj_bias: Its bias (C,).
        A: State decay, real (D, N).
        B: As in `selective_scan_fn`; None for what x_proj_weight gives.
        C: As B.
        D: Skip connection (D,).
        delta_bias: Bias of the step size (D,).
        B_proj_bias: Bias of the projected B (N,).
        C_proj_bias: Bias of the projected C (N,).
        delta_softplus: Apply softplus to the step size.
        checkpoint_lvl: What mamba-ssm's kernels compute again in the backward pass; it does not change results.

    Returns:
        out (B, L, C).
    """
    y = mamba_inner_fn_no_out_proj(
        xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, A, B, C, D, delta_bias, B_proj_bias,
        C_proj_bias, delta_softplus)
    return F.linear(y.mT, out_proj_weight, out_proj_bias)


def bimamba_inner_fn(
        xz: torch.Tensor,
        conv1d_weight: torch.Tensor,
        conv1d_bias: Optional[torch.Tensor],
        x_proj_weight: torch.Tensor,
        delta_proj_weight: torch.Tensor,
        out_proj_weight: torch.Tensor,
        out_proj_bias: Optional[torch.Tensor],
        A: torch.Tensor,
        A_b: torch.Tensor,
        B: Optional[torch.Tensor] = None,
        C: Optional[torch.Tensor] = None,
        D: Optional[torch.Tensor] = None,
        delta_bias: Optional[torch.Tensor] = None,
        B_proj_bias: Optional[torch.Tensor] = None,
        C_proj_bias: Optional[torch.Tensor] = None,
        delta_softplus: bool = True,
        checkpoint_lvl: int = 1,
) -> torch.Tensor:
    """`mamba_inner_fn` with a second scan in reverse, which has its own decay A_b alone, added (Vim's fork)."""
    x, z, delta, B, C = _inner(
        xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, A, B, C, B_proj_bias, C_proj_bias)
    y = bidirectional_selective_scan(
        (x, x), (delta, delta), (A, A_b), (B, B), (C, C), None if D is None else (D, D), z,
        None if delta_bias is None else (delta_bias, delta_bias), delta_softplus)
    return F.linear(y, out_proj_weight, out_proj_bias)


def _inner(
        xz: torch.Tensor,
        conv1d_weight: torch.Tensor,
        conv1d_bias: Optional[torch.Tensor],
        x_proj_weight: torch.Tensor,
        delta_proj_weight: torch.Tensor,
        A: torch.Tensor,
        B: Optional[torch.Tensor],
        C: Optional[torch.Tensor],
        B_proj_bias: Optional[torch.Tensor],
        C_proj_bias: Optional[torch.Tensor],
) -> Tuple[torch.Tensor, ...]:
    """x, z, delta (B, L, D), B and C as `ops.selective_scan` takes them."""
    if A.is_complex():
        raise ValueError(f'A: got dtype {A.dtype}, needs a real one')
    x, z = xz.mT.chunk(2, dim=-1)
    x = causal_conv1d(x, conv1d_weight.squeeze(1), conv1d_bias)
    projected = F.linear(x, x_proj_weight)
    rank, d_state = delta_proj_weight.shape[1], A.shape[1]
    delta = F.linear(projected[..., :rank], delta_proj_weight)
    used = rank
    if B is None:
        B = projected[..., used:used + d_state]
        used += d_state
        B = B if B_proj_bias is None else B + B_proj_bias.to(B.dtype)
    else:
        B = _tokens_first(B, x)
    if C is None:
        C = projected[..., used:used + d_state]
        C = C if C_proj_bias is None else C + C_proj_bias.to(C.dtype)
    else:
        C = _tokens_first(C, x)
    return x, z, delta, B, C


def layer_norm_fn(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: Optional[torch.Tensor],
        residual: Optional[torch.Tensor] = None,
        *,
        eps: float = 1e-6,
        prenorm: bool = False,
        residual_in_fp32: bool = False,
        is_rms_norm: bool = False,
) -> Union[torch.Tensor, Tuple[torch.Tensor, torch.Tensor]]:
    """Add x to a residual stream and normalise the sum, as one of mamba-ssm's Triton kernels does.

    Returns:
        The normed sum in x's dtype, and, if prenorm, the sum itself, in the residual's dtype, or, of the first x, in
        float32 if residual_in_fp32 asks for it.
    """
    dtype = x.dtype
    stream = torch.float32 if residual_in_fp32 else dtype
    y = x.float() if x.dtype != torch.float64 else x
    if residual is not None:
        y, stream = y + residual, residual.dtype
    w = weight.to(y.dtype)
    b = bias if bias is None else bias.to(y.dtype)
    if is_rms_norm:
        out = F.rms_norm(y, w.shape, w, eps)
        out = out if b is None else out + b
    else:
        out = F.layer_norm(y, w.shape, w, b, eps)
    return (out.to(dtype), y.to(stream)) if prenorm else out.to(dtype)


def rms_norm_fn(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: Optional[torch.Tensor],
        residual: Optional[torch.Tensor] = None,
        **kwargs: Any,
) -> Union[torch.Tensor, Tuple[torch.Tensor, torch.Tensor]]:
    """`layer_norm_fn` without the mean."""
    return layer_norm_fn(x, weight, bias, residual, **kwargs, is_rms_norm=True)


class RMSNorm(nn.Module):
    """mamba-ssm's RMSNorm, whose forward is `rms_norm_fn`."""

    def __init__(self, hidden_size: int, eps: float = 1e-5, device=None, dtype=None) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.register_parameter('bias', None)

    def forward(self, x: torch.Tensor, residual: Optional[torch.Tensor] = None, **kwargs: Any):
        return rms_norm_fn(x, self.weight, self.bias, residual, eps=self.eps, **kwargs)


_SCANS = (selective_scan_fn, mamba_inner_fn, bimamba_inner_fn, mamba_inner_fn_no_out_proj)
_NORMS = (RMSNorm, layer_norm_fn, rms_norm_fn)
#: What modules offer in place of compiled extensions.
_MODULES: Dict[str, Sequence[Callable]] = {
    'causal_conv1d': (causal_conv1d_fn, causal_conv1d_update),
    'mamba_ssm': (selective_scan_fn, mamba_inner_fn),
    'mamba_ssm.ops': (),
    'mamba_ssm.ops.selective_scan_interface': _SCANS,
    'mamba_ssm.ops.triton': (),
    'mamba_ssm.ops.triton.layernorm': _NORMS,  # its name up to mamba-ssm 1
    'mamba_ssm.ops.triton.layer_norm': _NORMS,
}


def install() -> None:
    """Let imports of mamba-ssm and causal-conv1d find these functions where the originals cannot run.

    A compiled extension that imports is never replaced, nor a module that another finder has and that needs none. Safe
    to call twice.
    """
    if not any(isinstance(finder, _StandIns) for finder in sys.meta_path):
        sys.meta_path.insert(0, _StandIns())


class _StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the modules of `_MODULES` that would not work here."""

    def find_spec(self, name: str, path: Optional[Sequence[str]] = None, target: Optional[ModuleType] = None):
        if name not in _MODULES or _originals_run(name, path):
            return None
        is_package = name == 'causal_conv1d' or any(other.startswith(f'{name}.') for other in _MODULES)
        return importlib.machinery.ModuleSpec(name, self, is_package=is_package)

    def exec_module(self, module: ModuleType) -> None:
        module.__doc__ = f'Stand-in for {module.__name__}, from timm_ssm.compat.'
        for function in _MODULES[module.__name__]:
            setattr(module, function.__name__, function)


def _originals_run(name: str, path: Optional[Sequence[str]]) -> bool:
    """Whether the module `name`, if it is there, can do its work on this machine."""
    if _MODULES[name] is _NORMS:
        return torch.cuda.is_available() and importlib.util.find_spec('triton') is not None
    extension = {
        'causal_conv1d': 'causal_conv1d_cuda', 'mamba_ssm.ops.selective_scan_interface': 'selective_scan_cuda',
    }.get(name)
    if extension is None:  # a package: its own code may be there, as in the repositories of Vim and VideoMamba
        return importlib.machinery.PathFinder.find_spec(name, path) is not None
    try:
        importlib.import_module(extension)
    except Exception:  # broken builds fail in more ways than ImportError
        return False
    return True
