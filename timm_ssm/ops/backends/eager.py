"""Both ops in plain PyTorch with hand-written gradients: the backend that runs where nothing faster does.

Vectorised over everything but the tokens, with memory linear in their number.
"""
from typing import List, Optional, Tuple

import torch
import torch.nn.functional as F

from ..calls import CHUNK_SIZE, ConvCall, ConvGradients, ScanCall, ScanGradients, ScanResult, acc_dtype
from .base import Backend


class Eager(Backend):
    name = 'eager'

    def scan_forward(self, call: ScanCall, save: bool) -> ScanResult:
        states = call.new_states() if save else None
        out = sum(_Direction(call, i).forward(states[i] if save else None) for i in range(len(call.u)))
        dtype = call.input.dtype
        y = out.to(dtype) if save and call.z is not None else None
        if call.z is not None:
            out = out * F.silu(call.z.to(out.dtype))
        return out.to(dtype).contiguous(), y, states

    def scan_backward(
            self,
            call: ScanCall,
            grad_out: torch.Tensor,
            y: Optional[torch.Tensor],
            states: torch.Tensor,
    ) -> ScanGradients:
        dtype = grad_out.dtype
        dy, dz = grad_out.to(acc_dtype(dtype)), None
        if call.z is not None:
            z = call.z.to(dy.dtype)
            gate = torch.sigmoid(z)
            dz = (dy * y.to(dy.dtype) * gate * (1 + z * (1 - gate))).to(dtype).contiguous()
            dy = dy * z * gate
        return [_Direction(call, i).backward(dy, states[i]) for i in range(len(call.u))], dz

    def conv_forward(self, call: ConvCall) -> List[torch.Tensor]:
        outs = [_convolve(call, i) for i in range(len(call.weight))]
        return [(F.silu(y) if call.silu else y).to(call.x.dtype).contiguous() for y in outs]

    def conv_backward(self, call: ConvCall, grad_outs: List[torch.Tensor]) -> ConvGradients:
        acc = acc_dtype(call.x.dtype)
        length, kernel_size = call.x.shape[1], call.weight[0].shape[1]
        dx = torch.zeros(call.x.shape, dtype=acc, device=call.x.device)
        dweights, dbiases = [], []
        for i, g in enumerate(grad_outs):
            g = g.to(acc)
            if call.silu:
                y = _convolve(call, i)
                gate = torch.sigmoid(y)
                g = g * gate * (1 + y * (1 - gate))
            weight, before, after = _taps(call, i)
            x_pad = F.pad(call.x.to(acc), (0, 0, before, after))
            g_pad = F.pad(g, (0, 0, after, before))
            dx += sum(g_pad[:, kernel_size - 1 - k:][:, :length] * weight[:, k] for k in range(kernel_size))
            dw = torch.stack([(x_pad[:, k:k + length] * g).sum((0, 1)) for k in range(kernel_size)], dim=1)
            dweights.append(dw.flip(1) if call.reverse[i] else dw)
            if call.bias:
                dbiases.append(g.sum((0, 1)))
        return dx.to(call.x.dtype), dweights, dbiases


def _taps(call: ConvCall, i: int) -> Tuple[torch.Tensor, int, int]:
    """Weights in the order of tokens in memory, and the zeros before the first and after the last token."""
    kernel_size = call.weight[i].shape[1]
    before = (kernel_size - 1) // 2 if call.centered else kernel_size - 1
    after = kernel_size - 1 - before
    return (call.weight[i].flip(1), after, before) if call.reverse[i] else (call.weight[i], before, after)


def _convolve(call: ConvCall, i: int) -> torch.Tensor:
    """Direction i before the activation, in accumulation dtype."""
    weight, before, after = _taps(call, i)
    x = F.pad(call.x.to(weight.dtype), (0, 0, before, after))
    y = sum(x[:, k:k + call.x.shape[1]] * weight[:, k] for k in range(weight.shape[1]))
    return y + call.bias[i] if call.bias else y


