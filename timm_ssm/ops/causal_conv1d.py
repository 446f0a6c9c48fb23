"""The short depthwise convolution before the scan as a PyTorch op: checks, dispatch, autograd, shapes and FLOPs."""
from typing import List, Optional, Sequence, Tuple

import torch
from timm.layers import register_notrace_function
from torch.utils.flop_counter import register_flop_formula

from . import exportable
from .backends import choose
from .calls import ConvCall, acc_dtype
from .glue import autocast_dtype, below_autograd, exporting, needs_grad, parameter, refuse_second_derivative, run

__all__ = ['causal_conv1d', 'bidirectional_causal_conv1d']


@register_notrace_function
def causal_conv1d(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: Optional[torch.Tensor] = None,
        activation: Optional[str] = 'silu',
        reverse: bool = False,
        centered: bool = False,
        backend: Optional[str] = None,
) -> torch.Tensor:
    """Convolve every channel of a token sequence with its own short kernel.

    `out[t,d] = act(bias[d] + sum_k weight[d,k] * x[t - (K-1) + k, d])`, with zeros before the first token.

    x is float32, bfloat16, float16 or float64, and so is the result; sums are float32 (float64 for float64). Under
    autocast x is cast to the autocast dtype, the parameters are not. Second derivatives are not defined.

    Args:
        x: Tokens (B, L, D), of any strides.
        weight: Kernels (D, K).
        bias: Bias (D,).
        activation: 'silu' or None.
        reverse: Mirror the convolution: a token sees itself and the K - 1 tokens after it, zeros after the last.
        centered: A token sees (K - 1) // 2 tokens before it and the rest after it ('same' padding), not only
            earlier ones.
        backend: Backend to use; None to take TIMM_SSM_BACKEND or the best one for the device.

    Returns:
        out (B, L, D), contiguous.

    Raises:
        ValueError: An argument has a wrong shape, dtype or device, or activation is unknown.
        RuntimeError: The backend asked for cannot serve the call.
    """
    if torch.jit.is_scripting():
        return exportable.conv1d(x, weight, bias, activation is not None, reverse, centered)
    else:
        return _causal_conv1d(
            x, (weight,), None if bias is None else (bias,), activation, [reverse], centered, backend)[0]


Pair = Tuple[torch.Tensor, torch.Tensor]


@register_notrace_function
def bidirectional_causal_conv1d(
        x: torch.Tensor,
        weight: Pair,
        bias: Optional[Pair] = None,
        activation: Optional[str] = 'silu',
        backend: Optional[str] = None,
) -> Pair:
    """Both directions of `causal_conv1d` over the same tokens, as one op.

    Arguments, dtypes and errors as there, except that weight and bias are pairs (forward, reverse).

    Returns:
        The forward and the reverse convolution, each (B, L, D).
    """
    if torch.jit.is_scripting():
        silu = activation is not None
        return (
            exportable.conv1d(x, weight[0], None if bias is None else bias[0], silu, False, False),
            exportable.conv1d(x, weight[1], None if bias is None else bias[1], silu, True, False),
        )
    else:
        return tuple(_causal_conv1d(x, weight, bias, activation, [False, True], False, backend))


_FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _causal_conv1d(
        x: torch.Tensor,
        weight: Sequence[torch.Tensor],
        bias: Optional[Sequence[torch.Tensor]],
        activation: Optional[str],
        reverse: List[bool],
        centered: bool,
        backend: Optional[str],
) -> List[torch.Tensor]:
    dtype = autocast_dtype(x)
    if dtype is not None:
        x = x.to(dtype)
    for i, w in enumerate(weight):
        b = None if bias is None else bias[i]
        if not _fits(x, w, b, activation):
            raise ValueError(_misfit(x, w, b, activation))
    acc = acc_dtype(x.dtype)
    weight = [parameter(w, acc) for w in weight]
    bias = [] if bias is None else [parameter(b, acc) for b in bias]
    flags = (activation == 'silu', reverse, centered)

    if exporting():
        return [
            exportable.conv1d(x, w, bias[i] if bias else None, flags[0], reverse[i], centered)
            for i, w in enumerate(weight)
        ]
    return run(_op, _forward, (x, *weight, *bias), x, weight, bias, *flags, backend or '')


def _fits(x, weight, bias, activation) -> bool:
    return (
        x.ndim == 3 and x.dtype in _FLOAT_DTYPES
        and weight.ndim == 2 and weight.shape[0] == x.shape[2] and weight.shape[1] > 0
        and weight.is_floating_point() and weight.device == x.device
        and (bias is None or (
            bias.shape == weight.shape[:1] and bias.is_floating_point() and bias.device == x.device))
        and activation in ('silu', None)
    )


