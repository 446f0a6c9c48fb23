"""What torch.onnx's exporter makes of the ops: ONNX graphs of standard operators.

The scan becomes ONNX's Scan operator, one token a step, on states (..., N, D). A step costs onnxruntime some
microseconds beside its arithmetic. Where a token has few states, the sequence is therefore cut into chunks that are
scanned side by side, each from a zero state, and a second Scan carries the states from chunk to chunk.
"""
import math
from typing import Dict, List, Optional, Sequence, Tuple, TypeVar, Union

import onnx_ir as ir
import onnx_ir.passes.common
import torch
from onnxscript import BFLOAT16, DOUBLE, FLOAT, FLOAT16, graph, script
from onnxscript import opset18 as op
from onnxscript.optimizer import fold_constants

import timm_ssm.ops  # noqa: F401  registers them

#: What the exporter understands of annotations: tensors by their type variables, lists of flags as integers.
Activation = TypeVar('Activation', bound=Union[BFLOAT16, DOUBLE, FLOAT, FLOAT16])
Parameter = TypeVar('Parameter', bound=Union[DOUBLE, FLOAT])

#: States of a token (channels times d_state) below which chunks are worth their extra arithmetic.
FEW_STATES = 2048
#: Tokens of a chunk where the length is not known.
CHUNK = 32
END = 2 ** 62


@script(default_opset=op)
def scan_tokens(
        h: FLOAT,
        dt: FLOAT,
        x: FLOAT,
        B: FLOAT,
        C: FLOAT,
        A: FLOAT,
        axes: Sequence[int],
        directions: Sequence[int],
        out_axes: Sequence[int],
        out_directions: Sequence[int],
) -> Tuple[FLOAT, FLOAT]:
    """The recurrence from state h (..., N, D) along an axis of dt, x = dt u and y (..., 1, D), B (..., N, 1) and
    C (..., 1, N). Returns the last state and y.
    """
    @graph()
    def step(h_before, dt_t, x_t, B_t, C_t):
        h_after = op.Add(op.Mul(op.Exp(op.Mul(dt_t, A)), h_before), op.Mul(B_t, x_t))
        y_t = op.MatMul(C_t, h_after)
        return h_after, y_t

    last, y = op.Scan(
        h, dt, x, B, C, body=step, num_scan_inputs=4, scan_input_axes=axes, scan_input_directions=directions,
        scan_output_axes=out_axes, scan_output_directions=out_directions)
    return last, y


@script(default_opset=op)
def carry_states(
        h: FLOAT,
        decay: FLOAT,
        own: FLOAT,
        axes: Sequence[int],
        directions: Sequence[int],
        out_axes: Sequence[int],
        out_directions: Sequence[int],
) -> FLOAT:
    """The state before each chunk, h (B, ...) before the first, from each chunk's decay and its last state if begun at
    zero (B, chunks, ...). Returns them (B, chunks, 1, ...).
    """
    @graph()
    def step(h_before, decay_c, own_c):
        h_after = op.Add(op.Mul(decay_c, h_before), own_c)
        before = op.Unsqueeze(h_before, op.Constant(value_ints=[1]))
        return h_after, before

    last, before = op.Scan(
        h, decay, own, body=step, num_scan_inputs=2, scan_input_axes=axes, scan_input_directions=directions,
        scan_output_axes=out_axes, scan_output_directions=out_directions)
    return before


def selective_scan(
        u: Sequence[Activation],
        delta: Sequence[Activation],
        A: Sequence[Parameter],
        B: Sequence[Activation],
        C: Sequence[Activation],
        D: Sequence[Parameter],
        delta_bias: Sequence[Parameter],
        z: Optional[Activation],
        delta_softplus: bool,
        reverse: Sequence[int],
        residual: bool,
        mask_diagonal: Sequence[int],
        save: bool,
        backend: str,
) -> Sequence[Activation]:
    """The op `timm_ssm::selective_scan`, of whose results inference uses the first."""
    dtype, acc = u[0].dtype, A[0].dtype
    batch = op.Shape(u[0], start=0, end=1)
    out = None
    for i in range(len(u)):
        dt = _cast(delta[i], acc)
        if delta_bias:
            dt = op.Add(dt, delta_bias[i])
        if delta_softplus:
            dt = _softplus(dt, acc)
        u_i, B_i, C_i = (_cast(x[i], acc) for x in (u, B, C))
        groups = 1
        if len(B[i].shape) == 4:
            groups = B[i].shape[2]
            B_i, C_i = (op.Reshape(x, _ints(0, 0, -1)) for x in (B_i, C_i))
        y = _scan(u_i, dt, A[i], B_i, C_i, batch, u[i].shape[1], groups, reverse[i], residual, mask_diagonal[i])
        if D:
            y = op.Add(y, op.Mul(u_i, D[i]))
        out = y if out is None else op.Add(out, y)
    if z is not None:
        out = op.Mul(out, _silu(_cast(z, acc)))
    return [out if dtype == acc else op.Cast(out, to=dtype)]


