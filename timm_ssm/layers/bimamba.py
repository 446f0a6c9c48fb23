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
    one output projection. Vim averages the scans; VideoMambaPro (https://arxiv.org/abs/2406.19006) changes what a scan
    sees and what the branches share.
    """

    def __init__(
            self,
            dim: int,
            d_state: int = 16,
            d_conv: int = 4,
            expand: int = 2,
            dt_rank: Optional[int] = None,
            average: bool = False,
            residual: bool = False,
            mask_diagonal: bool = False,
            share: str = '',
            scan_conv: bool = True,
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
            average: Average the two directions instead of adding them (Vim).
            residual: Start both scans from their first token instead of zero (VideoMambaPro).
            mask_diagonal: Leave a token's own contribution out of the reverse scan (VideoMambaPro).
            share: What the reverse branch takes from the forward one: '' for nothing, 'x_proj' for the projection
                alone, 'all' for the convolution's output, B, C, dt and D, so that A alone is its own (VideoMambaPro).
            scan_conv: Scan the convolution's output. If False the scan runs over the input projection itself, and the
                convolution only leads to B, C and dt (VideoMambaPro's released code).
        """
        super().__init__()
        if share not in ('', 'x_proj', 'all'):
            raise ValueError(f"share: got {share!r}, needs '', 'x_proj' or 'all'")
        dd = {'device': device, 'dtype': dtype}
        inner = expand * dim
        self.d_state = d_state
        self.dt_rank = dt_rank or math.ceil(dim / 16)
        self.average = average
        self.residual = residual
        self.mask_diagonal = mask_diagonal
        self.scan_conv = scan_conv

        self.in_proj = nn.Linear(dim, 2 * inner, bias=False, **dd)
        self.conv1d = CausalConv1d(inner, d_conv, **dd)
        self.x_proj = nn.Linear(inner, self.dt_rank + 2 * d_state, bias=False, **dd)
        self.dt_proj = DtProj(self.dt_rank, inner, **dd)
        self.A_log = nn.Parameter(torch.empty(inner, d_state, **dd))
        self.D = nn.Parameter(torch.empty(inner, **dd))
        self.A_b_log = nn.Parameter(torch.empty(inner, d_state, **dd))
        if share == 'all':
            self.conv1d_b = self.dt_proj_b = self.D_b = None
        else:
            self.conv1d_b = CausalConv1d(inner, d_conv, **dd)
            self.dt_proj_b = DtProj(self.dt_rank, inner, **dd)
            self.D_b = nn.Parameter(torch.empty(inner, **dd))
        if share:
            self.x_proj_b = None
        else:
            self.x_proj_b = nn.Linear(inner, self.dt_rank + 2 * d_state, bias=False, **dd)
        self.out_proj = nn.Linear(inner, dim, bias=False, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the parameters that are this module's own, A and D."""
        log_decay_init(self.A_log)
        log_decay_init(self.A_b_log)
        nn.init.ones_(self.D)
        if self.D_b is not None:
            nn.init.ones_(self.D_b)

    def init_dt(self) -> None:
        """Initialise the step sizes as Mamba does."""
        init_dt(self.dt_proj)
        if self.dt_proj_b is not None:
            init_dt(self.dt_proj_b)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, L, dim) -> (B, L, dim)"""
        x, z = self.in_proj(x).chunk(2, dim=-1)
        if self.conv1d_b is not None:
            c, c_b = bidirectional_causal_conv1d(
                x, (self.conv1d.weight.squeeze(1), self.conv1d_b.weight.squeeze(1)),
                (self.conv1d.bias, self.conv1d_b.bias))
        else:
            c = c_b = self.conv1d(x)
        split = [self.dt_rank, self.d_state, self.d_state]
        dt, B, C = self.x_proj(c).split(split, dim=-1)
        dt = self.dt_proj(dt)
        D_b = self.D_b
        if self.dt_proj_b is not None and D_b is not None:
            x_proj_b = self.x_proj_b(c_b) if self.x_proj_b is not None else self.x_proj(c_b)
            dt_b, B_b, C_b = x_proj_b.split(split, dim=-1)
            dt_b, dt_bias_b = self.dt_proj_b(dt_b), self.dt_proj_b.bias
        else:
            dt_b, B_b, C_b, D_b, dt_bias_b = dt, B, C, self.D, self.dt_proj.bias
        y = bidirectional_selective_scan(
            (c, c_b) if self.scan_conv else (x, x),
            (dt, dt_b),
            (state_decay(self.A_log), state_decay(self.A_b_log)),
            (B, B_b),
            (C, C_b),
            (self.D, D_b),
            z,
            (self.dt_proj.bias, dt_bias_b),
            residual=self.residual,
            mask_diagonal=self.mask_diagonal,
        )
        if self.average:
            y = y / 2
        return self.out_proj(y)