def _misfit(x, weight, bias, activation) -> str:
    """The first thing that is wrong with the arguments."""
    if x.ndim != 3:
        return f'x: got shape {tuple(x.shape)}, needs (batch, length, channels)'
    if x.dtype not in _FLOAT_DTYPES:
        return f'x: got dtype {x.dtype}, needs one of {", ".join(map(str, _FLOAT_DTYPES))}'
    if activation not in ('silu', None):
        return f"activation: got {activation!r}, needs 'silu' or None"
    channels = x.shape[2]
    if weight.ndim != 2 or weight.shape[0] != channels or weight.shape[1] == 0:
        return f'weight: got shape {tuple(weight.shape)}, needs ({channels}, kernel size) for x {tuple(x.shape)}'
    if bias is not None and bias.shape != (channels,):
        return f'bias: got shape {tuple(bias.shape)}, needs ({channels},)'
    for name, p in (('weight', weight), ('bias', bias)):
        if p is not None and not p.is_floating_point():
            return f'{name}: got dtype {p.dtype}, needs a floating-point dtype'
        if p is not None and p.device != x.device:
            return f'{name}: got device {p.device}, needs {x.device} like x'
    raise AssertionError('unreachable: the arguments fit')


_ARGS = 'Tensor x, Tensor[] weight, Tensor[] bias, bool silu, bool[] reverse, bool centered'
_lib = torch.library.Library('timm_ssm', 'FRAGMENT')
_lib.define(f'causal_conv1d({_ARGS}, str backend) -> Tensor[]', tags=(torch.Tag.pt2_compliant_tag,))
_lib.define(
    f'causal_conv1d_backward({_ARGS}, Tensor[] grad_outs, str backend) -> Tensor[]',
    tags=(torch.Tag.pt2_compliant_tag,))


def _forward(*args) -> List[torch.Tensor]:
    call = ConvCall(*args[:-1])
    return choose(call, args[-1]).conv_forward(call)


def _backward(*args) -> List[torch.Tensor]:
    """Gradients of x, of each weight and of each bias."""
    *call, grad_outs, backend = args
    call = ConvCall(*call)
    dx, dweights, dbiases = choose(call, backend).conv_backward(call, grad_outs)
    return [dx, *dweights, *dbiases]


def _forward_fake(*args) -> List[torch.Tensor]:
    x, weight = args[:2]
    return [x.new_empty(x.shape) for _ in weight]


def _backward_fake(*args) -> List[torch.Tensor]:
    x, weight, bias = args[:3]
    return [t.new_empty(t.shape) for t in (x, *weight, *bias)]


_lib.impl('causal_conv1d', _forward, 'CompositeExplicitAutograd')
_lib.impl('causal_conv1d_backward', _backward, 'CompositeExplicitAutograd')
torch.library.register_fake('timm_ssm::causal_conv1d', _forward_fake, lib=_lib)
torch.library.register_fake('timm_ssm::causal_conv1d_backward', _backward_fake, lib=_lib)
_op = torch.ops.timm_ssm.causal_conv1d.default
_op_backward = torch.ops.timm_ssm.causal_conv1d_backward.default


class _CausalConv1d(torch.autograd.Function):

    @staticmethod
    def forward(ctx, config, x, *parameters):
        flags, n, backend = config
        ctx.config = config
        ctx.save_for_backward(x, *parameters)
        return tuple(run(
            _op, _forward, (x, *parameters), x, parameters[:n], parameters[n:], *flags, backend))

    @staticmethod
    def backward(ctx, *grad_outs):
        refuse_second_derivative('causal_conv1d')
        x, *parameters = ctx.saved_tensors
        flags, n, backend = ctx.config
        return None, *run(
            _op_backward, _backward, (x, *parameters, *grad_outs), x, parameters[:n], parameters[n:], *flags, grad_outs,
            backend)


def _autograd(*args) -> List[torch.Tensor]:
    x, weight, bias, silu, reverse, centered, backend = args
    if not needs_grad((x, *weight, *bias)):
        with below_autograd():
            return _op(*args)
    return list(_CausalConv1d.apply(((silu, reverse, centered), len(weight), backend), x, *weight, *bias))


_lib.impl('causal_conv1d', _autograd, 'Autograd')


@register_flop_formula(torch.ops.timm_ssm.causal_conv1d)
def _forward_flops(x, weight, *args, **kwargs) -> int:
    batch, length, channels = x
    return sum(2 * batch * length * channels * w[1] for w in weight)


@register_flop_formula(torch.ops.timm_ssm.causal_conv1d_backward)
def _backward_flops(*args, **kwargs) -> int:
    return 2 * _forward_flops(*args)
