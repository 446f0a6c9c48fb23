"""The bidirectional Mamba mixer."""
import math
from typing import Optional

import torch
from torch import nn

from ..ops import bidirectional_causal_conv1d, bidirectional_selective_scan
from .ssm import CausalConv1d, DtProj, init_dt, log_decay_init, state_decay


class BiMamba(nn.Module):
    """Bidirectional Mamba mixer (Vim, https://arxiv.org/abs/2401.09417; VideoMamba, https://arxiv.org/abs/2403.06977).

    One input projection; a forward and a reverse branch of causal convolution, input-dependent B, C and dt, and
    selective scan, each with its own parameters (suffix `_b` for the reverse); both scans gated by silu(z) and added;
    one output projection.
    """

    def __init__(
            self,
            dim: int,
            d_state: int = 16,
            d_conv: int = 4,
            expand: int = 2,
            dt_rank: Optional[int] = None,
            device=None,
            dtype=None,
    ) -> None:
        """
        Args:
            dim: Width of the tokens.
            d_state: States of a channel.
            d_conv: Taps of the convolution.
            expand: Width of the scanned channels over dim.
            dt_rank: Rank of the step size's projection; ceil(dim / 16) if None.
        """
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        inner = expand * dim
        self.d_state = d_state
        self.dt_rank = dt_rank or math.ceil(dim / 16)

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

    def reset_parameters(self) -> None:
        """Initialise the parameters that are this module's own, A and D."""
        log_decay_init(self.A_log)
        log_decay_init(self.A_b_log)
        nn.init.ones_(self.D)
        nn.init.ones_(self.D_b)

    def init_dt(self) -> None:
        """Initialise the step sizes as Mamba does."""
        init_dt(self.dt_proj)
        init_dt(self.dt_proj_b)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, L, dim) -> (B, L, dim)"""
        x, z = self.in_proj(x).chunk(2, dim=-1)
        x, x_b = bidirectional_causal_conv1d(
            x, (self.conv1d.weight.squeeze(1), self.conv1d_b.weight.squeeze(1)),
            (self.conv1d.bias, self.conv1d_b.bias))
        split = [self.dt_rank, self.d_state, self.d_state]
        dt, B, C = self.x_proj(x).split(split, dim=-1)
        dt_b, B_b, C_b = self.x_proj_b(x_b).split(split, dim=-1)
        y = bidirectional_selective_scan(
            (x, x_b),
            (self.dt_proj(dt), self.dt_proj_b(dt_b)),
            (state_decay(self.A_log), state_decay(self.A_b_log)),
            (B, B_b),
            (C, C_b),
            (self.D, self.D_b),
            z,
            (self.dt_proj.bias, self.dt_proj_b.bias),
        )
        return self.out_proj(y)
