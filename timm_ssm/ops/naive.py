"""Both ops in plain PyTorch: the executable specification, and the backend that runs where nothing faster does.

`selective_scan_naive` and `causal_conv1d_naive` say what the ops mean, token by token, and leave gradients to autograd:
every other implementation is tested against them. The functions below them compute the same with hand-written
gradients, vectorised over everything but time and with memory linear in the length; they form the `naive` backend.
"""
from typing import List, Optional, Tuple

import torch
import torch.nn.functional as F

from .calls import STATE_STRIDE, ConvCall, ScanCall, ScanResult, acc_dtype

NAME = 'naive'


def unavailable() -> Optional[str]:
    """Why this backend cannot be used on this machine: it always can."""
    return None


def refuses_scan(call: ScanCall) -> Optional[str]:
    """Why this backend cannot run `call`: it runs all of them."""
    return None


def refuses_conv(call: ConvCall) -> Optional[str]:
    """Why this backend cannot run `call`: it runs all of them."""
    return None


def selective_scan_naive(
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
) -> torch.Tensor:
    """The selective scan, one token after the other; arguments and result as in `selective_scan`.

    This is also what a scripted (TorchScript) model runs.
    """
    dtype, acc = u.dtype, acc_dtype(u.dtype)
    u, delta, A, B, C = u.to(acc), delta.to(acc), A.to(acc), B.to(acc), C.to(acc)
    batch, length, channels = u.shape
    if B.ndim == 3:
        B, C = B.unsqueeze(2), C.unsqueeze(2)
    # (B, L, G, N) -> (B, L, D, N): channel d reads group d // (D / G)
    B = B.repeat_interleave(channels // B.shape[2], dim=2)
    C = C.repeat_interleave(channels // C.shape[2], dim=2)

    dt = delta if delta_bias is None else delta + delta_bias.to(acc)
    if delta_softplus:
        dt = F.softplus(dt, threshold=20.)

    # unbind, since the gradient of an index is as large as what it indexes
    us, dts, Bs, Cs = u.unbind(1), dt.unbind(1), B.unbind(1), C.unbind(1)
    h = torch.zeros(batch, channels, A.shape[1], dtype=acc, device=u.device)
    ys: List[torch.Tensor] = []
    for i in range(length):
        t = length - 1 - i if reverse else i
        if i == 0 and residual:
            h = us[t].unsqueeze(-1).expand_as(h)
        own = (dts[t] * us[t]).unsqueeze(-1) * Bs[t]
        h = torch.exp(dts[t].unsqueeze(-1) * A) * h + own
        if not mask_diagonal:
            seen = h
        elif i > 0:
            seen = h - own
        else:
            seen = torch.zeros_like(h)
        ys.append((Cs[t] * seen).sum(-1))
    y = torch.stack(ys, dim=1) if length > 0 else torch.zeros_like(u)
    if reverse:
        y = y.flip(1)
    if D is not None:
        y = y + D.to(acc) * u
    if z is not None:
        y = y * F.silu(z.to(acc))
    return y.to(dtype)


def causal_conv1d_naive(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: Optional[torch.Tensor] = None,
        *,
        activation: Optional[str] = 'silu',
        reverse: bool = False,
        centered: bool = False,
) -> torch.Tensor:
    """The depthwise convolution along the tokens; arguments and result as in `causal_conv1d`."""
    dtype, acc = x.dtype, acc_dtype(x.dtype)
    length, kernel_size = x.shape[1], weight.shape[1]
    if reverse:  # mirrored: the kernel looks ahead, its last tap still meets the token itself
        weight = weight.flip(1)
    x = F.pad(x.to(acc), (0, 0, *_padding(kernel_size, reverse, centered)))
    y = sum(x[:, k:k + length] * weight[:, k].to(acc) for k in range(kernel_size))
    if bias is not None:
        y = y + bias.to(acc)
    if activation == 'silu':
        y = F.silu(y)
    return y.to(dtype)


def _padding(kernel_size: int, reverse: bool, centered: bool) -> Tuple[int, int]:
    """Zeros before the first and after the last token."""
    before = (kernel_size - 1) // 2 if centered else kernel_size - 1
    after = kernel_size - 1 - before
    return (after, before) if reverse else (before, after)


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
        t = slice(s, s + STATE_STRIDE)
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


def scan_forward(call: ScanCall, save: bool) -> ScanResult:
    """Run `call`."""
    out = None
    states = call.new_states() if save else None
    for i in range(len(call.u)):
        d = _Direction(call, i)
        y = torch.empty(d.u.shape, dtype=d.acc, device=d.u.device)
        h = d.start()
        for s in range(0, d.length, STATE_STRIDE):
            if states is not None:
                states[i, :, s // STATE_STRIDE] = h.flatten(1, 2)
            u, _, _, _, C, decay, own = d.chunk(s)
            hs = d.states(h, decay, own)
            h = hs[-1]
            y[:, s:s + STATE_STRIDE] = (d.seen(s, hs, own) * C).sum(-1)
            if d.D is not None:
                y[:, s:s + STATE_STRIDE] += d.D * u
        y = d.ordered(y.flatten(2))
        out = y if out is None else out + y
    dtype = call.u[0].dtype
    if call.z is None:
        return out.to(dtype), None, states
    y = out.to(dtype) if save else None
    return (out * F.silu(call.z.to(out.dtype))).to(dtype), y, states


def scan_backward(
        call: ScanCall,
        grad_out: torch.Tensor,
        y: torch.Tensor,
        states: torch.Tensor,
) -> Tuple[List[List[torch.Tensor]], Optional[torch.Tensor]]:
    """Gradients of every input of `call`: a list over directions of [u, delta, A, B, C, D?, delta_bias?], and z's.

    With g_t = dL/dh_t = C_t dy_t + a_{t+1} g_{t+1}, walked from the last token of the scan to the first, the chunk's
    states recomputed from the one saved at its start.
    """
    acc = acc_dtype(grad_out.dtype)
    dy, dz = grad_out.to(acc), None
    if call.z is not None:
        z = call.z.to(acc)
        gate = torch.sigmoid(z)
        dz = (dy * y.to(acc) * gate * (1 + z * (1 - gate))).to(grad_out.dtype)
        dy = dy * z * gate
    return [_direction_backward(_Direction(call, i), dy, states[i]) for i in range(len(call.u))], dz


def _direction_backward(d: _Direction, dy: torch.Tensor, states: torch.Tensor) -> List[torch.Tensor]:
    dy = d.split(d.ordered(dy))
    du, ddelta = (torch.empty(dy.shape, dtype=d.acc, device=dy.device) for _ in range(2))
    dB, dC = (torch.empty(x.shape, dtype=d.acc, device=dy.device) for x in (d.B, d.C))
    dA = torch.zeros_like(d.A)
    g = torch.zeros((d.batch, *d.A.shape), dtype=d.acc, device=dy.device)  # dL/dh flowing in from the next token
    starts = range(0, d.length, STATE_STRIDE)
    for s in reversed(starts):
        t = slice(s, s + STATE_STRIDE)
        u, x, dt, B, C, decay, own = d.chunk(s)
        h0 = states[:, s // STATE_STRIDE].unflatten(1, d.A.shape[:2])
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


def conv_forward(call: ConvCall) -> List[torch.Tensor]:
    """Run `call`: one output a direction."""
    activation = 'silu' if call.silu else None
    biases = call.bias or [None] * len(call.weight)
    return [
        causal_conv1d_naive(call.x, w, b, activation=activation, reverse=r, centered=call.centered)
        for w, b, r in zip(call.weight, biases, call.reverse)
    ]


def conv_backward(
        call: ConvCall,
        grad_outs: List[torch.Tensor],
) -> Tuple[torch.Tensor, List[torch.Tensor], List[torch.Tensor]]:
    """Gradients of x (summed over directions), of the weights and of the biases of `call`."""
    acc = acc_dtype(call.x.dtype)
    length = call.x.shape[1]
    dx = torch.zeros(call.x.shape, dtype=acc, device=call.x.device)
    dweights, dbiases = [], []
    biases = call.bias or [None] * len(call.weight)
    for weight, bias, reverse, g in zip(call.weight, biases, call.reverse, grad_outs):
        g = g.to(acc)
        if call.silu:
            pre = causal_conv1d_naive(
                call.x.to(acc), weight, bias, activation=None, reverse=reverse, centered=call.centered)
            gate = torch.sigmoid(pre)
            g = g * gate * (1 + pre * (1 - gate))
        w = weight.to(acc).flip(1) if reverse else weight.to(acc)
        kernel_size = w.shape[1]
        before, after = _padding(kernel_size, reverse, call.centered)
        x_pad = F.pad(call.x.to(acc), (0, 0, before, after))
        g_pad = F.pad(g, (0, 0, after, before))
        dx += sum(g_pad[:, kernel_size - 1 - k:][:, :length] * w[:, k] for k in range(kernel_size))
        dw = torch.stack([(x_pad[:, k:k + length] * g).sum((0, 1)) for k in range(kernel_size)], dim=1)
        dweights.append(dw.flip(1) if reverse else dw)
        if bias is not None:
            dbiases.append(g.sum((0, 1)))
    return dx.to(call.x.dtype), dweights, dbiases
