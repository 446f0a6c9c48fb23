"""The selective scan (S6) as a PyTorch op: checks, dispatch, autograd, autocast, shape inference and FLOPs.

Paper: `Mamba: Linear-Time Sequence Modeling with Selective State Spaces` - https://arxiv.org/abs/2312.00752
"""
from typing import List, Optional, Sequence, Tuple

import torch
from torch.overrides import handle_torch_function, has_torch_function  # torch.fx, tensor subclasses
from torch.utils.flop_counter import register_flop_formula

from . import exportable
from .backends import select_backend
from .calls import FLOAT_DTYPES, ScanCall, acc_dtype, check, directions
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
from .naive import selective_scan_naive

__all__ = ['selective_scan', 'bidirectional_selective_scan']


def selective_scan(  # no keyword-only arguments: TorchScript refuses them
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
        backend: Optional[str] = None,
) -> torch.Tensor:
    r"""Run the selective state-space recurrence over the tokens of a sequence.

    For every channel d with state n, and t in scan order::

        dt[t,d]  = softplus(delta[t,d] + delta_bias[d])
        h[t,d,n] = exp(dt[t,d] * A[d,n]) * h[t-1,d,n] + dt[t,d] * B[t,g(d),n] * u[t,d]
        y[t,d]   = sum_n C[t,g(d),n] * h[t,d,n] + D[d] * u[t,d]
        out[t,d] = y[t,d] * silu(z[t,d])

    with h[-1] = 0, which is equation (2) of the Mamba paper with the Euler discretisation of B that its released
    kernels use, and g(d) the group of channel d, the channels being split evenly over the groups of B and C.
    With N = 1, C of ones and no D, y is the states themselves. Several scans of as many tokens, like those of the rows
    and of the columns of a map, can share a call as groups of channels.

    u, delta, B, C and z are activations: they share one dtype of float32, bfloat16, float16 or float64, and the result
    has it too. A, D and delta_bias are parameters. The recurrence, its parameters and all sums are float32 (float64
    for float64 activations), but for one: on NVIDIA GPUs the gradients of B and C of bfloat16 and float16 calls are
    sums over channels of terms rounded to TF32, off by at most 2^-11 of the sum of the terms' magnitudes. Under
    autocast activations are cast to the autocast dtype, parameters are not. Tensors may be non-contiguous. Results and
    gradients are the same bits each time on every backend but mamba_ssm, whose backward pass adds in any order. Second
    derivatives are not defined, except under torch.func, whose transforms run the op as plain PyTorch operators.

    Args:
        u: Input (B, L, D).
        delta: Step size before bias and softplus (B, L, D).
        A: State decay, negative (D, N).
        B: Input matrix, (B, L, N) or in groups (B, L, G, N).
        C: Output matrix, shaped like B.
        D: Skip connection (D,).
        z: Gate (B, L, D).
        delta_bias: Bias of delta (D,).
        delta_softplus: Apply softplus to delta (linear above 20).
        reverse: Walk the tokens from the last to the first; the output stays in place.
        residual: Start from h[-1,d,n] = u[first,d] instead of 0, first being the first token of the scan
            (VideoMambaPro, https://arxiv.org/abs/2406.19006).
        mask_diagonal: Leave a token's own contribution dt B u out of its y; y of the first token of the scan is then
            D u alone (VideoMambaPro).
        backend: Backend to use; None to take TIMM_SSM_BACKEND or the best one for the device.

    Returns:
        out (B, L, D), contiguous.

    Raises:
        ValueError: An argument has a wrong shape, dtype or device.
        RuntimeError: The backend asked for cannot serve the call.
    """
    if torch.jit.is_scripting():
        return selective_scan_naive(
            u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse, residual, mask_diagonal)
    else:
        args = u, delta, A, B, C, D, z, delta_bias
        if has_torch_function(args):
            return handle_torch_function(
                selective_scan, args, *args, delta_softplus, reverse, residual, mask_diagonal, backend)
        return _selective_scan(
            (u,), (delta,), (A,), (B,), (C,), None if D is None else (D,), z,
            None if delta_bias is None else (delta_bias,),
            delta_softplus, [reverse], residual, [mask_diagonal], backend)


Pair = Tuple[torch.Tensor, torch.Tensor]


