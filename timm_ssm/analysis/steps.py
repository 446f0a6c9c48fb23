"""The step sizes dt of scans: maps of them, and how long states last at them."""
import math
from typing import Dict, Iterator, List, NamedTuple, Tuple

import torch
from torch import nn

from ..layers.mixer import ScanInputs, step_sizes
from ..training.evaluation import evaluating
from .record import Record, is_scan, record
from .tokens import TokenLayout


def _scans(model: nn.Module, x: torch.Tensor) -> Iterator[Tuple[TokenLayout, Record, List[ScanInputs]]]:
    """Every mixer of a model that scans tokens, and what its scans are given."""
    records = record(model, x, is_scan)
    if not records:
        raise ValueError(f'model: got {type(model).__name__}, needs one with scans')
    with evaluating(model):
        layout = TokenLayout(model, x)
        for r in records:
            if not layout.stages or layout.stage_of(r) >= 0:  # GroupMamba scans its pooled features, too: one token
                yield layout, r, r.module.project(r.args[0])


class Steps(NamedTuple):
    """Step sizes of one mixer."""
    maps: torch.Tensor  # (B, directions, h, w), or (B, directions, t, h, w) for clips: the mean over channels
    low: torch.Tensor  # (directions,), of all tokens and channels
    high: torch.Tensor  # (directions,)


@torch.no_grad()
def delta_maps(model: nn.Module, x: torch.Tensor) -> Dict[str, Steps]:
    """Where a model takes large steps, that is where it lets a token in and forgets those before it.

    See section 5.6 of VideoMamba: Spatio-Temporal Selective State Space Model (https://arxiv.org/abs/2407.08476).

    Args:
        model: A model of this package.
        x: Its input: images (B, C, H, W), or clips (B, C, T, H, W).

    Returns:
        The steps by the name of the mixer, in the order of the model.
    """
    found = {}
    for layout, r, inputs in _scans(model, x):
        sizes = [step_sizes(s) for s in inputs]
        shape = list(r.args[0].shape)
        means = [
            r.module.restore(dt.mean(-1, keepdim=True), i, shape).flatten(1) for i, dt in enumerate(sizes)]
        found[r.name] = Steps(
            torch.stack([layout.to_map(r, mean) for mean in means], dim=1),
            torch.stack([dt.min() for dt in sizes]), torch.stack([dt.max() for dt in sizes]))
    return found


@torch.no_grad()
def half_lives(model: nn.Module, x: torch.Tensor) -> Dict[str, torch.Tensor]:
    """Tokens after which half of what a state holds is gone.

    A token multiplies state n of channel d by exp(dt[d] A[d, n]). With the mean of dt over the tokens of the input that
    makes ln(2) / (mean dt[d] |A[d, n]|) tokens: the number after which the product of these factors is a half, if every
    token takes the mean step.

    Args:
        model: A model of this package.
        x: Its input; images (B, C, H, W), or clips (B, C, T, H, W).

    Returns:
        (directions, D, N) by the name of the mixer, in the order of the model.
    """
    return {
        r.name: torch.stack([math.log(2) / (step_sizes(s).mean((0, 1))[:, None] * s.A.abs()) for s in inputs])
        for _, r, inputs in _scans(model, x)}