def causal_conv1d(
        x: Activation,
        weight: Sequence[Parameter],
        bias: Sequence[Parameter],
        silu: bool,
        reverse: Sequence[int],
        centered: bool,
        backend: str,
) -> Sequence[Activation]:
    """The op `timm_ssm::causal_conv1d`, as ONNX's convolution, channels first."""
    dtype, acc = x.dtype, weight[0].dtype
    x = op.Transpose(_cast(x, acc), perm=[0, 2, 1])
    outs = []
    for i, w in enumerate(weight):
        channels, kernel_size = w.shape
        before = (kernel_size - 1) // 2 if centered else kernel_size - 1
        pads = [before, kernel_size - 1 - before]
        if reverse[i]:
            w = op.Slice(w, _ints(-1), _ints(-END), _ints(1), _ints(-1))
            pads.reverse()
        y = op.Conv(x, op.Unsqueeze(w, _ints(1)), *bias[i:i + 1], group=channels, pads=pads)
        y = op.Transpose(_silu(y) if silu else y, perm=[0, 2, 1])
        outs.append(y if dtype == acc else op.Cast(y, to=dtype))
    return outs


def rms_norm(x: Activation, normalized_shape: Sequence[int], weight: Optional[Activation], eps: float) -> Activation:
    """PyTorch's RMSNorm, in the operators that onnxruntime finds to be one."""
    axes = _ints(*range(-len(normalized_shape), 0))
    mean = op.ReduceMean(op.Pow(x, _float(2., x.dtype)), axes, keepdims=1)
    x = op.Div(x, op.Sqrt(op.Add(mean, _float(eps, x.dtype))))
    return x if weight is None else op.Mul(x, weight)


