"""The bidirectional Mamba mixer."""
import math
from typing import List

import torch
from torch import nn

from ..ops import bidirectional_causal_conv1d
from .mixer import ScanInputs, ScanMixer, scan
from .ssm import CausalConv1d, DtProj, state_decay


class BiMamba(ScanMixer):
    """Bidirectional Mamba mixer (Vim, https://arxiv.org/abs/2401.09417; VideoMamba, https://arxiv.org/abs/2403.06977).

    One input projection; a forward and a reverse branch of causal convolution, input-dependent B, C and dt, and
    selective scan, each with its own parameters (suffix `_b` for the reverse); both scans gated by silu(z) and added;
    one output projection.
    """

    def __init__(self, dim: int, d_state: int = 16, d_conv: int = 4, expand: int = 2, device=None, dtype=None) -> None:
        """
        Args:
            dim: Width of the tokens.
            d_state: States of a channel.
            d_conv: Taps of the convolution.
            expand: Width of the scanned channels over dim.
        """
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        inner = expand * dim
        self.d_state = d_state
        self.dt_rank = math.ceil(dim / 16)

        self.in_proj = nn.Linear(dim, 2 * inner, bias=False, **dd)
        self.conv1d = CausalConv1d(inner, d_conv, **dd)
        self.x_proj = nn.Linear(inner, self.dt_rank + 2 * d_state, bias=False, **dd)
        self.dt_proj = DtProj(self.dt_rank, inner, **dd)
        self.A_log = nn.Parameter(torch.empty(inner, d_state, **dd))
        self.D = nn.Parameter(torch.empty(inner, **dd))
        self.conv1d_b = CausalConv1d(inner, d_conv, **dd)
        self.x_proj_b = nn.Linear(inner, self.dt_rank + 2 * d_state, bias=False, **dd)
        self.dt_proj_b = DtProj(self.dt_rank, inner, **dd)
        self.A_b_log = nn.Parameter(torch.empty(inner, d_state, **dd))
        self.D_b = nn.Parameter(torch.empty(inner, **dd))
        self.out_proj = nn.Linear(inner, dim, bias=False, **dd)
        self.reset_parameters()

    def project(self, x: torch.Tensor) -> List[ScanInputs]:
        """(B, L, dim) -> what the forward and the reverse scan are given."""
        x, z = self.in_proj(x).chunk(2, dim=-1)
        x, x_b = bidirectional_causal_conv1d(
            x, (self.conv1d.weight.squeeze(1), self.conv1d_b.weight.squeeze(1)), (self.conv1d.bias, self.conv1d_b.bias))
        return [self.forward_inputs(x, z), self.reverse_inputs(x_b, z)]

    def forward_inputs(self, x: torch.Tensor, z: torch.Tensor) -> ScanInputs:
        """The forward scan's inputs from its convolution's output and the gate."""
        dt, B, C = self.x_proj(x).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        return ScanInputs(x, self.dt_proj(dt), state_decay(self.A_log), B, C, self.D, z, self.dt_proj.bias)

    def reverse_inputs(self, x: torch.Tensor, z: torch.Tensor) -> ScanInputs:
        """The reverse scan's inputs from its convolution's output and the gate."""
        dt, B, C = self.x_proj_b(x).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        return ScanInputs(
            x, self.dt_proj_b(dt), state_decay(self.A_b_log), B, C, self.D_b, z, self.dt_proj_b.bias, reverse=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, L, dim) -> (B, L, dim)"""
        return self.out_proj(scan(self.project(x)))
