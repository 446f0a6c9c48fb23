"""Parameters that every Mamba mixer has."""
import math

import torch
from torch import nn
from torch.nn import functional as F

from ..ops import causal_conv1d


class DtProj(nn.Linear):
    """Projection of the step size, whose bias is left to the scan: it adds it in float32, whatever the activations."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight)


class CausalConv1d(nn.Conv1d):
    """Parameters of `ops.causal_conv1d`, named and initialised as in nn.Conv1d, and the op itself as forward."""
    bias: torch.Tensor  # never None, which TorchScript wants to be told

    def __init__(self, channels: int, kernel_size: int, device=None, dtype=None) -> None:
        super().__init__(
            channels, channels, kernel_size, groups=channels, padding=kernel_size - 1, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, L, channels) -> (B, L, channels), SiLU applied"""
        return causal_conv1d(x, self.weight.squeeze(1), self.bias)


def init_dt(proj: nn.Linear, dt_min: float = 1e-3, dt_max: float = 1e-1) -> None:
    """Initialise a step size projection as Mamba does: softplus(bias) log-uniform in [dt_min, dt_max].

    See section 3.6 of https://arxiv.org/abs/2312.00752.
    """
    bound = proj.in_features ** -0.5
    nn.init.uniform_(proj.weight, -bound, bound)
    with torch.no_grad():
        dt = torch.empty_like(proj.bias).uniform_(math.log(dt_min), math.log(dt_max)).exp()
        proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus


def init_A_log(A_log: nn.Parameter) -> None:
    """Fill A_log (..., D, N) so that state n decays at rate n + 1 (S4D-Real, https://arxiv.org/abs/2206.11893)."""
    with torch.no_grad():
        n = torch.arange(1, A_log.shape[-1] + 1, dtype=torch.float32, device=A_log.device)
        A_log.copy_(n.log().expand_as(A_log))


def state_decay(A_log: torch.Tensor) -> torch.Tensor:
    """A = -exp(A_log), in float32 at least."""
    return -torch.exp(at_least_float32(A_log))


@torch.fx.wrap  # the branch depends on what torch.fx does not know
def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """x, in float32 if it is of a half precision."""
    return x.float() if x.dtype == torch.bfloat16 or x.dtype == torch.float16 else x
