"""The selective scan (S6) as a PyTorch op: checks, dispatch, autograd, autocast, shape inference and FLOPs.

Paper: `Mamba: Linear-Time Sequence Modeling with Selective State Spaces` - https://arxiv.org/abs/2312.00752
"""
from typing import List, Optional, Sequence, Tuple

import torch
from timm.layers import register_notrace_function
from torch.utils.flop_counter import register_flop_formula

from .backends import choose
from .calls import ScanCall, ScanResult, acc_dtype
from .exportable import parallel_scan
from .glue import autocast_dtype, below_autograd, exporting, needs_grad, parameter, refuse_second_derivative, run
from .naive import selective_scan_naive

__all__ = ['selective_scan', 'bidirectional_selective_scan']


@register_notrace_function
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

    u, delta, B, C and z are activations: they share one dtype of float32, bfloat16, float16 or float64, and the result
    has it too. A, D and delta_bias are parameters. The recurrence, its parameters and all sums are float32 (float64
    for float64 activations). Under autocast activations are cast to the autocast dtype, parameters are not.
    Tensors may be non-contiguous. Results and gradients are deterministic. Second derivatives are not defined.

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
        return _selective_scan(
            (u,), (delta,), (A,), (B,), (C,), None if D is None else (D,), z,
            None if delta_bias is None else (delta_bias,),
            delta_softplus, [reverse], residual, [mask_diagonal], backend)


Pair = Tuple[torch.Tensor, torch.Tensor]


@register_notrace_function
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
        return _selective_scan(
            u, delta, A, B, C, D, z, delta_bias, delta_softplus, [False, True], residual, [False, mask_diagonal],
            backend)


_FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
Tensors = Sequence[torch.Tensor]


def _selective_scan(
        u: Tensors,
        delta: Tensors,
        A: Tensors,
        B: Tensors,
        C: Tensors,
        D: Optional[Tensors],
        z: Optional[torch.Tensor],
        delta_bias: Optional[Tensors],
        delta_softplus: bool,
        reverse: List[bool],
        residual: bool,
        mask_diagonal: List[bool],
        backend: Optional[str],
) -> torch.Tensor:
    dtype = autocast_dtype(u[0])
    if dtype is not None:
        u, delta, B, C = ([x.to(dtype) for x in xs] for xs in (u, delta, B, C))
        z = z if z is None else z.to(dtype)
    for i in range(len(u)):
        args = (u[i], delta[i], A[i], B[i], C[i], D and D[i], z, delta_bias and delta_bias[i])
        if not _fits(*args):
            raise ValueError(_misfit(*args))
    acc = acc_dtype(u[0].dtype)
    A = [parameter(x, acc) for x in A]
    D = [] if D is None else [parameter(x, acc) for x in D]
    delta_bias = [] if delta_bias is None else [parameter(x, acc) for x in delta_bias]
    flags = (delta_softplus, reverse, residual, mask_diagonal)

    if exporting():
        out = None
        for i in range(len(u)):
            y = parallel_scan(
                u[i], delta[i], A[i], B[i], C[i], D[i] if D else None, z, delta_bias[i] if delta_bias else None,
                delta_softplus, reverse[i], residual, mask_diagonal[i])
            out = y if out is None else out + y
        return out
    return run(_op, _forward, (*u, *delta, *A, *B, *C, *D, *delta_bias, z),
               u, delta, A, B, C, D, delta_bias, z, *flags, False, backend or '')[0]