def _scan(
        u: ir.Value,
        dt: ir.Value,
        A: ir.Value,
        B: ir.Value,
        C: ir.Value,
        batch: ir.Value,
        length: Union[int, ir.SymbolicDim],
        groups: int,
        reverse: bool,
        residual: bool,
        mask_diagonal: bool,
) -> ir.Value:
    """y (B, L, D) before skip and gate, of u, dt (B, L, D), A (D, N) and B, C (B, L, G N)."""
    (channels, d_state), dtype = A.shape, A.dtype
    width = channels // groups
    chunk = 0
    if channels * d_state < FEW_STATES:
        chunk = math.isqrt(length) if isinstance(length, int) else CHUNK
    padded = chunk > 0 and not (isinstance(length, int) and length % chunk == 0)

    def split(x: ir.Value, *sizes: int) -> ir.Value:
        """(B, L, ...) to (B, L, G, *sizes), or (B, chunks, tokens of a chunk, G, *sizes)."""
        if padded:  # with dt = 0, which leaves the state as it is
            missing = op.Mod(op.Neg(op.Shape(x, start=1, end=2)), _ints(chunk))
            x = op.Pad(x, op.Concat(_ints(0, 0, 0, 0), missing, _ints(0), axis=0))
        return op.Reshape(x, _ints(0, -1, chunk, groups, *sizes) if chunk else _ints(0, 0, groups, *sizes))

    A = op.Transpose(op.Reshape(A, _ints(groups, width, d_state)), perm=[0, 2, 1])
    x = op.Mul(dt, u)
    tokens = split(dt, 1, width), split(x, 1, width), split(B, d_state, 1), split(C, 1, d_state)
    start = _zeros(dtype, batch, groups, d_state, width)
    if residual:
        first = op.Slice(u, _ints(-1 if reverse else 0), _ints(END if reverse else 1), _ints(1))
        start = op.Add(start, op.Reshape(first, _ints(0, groups, 1, width)))
    if not chunk:
        _, y = scan_tokens(start, *tokens, A, **_along(1, 4, reverse))
    else:
        chunks = -(-length // chunk) if isinstance(length, int) else op.Shape(tokens[0], start=1, end=2)
        last, y = scan_tokens(_zeros(dtype, batch, chunks, groups, d_state, width), *tokens, A, **_along(2, 4, reverse))
        decay = op.Exp(op.Mul(op.CumSum(tokens[0], _ints(2), reverse=int(reverse)), A))  # since the chunk began
        whole = op.Gather(decay, op.Constant(value_int=0 if reverse else -1), axis=2)
        before = carry_states(start, whole, last, **_along(1, 2, reverse))
        y = op.Add(y, op.MatMul(tokens[3], op.Mul(decay, before)))
    y = op.Reshape(y, _ints(0, -1, channels))
    if padded:
        y = op.Slice(y, _ints(0), op.Shape(u, start=1, end=2), _ints(1))
    if mask_diagonal:
        BC = op.ReduceSum(op.Reshape(op.Mul(B, C), _ints(0, 0, groups, d_state)), _ints(-1), keepdims=1)
        own = op.Reshape(op.Mul(op.Reshape(x, _ints(0, 0, groups, width)), BC), _ints(0, 0, channels))
        y = op.Sub(y, own)
        # the first token of the scan has none but its own
        first, last, pads = (0, -1, (0, 0, 0, 0, 1, 0)) if reverse else (1, END, (0, 1, 0, 0, 0, 0))
        y = op.Pad(op.Slice(y, _ints(first), _ints(last), _ints(1)), _ints(*pads))
    return y


def _along(axis: int, inputs: int, reverse: bool) -> Dict[str, List[int]]:
    """How a Scan walks its inputs and its output."""
    axes, directions = [axis], [int(reverse)]
    return dict(axes=axes * inputs, directions=directions * inputs, out_axes=axes, out_directions=directions)


def _zeros(dtype: ir.DataType, *shape: Union[int, ir.Value]) -> ir.Value:
    sizes = [_ints(x) if isinstance(x, int) else x for x in shape]
    return op.Expand(op.Constant(value=ir.tensor(0., dtype=dtype)), op.Concat(*sizes, axis=0))


def _cast(x: ir.Value, dtype: ir.DataType) -> ir.Value:
    return x if x.dtype == dtype else op.Cast(x, to=dtype)


def _ints(*values: int) -> ir.Value:
    return op.Constant(value_ints=list(values))


def _float(value: float, dtype: ir.DataType) -> ir.Value:
    return op.Constant(value=ir.tensor(value, dtype=dtype))


def _softplus(x: ir.Value, dtype: ir.DataType) -> ir.Value:
    """log(1 + exp(x)) in a third of the time of onnxruntime's Softplus and as exact.

    Small results would lose digits by the rounding of w = 1 + exp(x), for which the last term corrects.
    """
    one = _float(1., dtype)
    e = op.Exp(op.Min(x, _float(60., dtype)))
    w = op.Add(e, one)
    return op.Max(x, op.Add(op.Log(w), op.Div(op.Sub(e, op.Sub(w, one)), w)))


def _silu(x: ir.Value) -> ir.Value:
    return op.Mul(x, op.Sigmoid(x))


def simplify(model: ir.Model) -> None:
    """Fold constants, inline functions and leave out what is not used."""
    common = ir.passes.common
    common.InlinePass()(model)
    fold_constants(model, onnx_shape_inference=True)
    ir.passes.Sequential(
        common.RemoveUnusedNodesPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.ClearMetadataAndDocStringPass(),  # stack traces, several times the size of a small model
    )(model)


#: For torch.onnx.export's custom_translation_table.
TABLE = {
    torch.ops.timm_ssm.selective_scan.default: selective_scan,
    torch.ops.timm_ssm.causal_conv1d.default: causal_conv1d,
    torch.ops.aten.rms_norm.default: rms_norm,
}
