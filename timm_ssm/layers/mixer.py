"""Mixers in two steps: project the tokens to what the scans are given, then scan."""
from contextlib import nullcontext
from typing import Dict, List, NamedTuple, Optional

import torch
from timm.layers import register_notrace_function
from torch import nn

from ..ops import bidirectional_selective_scan, selective_scan
from .ssm import at_least_float32

# torch.fx records their calls instead of tracing into them
torch.fx.wrap('selective_scan')
torch.fx.wrap('bidirectional_selective_scan')


class ScanInputs(NamedTuple):
    """What one direction of a mixer gives its scan: the arguments of `ops.selective_scan` with softplus.

    u, delta, B, C and z hold L tokens each, in the order in which they lie in memory for the scan, which walks them
    from the last to the first if `reverse`; `ScanMixer.restore` brings them to the order of the mixer's input.
    """
    u: torch.Tensor  # (B, L, D)
    delta: torch.Tensor  # (B, L, D), before its bias and softplus
    A: torch.Tensor  # (D, N), negative
    B: torch.Tensor  # (B, L, N)
    C: torch.Tensor  # (B, L, N)
    D: torch.Tensor  # (D,)
    z: Optional[torch.Tensor]  # (B, L, D), the scan's gate, if it has one
    delta_bias: torch.Tensor  # (D,)
    reverse: bool = False
    residual: bool = False
    mask_diagonal: bool = False
    bypass: Optional[torch.Tensor] = None  # what the mixer joins to the scan's result by itself, if anything


class ScanMixer(nn.Module):
    """Base of the mixers that scan. A subclass has `project` and a forward that scans what it returns."""

    def project(self, x: torch.Tensor) -> List[ScanInputs]:
        """The mixer's input to what its scans are given, one item for each direction."""
        raise NotImplementedError

    def restore(self, y: torch.Tensor, direction: int, shape: List[int]) -> torch.Tensor:
        """Bring one direction's tokens to the order of the mixer's input.

        Args:
            y: Tokens (B, L, C) as they lie in the scan inputs of that direction, u or delta for instance.
            direction: Index of the direction.
            shape: The shape of the mixer's input, (B, ..., dim).

        Returns:
            y as (B, ..., C).
        """
        return y


def scan_mixers(model: nn.Module) -> Dict[str, ScanMixer]:
    """All mixers of a model that scan, by their names in it, in the order of the model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, ScanMixer)}


def scan(inputs: ScanInputs) -> torch.Tensor:
    """One direction's scan, (B, L, D)."""
    return selective_scan(
        inputs.u, inputs.delta, inputs.A, inputs.B, inputs.C, inputs.D, inputs.z, inputs.delta_bias,
        reverse=inputs.reverse, residual=inputs.residual, mask_diagonal=inputs.mask_diagonal)


def bidirectional_scan(inputs: List[ScanInputs]) -> torch.Tensor:
    """The sum (B, L, D) of a forward and a reverse scan with the same gate, as one op."""
    forward, reverse = inputs[0], inputs[1]
    return bidirectional_selective_scan(
        (forward.u, reverse.u),
        (forward.delta, reverse.delta),
        (forward.A, reverse.A),
        (forward.B, reverse.B),
        (forward.C, reverse.C),
        (forward.D, reverse.D),
        forward.z,
        (forward.delta_bias, reverse.delta_bias),
        residual=forward.residual,
        mask_diagonal=reverse.mask_diagonal,
    )


def float32_scan(inputs: ScanInputs) -> torch.Tensor:
    """One direction's scan of activations in float32 at least, under autocast too. Returns that dtype."""
    return _float32_scan(
        inputs.u, inputs.delta, inputs.A, inputs.B, inputs.C, inputs.D, inputs.delta_bias, inputs.reverse)


@torch.fx.wrap
@register_notrace_function
def _float32_scan(
        u: torch.Tensor,
        delta: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        D: torch.Tensor,
        delta_bias: torch.Tensor,
        reverse: bool,
) -> torch.Tensor:
    u, delta = at_least_float32(u), at_least_float32(delta)
    B, C = at_least_float32(B), at_least_float32(C)
    if torch.jit.is_scripting():
        return selective_scan(u, delta, A, B, C, D, delta_bias=delta_bias, reverse=reverse)
    else:
        device = u.device.type
        autocast = device != 'meta' and torch.is_autocast_enabled(device)  # meta knows no autocast
        with torch.autocast(device, enabled=False) if autocast else nullcontext():
            return selective_scan(u, delta, A, B, C, D, delta_bias=delta_bias, reverse=reverse)
