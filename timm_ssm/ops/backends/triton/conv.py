"""The short depthwise convolution, both directions in one launch."""
from typing import List, Tuple

import torch
import triton
import triton.language as tl

from ...calls import ConvCall, ConvGradients, acc_dtype
from .common import OPTIONS, device_guard, last_contiguous, sigmoid, strides

TOKENS = 16  # tokens of a tile
BLOCK = 128  # channels of a tile
SEGMENT_SIZE = 128  # tokens of a program of the backward pass


@triton.jit
def _tokens(x_ptr, t, k: tl.constexpr, c, mask, length, x_l, REVERSE: tl.constexpr, BEFORE: tl.constexpr):
    """What tap k of the kernel meets at tokens t; zeros outside the sequence."""
    at = t + (BEFORE - k if REVERSE else k - BEFORE)
    live = ((at >= 0) & (at < length))[:, None] & mask[None, :]
    return tl.load(x_ptr + at[:, None] * x_l + c[None, :], mask=live, other=0.)


@triton.jit
def _pre_activation(
        x_ptr, weight_ptr, bias_ptr, t, c, mask, length, channels, x_l,
        K: tl.constexpr, REVERSE: tl.constexpr, BEFORE: tl.constexpr, HAS_BIAS: tl.constexpr,
):
    """The convolution at tokens t (one direction, before the activation)."""
    acc = weight_ptr.dtype.element_ty
    y = tl.zeros([t.shape[0], c.shape[0]], acc)
    if HAS_BIAS:
        y += tl.load(bias_ptr + c, mask=mask, other=0.)[None, :]
    for k in tl.static_range(K):
        x = _tokens(x_ptr, t, k, c, mask, length, x_l, REVERSE, BEFORE).to(acc)
        y += x * tl.load(weight_ptr + k * channels + c, mask=mask, other=0.)[None, :]
    return y


