"""The scan backward: chunks of CHUNK_SIZE tokens from the last to the first, their states recomputed from the one
that the forward pass saved."""
from typing import Dict, Optional, Union

import torch
import triton
import triton.language as tl

from ...calls import CHUNK_SIZE, ScanCall, ScanGradients
from .common import (
    LOG2E,
    OPTIONS,
    alignment,
    block_channels,
    channel_sums,
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
    put_token,
    sigmoid,
    softplus,
    softplus_derivative,
    strides,
    take_token,
)
from .forward import enter

TILE = 8  # tokens whose states are in registers at a time


@triton.jit
def _transpose_kernel(
        B0_ptr, B1_ptr, C0_ptr, C1_ptr, bc_ptr,
        batch, length, groups, padded,
        B_b, B_l, B_g, C_b, C_l, C_g,
        N: tl.constexpr, N_POW2: tl.constexpr, REVERSE0: tl.constexpr, REVERSE1: tl.constexpr, CHUNK_SIZE: tl.constexpr,
):
    """B and C from (B, L, G, N) to (directions, B, G, 2, N, L) in scan order, padded with zeros, accumulation dtype."""
    pid = tl.program_id(0)
    chunks = padded // CHUNK_SIZE
    chunk = pid % chunks
    item = (pid // chunks).to(tl.int64)  # (direction, batch item, group)
    i = item // (batch * groups)
    b = item // groups % batch
    g = item % groups
    n = tl.arange(0, N_POW2)
    s = chunk * CHUNK_SIZE + tl.arange(0, CHUNK_SIZE)
    mask = (s < length)[:, None] & (n < N)[None, :]
    t = tl.where((i == 0) & REVERSE0 | (i == 1) & REVERSE1, length - 1 - s, s).to(tl.int64)
    B_at = b * B_b + g * B_g + t[:, None] * B_l + n[None, :]
    C_at = b * C_b + g * C_g + t[:, None] * C_l + n[None, :]
    if i == 0:
        B = tl.load(B0_ptr + B_at, mask=mask, other=0.)
        C = tl.load(C0_ptr + C_at, mask=mask, other=0.)
    else:
        B = tl.load(B1_ptr + B_at, mask=mask, other=0.)
        C = tl.load(C1_ptr + C_at, mask=mask, other=0.)
    to = bc_ptr + item * 2 * N * padded + n[None, :] * padded + s[:, None]
    tl.store(to, B.to(bc_ptr.dtype.element_ty), mask=(n < N)[None, :] & (s < padded)[:, None])
    tl.store(to + N * padded, C.to(bc_ptr.dtype.element_ty), mask=(n < N)[None, :] & (s < padded)[:, None])


@triton.jit
def _untranspose_kernel(
        sums_ptr, dB_ptr, dC_ptr,
        batch, length, groups, group_blocks, padded,
        N: tl.constexpr, N_POW2: tl.constexpr, REVERSE0: tl.constexpr, REVERSE1: tl.constexpr, CHUNK_SIZE: tl.constexpr,
):
    """Sum the blocks' shares of dB and dC, (directions, B, G, blocks, 2, N, L) in scan order, into
    (directions, B, L, G, N)."""
    pid = tl.program_id(0)
    chunks = padded // CHUNK_SIZE
    chunk = pid % chunks
    item = (pid // chunks).to(tl.int64)
    i = item // (batch * groups)
    b = item // groups % batch
    g = item % groups
    n = tl.arange(0, N_POW2)
    s = chunk * CHUNK_SIZE + tl.arange(0, CHUNK_SIZE)
    mask = (n < N)[:, None] & (s < length)[None, :]
    at = sums_ptr + item * group_blocks * 2 * N * padded + n[:, None] * padded + s[None, :]
    dB = tl.zeros([N_POW2, CHUNK_SIZE], sums_ptr.dtype.element_ty)
    dC = tl.zeros([N_POW2, CHUNK_SIZE], sums_ptr.dtype.element_ty)
    k = group_blocks * 0
    while k < group_blocks:
        dB += tl.load(at, mask=mask, other=0.)
        dC += tl.load(at + N * padded, mask=mask, other=0.)
        at += 2 * N * padded
        k += 1
    t = tl.where((i == 0) & REVERSE0 | (i == 1) & REVERSE1, length - 1 - s, s).to(tl.int64)
    to = (((i * batch + b) * length + t[None, :]) * groups + g) * N + n[:, None]
    tl.store(dB_ptr + to, dB.to(dB_ptr.dtype.element_ty), mask=mask)
    tl.store(dC_ptr + to, dC.to(dC_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _carry_direction(
        delta_ptr, C_ptr, z_ptr, grad_ptr, params_ptr, carries_ptr, sums_ptr,
        segment, c, mask, length, channels, segment_size, delta_l, C_l, z_l,
        N: tl.constexpr, N_POW2: tl.constexpr, ALIGNED: tl.constexpr, REVERSE: tl.constexpr, SOFTPLUS: tl.constexpr,
        HAS_BIAS: tl.constexpr, HAS_Z: tl.constexpr,
):
    acc = params_ptr.dtype.element_ty
    n = tl.arange(0, N_POW2)
    n_mask = n < N
    tile = n[:, None] * channels + c[None, :]
    tile_mask = n_mask[:, None] & mask[None, :]
    A = load_A(params_ptr + tile, tile_mask) * LOG2E
    if HAS_BIAS:
        bias = tl.load(params_ptr + (N + 1) * channels + c, mask=mask, other=0.)
    begin = segment.to(tl.int64) * segment_size
    s = tl.minimum(begin + segment_size, length) - 1
    e = tl.zeros([N_POW2, c.shape[0]], acc)
    total = tl.zeros([c.shape[0]], acc)
    while s >= begin:
        t = in_memory(s, length, REVERSE)
        dt = tl.load(delta_ptr + t * delta_l + c, mask=mask, other=0.).to(acc)
        dy = tl.load(grad_ptr + t * channels + c, mask=mask, other=0.).to(acc)
        C = load_BC(C_ptr + t * C_l, n, N, N_POW2, ALIGNED).to(acc)
        if HAS_Z:
            z = tl.load(z_ptr + t * z_l + c, mask=mask, other=0.).to(acc)
            dy *= z * sigmoid(z)
        if HAS_BIAS:
            dt += bias
        if SOFTPLUS:
            dt = softplus(dt)
        e = tl.exp2(dt[None, :] * A) * (e + dy[None, :] * C[:, None])
        total += dt
        s -= 1
    tl.store(carries_ptr + segment.to(tl.int64) * N * channels + tile, e, mask=tile_mask)
    tl.store(sums_ptr + segment.to(tl.int64) * channels + c, total, mask=mask)


@triton.jit
def _scan_carry(
        delta0_ptr, delta1_ptr, C0_ptr, C1_ptr, z_ptr, grad_ptr, params_ptr, carries_ptr, sums_ptr,
        batch, length, channels, per_group, blocks, segments, segment_size,
        delta_b, delta_l, C_b, C_l, C_g, z_b, z_l,
        N: tl.constexpr, N_POW2: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr, ALIGNED: tl.constexpr,
        REVERSE0: tl.constexpr, REVERSE1: tl.constexpr, DIRECTIONS: tl.constexpr,
        SOFTPLUS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_Z: tl.constexpr,
):
    """What a segment of tokens adds to the gradient that it hands to the tokens before it:

        e[t] = exp(dt A) (e[t+1] + dy C),  dL/dh[t-1] by way of h[t]

    from e = 0 at the end of the segment (in `carries`), and the segment's sum of dt (in `sums`).
    """
    pid = tl.program_id(0)
    block = pid % blocks
    segment = (pid // blocks) % segments
    item = (pid // blocks // segments).to(tl.int64)
    b = item % batch
    g, c, mask = block_channels(block, per_group, BLOCK, VECTOR)
    z_ptr += b * z_b
    grad_ptr += b * length * channels
    carries_ptr += item * segments * N * channels
    sums_ptr += item * segments * channels
    if item < batch:
        _carry_direction(
            delta0_ptr + b * delta_b, C0_ptr + b * C_b + g * C_g, z_ptr, grad_ptr, params_ptr, carries_ptr, sums_ptr,
            segment, c, mask, length, channels, segment_size, delta_l, C_l, z_l,
            N, N_POW2, ALIGNED, REVERSE0, SOFTPLUS, HAS_BIAS, HAS_Z,
        )
    elif DIRECTIONS == 2:
        _carry_direction(
            delta1_ptr + b * delta_b, C1_ptr + b * C_b + g * C_g, z_ptr, grad_ptr, params_ptr + (N + 2) * channels,
            carries_ptr, sums_ptr,
            segment, c, mask, length, channels, segment_size, delta_l, C_l, z_l,
            N, N_POW2, ALIGNED, REVERSE1, SOFTPLUS, HAS_BIAS, HAS_Z,
        )


@triton.jit
def _backward_direction(
        u_ptr, delta_ptr, B_ptr, z_ptr, params_ptr, bc_ptr, states_ptr, starts_ptr, carries_ptr, grad_ptr, y_ptr,
        du_ptr, ddelta_ptr, dz_ptr, dbc_ptr, dparams_ptr,
        segment, c, mask, length, channels, padded, segment_size, u_l, delta_l, B_l, z_l,
        N: tl.constexpr, N_POW2: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
        REVERSE: tl.constexpr, MASK_DIAGONAL: tl.constexpr, SOFTPLUS: tl.constexpr, RESIDUAL: tl.constexpr,
        HAS_D: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_Z: tl.constexpr, WRITE_DZ: tl.constexpr,
        CHUNK_SIZE: tl.constexpr, TILE: tl.constexpr, AT_ONCE: tl.constexpr, REDUCE: tl.constexpr,
):
    acc = params_ptr.dtype.element_ty
    n = tl.arange(0, N_POW2)
    tile = n[:, None] * channels + c[None, :]
    tile_mask = (n < N)[:, None] & mask[None, :]
    if HAS_D:
        D = tl.load(params_ptr + N * channels + c, mask=mask, other=0.)
        dD = tl.zeros([BLOCK], acc)
    if HAS_BIAS:
        bias = tl.load(params_ptr + (N + 1) * channels + c, mask=mask, other=0.)
        dbias = tl.zeros([BLOCK], acc)

    # Tiles are (states at once, tokens, channels): all three axes everywhere, so that Triton gives them one layout.
    r = tl.arange(0, TILE)
    c3 = c[None, None, :]

    begin = segment.to(tl.int64) * segment_size
    end = tl.minimum(begin + segment_size, length)
    chunk = (end - 1) // CHUNK_SIZE * CHUNK_SIZE
    while chunk >= begin:
        # first the states before each tile of the chunk, from its first token to the last tile
        A = load_A(params_ptr + tile, tile_mask) * LOG2E
        h = tl.load(states_ptr + (chunk // CHUNK_SIZE) * N * channels + tile, mask=tile_mask, other=0.)
        last = chunk + (tl.minimum(chunk + CHUNK_SIZE, length) - 1 - chunk) // TILE * TILE
        s = chunk
        u_next, delta_next, B_next = load_token(
            u_ptr, delta_ptr, B_ptr, s, length, c, mask, n, u_l, delta_l, B_l, N, N_POW2, ALIGNED, REVERSE)
        while s < last:
            u = u_next.to(acc)
            dt = delta_next.to(acc)
            B = B_next.to(acc)
            u_next, delta_next, B_next = load_token(  # while the present token is computed
                u_ptr, delta_ptr, B_ptr, s + 1, length, c, mask, n, u_l, delta_l, B_l, N, N_POW2, ALIGNED, REVERSE)
            if s % TILE == 0:
                tl.store(starts_ptr + (s - chunk) // TILE * N * channels + tile, h, mask=tile_mask)
            if HAS_BIAS:
                dt += bias
            if SOFTPLUS:
                dt = softplus(dt)
            h = tl.exp2(dt[None, :] * A) * h + (dt * u)[None, :] * B[:, None]
            s += 1
        tl.store(starts_ptr + (s - chunk) // TILE * N * channels + tile, h, mask=tile_mask)
        tl.debug_barrier()  # other lanes may read what was written here

        # then the gradients, tile by tile, from the last to the first
        while s >= chunk:
            live = (s + r < length)[None, :, None] & mask[None, None, :]
            to = in_memory(s + r, length, REVERSE)[None, :, None]
            us = tl.load(u_ptr + to * u_l + c3, mask=live, other=0.).to(acc)
            dts = tl.load(delta_ptr + to * delta_l + c3, mask=live, other=0.).to(acc)
            dy = tl.load(grad_ptr + to * channels + c3, mask=live, other=0.).to(acc)
            if HAS_Z:
                z = tl.load(z_ptr + to * z_l + c3, mask=live, other=0.).to(acc)
                gate = sigmoid(z)
                if WRITE_DZ:
                    y = tl.load(y_ptr + to * channels + c3, mask=live, other=0.).to(acc)
                    dz = dy * y * gate * (1. + z * (1. - gate))
                    tl.store(dz_ptr + to * channels + c3, dz.to(dz_ptr.dtype.element_ty), mask=live)
                dy *= z * gate
            if HAS_D:
                dD += tl.sum(tl.sum(dy * us, 1), 0)
            if HAS_BIAS:
                dts += bias[None, None, :]
            if SOFTPLUS:
                dts = softplus(dts)
            dts = tl.where(live, dts, 0.)  # tokens past the end neither decay nor add
            inputs = dts * us
            dinputs = tl.zeros([1, TILE, BLOCK], acc)  # dL/d(dt u) = sum_n g B
            ddecay = tl.zeros([1, TILE, BLOCK], acc)  # sum_n g exp(dt A) h[t-1] A
            into_first = tl.zeros([1, BLOCK], acc)
            for i in range((N + AT_ONCE - 1) // AT_ONCE):
                ni = i * AT_ONCE + tl.arange(0, AT_ONCE)
                at_n = ni[:, None] * channels + c[None, :]
                at_n_mask = (ni < N)[:, None] & mask[None, :]
                An = load_A(params_ptr + at_n, at_n_mask)[:, None, :]
                hn = tl.load(starts_ptr + (s - chunk) // TILE * N * channels + at_n, mask=at_n_mask, other=0.)
                en = tl.load(carries_ptr + at_n, mask=at_n_mask, other=0.)
                dA = tl.load(dparams_ptr + at_n, mask=at_n_mask, other=0.)
                at_bc = ni[:, None] * padded + (s // TILE * TILE + r)[None, :]  # which shows Triton the alignment
                bc_mask = (ni < N)[:, None] & (r < TILE)[None, :]
                Bn = tl.load(bc_ptr + at_bc, mask=bc_mask, other=0.)[:, :, None]
                Cn = tl.load(bc_ptr + N * padded + at_bc, mask=bc_mask, other=0.)[:, :, None]
                a = tl.exp2(dts * (An * LOG2E))
                added = inputs * Bn  # to the state
                dread = dy * Cn  # gradient of the state that C reads
                if MASK_DIAGONAL:
                    dread = tl.where((s + r == 0)[None, :, None], 0., dread)

                decayed = tl.zeros([AT_ONCE, TILE, BLOCK], acc)  # exp(dt A) h[t-1]
                for k in tl.static_range(TILE):
                    hn *= take_token(a, k, r)
                    decayed = put_token(decayed, k, r, hn)
                    hn += take_token(added, k, r)
                g = tl.zeros([AT_ONCE, TILE, BLOCK], acc)  # dL/dh
                g_added = g  # dL/d(dt B u)
                for k in tl.static_range(TILE):
                    if MASK_DIAGONAL:
                        g_added = put_token(g_added, TILE - 1 - k, r, en)
                    en += take_token(dread, TILE - 1 - k, r)
                    g = put_token(g, TILE - 1 - k, r, en)
                    en *= take_token(a, TILE - 1 - k, r)
                tl.store(carries_ptr + at_n, en, mask=at_n_mask)

                if MASK_DIAGONAL:
                    read = tl.where((s + r == 0)[None, :, None], 0., decayed)
                else:
                    read = decayed + added
                    g_added = g
                g_decayed = g * decayed
                dinputs += tl.sum(g_added * Bn, 0)[None, :, :]
                ddecay += tl.sum(g_decayed * An, 0)[None, :, :]
                tl.store(dparams_ptr + at_n, dA + tl.sum(g_decayed * dts, 1), mask=at_n_mask)
                if RESIDUAL:
                    into_first += tl.sum(tl.where(at_n_mask, en, 0.), 0)[None, :]
                if REDUCE == 'sum':
                    tl.store(dbc_ptr + at_bc, tl.sum(g_added * inputs, 2), mask=bc_mask)
                    tl.store(dbc_ptr + N * padded + at_bc, tl.sum(read * dy, 2), mask=bc_mask)
                else:
                    both = tl.arange(0, 2 * TILE)
                    tl.store(
                        dbc_ptr + (i + both // TILE * N) * padded + s + both % TILE,
                        channel_sums(g_added * inputs, read * dy, REDUCE))

            us = tl.load(u_ptr + to * u_l + c3, mask=live, other=0.).to(acc)  # again, for want of registers
            du = dinputs * dts
            ddt = dinputs * us + ddecay
            if HAS_D:
                du += D[None, None, :] * dy
            if RESIDUAL:
                du += tl.where((s + r == 0)[None, :, None], into_first[:, None, :], 0.)
            if SOFTPLUS:
                ddt *= softplus_derivative(dts)
            if HAS_BIAS:
                dbias += tl.sum(tl.sum(tl.where(live, ddt, 0.), 1), 0)
            tl.store(du_ptr + to * channels + c3, du.to(du_ptr.dtype.element_ty), mask=live)
            tl.store(ddelta_ptr + to * channels + c3, ddt.to(ddelta_ptr.dtype.element_ty), mask=live)
            tl.debug_barrier()  # the next tile reads `carries` and `dparams`, the next chunk overwrites `starts`
            s -= TILE
        chunk -= CHUNK_SIZE

    if HAS_D:
        tl.store(dparams_ptr + N * channels + c, dD, mask=mask)
    if HAS_BIAS:
        tl.store(dparams_ptr + (N + 1) * channels + c, dbias, mask=mask)


@triton.jit
def _scan_backward(
        u0_ptr, u1_ptr, delta0_ptr, delta1_ptr, B0_ptr, B1_ptr, z_ptr, params_ptr, bc_ptr, states_ptr,
        starts_ptr, carries_ptr, grad_ptr, y_ptr,
        du0_ptr, du1_ptr, ddelta0_ptr, ddelta1_ptr, dz_ptr, dbc_ptr, dparams_ptr,
        batch, length, channels, groups, per_group, blocks, segments, segment_size, chunks, padded,
        u_b, u_l, delta_b, delta_l, B_b, B_l, B_g, z_b, z_l,
        N: tl.constexpr, N_POW2: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr, ALIGNED: tl.constexpr,
        DIRECTIONS: tl.constexpr, REVERSE0: tl.constexpr, REVERSE1: tl.constexpr,
        MASK0: tl.constexpr, MASK1: tl.constexpr, SOFTPLUS: tl.constexpr, RESIDUAL: tl.constexpr,
        HAS_D: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_Z: tl.constexpr, CHUNK_SIZE: tl.constexpr,
        TILE: tl.constexpr, AT_ONCE: tl.constexpr, REDUCE: tl.constexpr,
):
    """A block of channels of one batch item and one direction over one segment of tokens, AT_ONCE states at a time: one
    for want of registers, all in the interpreter for want of patience.

    With g[t] = dL/dh[t] and e[t] = exp(dt A) g[t], what reaches h[t-1] by way of h[t]:

        g[t] = e[t+1] + dy C,  d(dt u) = sum_n g B,  d(dt A) = g exp(dt A) h[t-1],  dB = sum_d g dt u,  dC = sum_d h dy

    where under `mask_diagonal` B's share takes e[t+1] for g[t], and C's exp(dt A) h[t-1] for h[t]. Each program leaves
    its own share of dA, dD, dbias (`dparams`), dB and dC (`dbc`) for a second step to sum, in a fixed order.
    """
    pid = tl.program_id(0)
    block = pid % blocks
    segment = (pid // blocks) % segments
    item = (pid // blocks // segments).to(tl.int64)
    b = item % batch
    g, c, mask = block_channels(block, per_group, BLOCK, VECTOR)
    z_ptr += b * z_b
    bc_ptr += (item * groups + g) * 2 * N * padded
    states_ptr += item * chunks * N * channels
    starts_ptr += (item * segments + segment) * (CHUNK_SIZE // TILE) * N * channels
    carries_ptr += (item * segments + segment) * N * channels
    token = b * length * channels
    dbc_ptr += (item * blocks + block) * 2 * N * padded
    dparams_ptr += (item * segments + segment) * (N + 2) * channels
    if item < batch:
        _backward_direction(
            u0_ptr + b * u_b, delta0_ptr + b * delta_b, B0_ptr + b * B_b + g * B_g, z_ptr, params_ptr, bc_ptr,
            states_ptr, starts_ptr, carries_ptr, grad_ptr + token, y_ptr + token,
            du0_ptr + token, ddelta0_ptr + token, dz_ptr + token, dbc_ptr, dparams_ptr,
            segment, c, mask, length, channels, padded, segment_size, u_l, delta_l, B_l, z_l,
            N, N_POW2, BLOCK, ALIGNED, REVERSE0, MASK0, SOFTPLUS, RESIDUAL, HAS_D, HAS_BIAS, HAS_Z, HAS_Z,
            CHUNK_SIZE, TILE, AT_ONCE, REDUCE,
        )
    elif DIRECTIONS == 2:
        _backward_direction(
            u1_ptr + b * u_b, delta1_ptr + b * delta_b, B1_ptr + b * B_b + g * B_g, z_ptr,
            params_ptr + (N + 2) * channels, bc_ptr,
            states_ptr, starts_ptr, carries_ptr, grad_ptr + token, y_ptr + token,
            du1_ptr + token, ddelta1_ptr + token, dz_ptr + token, dbc_ptr, dparams_ptr,
            segment, c, mask, length, channels, padded, segment_size, u_l, delta_l, B_l, z_l,
            N, N_POW2, BLOCK, ALIGNED, REVERSE1, MASK1, SOFTPLUS, RESIDUAL, HAS_D, HAS_BIAS, HAS_Z, False,
            CHUNK_SIZE, TILE, AT_ONCE, REDUCE,
        )


def tuning(x: torch.Tensor, n_pow2: int) -> Dict[str, Union[int, str]]:
    """States at a time, and how dB and dC are summed over channels: by tensor cores in the precision of x's dtype, or,
    in float64, on AMD and in the interpreter, plainly."""
    if x.device.type == 'cpu':
        return dict(AT_ONCE=n_pow2, REDUCE='sum')
    if torch.version.hip or x.dtype == torch.float64:
        return dict(AT_ONCE=1, REDUCE='sum')
    return dict(AT_ONCE=1, REDUCE='tf32x3' if x.dtype == torch.float32 else 'tf32')


def scan_backward(
        call: ScanCall,
        grad_out: torch.Tensor,
        y: Optional[torch.Tensor],
        states: torch.Tensor,
) -> ScanGradients:
    """Gradients of every input of `call`: a list over directions of [u, delta, A, B, C, D?, delta_bias?], and z's."""
    u, delta, B, C = directions(call.u), directions(call.delta), grouped(call.B), grouped(call.C)
    batch, length, channels = u[0].shape
    n_directions, d_state, groups = len(call.u), call.A[0].shape[1], B[0].shape[2]
    z = None if call.z is None else last_contiguous(call.z)
    grad_out = grad_out.contiguous()
    du = [u[0].new_empty(u[0].shape) for _ in range(n_directions)]
    ddelta = [u[0].new_empty(u[0].shape) for _ in range(n_directions)]
    dz = None if z is None else u[0].new_empty(u[0].shape)
    empty = u[0].numel() == 0

    p = plan(call, n_directions)
    chunks = triton.cdiv(length, CHUNK_SIZE)
    padded = chunks * CHUNK_SIZE
    with device_guard(grad_out):
        params = parameters(call)
        dparams = params.new_zeros(n_directions, batch * p.segments, d_state + 2, channels)
        dB, dC = (u[0].new_zeros(n_directions, batch, length, groups, d_state) for _ in range(2))
        if not empty:
            bc = params.new_empty(n_directions, batch, groups, 2, d_state, padded)
            dbc = params.new_empty(n_directions, batch, p.blocks, 2, d_state, padded)
            starts = params.new_empty(n_directions, batch, p.segments, CHUNK_SIZE // TILE, d_state, channels)
            z_ = grad_out if z is None else z
            shared = flags(call, p)
            order = dict(REVERSE0=call.reverse[0], REVERSE1=call.reverse[-1])
            states_of = {k: shared[k] for k in ('N', 'N_POW2')}
            forms = dict(SOFTPLUS=call.delta_softplus, HAS_BIAS=len(call.delta_bias) > 0, HAS_Z=z is not None)

            _transpose_kernel[(n_directions * batch * groups * chunks,)](
                *B, *C, bc, batch, length, groups, padded, *strides(B[0], 0, 1, 2), *strides(C[0], 0, 1, 2),
                **states_of, **order, CHUNK_SIZE=CHUNK_SIZE, num_warps=1, **OPTIONS)
            carries = params.new_zeros(n_directions, batch, p.segments, d_state, channels)
            if p.segments > 1:
                sums = params.new_empty(n_directions, batch, p.segments, channels)
                _scan_carry[(n_directions * batch * p.segments * p.blocks,)](
                    *delta, *C, z_, grad_out, params, carries, sums,
                    batch, length, channels, p.per_group, p.blocks, p.segments, p.segment_size,
                    *strides(delta[0], 0, 1), *strides(C[0], 0, 1, 2), *strides(z_, 0, 1),
                    DIRECTIONS=n_directions, ALIGNED=alignment(C), **order, **forms, **shared)
                enter[(n_directions * batch * p.blocks,)](
                    *u, params, carries, sums,
                    batch, length, channels, p.per_group, p.blocks, p.segments, *strides(u[0], 0, 1),
                    DESCENDING0=True, DESCENDING1=True, RESIDUAL=False, **shared)
            _scan_backward[(n_directions * batch * p.segments * p.blocks,)](
                *u, *delta, *B, z_, params, bc, states, starts, carries, grad_out, y if z is not None else grad_out,
                du[0], du[-1], ddelta[0], ddelta[-1], grad_out if dz is None else dz, dbc, dparams,
                batch, length, channels, groups, p.per_group, p.blocks, p.segments, p.segment_size, chunks, padded,
                *strides(u[0], 0, 1), *strides(delta[0], 0, 1), *strides(B[0], 0, 1, 2), *strides(z_, 0, 1),
                DIRECTIONS=n_directions, ALIGNED=alignment(B),
                MASK0=call.mask_diagonal[0], MASK1=call.mask_diagonal[-1],
                RESIDUAL=call.residual, HAS_D=len(call.D) > 0,
                CHUNK_SIZE=CHUNK_SIZE, TILE=TILE, **tuning(grad_out, shared['N_POW2']), **order, **forms, **shared)
            _untranspose_kernel[(n_directions * batch * groups * chunks,)](
                dbc, dB, dC, batch, length, groups, p.blocks // groups, padded,
                **states_of, **order, CHUNK_SIZE=CHUNK_SIZE, num_warps=1, **OPTIONS)
        dparams = dparams.sum(1)

    gradients = []
    for i in range(n_directions):
        one = [du[i], ddelta[i], dparams[i, :d_state].t().contiguous(),
               dB[i].view(call.B[i].shape), dC[i].view(call.C[i].shape)]
        if call.D:
            one.append(dparams[i, d_state].clone())
        if call.delta_bias:
            one.append(dparams[i, d_state + 1].clone())
        gradients.append(one)
    return gradients, dz