def bidirectional_selective_scan(
        u: Pair,
        delta: Pair,
        A: Pair,
        B: Pair,
        C: Pair,
        D: Optional[Pair] = None,
        z: Optional[torch.Tensor] = None,
        delta_bias: Optional[Pair] = None,
        delta_softplus: bool = True,
        residual: bool = False,
        mask_diagonal: bool = False,
        backend: Optional[str] = None,
) -> torch.Tensor:
    """Scan the tokens forward and in reverse, add the two results and gate the sum, as one op.

    Equals `selective_scan(..., z=z) + selective_scan(..., z=z, reverse=True, mask_diagonal=mask_diagonal)` on the first
    and the second items of the pairs. Arguments, dtypes and errors as there, except that every argument but z is a
    pair (forward, reverse), and that mask_diagonal concerns the reverse direction alone.
    """
    if torch.jit.is_scripting():
        y = selective_scan_naive(
            u[0], delta[0], A[0], B[0], C[0], None if D is None else D[0], z,
            None if delta_bias is None else delta_bias[0], delta_softplus, False, residual, False)
        return y + selective_scan_naive(
            u[1], delta[1], A[1], B[1], C[1], None if D is None else D[1], z,
            None if delta_bias is None else delta_bias[1], delta_softplus, True, residual, mask_diagonal)
    else:
        args = u, delta, A, B, C, D, z, delta_bias
        if has_torch_function(flat(args)):
            return handle_torch_function(
                bidirectional_selective_scan, flat(args), *args, delta_softplus, residual, mask_diagonal, backend)
        return _selective_scan(
            u, delta, A, B, C, D, z, delta_bias, delta_softplus, [False, True], residual, [False, mask_diagonal],
            backend)


def _selective_scan(
        u: Sequence[torch.Tensor],
        delta: Sequence[torch.Tensor],
        A: Sequence[torch.Tensor],
        B: Sequence[torch.Tensor],
        C: Sequence[torch.Tensor],
        D: Optional[Sequence[torch.Tensor]],
        z: Optional[torch.Tensor],
        delta_bias: Optional[Sequence[torch.Tensor]],
        delta_softplus: bool,
        reverse: List[bool],
        residual: bool,
        mask_diagonal: List[bool],
        backend: Optional[str],
) -> torch.Tensor:
    n = len(reverse)
    call = ScanCall(
        directions('u', u, n), directions('delta', delta, n), directions('A', A, n), directions('B', B, n),
        directions('C', C, n), [] if D is None else directions('D', D, n),
        [] if delta_bias is None else directions('delta_bias', delta_bias, n),
        None if z is None else directions('z', (z,), 1)[0], delta_softplus, reverse, residual, mask_diagonal)
    call = _checked(call)
    tensors = call.tensors()
    if exporting() or has_tangent(tensors):
        return exportable.run_scan(call)
    save = needs_grad(tensors)
    op = _op if save or torch.compiler.is_compiling() else _op_no_autograd
    return op(*call, save, backend_name(call, backend, save))[0]


def _checked(call: ScanCall) -> ScanCall:
    """`call` with activations as autocast wants them and parameters as kernels want them.

    Raises:
        ValueError: An argument has a wrong shape, dtype or device.
    """
    u, delta, A, B, C, D, delta_bias, z, *flags = call
    dtype = autocast_dtype(u[0])
    if dtype is not None:
        u, delta, B, C = ([x.to(dtype) for x in xs] for xs in (u, delta, B, C))
        z = z if z is None else z.to(dtype)

    like, device = 'u' if len(u) == 1 else 'u[0]', u[0].device
    shape = tuple(u[0].shape) if u[0].ndim == 3 else None
    check([('u', u[:1], shape, FLOAT_DTYPES, lambda: '(batch, length, channels)')], like, device)
    batch, length, channels = shape
    activation = u[0].dtype,
    d_state = A[0].shape[1] if A[0].ndim == 2 and A[0].shape[1] > 0 else None
    grouped = B[0].ndim == 4 and B[0].shape[2] > 0 and channels % B[0].shape[2] == 0
    shape_B = (batch, length, B[0].shape[2], d_state) if grouped else (batch, length, d_state)
    check((
        ('u', u, shape, activation, None),
        ('delta', delta, shape, activation, None),
        ('z', () if z is None else (z,), shape, activation, None),
        ('A', A, d_state and (channels, d_state), FLOAT_DTYPES, lambda: f'({channels}, d_state)'),
        ('B', B, shape_B, activation, lambda: (
            f'{(batch, length, d_state)} or {(batch, length)} + (groups, {d_state}) with groups dividing the '
            f'{channels} channels')),
        ('C', C, shape_B, activation, None),
        ('D', D, (channels,), FLOAT_DTYPES, None),
        ('delta_bias', delta_bias, (channels,), FLOAT_DTYPES, None),
    ), like, device)

    acc = acc_dtype(u[0].dtype)
    A, D, delta_bias = ([as_parameter(x, acc) for x in xs] for xs in (A, D, delta_bias))
    return ScanCall(u, delta, A, B, C, D, delta_bias, z, *flags)


