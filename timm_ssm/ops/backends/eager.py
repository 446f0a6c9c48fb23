"""Both ops in plain PyTorch with hand-written gradients: the backend that runs where nothing faster does.

Vectorised over everything but time, with memory linear in the length.
"""
from typing import List, Tuple

import torch
import torch.nn.functional as F

from ..calls import CHUNK_SIZE, ConvCall, ConvGradients, ScanCall, ScanGradients, ScanResult, acc_dtype
from .base import Backend


class Eager(Backend):
    name = 'eager'

    def scan_forward(self, call: ScanCall, save: bool) -> ScanResult:
        out = None
        states = call.new_states() if save else None
        for i in range(len(call.u)):
            d = _Direction(call, i)
            y = torch.empty(d.u.shape, dtype=d.acc, device=d.u.device)
            h = d.start()
            for s in range(0, d.length, CHUNK_SIZE):
                if states is not None:
                    states[i, :, s // CHUNK_SIZE] = h.flatten(1, 2).mT
                u, _, _, _, C, decay, own = d.chunk(s)
                hs = d.states(h, decay, own)
                h = hs[-1]
                y[:, s:s + CHUNK_SIZE] = (d.seen(s, hs, own) * C).sum(-1)
                if d.D is not None:
                    y[:, s:s + CHUNK_SIZE] += d.D * u
            y = d.ordered(y.flatten(2))
            out = y if out is None else out + y
        dtype = call.u[0].dtype
        if call.z is None:
            return out.to(dtype), None, states
        y = out.to(dtype) if save else None
        return (out * F.silu(call.z.to(out.dtype))).to(dtype).contiguous(), y, states

    def scan_backward(
            self,
            call: ScanCall,
            grad_out: torch.Tensor,
            y: torch.Tensor,
            states: torch.Tensor,
    ) -> ScanGradients:
        """With g_t = dL/dh_t = C_t dy_t + a_{t+1} g_{t+1}, walked from the last token of the scan to the first, the
        chunk's states recomputed from the one saved at its start."""
        acc = acc_dtype(grad_out.dtype)
        dy, dz = grad_out.to(acc), None
        if call.z is not None:
            z = call.z.to(acc)
            gate = torch.sigmoid(z)
            dz = (dy * y.to(acc) * gate * (1 + z * (1 - gate))).to(grad_out.dtype).contiguous()
            dy = dy * z * gate
        return [_direction_backward(_Direction(call, i), dy, states[i]) for i in range(len(call.u))], dz

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
    """One direction of a scan in scan order and accumulation dtype, with chunk-wise access.

    Channels are split in (groups, channels per group), so that B and C broadcast over a group's channels.
    """

    def __init__(self, call: ScanCall, i: int) -> None:
        u, delta, A, B = call.u[i], call.delta[i], call.A[i], call.B[i]
        self.acc = acc_dtype(u.dtype)
        self.reverse = call.reverse[i]
        self.residual, self.mask_diagonal = call.residual, call.mask_diagonal[i]
        self.softplus = call.delta_softplus
        self.groups = B.shape[2] if B.ndim == 4 else 1
        self.batch, self.length, self.channels = u.shape
        self.d_state = A.shape[1]
        self.u, self.delta = self.split(self.ordered(u)), self.split(self.ordered(delta))
        self.B, self.C = self.ordered(B), self.ordered(call.C[i])
        self.A = A.unflatten(0, (self.groups, -1))
        self.D = call.D[i].unflatten(0, (self.groups, -1)) if call.D else None
        self.bias = call.delta_bias[i].unflatten(0, (self.groups, -1)) if call.delta_bias else None

    def ordered(self, x: torch.Tensor) -> torch.Tensor:
        return x.flip(1) if self.reverse else x

    def split(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (self.groups, -1))  # (B, L, D) -> (B, L, G, D / G)

    def chunk(self, s: int) -> Tuple[torch.Tensor, ...]:
        """u, delta + bias, dt (B, T, G, Dg), B, C (B, T, G, 1, N), decay and input (B, T, G, Dg, N) of one chunk."""
        t = slice(s, s + CHUNK_SIZE)
        u, x = self.u[:, t].to(self.acc), self.delta[:, t].to(self.acc)
        B, C = (m[:, t].to(self.acc).reshape(*u.shape[:3], 1, self.d_state) for m in (self.B, self.C))
        if self.bias is not None:
            x = x + self.bias
        dt = F.softplus(x, threshold=20.) if self.softplus else x
        decay = torch.exp(dt[..., None] * self.A)
        return u, x, dt, B, C, decay, (dt * u)[..., None] * B

    def start(self) -> torch.Tensor:
        if self.residual and self.length:
            return self.u[:, 0, ..., None].to(self.acc).expand(-1, -1, -1, self.d_state).contiguous()
        return torch.zeros(
            (self.batch, *self.A.shape), dtype=self.acc, device=self.u.device)

    def states(self, h: torch.Tensor, decay: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        """The states after each token of a chunk, (T, B, G, Dg, N), from the state before it."""
        hs = h.new_empty(decay.shape[1], *h.shape)
        for t in range(decay.shape[1]):
            h = torch.addcmul(own[:, t], decay[:, t], h, out=hs[t])
        return hs

    def seen(self, s: int, hs: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        """What C reads, (B, T, G, Dg, N): the state, or the state without the token's own contribution."""
        hs = hs.transpose(0, 1)
        if self.mask_diagonal:
            hs = hs - own
            if s == 0:
                hs[:, 0] = 0.
        return hs


def _direction_backward(d: _Direction, dy: torch.Tensor, states: torch.Tensor) -> List[torch.Tensor]:
    dy = d.split(d.ordered(dy))
    du, ddelta = (torch.empty(dy.shape, dtype=d.acc, device=dy.device) for _ in range(2))
    dB, dC = (torch.empty(x.shape, dtype=d.acc, device=dy.device) for x in (d.B, d.C))
    dA = torch.zeros_like(d.A)
    g = torch.zeros((d.batch, *d.A.shape), dtype=d.acc, device=dy.device)  # dL/dh flowing in from the next token
    starts = range(0, d.length, CHUNK_SIZE)
    for s in reversed(starts):
        t = slice(s, s + CHUNK_SIZE)
        u, x, dt, B, C, decay, own = d.chunk(s)
        h0 = states[:, s // CHUNK_SIZE].mT.unflatten(1, d.A.shape[:2])
        hs = d.states(h0, decay, own)
        dyt = dy[:, t, ..., None]
        dseen = dyt * C
        if d.mask_diagonal and s == 0:
            dseen[:, 0] = 0.
        # gradients of the decayed state and of the token's own contribution: equal unless the diagonal is masked
        g_state = torch.empty_like(decay)
        g_own = torch.empty_like(decay) if d.mask_diagonal else g_state
        for k in range(decay.shape[1] - 1, -1, -1):
            if d.mask_diagonal:
                g_own[:, k] = g
            torch.add(g, dseen[:, k], out=g_state[:, k])
            g = decay[:, k] * g_state[:, k]
        before = torch.cat((h0[None], hs[:-1])).transpose(0, 1)
        d_decay = g_state * before * decay
        dt_u = dt * u
        ddt = (d_decay * d.A).sum(-1) + (g_own * B).sum(-1) * u
        du[:, t] = (g_own * B).sum(-1) * dt
        dA += torch.einsum('btgdn,btgd->gdn', d_decay, dt)
        dB[:, t] = (g_own * dt_u[..., None]).sum(3).view_as(dB[:, t])
        dC[:, t] = (d.seen(s, hs, own) * dyt).sum(3).view_as(dC[:, t])
        if d.D is not None:
            du[:, t] += d.D * dy[:, t]
        if d.softplus:
            ddt = ddt * torch.where(x > 20., 1., torch.sigmoid(x))
        ddelta[:, t] = ddt
    if d.residual and d.length:
        du[:, 0] += g.sum(-1)

    dtype = d.u.dtype
    du, ddelta = du.flatten(2), ddelta.flatten(2)
    grads = [d.ordered(du).to(dtype), d.ordered(ddelta).to(dtype), dA.flatten(0, 1)]
    grads += [d.ordered(dB).to(dtype), d.ordered(dC).to(dtype)]
    if d.D is not None:
        grads.append((dy * d.u.to(d.acc)).sum((0, 1)).flatten())
    if d.bias is not None:
        grads.append(ddelta.sum((0, 1)))
    return grads
