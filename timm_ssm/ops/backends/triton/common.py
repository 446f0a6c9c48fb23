"""What the Triton kernels share: element-wise functions, and how the host prepares a call."""
import contextlib
import math
from functools import cache
from typing import List, NamedTuple, Sequence, Tuple

import torch
import triton
import triton.language as tl

from ...calls import CHUNK_SIZE, ScanCall

LOG2E = tl.constexpr(1.4426950408889634)
SOFTPLUS_OF_20 = tl.constexpr(20.000000002061153)


@triton.jit
def softplus(x):
    """log(1 + e^x) as max(x, 0) + log(1 + e^-|x|); x above 20. e - ((1 + e) - 1) is what rounding took from 1 + e,
    without which the smallest steps would lose most of their digits."""
    e = tl.exp2(tl.abs(x) * -LOG2E)
    w = 1. + e
    return tl.where(x > 20., x, tl.maximum(x, 0.) + (tl.log(w) + (e - (w - 1.))))


@triton.jit
def softplus_derivative(y):
    """Of y = softplus(x), with respect to x: 1 - e^-y, where that would lose the digits of a small y by its series."""
    series = y * (1. - y * (1 / 2 - y * (1 / 6 - y * (1 / 24 - y * (1 / 120)))))
    return tl.where(y > SOFTPLUS_OF_20, 1., tl.where(y < 1 / 64, series, 1. - tl.exp2(y * -LOG2E)))


@triton.jit
def sigmoid(x):
    """1 / (1 + e^-x), the reciprocal as a squared reciprocal root: one instruction where a division takes ten."""
    root = tl.rsqrt(1. + tl.exp2(x * -LOG2E))
    return root * root


@triton.jit
def block_channels(block, per_group, BLOCK: tl.constexpr, VECTOR: tl.constexpr):
    """Group, channels and their mask of one block of channels; blocks do not straddle groups.

    Two channels a lane: with more, Triton would spread the states over lanes, too, and reduce over them by shuffles.
    """
    per_group_blocks = tl.cdiv(per_group, BLOCK)
    g = block // per_group_blocks
    c = g * per_group + (block % per_group_blocks) * BLOCK + tl.arange(0, BLOCK)
    c = tl.multiple_of(c, VECTOR)
    return g, c, c < (g + 1) * per_group


@triton.jit
def load_A(ptr, mask):
    """A in bounds that leave A log2(e) finite: infinity times a step of 0, as padding has, would be NaN."""
    most: tl.constexpr = 2.3e38 if ptr.dtype.element_ty == tl.float32 else 1.2e308
    A = tl.load(ptr, mask=mask, other=0.)
    return tl.where(A < -most, -most, tl.where(A > most, most, A))


@triton.jit
def load_BC(ptr, n, N: tl.constexpr, N_POW2: tl.constexpr, ALIGNED: tl.constexpr):
    """B or C of one token, zero beyond N. Slices of a projection are seldom aligned to what Triton finds out by itself,
    hence ALIGNED, in bytes: the loads of a row become one or two."""
    at = tl.multiple_of(ptr + n, ALIGNED)
    if N == N_POW2:
        x = tl.load(at)
    else:
        x = tl.load(at, mask=n < N, other=0.)
    return x


@triton.jit
def in_memory(s, length, REVERSE: tl.constexpr):
    """Where the token that a scan meets at step s lies."""
    return length - 1 - s if REVERSE else s


@triton.jit
def load_token(
        u_ptr, delta_ptr, B_ptr, s, length, c, mask, n, u_l, delta_l, B_l,
        N: tl.constexpr, N_POW2: tl.constexpr, ALIGNED: tl.constexpr, REVERSE: tl.constexpr,
):
    """u, delta and B at step s, as they are in memory."""
    t = in_memory(s, length, REVERSE)
    u = tl.load(u_ptr + t * u_l + c, mask=mask, other=0.)
    delta = tl.load(delta_ptr + t * delta_l + c, mask=mask, other=0.)
    return u, delta, load_BC(B_ptr + t * B_l, n, N, N_POW2, ALIGNED)


@triton.jit
def take_token(x, k: tl.constexpr, index):
    """x[:, k] of a tile (a, b, c) whose middle axis, numbered by `index`, lies in the registers of one lane: a choice
    of registers, no code. The detour by integers lets the compiler drop the zeros, which it may not with floats."""
    integer: tl.constexpr = tl.int64 if x.dtype == tl.float64 else tl.int32
    bits = tl.sum(tl.where((index == k)[None, :, None], x.to(integer, bitcast=True), 0), 1)
    return bits.to(x.dtype, bitcast=True)


@triton.jit
def put_token(x, k: tl.constexpr, index, value):
    """x with x[:, k] replaced; like `take_token`, no code."""
    return tl.where((index == k)[None, :, None], value[:, None, :], x)