def _fits(u, delta, A, B, C, D, z, delta_bias) -> bool:
    shape, dtype, device = u.shape, u.dtype, u.device
    if len(shape) != 3 or dtype not in _FLOAT_DTYPES or A.ndim != 2:
        return False
    batch, length, channels = shape
    d_state, vector = A.shape[1], (channels,)
    return (
        delta.shape == shape and delta.dtype is dtype and delta.device == device
        and A.shape[0] == channels and d_state > 0 and A.dtype in _FLOAT_DTYPES and A.device == device
        and (B.shape == (batch, length, d_state)
             or (B.ndim == 4 and B.shape[:2] == shape[:2] and B.shape[3] == d_state and B.shape[2] > 0
                 and channels % B.shape[2] == 0))
        and B.dtype is dtype and B.device == device
        and C.shape == B.shape and C.dtype is dtype and C.device == device
        and (D is None or (D.shape == vector and D.dtype in _FLOAT_DTYPES and D.device == device))
        and (z is None or (z.shape == shape and z.dtype is dtype and z.device == device))
        and (delta_bias is None or (
            delta_bias.shape == vector and delta_bias.dtype in _FLOAT_DTYPES and delta_bias.device == device))
    )


def _misfit(u, delta, A, B, C, D, z, delta_bias) -> str:
    """The first thing that is wrong with the arguments."""
    if u.ndim != 3:
        return f'u: got shape {tuple(u.shape)}, needs (batch, length, channels)'
    if u.dtype not in _FLOAT_DTYPES:
        return f'u: got dtype {u.dtype}, needs one of {", ".join(map(str, _FLOAT_DTYPES))}'
    shape, channels = tuple(u.shape), u.shape[2]
    if A.ndim != 2 or A.shape[0] != channels or A.shape[1] == 0:
        return f'A: got shape {tuple(A.shape)}, needs ({channels}, d_state) for u {shape}'
    d_state = A.shape[1]
    needs = {'delta': shape, 'D': (channels,), 'z': shape, 'delta_bias': (channels,), 'C': tuple(B.shape)}
    grouped = B.ndim == 4 and B.shape[2] > 0 and channels % B.shape[2] == 0
    if tuple(B.shape) != (*shape[:2], *((B.shape[2],) if grouped else ()), d_state):
        return (
            f'B: got shape {tuple(B.shape)}, needs {(*shape[:2], d_state)} or {shape[:2]} + (groups, {d_state}) with '
            f'groups dividing the {channels} channels')
    tensors = dict(delta=delta, A=A, B=B, C=C, D=D, z=z, delta_bias=delta_bias)
    for name, x in tensors.items():
        if x is None:
            continue
        if name in needs and tuple(x.shape) != needs[name]:
            return f'{name}: got shape {tuple(x.shape)}, needs {needs[name]}'
        if name in ('delta', 'B', 'C', 'z') and x.dtype != u.dtype:
            return f'{name}: got dtype {x.dtype}, needs {u.dtype} like u'
        if x.dtype not in _FLOAT_DTYPES:
            return f'{name}: got dtype {x.dtype}, needs one of {", ".join(map(str, _FLOAT_DTYPES))}'
        if x.device != u.device:
            return f'{name}: got device {x.device}, needs {u.device} like u'
    raise AssertionError('unreachable: the arguments fit')


# The op proper. A schema, kernels and an autograd.Function: `torch.library.custom_op` + `register_autograd` do the same
# at three times the call overhead.
_ARGS = (
    'Tensor[] u, Tensor[] delta, Tensor[] A, Tensor[] B, Tensor[] C, Tensor[] D, Tensor[] delta_bias, Tensor? z, '
    'bool delta_softplus, bool[] reverse, bool residual, bool[] mask_diagonal'
)
_lib = torch.library.Library('timm_ssm', 'FRAGMENT')
_lib.define(
    f'selective_scan({_ARGS}, bool save, str backend) -> (Tensor out, Tensor y, Tensor states)',
    tags=(torch.Tag.pt2_compliant_tag,))
_lib.define(
    f'selective_scan_backward({_ARGS}, Tensor grad_out, Tensor y, Tensor states, str backend) -> Tensor[]',
    tags=(torch.Tag.pt2_compliant_tag,))


def _forward(*args) -> ScanResult:
    *call, save, backend = args
    call = ScanCall(*call)
    return choose(call, backend).scan_forward(call, save)


