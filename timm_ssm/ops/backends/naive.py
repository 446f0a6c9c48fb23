"""The specification itself as a backend, its gradients left to autograd: slow, and never selected unasked."""
from typing import List, Optional, Tuple

import torch

from ..calls import ConvCall, ConvGradients, ScanCall, ScanGradients, ScanResult, acc_dtype
from ..naive import causal_conv1d_naive, selective_scan_naive
from .base import Backend


class Naive(Backend):
    name = 'naive'

    def scan_forward(self, call: ScanCall, save: bool) -> ScanResult:
        out, y = _scan(call)
        return out, y if save else None, call.new_states() if save else None  # the states stay unwritten

    def scan_backward(
            self,
            call: ScanCall,
            grad_out: torch.Tensor,
            y: Optional[torch.Tensor],
            states: torch.Tensor,
    ) -> ScanGradients:
        leaves = [None if x is None else x.detach().requires_grad_() for x in call.tensors()]
        with torch.enable_grad():
            out, _ = _scan(call.with_tensors(leaves))
        grads = iter(_gradients([out], leaves, [grad_out]))
        arguments = [[next(grads) for _ in xs] for xs in call[:7]]
        return [[g for g in one if g is not None] for one in zip(*filter(None, arguments))], next(grads)

    def conv_forward(self, call: ConvCall) -> List[torch.Tensor]:
        return [
            causal_conv1d_naive(
                call.x, w, call.bias[i] if call.bias else None, activation='silu' if call.silu else None,
                reverse=call.reverse[i], centered=call.centered)
            for i, w in enumerate(call.weight)
        ]

    def conv_backward(self, call: ConvCall, grad_outs: List[torch.Tensor]) -> ConvGradients:
        leaves = [x.detach().requires_grad_() for x in call.tensors()]
        with torch.enable_grad():
            outs = self.conv_forward(call.with_tensors(leaves))
        return call.with_tensors(_gradients(outs, leaves, grad_outs))[:3]


def _scan(call: ScanCall) -> Tuple[torch.Tensor, Optional[torch.Tensor]]:
    """out, and the sum before the gate if there is one."""
    dtype, acc = call.input.dtype, acc_dtype(call.input.dtype)
    y = 0
    for i, reverse in enumerate(call.reverse):
        *tensors, delta_bias = (x if x is None else x.to(acc) for x in call.direction(i))
        y = y + selective_scan_naive(
            *tensors, None, delta_bias, call.delta_softplus, reverse, call.residual, call.mask_diagonal[i])
    if call.z is None:
        return y.to(dtype), None
    return (y * torch.nn.functional.silu(call.z.to(acc))).to(dtype).contiguous(), y.to(dtype)


def _gradients(outs, leaves, grad_outs) -> List[Optional[torch.Tensor]]:
    """Contiguous gradients of those leaves that are not None."""
    given = [x for x in leaves if x is not None]
    if outs[0].requires_grad:
        grads = iter(torch.autograd.grad(outs, given, grad_outs, allow_unused=True, materialize_grads=True))
    else:  # an empty loop over tokens
        grads = iter([torch.zeros_like(x) for x in given])
    return [None if x is None else next(grads).contiguous() for x in leaves]
