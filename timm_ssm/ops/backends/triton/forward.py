"""The scan forward: sequential over tokens, parallel over batch and blocks of channels, the states in registers."""

import triton
import triton.language as tl

from ...calls import CHUNK_SIZE, ScanCall, ScanResult
from .common import (
    LOG2E,
    alignment,
    block_channels,
    device_guard,
    directions,
    flags,
    grouped,
    in_memory,
    last_contiguous,
    load_A,
    load_BC,
    load_token,
    parameters,
    plan,
    sigmoid,
    softplus,
    strides,
)


@triton.jit
def _scan_direction(
        u_ptr, delta_ptr, B_ptr, C_ptr, z_ptr, params_ptr, starts_ptr, sums_ptr, out_ptr, y_ptr, states_ptr,
        b, segment, c, mask,
        length, channels, segments, segment_size, chunks,
        u_l, delta_l, B_l, C_l, z_l,
        N: tl.constexpr, N_POW2: tl.constexpr, ALIGNED: tl.constexpr,
        REVERSE: tl.constexpr, MASK_DIAGONAL: tl.constexpr, SOFTPLUS: tl.constexpr, RESIDUAL: tl.constexpr,
        HAS_D: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_Z: tl.constexpr, SAVE: tl.constexpr,
        SEGMENTED: tl.constexpr, SUMMARY: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
        CHUNK_SIZE: tl.constexpr,
):
    """One direction over one segment of tokens; pointers stand at the batch item (and group, and direction).

    The output of the first direction waits in `out` for the second.
    """
    acc = params_ptr.dtype.element_ty
    n = tl.arange(0, N_POW2)
    n_mask = n < N
    tile = n[:, None] * channels + c[None, :]
    tile_mask = n_mask[:, None] & mask[None, :]

    A = load_A(params_ptr + tile, tile_mask) * LOG2E
    if HAS_D:
        D = tl.load(params_ptr + N * channels + c, mask=mask, other=0.)
    if HAS_BIAS:
        bias = tl.load(params_ptr + (N + 1) * channels + c, mask=mask, other=0.)

    # the segment in memory order, then in scan order
    begin = segment.to(tl.int64) * segment_size
    end = tl.minimum(begin + segment_size, length)
    s = begin
    if REVERSE:
        s = length - end
        end = length - begin

    h = tl.zeros([N_POW2, c.shape[0]], acc)
    if SEGMENTED and not SUMMARY:
        h += tl.load(starts_ptr + segment.to(tl.int64) * N * channels + tile, mask=tile_mask, other=0.)
    elif RESIDUAL and not SUMMARY:
        u = tl.load(u_ptr + in_memory(s, length, REVERSE) * u_l + c, mask=mask, other=0.).to(acc)  # segment 0: s = 0
        h += tl.where(n_mask[:, None], u[None, :], 0.)
    total = tl.zeros([c.shape[0]], acc)

    u_next, delta_next, B_next = load_token(
        u_ptr, delta_ptr, B_ptr, s, length, c, mask, n, u_l, delta_l, B_l, N, N_POW2, ALIGNED, REVERSE)
    if not SUMMARY:
        C_next = load_BC(C_ptr + in_memory(s, length, REVERSE) * C_l, n, N, N_POW2, ALIGNED)
    while s < end:
        t = in_memory(s, length, REVERSE)
        u = u_next.to(acc)
        dt = delta_next.to(acc)
        B = B_next.to(acc)
        if not SUMMARY:
            C = C_next.to(acc)
        following = tl.minimum(s + 1, end - 1)  # fetched while the present token is computed
        u_next, delta_next, B_next = load_token(
            u_ptr, delta_ptr, B_ptr, following, length, c, mask, n, u_l, delta_l, B_l, N, N_POW2, ALIGNED, REVERSE)
        if not SUMMARY:
            C_next = load_BC(C_ptr + in_memory(following, length, REVERSE) * C_l, n, N, N_POW2, ALIGNED)
        if SAVE:  # noqa: SIM102 (decided at compile time)
            if s % CHUNK_SIZE == 0:
                # s >> 63 is 0, but bound to the loop: else the addresses would stay in registers throughout it
                at = n[:, None] * (channels + (s >> 63) * 16) + c[None, :]
                tl.store(states_ptr + (s // CHUNK_SIZE) * N * channels + at, h, mask=tile_mask)
        if HAS_BIAS:
            dt += bias
        if SOFTPLUS:
            dt = softplus(dt)
        decayed = tl.exp2(dt[None, :] * A) * h
        h = decayed + (dt * u)[None, :] * B[:, None]
        if SUMMARY:
            total += dt
        else:
            if MASK_DIAGONAL:
                y = tl.where(s == 0, 0., tl.sum(decayed * C[:, None], axis=0))
            else:
                y = tl.sum(h * C[:, None], axis=0)
            if HAS_D:
                y += D * u
            if not FIRST:
                y += tl.load(out_ptr + t * channels + c, mask=mask, other=0.).to(acc)
            if LAST and HAS_Z:
                if SAVE:  # noqa: SIM102 (decided at compile time)
                    tl.store(y_ptr + t * channels + c, y.to(y_ptr.dtype.element_ty), mask=mask)
                z = tl.load(z_ptr + t * z_l + c, mask=mask, other=0.).to(acc)
                y *= z * sigmoid(z)
            tl.store(out_ptr + t * channels + c, y.to(out_ptr.dtype.element_ty), mask=mask)
        s += 1

    if SUMMARY:
        tl.store(starts_ptr + segment.to(tl.int64) * N * channels + tile, h, mask=tile_mask)
        tl.store(sums_ptr + segment.to(tl.int64) * channels + c, total, mask=mask)


@triton.jit
def _scan_forward(
        u0_ptr, u1_ptr, delta0_ptr, delta1_ptr, B0_ptr, B1_ptr, C0_ptr, C1_ptr, z_ptr, params_ptr,
        starts_ptr, sums_ptr, out_ptr, y_ptr, states_ptr,
        batch, length, channels, per_group, blocks, segments, segment_size, chunks,
        u_b, u_l, delta_b, delta_l, B_b, B_l, B_g, C_b, C_l, C_g, z_b, z_l,
        N: tl.constexpr, N_POW2: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr, ALIGNED: tl.constexpr,
        DIRECTIONS: tl.constexpr, REVERSE0: tl.constexpr, REVERSE1: tl.constexpr,
        MASK0: tl.constexpr, MASK1: tl.constexpr, SOFTPLUS: tl.constexpr, RESIDUAL: tl.constexpr,
        HAS_D: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_Z: tl.constexpr, SAVE: tl.constexpr,
        SEGMENTED: tl.constexpr, SUMMARY: tl.constexpr, CHUNK_SIZE: tl.constexpr,
):
    """A block of channels of one batch item over one segment of tokens, one direction after the other.

        h[t] = exp(dt A) h[t-1] + dt u B,  y = C h + D u,  out = (y of both directions) silu(z)

    SUMMARY computes only what a segment does to the state that enters it: the state it leaves from zero (in `starts`)
    and its sum of dt (in `sums`); the decay over the segment is exp(A sum). `enter` turns these into the states that
    enter the segments, in `starts` again, from which the scan proper (SEGMENTED) sets out.
    """
    pid = tl.program_id(0)
    block = pid % blocks
    segment = (pid // blocks) % segments
    b = (pid // blocks // segments).to(tl.int64)
    g, c, mask = block_channels(block, per_group, BLOCK, VECTOR)
    for i in tl.static_range(DIRECTIONS):
        item = i * batch + b
        if i > 0:
            tl.debug_barrier()  # out, written by the first direction, is read by the second
        _scan_direction(
            (u0_ptr if i == 0 else u1_ptr) + b * u_b,
            (delta0_ptr if i == 0 else delta1_ptr) + b * delta_b,
            (B0_ptr if i == 0 else B1_ptr) + b * B_b + g * B_g,
            (C0_ptr if i == 0 else C1_ptr) + b * C_b + g * C_g,
            z_ptr + b * z_b,
            params_ptr + i * (N + 2) * channels,
            starts_ptr + item * segments * N * channels,
            sums_ptr + item * segments * channels,
            out_ptr + b * length * channels,
            y_ptr + b * length * channels,
            states_ptr + item * chunks * N * channels,
            b, segment, c, mask,
            length, channels, segments, segment_size, chunks,
            u_l, delta_l, B_l, C_l, z_l,
            N, N_POW2, ALIGNED, REVERSE0 if i == 0 else REVERSE1, MASK0 if i == 0 else MASK1,
            SOFTPLUS, RESIDUAL, HAS_D, HAS_BIAS, HAS_Z, SAVE, SEGMENTED, SUMMARY, i == 0, i == DIRECTIONS - 1,
            CHUNK_SIZE,
        )


@triton.jit
def enter(
        u0_ptr, u1_ptr, params_ptr, starts_ptr, sums_ptr,
        batch, length, channels, per_group, blocks, segments, u_b, u_l,
        N: tl.constexpr, N_POW2: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr,
        DESCENDING0: tl.constexpr, DESCENDING1: tl.constexpr, RESIDUAL: tl.constexpr,
):
    """From what each segment does to a state to the state that enters it, in place: one short sequential scan."""
    pid = tl.program_id(0)
    block = pid % blocks
    item = (pid // blocks).to(tl.int64)
    i = item // batch
    b = item % batch
    g, c, mask = block_channels(block, per_group, BLOCK, VECTOR)
    n = tl.arange(0, N_POW2)
    tile = n[:, None] * channels + c[None, :]
    tile_mask = (n < N)[:, None] & mask[None, :]
    A = load_A(params_ptr + i * (N + 2) * channels + tile, tile_mask) * LOG2E
    h = tl.zeros([N_POW2, BLOCK], A.dtype)
    descending = (i == 0) & DESCENDING0 | (i == 1) & DESCENDING1
    if RESIDUAL:
        first = tl.where(descending, length - 1, 0).to(tl.int64) * u_l + b * u_b
        if i == 0:
            u = tl.load(u0_ptr + first + c, mask=mask, other=0.)
        else:
            u = tl.load(u1_ptr + first + c, mask=mask, other=0.)
        h += tl.where((n < N)[:, None], u.to(A.dtype)[None, :], 0.)
    k = segments * 0
    while k < segments:
        at = item * segments + tl.where(descending, segments - 1 - k, k)
        left = tl.load(starts_ptr + at * N * channels + tile, mask=tile_mask, other=0.)
        total = tl.load(sums_ptr + at * channels + c, mask=mask, other=0.)
        tl.store(starts_ptr + at * N * channels + tile, h, mask=tile_mask)
        h = tl.exp2(total[None, :] * A) * h + left
        k += 1


def scan_forward(call: ScanCall, save: bool) -> ScanResult:
    """Run `call`."""
    u, delta, B, C = directions(call.u), directions(call.delta), grouped(call.B), grouped(call.C)
    batch, length, channels = u[0].shape
    z = None if call.z is None else last_contiguous(call.z)
    out = u[0].new_empty(u[0].shape)
    y = u[0].new_empty(u[0].shape) if save and z is not None else None
    states = call.new_states() if save else None
    if out.numel() == 0:
        return out, y, states

    p = plan(call)
    n_directions, d_state = len(call.u), call.A[0].shape[1]
    segmented = p.segments > 1
    with device_guard(out):
        params = parameters(call)
        starts = sums = params
        if segmented:
            starts = params.new_empty(n_directions, batch, p.segments, d_state, channels)
            sums = params.new_empty(n_directions, batch, p.segments, channels)
        z_ = u[0] if z is None else z
        chunks = triton.cdiv(length, CHUNK_SIZE)
        shared = flags(call, p)
        for summary in (True, False) if segmented else (False,):
            _scan_forward[(batch * p.segments * p.blocks,)](
                *u, *delta, *B, *C, z_, params, starts, sums, out, out if y is None else y,
                params if states is None else states,
                batch, length, channels, p.per_group, p.blocks, p.segments, p.segment_size, chunks,
                *strides(u[0], 0, 1), *strides(delta[0], 0, 1), *strides(B[0], 0, 1, 2), *strides(C[0], 0, 1, 2),
                *strides(z_, 0, 1),
                DIRECTIONS=n_directions, ALIGNED=alignment([*B, *C]),
                REVERSE0=call.reverse[0], REVERSE1=call.reverse[-1],
                MASK0=call.mask_diagonal[0], MASK1=call.mask_diagonal[-1],
                SOFTPLUS=call.delta_softplus, RESIDUAL=call.residual,
                HAS_D=len(call.D) > 0, HAS_BIAS=len(call.delta_bias) > 0, HAS_Z=z is not None,
                SAVE=save and not summary, SEGMENTED=segmented, SUMMARY=summary, CHUNK_SIZE=CHUNK_SIZE,
                **shared,
            )
            if summary:
                enter[(n_directions * batch * p.blocks,)](
                    *u, params, starts, sums,
                    batch, length, channels, p.per_group, p.blocks, p.segments, *strides(u[0], 0, 1),
                    DESCENDING0=call.reverse[0], DESCENDING1=call.reverse[-1], RESIDUAL=call.residual,
                    **shared,
                )
    return out, y, states