def _forward_tensors(*args) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`_forward` with empty tensors for what is not there, which a schema cannot leave out."""
    out, y, states = _forward(*args)
    return out, out.new_empty(0) if y is None else y, out.new_empty(0) if states is None else states


def _backward(*args) -> List[torch.Tensor]:
    """Gradients in the order of the tensor arguments (u of each direction, delta of each, ...), z's last if given."""
    *call, grad_out, y, states, backend = args
    call = ScanCall(*call)
    grads, dz = choose(call, backend).scan_backward(call, grad_out, y, states)
    grads = [g for argument in zip(*grads) for g in argument]
    return grads if dz is None else [*grads, dz]


def _forward_fake(*args) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    *call, save, _ = args
    call = ScanCall(*call)
    u = call.u[0]
    y = u.new_empty(u.shape if save and call.z is not None else 0)
    return u.new_empty(u.shape), y, call.new_states() if save else u.new_empty(0)


def _backward_fake(*args) -> List[torch.Tensor]:
    call = ScanCall(*args[:12])
    tensors = [*call.u, *call.delta, *call.A, *call.B, *call.C, *call.D, *call.delta_bias]
    if call.z is not None:
        tensors.append(call.z)
    return [x.new_empty(x.shape) for x in tensors]


_lib.impl('selective_scan', _forward_tensors, 'CompositeExplicitAutograd')
_lib.impl('selective_scan_backward', _backward, 'CompositeExplicitAutograd')
torch.library.register_fake('timm_ssm::selective_scan', _forward_fake, lib=_lib)
torch.library.register_fake('timm_ssm::selective_scan_backward', _backward_fake, lib=_lib)
_op = torch.ops.timm_ssm.selective_scan.default
_op_backward = torch.ops.timm_ssm.selective_scan_backward.default


class _SelectiveScan(torch.autograd.Function):

    @staticmethod
    def forward(ctx, config, z, *tensors):
        n, has_D, has_bias, flags, backend = config
        lists = _SelectiveScan.lists(tensors, n, has_D, has_bias)
        out, y, states = run(_op, _forward_tensors, (*tensors, z), *lists, z, *flags, True, backend)
        ctx.config = config
        ctx.save_for_backward(z, y, states, *tensors)
        ctx.mark_non_differentiable(y, states)
        ctx.set_materialize_grads(False)  # no zeros for y and states
        return out, y, states

    @staticmethod
    def backward(ctx, grad_out, *_):
        refuse_second_derivative('selective_scan')
        z, y, states, *tensors = ctx.saved_tensors
        if grad_out is None:
            return (None,) * (2 + len(tensors))
        n, has_D, has_bias, flags, backend = ctx.config
        lists = _SelectiveScan.lists(tensors, n, has_D, has_bias)
        grads = run(
            _op_backward, _backward, (*tensors, z, grad_out), *lists, z, *flags, grad_out, y, states, backend)
        if z is None:
            return None, None, *grads
        return None, grads[-1], *grads[:-1]

    @staticmethod
    def lists(tensors, n: int, has_D: bool, has_bias: bool) -> List[List[torch.Tensor]]:
        """Undo the flattening: u, delta, A, B, C, D, delta_bias, each a list over directions."""
        it = iter(tensors)
        return [[next(it) for _ in range(n)] if given else [] for given in (True,) * 5 + (has_D, has_bias)]


def _autograd(*args) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    *lists, z, delta_softplus, reverse, residual, mask_diagonal, save, backend = args
    tensors = [x for xs in lists for x in xs]
    if not needs_grad((*tensors, z)):
        with below_autograd():
            return _op(*args)
    flags = (delta_softplus, reverse, residual, mask_diagonal)
    return _SelectiveScan.apply((len(lists[0]), bool(lists[5]), bool(lists[6]), flags, backend), z, *tensors)


_lib.impl('selective_scan', _autograd, 'Autograd')


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