@triton.jit
def channel_sums(x, y, REDUCE: tl.constexpr):
    """Sums over channels of two tiles (1, tokens, channels), as (2, tokens) in one vector.

    A sum across lanes takes five shuffles and additions a value; a tensor core takes the tile in a few instructions,
    as a product with ones. Channels of one lane are added in float32 before.
    """
    TILE: tl.constexpr = x.shape[1]
    BLOCK: tl.constexpr = x.shape[2]
    both = tl.reshape(tl.permute(tl.join(x, y), (0, 3, 1, 2)), [2 * TILE, BLOCK])
    if BLOCK > 32:
        both = tl.sum(tl.reshape(both, [2 * TILE, BLOCK // 2, 2]), 2)
    ones = tl.full([BLOCK // 2 if BLOCK > 32 else BLOCK, 16], 1., tl.float32)
    return tl.max(tl.dot(both, ones, input_precision=REDUCE), 1)  # 16 equal columns


#: Compiler options: nothing here gains by software pipelining, and much by fused multiply-adds.
OPTIONS = dict(num_stages=1, enable_fp_fusion=True)


class Plan(NamedTuple):
    """How the work of a scan is cut: into blocks of channels and, where these are few, into segments of tokens."""
    groups: int
    per_group: int  # channels of a group
    block: int  # channels of a block
    blocks: int  # blocks of all groups
    segments: int  # segments of tokens
    segment_size: int  # tokens of a segment, a multiple of CHUNK_SIZE


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of the GPU; 1 in the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == 'cuda' else 1


def device_guard(x: torch.Tensor):
    """Launch on x's GPU, whichever is the current one."""
    return torch.cuda.device(x.device) if x.device.type == 'cuda' else contextlib.nullcontext()


def last_contiguous(x: torch.Tensor) -> torch.Tensor:
    """x itself if its last axis is contiguous, else a contiguous copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def directions(xs: Sequence[torch.Tensor]) -> List[torch.Tensor]:
    """The tensors of both directions with one set of strides and a contiguous last axis; one direction stands twice."""
    xs = [last_contiguous(x) for x in xs]
    if xs[0].stride() != xs[-1].stride():
        xs = [x.contiguous() for x in xs]
    return [xs[0], xs[-1]]


def grouped(xs: Sequence[torch.Tensor]) -> List[torch.Tensor]:
    """B or C of both directions as (B, L, G, N)."""
    return directions([x if x.ndim == 4 else x.unsqueeze(2) for x in xs])


def parameters(call: ScanCall) -> torch.Tensor:
    """A (transposed), D and delta_bias as one tensor (directions, N + 2, channels), in which absent ones are A's."""
    pieces = []
    for i, A in enumerate(call.A):
        filler = A[:, :1].t()
        pieces += [
            A.t(),
            call.D[i][None] if call.D else filler,
            call.delta_bias[i][None] if call.delta_bias else filler,
        ]
    return torch.cat(pieces)


def alignment(xs: Sequence[torch.Tensor]) -> int:
    """Bytes, up to 16, that divide the address of every token of B or C."""
    steps = [16]
    for x in xs:
        steps += [x.data_ptr(), *(stride * x.element_size() for stride in x.stride()[:-1])]
    return math.gcd(*steps)


def strides(x: torch.Tensor, *axes: int) -> Tuple[int, ...]:
    return tuple(x.stride(i) for i in axes)


def plan(call: ScanCall, directions: int = 1, programs_per_processor: int = 8) -> Plan:
    """How to cut `call`, `directions` of whose directions run in parallel."""
    batch, length, channels = (max(1, size) for size in call.u[0].shape)
    groups = call.B[0].shape[2] if call.B[0].ndim == 4 else 1
    per_group = channels // groups
    wanted = programs_per_processor * processors(call.u[0].device)

    def blocks(block: int) -> int:
        return groups * triton.cdiv(per_group, block)

    block = 64
    wide_state = call.A[0].shape[1] > 16 or call.u[0].dtype == torch.float64
    if wide_state or per_group <= 32 or batch * blocks(64) * directions < wanted:
        block = 32
    programs = batch * blocks(block) * directions
    segments = 1
    if programs * 2 <= wanted:
        segments = max(1, min(wanted // programs, length // (4 * CHUNK_SIZE)))
    segment_size = triton.cdiv(triton.cdiv(length, segments), CHUNK_SIZE) * CHUNK_SIZE
    return Plan(groups, per_group, block, blocks(block), triton.cdiv(length, segment_size), segment_size)


def flags(call: ScanCall, p: Plan) -> dict:
    """The compile-time arguments that all kernels of the scan share."""
    d_state = call.A[0].shape[1]
    return dict(
        N=d_state,
        N_POW2=triton.next_power_of_2(d_state),
        BLOCK=p.block,
        VECTOR=p.block // 32,
        num_warps=1,
        **OPTIONS,
    )
