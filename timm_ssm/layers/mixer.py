"""Mixers in two steps: project the tokens to what the scans are given, then scan."""
from contextlib import nullcontext
from typing import Dict, List, NamedTuple, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import nn

from ..ops import bidirectional_selective_scan, selective_scan
from .ssm import DtProj, at_least_float32, init_A_log, init_dt


class ScanInputs(NamedTuple):
    """What one direction of a mixer gives its scan: the arguments of `ops.selective_scan` with softplus.

    u, delta, B, C and z hold L tokens each, in the order in which they lie in memory for the scan, which walks them
    from the last to the first if `reverse`; `ScanMixer.restore` brings them to the order of the mixer's input.
    """
    u: torch.Tensor  # (B, L, D)
    delta: torch.Tensor  # (B, L, D), before its bias and softplus
    A: torch.Tensor  # (D, N), negative
    B: torch.Tensor  # (B, L, N), or (B, L, G, N) for groups of channels
    C: torch.Tensor  # as B
    D: Optional[torch.Tensor]  # (D,)
    z: Optional[torch.Tensor]  # (B, L, D), the scan's gate, if it has one
    delta_bias: torch.Tensor  # (D,)
    reverse: bool = False
    residual: bool = False
    mask_diagonal: bool = False
    bypass: Optional[torch.Tensor] = None  # what the mixer joins to the scan's result by itself, if anything


def step_sizes(s: ScanInputs) -> torch.Tensor:
    """dt of one direction (B, L, D), in float32 at least."""
    return F.softplus(at_least_float32(s.delta) + s.delta_bias)


class ScanMixer(nn.Module):
    """Base of the mixers that scan. A subclass has `project` and a forward that scans what it returns."""

    def reset_parameters(self) -> None:
        """Initialise the parameters that are this module's own, A and D of each direction."""
        for name, p in self.named_parameters(recurse=False):
            if name.endswith('_log'):
                init_A_log(p)
            else:
                nn.init.ones_(p)

    def init_dt(self) -> None:
        """Initialise the step sizes as Mamba does."""
        for module in self.modules():
            if isinstance(module, DtProj):
                init_dt(module)

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


def scan(inputs: List[ScanInputs], float32: bool = False) -> torch.Tensor:
    """Run one direction's scan, or a forward and a reverse one with the same gate as one op, which adds them.

    Args:
        inputs: One item, or a forward and a reverse one.
        float32: Take the activations in float32 at least, under autocast too, and return that.

    Returns:
        (B, L, D)
    """
    return _float32_scan(inputs) if float32 else _run(inputs)


@torch.fx.wrap  # which cannot trace the context manager
def _float32_scan(inputs: List[ScanInputs]) -> torch.Tensor:
    inputs = [_in_float32(s) for s in inputs]
    if torch.jit.is_scripting():
        return _run(inputs)
    else:
        device = inputs[0].u.device.type
        autocast = device != 'meta' and torch.is_autocast_enabled(device)  # meta knows no autocast
        with torch.autocast(device, enabled=False) if autocast else nullcontext():
            return _run(inputs)


def _in_float32(s: ScanInputs) -> ScanInputs:
    z = s.z
    return ScanInputs(
        at_least_float32(s.u), at_least_float32(s.delta), s.A, at_least_float32(s.B), at_least_float32(s.C), s.D,
        None if z is None else at_least_float32(z), s.delta_bias, s.reverse, s.residual, s.mask_diagonal, s.bypass)


def _run(inputs: List[ScanInputs]) -> torch.Tensor:
    s = inputs[0]
    if len(inputs) == 1:
        return selective_scan(
            s.u, s.delta, s.A, s.B, s.C, s.D, s.z, s.delta_bias,
            reverse=s.reverse, residual=s.residual, mask_diagonal=s.mask_diagonal)
    r = inputs[1]
    D, D_r = s.D, r.D
    both: Optional[Tuple[torch.Tensor, torch.Tensor]] = None
    if D is not None and D_r is not None:
        both = (D, D_r)
    return bidirectional_selective_scan(
        (s.u, r.u), (s.delta, r.delta), (s.A, r.A), (s.B, r.B), (s.C, r.C), both, s.z,
        (s.delta_bias, r.delta_bias), residual=s.residual, mask_diagonal=r.mask_diagonal)