# The op proper

_ARGS = (
    'Tensor[] u, Tensor[] delta, Tensor[] A, Tensor[] B, Tensor[] C, Tensor[] D, Tensor[] delta_bias, Tensor? z, '
    'bool delta_softplus, bool[] reverse, bool residual, bool[] mask_diagonal'
)


def _forward(*args) -> List[torch.Tensor]:
    """out and, if they are to be saved, the states and the sum before the gate."""
    *call, save, backend = args
    call = ScanCall(*call)
    out, y, states = select_backend(call, backend).scan_forward(call, save)
    return [x for x in (out, states, y) if x is not None]


def _transformed(*args) -> List[torch.Tensor]:
    return [exportable.run_scan(ScanCall(*args[:-2]))]


def _forward_fake(*args) -> List[torch.Tensor]:
    *call, save, _ = args
    call = ScanCall(*call)
    outs = [call.input.new_empty(call.input.shape)]
    if save:
        outs.append(call.new_states())
        if call.z is not None:
            outs.append(torch.empty_like(outs[0]))
    return outs


def _backward(*args) -> List[torch.Tensor]:
    """Gradients in the order of `ScanCall.tensors`, z's only if it is given."""
    *call, grad_out, saved, backend = args
    call = ScanCall(*call)
    states, y = (*saved, None)[:2]
    grads, dz = select_backend(call, backend).scan_backward(call, grad_out, y, states)
    grads = [g for argument in zip(*grads) for g in argument]
    return grads if dz is None else [*grads, dz]


def _backward_fake(*args) -> List[torch.Tensor]:
    return [x.new_empty(x.shape) for x in ScanCall(*args[:-3]).tensors() if x is not None]


_op, _op_no_autograd = (
    define_op(f'{name}({_ARGS}, bool save, str backend) -> Tensor[]', _forward, _forward_fake, _transformed)
    for name in ('selective_scan', 'selective_scan.no_autograd'))
_op_backward = define_op(
    f'selective_scan_backward({_ARGS}, Tensor grad_out, Tensor[] saved, str backend) -> Tensor[]',
    _backward, _backward_fake)


def _setup_context(ctx, inputs, output) -> None:
    *call, ctx.saved, ctx.backend = inputs
    call = ScanCall(*call)
    tensors = call.tensors()
    _, *saved = output
    ctx.call = call.with_tensors([None] * len(tensors))
    ctx.save_for_backward(*tensors, *saved)
    ctx.mark_non_differentiable(*saved)
    ctx.set_materialize_grads(False)  # no zeros for what is saved


def _autograd(ctx, grad_outs: List[Optional[torch.Tensor]]):
    grad_out = grad_outs[0]
    refuse_higher_order('selective_scan', [grad_out])
    if not ctx.saved:
        raise RuntimeError('selective_scan: got save=False, needs save=True to be differentiated')
    count = len(ctx.call.tensors())
    tensors = ctx.saved_tensors  # once: checkpointing unpacks them a single time
    tensors, saved = tensors[:count], tensors[count:]
    grads = [None] * count
    if grad_out is not None:
        grads = _op_backward(*ctx.call.with_tensors(tensors), grad_out, saved, ctx.backend)
    return *ctx.call.with_tensors([*grads, None])[:8], *[None] * 6  # the last None: z's, if it is not given


register_autograd('selective_scan', _autograd, _setup_context)


def scan_flops(
        u_shape: Sequence[int],
        d_state: int,
        directions: int = 1,
        has_D: bool = True,
        has_z: bool = True,
) -> int:
    """Floating-point operations of one scan: 9 B L D N a direction, B L D for the skip and for the gate.

    This is the convention of mamba-ssm and VMamba, in which the skip counts once a direction and the gate once a call.
    Multiply-accumulates, as GMACs count them, are half of it.
    """
    batch, length, channels = u_shape
    tokens = batch * length * channels
    return directions * (9 * tokens * d_state + tokens * has_D) + tokens * has_z


@register_flop_formula(torch.ops.timm_ssm.selective_scan)
def _forward_flops(u, delta, A, B, C, D, delta_bias, z, *args, **kwargs) -> int:
    return scan_flops(u[0], A[0][1], len(u), len(D) > 0, z is not None)


@register_flop_formula(torch.ops.timm_ssm.selective_scan_backward)
def _backward_flops(*args, **kwargs) -> int:
    return 2 * _forward_flops(*args)  # as for a matrix product