@triton.jit
def _conv_forward(
        x_ptr, weight_ptr, bias_ptr, out0_ptr, out1_ptr,
        length, channels, tiles, blocks, x_b, x_l,
        K: tl.constexpr, BEFORE: tl.constexpr, DIRECTIONS: tl.constexpr, REVERSE0: tl.constexpr, REVERSE1: tl.constexpr,
        SILU: tl.constexpr, HAS_BIAS: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):
    """out[t,d] = act(bias[d] + sum_k weight[k,d] x[t - BEFORE + k, d]), mirrored in reverse."""
    pid = tl.program_id(0)
    c = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = c < channels
    t = ((pid // blocks) % tiles).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    b = (pid // blocks // tiles).to(tl.int64)
    for i in tl.static_range(DIRECTIONS):
        y = _pre_activation(
            x_ptr + b * x_b, weight_ptr + i * K * channels, bias_ptr + i * channels, t, c, mask, length, channels, x_l,
            K, REVERSE0 if i == 0 else REVERSE1, BEFORE, HAS_BIAS)
        if SILU:
            y *= sigmoid(y)
        to = (out0_ptr if i == 0 else out1_ptr) + (b * length + t)[:, None] * channels + c[None, :]
        tl.store(to, y.to(out0_ptr.dtype.element_ty), mask=(t < length)[:, None] & mask[None, :])


@triton.jit
def _conv_backward_activation(
        x_ptr, weight_ptr, bias_ptr, grad0_ptr, grad1_ptr, pre0_ptr, pre1_ptr, dparams_ptr,
        batch, length, channels, segments, blocks, x_b, x_l,
        K: tl.constexpr, K1_POW2: tl.constexpr, BEFORE: tl.constexpr, DIRECTIONS: tl.constexpr,
        REVERSE0: tl.constexpr, REVERSE1: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr,
        TOKENS: tl.constexpr, BLOCK: tl.constexpr, SEGMENT_SIZE: tl.constexpr,
):
    """The gradient before the activation (in `pre`, if there is one), and by a segment of tokens the share of the
    gradients of weights and bias, as K + 1 rows (in `dparams`)."""
    acc = weight_ptr.dtype.element_ty
    pid = tl.program_id(0)
    c = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = c < channels
    segment = ((pid // blocks) % segments).to(tl.int64)
    b = (pid // blocks // segments).to(tl.int64)
    x_ptr += b * x_b
    k1 = tl.arange(0, K1_POW2)
    for i in tl.static_range(DIRECTIONS):
        shares = tl.zeros([K1_POW2, BLOCK], acc)
        begin = segment * SEGMENT_SIZE
        while begin < tl.minimum((segment + 1) * SEGMENT_SIZE, length):
            t = begin + tl.arange(0, TOKENS)
            live = (t < length)[:, None] & mask[None, :]
            at = (b * length + t)[:, None] * channels + c[None, :]
            g = tl.load((grad0_ptr if i == 0 else grad1_ptr) + at, mask=live, other=0.).to(acc)
            if SILU:
                y = _pre_activation(
                    x_ptr, weight_ptr + i * K * channels, bias_ptr + i * channels, t, c, mask, length, channels, x_l,
                    K, REVERSE0 if i == 0 else REVERSE1, BEFORE, HAS_BIAS)
                gate = sigmoid(y)
                g *= gate * (1. + y * (1. - gate))
                tl.store((pre0_ptr if i == 0 else pre1_ptr) + at, g.to(pre0_ptr.dtype.element_ty), mask=live)
            for k in tl.static_range(K):
                x = _tokens(x_ptr, t, k, c, mask, length, x_l, REVERSE0 if i == 0 else REVERSE1, BEFORE).to(acc)
                shares += tl.where((k1 == k)[:, None], tl.sum(g * x, 0)[None, :], 0.)
            if HAS_BIAS:
                shares += tl.where((k1 == K)[:, None], tl.sum(g, 0)[None, :], 0.)
            begin += TOKENS
        to = ((i * batch + b) * segments + segment) * (K + 1) + k1
        tl.store(
            dparams_ptr + to[:, None] * channels + c[None, :], shares, mask=(k1 < K + 1)[:, None] & mask[None, :])


@triton.jit
def _conv_backward_input(
        pre0_ptr, pre1_ptr, weight_ptr, dx_ptr,
        length, channels, tiles, blocks,
        K: tl.constexpr, BEFORE: tl.constexpr, DIRECTIONS: tl.constexpr, REVERSE0: tl.constexpr, REVERSE1: tl.constexpr,
        TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):
    """dx: the mirrored convolution of the gradients before the activation, summed over the directions."""
    pid = tl.program_id(0)
    c = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = c < channels
    t = ((pid // blocks) % tiles).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    item = (pid // blocks // tiles).to(tl.int64) * length * channels
    dx = _pre_activation(
        pre0_ptr + item, weight_ptr, weight_ptr, t, c, mask, length, channels, channels,
        K, not REVERSE0, BEFORE, False)
    if DIRECTIONS == 2:
        dx += _pre_activation(
            pre1_ptr + item, weight_ptr + K * channels, weight_ptr, t, c, mask, length, channels, channels,
            K, not REVERSE1, BEFORE, False)
    to = item + t[:, None] * channels + c[None, :]
    tl.store(dx_ptr + to, dx.to(dx_ptr.dtype.element_ty), mask=(t < length)[:, None] & mask[None, :])


def _prepare(call: ConvCall) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict]:
    """x, the weights (directions, K, channels), the biases (directions, channels), and compile-time arguments."""
    acc = acc_dtype(call.x.dtype)
    weight = torch.stack([w.t() for w in call.weight]).to(acc)
    bias = torch.stack(tuple(call.bias)).to(acc) if call.bias else weight
    kernel_size = weight.shape[1]
    return last_contiguous(call.x), weight, bias, dict(
        K=kernel_size,
        BEFORE=(kernel_size - 1) // 2 if call.centered else kernel_size - 1,
        DIRECTIONS=len(call.weight),
        REVERSE0=call.reverse[0],
        REVERSE1=call.reverse[-1],
        TOKENS=TOKENS,
        BLOCK=BLOCK,
        num_warps=4,
        **OPTIONS,
    )


def conv_forward(call: ConvCall) -> List[torch.Tensor]:
    """Run `call`: one output a direction."""
    batch, length, channels = call.x.shape
    outs = [call.x.new_empty(call.x.shape) for _ in call.weight]
    if call.x.numel() == 0:
        return outs
    tiles, blocks = triton.cdiv(length, TOKENS), triton.cdiv(channels, BLOCK)
    with device_guard(call.x):
        x, weight, bias, shared = _prepare(call)
        _conv_forward[(batch * tiles * blocks,)](
            x, weight, bias, outs[0], outs[-1],
            length, channels, tiles, blocks, *strides(x, 0, 1),
            SILU=call.silu, HAS_BIAS=len(call.bias) > 0, **shared)
    return outs


def conv_backward(
        call: ConvCall,
        grad_outs: List[torch.Tensor],
) -> ConvGradients:
    """Gradients of x (summed over directions), of the weights and of the biases of `call`."""
    batch, length, channels = call.x.shape
    n_directions, kernel_size = len(call.weight), call.weight[0].shape[1]
    dx = call.x.new_empty(call.x.shape)
    tiles, blocks = triton.cdiv(length, TOKENS), triton.cdiv(channels, BLOCK)
    segments = triton.cdiv(length, SEGMENT_SIZE)
    with device_guard(call.x):
        x, weight, bias, shared = _prepare(call)
        dparams = weight.new_empty(n_directions, batch * segments, kernel_size + 1, channels)
        if dx.numel():
            grads = [g.contiguous() for g in grad_outs]
            pre = [torch.empty_like(g) for g in grads] if call.silu else grads
            _conv_backward_activation[(batch * segments * blocks,)](
                x, weight, bias, grads[0], grads[-1], pre[0], pre[-1], dparams,
                batch, length, channels, segments, blocks, *strides(x, 0, 1),
                K1_POW2=triton.next_power_of_2(kernel_size + 1), SILU=call.silu, HAS_BIAS=len(call.bias) > 0,
                SEGMENT_SIZE=SEGMENT_SIZE, **shared)
            _conv_backward_input[(batch * tiles * blocks,)](
                pre[0], pre[-1], weight, dx, length, channels, tiles, blocks, **shared)
        dparams = dparams.sum(1)
    dweights = [d[:kernel_size].t().contiguous().to(w.dtype) for d, w in zip(dparams, call.weight)]
    dbiases = [d[kernel_size].to(b.dtype) for d, b in zip(dparams.clone(), call.bias)]
    return dx, dweights, dbiases
