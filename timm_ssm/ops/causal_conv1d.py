"""The short depthwise convolution before the scan as a PyTorch op: checks, dispatch, autograd, shapes and FLOPs."""
from typing import List, Optional, Sequence, Tuple

import torch
from torch.overrides import handle_torch_function, has_torch_function  # torch.fx, tensor subclasses
from torch.utils.flop_counter import register_flop_formula

from . import exportable
from .backends import select_backend
from .calls import FLOAT_DTYPES, ConvCall, acc_dtype, check, directions
from .glue import (
    as_parameter,
    autocast_dtype,
    backend_name,
    define_op,
    exporting,
    flat,
    has_tangent,
    needs_grad,
    refuse_higher_order,
    register_autograd,
)

__all__ = ['causal_conv1d', 'bidirectional_causal_conv1d']


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
        args = x, weight, bias
        if has_torch_function(args):
            return handle_torch_function(causal_conv1d, args, *args, activation, reverse, centered, backend)
        return _causal_conv1d(
            x, (weight,), None if bias is None else (bias,), activation, [reverse], centered, backend)[0]


Pair = Tuple[torch.Tensor, torch.Tensor]


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
        args = x, weight, bias
        if has_torch_function(flat(args)):
            return handle_torch_function(bidirectional_causal_conv1d, flat(args), *args, activation, backend)
        return tuple(_causal_conv1d(x, weight, bias, activation, [False, True], False, backend))


def _causal_conv1d(
        x: torch.Tensor,
        weight: Sequence[torch.Tensor],
        bias: Optional[Sequence[torch.Tensor]],
        activation: Optional[str],
        reverse: List[bool],
        centered: bool,
        backend: Optional[str],
) -> List[torch.Tensor]:
    n = len(reverse)
    call = ConvCall(
        directions('x', (x,), 1)[0], directions('weight', weight, n),
        [] if bias is None else directions('bias', bias, n), activation == 'silu', reverse, centered)
    if activation not in ('silu', None):
        raise ValueError(f"activation: got {activation!r}, needs 'silu' or None")
    call = _checked(call)
    tensors = call.tensors()
    if exporting() or has_tangent(tensors):
        return exportable.run_conv(call)
    save = needs_grad(tensors)
    op = _op if save or torch.compiler.is_compiling() else _op_no_autograd
    return op(*call, backend_name(call, backend, save))


def _checked(call: ConvCall) -> ConvCall:
    """`call` with x as autocast wants it and parameters as kernels want them.

    Raises:
        ValueError: An argument has a wrong shape, dtype or device.
    """
    x, weight, bias, *flags = call
    dtype = autocast_dtype(x)
    if dtype is not None:
        x = x.to(dtype)
    shape = tuple(x.shape) if x.ndim == 3 else None
    check([('x', [x], shape, FLOAT_DTYPES, lambda: '(batch, length, channels)')], 'x', x.device)
    channels = x.shape[2]
    kernel_size = weight[0].shape[1] if weight[0].ndim == 2 and weight[0].shape[1] > 0 else None
    check((
        ('weight', weight, kernel_size and (channels, kernel_size), FLOAT_DTYPES,
         lambda: f'({channels}, kernel size)'),
        ('bias', bias, (channels,), FLOAT_DTYPES, None),
    ), 'x', x.device)
    acc = acc_dtype(x.dtype)
    weight, bias = ([as_parameter(p, acc) for p in ps] for ps in (weight, bias))
    return ConvCall(x, weight, bias, *flags)


# The op proper

_ARGS = 'Tensor x, Tensor[] weight, Tensor[] bias, bool silu, bool[] reverse, bool centered'


def _forward(*args) -> List[torch.Tensor]:
    *call, backend = args
    call = ConvCall(*call)
    return select_backend(call, backend).conv_forward(call)


def _transformed(*args) -> List[torch.Tensor]:
    return exportable.run_conv(ConvCall(*args[:-1]))


def _forward_fake(*args) -> List[torch.Tensor]:
    x, weight = args[:2]
    return [x.new_empty(x.shape) for _ in weight]


def _backward(*args) -> List[torch.Tensor]:
    """Gradients in the order of `ConvCall.tensors`."""
    *call, grad_outs, backend = args
    call = ConvCall(*call)
    dx, dweights, dbiases = select_backend(call, backend).conv_backward(call, grad_outs)
    return [dx, *dweights, *dbiases]


def _backward_fake(*args) -> List[torch.Tensor]:
    return [t.new_empty(t.shape) for t in ConvCall(*args[:-2]).tensors()]


_op, _op_no_autograd = (
    define_op(f'{name}({_ARGS}, str backend) -> Tensor[]', _forward, _forward_fake, _transformed)
    for name in ('causal_conv1d', 'causal_conv1d.no_autograd'))
_op_backward = define_op(
    f'causal_conv1d_backward({_ARGS}, Tensor[] grad_outs, str backend) -> Tensor[]', _backward, _backward_fake)


def _setup_context(ctx, inputs, output) -> None:
    *call, ctx.backend = inputs
    call = ConvCall(*call)
    tensors = call.tensors()
    ctx.call = call.with_tensors([None] * len(tensors))
    ctx.save_for_backward(*tensors)


def _autograd(ctx, grad_outs: List[torch.Tensor]):
    refuse_higher_order('causal_conv1d', grad_outs)
    grads = _op_backward(*ctx.call.with_tensors(ctx.saved_tensors), grad_outs, ctx.backend)
    return *ctx.call.with_tensors(grads)[:3], *[None] * 4


register_autograd('causal_conv1d', _autograd, _setup_context)


@register_flop_formula(torch.ops.timm_ssm.causal_conv1d)
def _forward_flops(x, weight, *args, **kwargs) -> int:
    batch, length, channels = x
    return sum(2 * batch * length * channels * w[1] for w in weight)


@register_flop_formula(torch.ops.timm_ssm.causal_conv1d_backward)
def _backward_flops(*args, **kwargs) -> int:
    return 2 * _forward_flops(*args)
