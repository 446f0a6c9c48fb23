"""Adapter to the authors' own CUDA kernels, for those who have them compiled: mamba-ssm's selective scan and
causal-conv1d's convolution (https://github.com/state-spaces/mamba, https://github.com/Dao-AILab/causal-conv1d).

They want (B, D, L) with the tokens contiguous, walk forward only, and know one direction: this adapter transposes,
flips, adds the directions and gates the sum. Their backward pass adds dB and dC with atomics, hence is not
deterministic. The backward pass runs the scan again for its chunk states.
"""
import importlib
from functools import cache
from types import ModuleType
from typing import List, Optional, Tuple, Union

import torch
import torch.nn.functional as F

from ..calls import ConvCall, ConvGradients, ScanCall, ScanGradients, ScanResult
from .base import Backend


@cache
def _import(module: str) -> Union[ModuleType, str]:
    """The module, or why it does not import."""
    try:
        return importlib.import_module(module)
    except Exception as e:  # a broken build fails in more ways than ImportError
        return f'{module} does not import: {type(e).__name__}: {e}'


def _scan_module() -> Union[ModuleType, str]:
    return _import('selective_scan_cuda')


def _conv_module() -> Union[ModuleType, str]:
    return _import('causal_conv1d.cpp_functions')


class MambaSsm(Backend):
    name = 'mamba_ssm'
    devices = ('cuda',)
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    max_d_state = 256
    kernel_sizes = (2, 3, 4)
    forms = ()
    empty = False
    deterministic = False

    def why_unavailable(self) -> Optional[str]:
        if not torch.cuda.is_available():
            return 'no GPU that PyTorch can use'
        module = _scan_module()
        return module if isinstance(module, str) else None

    def why_unsupported(self, call: Union[ScanCall, ConvCall]) -> Optional[str]:
        if isinstance(call, ConvCall) and isinstance(_conv_module(), str):
            return _conv_module()
        return super().why_unsupported(call)

    def scan_forward(self, call: ScanCall, save: bool) -> ScanResult:
        y = None
        for i in range(len(call.u)):
            out = _scan_module().fwd(*_scan_arguments(call, i), call.delta_softplus)[0]
            out = _tokens_first(out, call.reverse[i])
            y = out if y is None else y + out
        states = call.new_states() if save else None
        if call.z is None:
            return y, None, states
        return y * F.silu(call.z), y if save else None, states

    def scan_backward(
            self,
            call: ScanCall,
            grad_out: torch.Tensor,
            y: Optional[torch.Tensor],
            states: torch.Tensor,
    ) -> ScanGradients:
        dy, dz = grad_out, None
        if call.z is not None:
            z = call.z.float()
            gate = torch.sigmoid(z)
            dz = (grad_out * y * gate * (1. + z * (1. - gate))).to(grad_out.dtype)
            dy = (grad_out * z * gate).to(grad_out.dtype)
        gradients = []
        for i, reverse in enumerate(call.reverse):
            arguments = _scan_arguments(call, i)
            chunk_states = _scan_module().fwd(*arguments, call.delta_softplus)[1]
            du, ddelta, dA, dB, dC, dD, dbias, *_ = _scan_module().bwd(
                *arguments, _channels_first(dy, reverse), chunk_states, None, None, call.delta_softplus, False)
            du, ddelta, dB, dC = (_tokens_first(g, reverse).to(grad_out.dtype) for g in (du, ddelta, dB, dC))
            one = [du, ddelta, dA, dB.view(call.B[i].shape), dC.view(call.C[i].shape)]
            if call.D:
                one.append(dD)
            if call.delta_bias:
                one.append(dbias)
            gradients.append(one)
        return gradients, dz

    def conv_forward(self, call: ConvCall) -> List[torch.Tensor]:
        outs = []
        for i, reverse in enumerate(call.reverse):
            out = _conv_module().causal_conv1d_fwd_function(
                _conv_input(call.x, reverse), call.weight[i], call.bias[i] if call.bias else None,
                None, None, None, call.silu)
            outs.append(_tokens_first(out, reverse))
        return outs

    def conv_backward(
            self,
            call: ConvCall,
            grad_outs: List[torch.Tensor],
    ) -> ConvGradients:
        dx, dweights, dbiases = None, [], []
        for i, reverse in enumerate(call.reverse):
            di, dweight, dbias, _ = _conv_module().causal_conv1d_bwd_function(
                _conv_input(call.x, reverse), call.weight[i], call.bias[i] if call.bias else None,
                _conv_input(grad_outs[i], reverse), None, None, None, None, False, call.silu)
            di = _tokens_first(di, reverse)
            dx = di if dx is None else dx + di
            dweights.append(dweight)
            if call.bias:
                dbiases.append(dbias)
        return dx, dweights, dbiases


def _ordered(x: torch.Tensor, reverse: bool) -> torch.Tensor:
    return x.flip(1) if reverse else x


def _channels_first(x: torch.Tensor, reverse: bool) -> torch.Tensor:
    """(B, L, ...) in memory order to (B, ..., L) in scan order, contiguous."""
    return _ordered(x, reverse).movedim(1, -1).contiguous()


def _tokens_first(x: torch.Tensor, reverse: bool) -> torch.Tensor:
    """(B, ..., L) in scan order to (B, L, ...) in memory order, contiguous."""
    return _ordered(x.movedim(-1, 1), reverse).contiguous()


def _scan_arguments(call: ScanCall, i: int) -> Tuple[Optional[torch.Tensor], ...]:
    """u, delta, A, B, C, D, z, delta_bias as the compiled scan takes them, the gate left out."""
    u, delta, A, B, C, D, delta_bias = call.direction(i)
    B, C = (x if x.ndim == 4 else x.unsqueeze(2) for x in (B, C))
    u, delta, B, C = (_channels_first(x, call.reverse[i]) for x in (u, delta, B, C))
    return u, delta, A, B, C, D, None, delta_bias


def _conv_input(x: torch.Tensor, reverse: bool) -> torch.Tensor:
    """(B, L, D) in memory order to (B, D, L) in scan order: as a view of tokens if these are aligned, else copied."""
    x = _ordered(x, reverse).transpose(1, 2)
    aligned = x.shape[1] % 8 == 0 and x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.stride(2) % 8 == 0
    return x if aligned and x.stride(2) > 1 else x.contiguous()