class _Direction:
    """One direction of a scan in accumulation dtype, a chunk of tokens at a time.

    Tensors are in scan order: (L, B, G, 1, D / G) those of channels, (L, B, G, N, 1) those of states, B and C, so that
    their products are (L, B, G, N, D / G), in which the elements of a token are contiguous.
    """

    def __init__(self, call: ScanCall, i: int) -> None:
        self.acc = acc_dtype(call.input.dtype)
        self.softplus, self.reverse = call.delta_softplus, call.reverse[i]
        self.residual, self.mask_diagonal = call.residual, call.mask_diagonal[i]
        u, delta, A, B, C, D, bias = call.direction(i)
        B, C = (x if x.ndim == 4 else x.unsqueeze(2) for x in (B, C))
        batch, self.length, self.groups, _ = B.shape
        self.u, self.delta = (self.tokens_first(self.split(x)) for x in (u, delta))
        self.B, self.C = (self.tokens_first(x).unsqueeze(-1) for x in (B, C))
        self.A = self.split(A.t()).squeeze(2).transpose(0, 1).contiguous()
        self.D, self.bias = (x if x is None else self.split(x) for x in (D, bias))
        self.start = self.A.new_zeros(batch, *self.A.shape)  # the state before the first token
        if self.residual and self.length:
            self.start += self.u[0]
        self.buffers = [self.A.new_empty(min(CHUNK_SIZE, self.length), *self.start.shape) for _ in range(2)]
        self.call, self.index = call, i

    def split(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (self.groups, 1, x.shape[-1] // self.groups))

    def tokens_first(self, x: torch.Tensor) -> torch.Tensor:
        return (x.flip(1) if self.reverse else x).transpose(0, 1)

    def batch_first(self, x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """The inverse of `tokens_first`, contiguous and in the shape of `like`."""
        return (x.flip(0) if self.reverse else x).transpose(0, 1).reshape(like.shape).contiguous()

    def chunk(self, t: slice, h: torch.Tensor) -> Tuple[torch.Tensor, ...]:
        """u, delta + bias, dt, B, C and decays of the tokens t, and the states after each of them, from the state h.

        Decays and states are overwritten by the next call.
        """
        u, x, B, C = (x[t].to(self.acc) for x in (self.u, self.delta, self.B, self.C))
        if self.bias is not None:
            x = x + self.bias
        dt = F.softplus(x, threshold=20.) if self.softplus else x
        decay, states = (x[:len(u)] for x in self.buffers)
        torch.mul(dt, self.A, out=decay).exp_()
        torch.mul(dt * u, B, out=states)
        for state, a in zip(states.unbind(), decay.unbind()):
            h = state.addcmul_(a, h)
        return u, x, dt, B, C, decay, states

    def forward(self, saved: Optional[torch.Tensor]) -> torch.Tensor:
        """y (B, L, D), before the gate. The states before each chunk are written to `saved`."""
        y = torch.empty(self.u.shape, dtype=self.acc, device=self.u.device)
        h = self.start
        for s in range(0, self.length, CHUNK_SIZE):
            if saved is not None:
                saved[:, s // CHUNK_SIZE] = h.transpose(1, 2).flatten(2)
            t = slice(s, s + CHUNK_SIZE)
            u, _, _, _, C, decay, states = self.chunk(t, h)
            decayed = decay.mul_(torch.cat((h[None], states[:-1]))) if self.mask_diagonal else None
            h = states[-1].clone()
            torch.sum((states if decayed is None else decayed).mul_(C), -2, keepdim=True, out=y[t])
            if self.mask_diagonal and s == 0:
                y[0] = 0.
            if self.D is not None:
                y[t].addcmul_(u, self.D)
        return self.batch_first(y, self.call.input)

    def backward(self, dy: torch.Tensor, saved: torch.Tensor) -> List[torch.Tensor]:
        """Gradients of u, delta, A, B, C, D and delta_bias.

        g_t = dL/dh_t = C_t dy_t + a_{t+1} g_{t+1} is walked from the last token to the first, the states of a chunk
        recomputed from the one before it.
        """
        dy = self.tokens_first(self.split(dy))
        du, ddelta = torch.empty_like(dy), torch.empty_like(dy)
        dB, dC = (torch.empty(self.B.shape, dtype=self.acc, device=dy.device) for _ in range(2))
        dA = torch.zeros_like(self.A)
        carry = torch.zeros_like(self.start)  # a_{t+1} g_{t+1} from the chunk after
        for s in reversed(range(0, self.length, CHUNK_SIZE)):
            t = slice(s, s + CHUNK_SIZE)
            h = self.split(saved[:, s // CHUNK_SIZE]).squeeze(3).transpose(1, 2)
            u, x, dt, B, C, decay, states = self.chunk(t, h)
            decayed = decay * torch.cat((h[None], states[:-1]))
            dy_C = dy[t]  # for C, which does not read the first state of a masked scan
            if self.mask_diagonal and s == 0:
                dy_C = torch.cat((torch.zeros_like(dy[:1]), dy[1:CHUNK_SIZE]))
            dC[t] = ((decayed if self.mask_diagonal else states) * dy_C).sum(-1, keepdim=True)
            g = dy_C * C
            g[-1] += carry
            for k in range(len(g) - 2, -1, -1):
                g[k].addcmul_(decay[k + 1], g[k + 1])
            # gradient of what a token adds to the state, which a masked diagonal hides until the next token
            g_added = torch.cat((decay[1:] * g[1:], carry[None])) if self.mask_diagonal else g
            carry = decay[0] * g[0]
            dB[t] = (g_added * (dt * u)).sum(-1, keepdim=True)
            g_B = (g_added * B).sum(-2, keepdim=True)
            g_exponent = g * decayed
            dA += (g_exponent * dt).sum((0, 1))
            du[t] = g_B * dt
            ddelta[t] = (g_exponent * self.A).sum(-2, keepdim=True) + g_B * u
            if self.softplus:
                ddelta[t] *= torch.where(x > 20., 1., torch.sigmoid(x))
        if self.residual and self.length:
            du[0] += carry.sum(-2, keepdim=True)
        optional = []
        if self.D is not None:
            du += self.D * dy
            optional.append((dy * self.u).sum((0, 1)).flatten())
        if self.bias is not None:
            optional.append(ddelta.sum((0, 1)).flatten())
        u, delta, A, B, C, *_ = self.call.direction(self.index)
        du, ddelta, dB, dC = (
            self.batch_first(g.to(u.dtype), like) for g, like in ((du, u), (ddelta, delta), (dB, B), (dC, C)))
        return [du, ddelta, dA.transpose(1, 2).reshape(A.shape), dB, dC, *optional]
