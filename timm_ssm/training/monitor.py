"""Monitoring of a run: statistics at intervals in monitor.csv, and spikes of the loss."""
import csv
import logging
import os
import statistics
from collections import deque
from typing import Any, Callable, Dict, List, Optional

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ..layers.mixer import ScanInputs, scan_mixers, step_sizes
from ..ops import selective_scan
from .checkpoints import atomic_write
from .evaluation import evaluating
from .sharding import gathered, named_blocks

MAX_TOKENS = 1024  # of a scan whose states are looked at

_logger = logging.getLogger(__name__)


class Spiked(Exception):
    """A loss, or one too many, is far from those before it."""


class SpikeDetector:
    """Finds losses far above those before them.

    The score of a loss is its distance from the median of the latest ones, in units of their median absolute deviation
    (times 1.4826: standard deviations, were they normal).

    Args:
        threshold: Score from which on a loss is a spike.
        window: Number of losses to compare with; spikes are not among them.
    """

    WARM_UP = 20  # losses to see before any is a spike

    def __init__(self, threshold: float, window: int = 100):
        self.threshold = threshold
        self.losses: deque = deque(maxlen=window)
        self.count = 0

    def score(self, loss: float) -> float:
        if len(self.losses) < self.WARM_UP:
            return 0.
        median = statistics.median(self.losses)
        deviation = 1.4826 * statistics.median(abs(x - median) for x in self.losses)
        return (loss - median) / max(deviation, 1e-3 * abs(median), 1e-12)

    def is_spike(self, loss: float) -> bool:
        """Whether a loss is one, which is counted then; all losses have to be passed, in their order."""
        score = self.score(loss)
        if not score < self.threshold:  # NaN is one
            self.count += 1
            return True
        self.losses.append(loss)
        return False

    def state_dict(self) -> Dict[str, Any]:
        return dict(losses=list(self.losses), count=self.count)

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        self.losses.extend(state['losses'])
        self.count = state['count']


class Monitor:
    """Statistics of a model and its training, a row of monitor.csv each time `record` is called.

    Columns are `loss`; `loss_score`, the highest of a SpikeDetector since the last row; `grad_norm`, before clipping;
    and for each block NAME `NAME.grad_norm`, `NAME.update_ratio` (norm of the step over that of the weights) and
    `NAME.activation` (root mean square of its output). For each mixer NAME that scans, over its directions, the range
    of dt in `NAME.dt_min` and `NAME.dt_max`, of exp(dt A) in `NAME.decay_min` and `NAME.decay_max`, and the largest
    state in `NAME.state_max`, of the first `MAX_TOKENS` tokens of a scan.

    Activations are those of the first sample of the batch in a forward pass of its own, in eval mode, which changes
    nothing of the run, be it compiled or distributed.

    Args:
        model: Not wrapped for compilation or several processes.
        path: File to write; rows up to `start_update` are kept. None to write none: of a sharded model every process
            needs a monitor, and one of them writes.
        start_update: Optimiser steps done.
    """

    def __init__(self, model: nn.Module, path: Optional[str], start_update: int):
        self.model = model
        self.path = path
        self.blocks = dict(named_blocks(model))
        self.mixers = scan_mixers(model)
        self.scores = SpikeDetector(float('inf'))
        self.score = 0.
        self.row: Dict[str, float] = {}
        self.before: Dict[str, List[torch.Tensor]] = {}
        rows = []
        if path and start_update and os.path.exists(path):
            with open(path, newline='') as f:
                rows = [row for row in csv.DictReader(f) if int(row['update']) <= start_update]
        self.columns = ['epoch', 'update', 'loss', 'loss_score', 'lr', 'grad_norm']
        for kind in ('grad_norm', 'update_ratio', 'activation'):
            self.columns += [f'{name}.{kind}' for name in self.blocks]
        for kind in ('dt_min', 'dt_max', 'decay_min', 'decay_max', 'state_max'):
            self.columns += [f'{name}.{kind}' for name in self.mixers]
        if path:
            with atomic_write(path, 'w', newline='') as f:
                writer = csv.DictWriter(f, self.columns, extrasaction='ignore', restval='')
                writer.writeheader()
                writer.writerows(rows)

    def see_losses(self, losses: List[float]) -> None:
        """Score the latest losses."""
        for loss in losses:
            self.score = max(self.score, self.scores.score(loss))
            self.scores.is_spike(loss)

    def before_step(self) -> None:
        """Look at the gradients, which are not clipped yet, and remember the weights."""
        norms = {name: norm([p.grad for p in block.parameters()]) for name, block in self.blocks.items()}
        self.row = {'grad_norm': norm([p.grad for p in self.model.parameters()])}
        self.row.update({f'{name}.grad_norm': value for name, value in norms.items()})
        self.before = {
            name: [p.detach().clone() for p in block.parameters()] for name, block in self.blocks.items()}

    def after_step(self) -> None:
        """Compare the weights with those before the step."""
        for name, block in self.blocks.items():
            steps = [p.detach() - old for p, old in zip(block.parameters(), self.before[name])]
            self.row[f'{name}.update_ratio'] = norm(steps) / max(norm(self.before[name]), 1e-12)
        self.before = {}

    def record(self, epoch: int, update: int, loss: float, lr: float, input: torch.Tensor, autocast: Callable) -> None:
        """Write the row of optimiser step number `update`, from 1; `input` is its last batch."""
        with gathered(self.model):
            self.probe(input[:1], autocast)
        row = dict(epoch=epoch, update=update, loss=loss, loss_score=self.score, lr=lr, **self.row)
        if self.path:
            with open(self.path, 'a', newline='') as f:
                csv.DictWriter(f, self.columns).writerow({
                    k: f'{v:.6g}' if isinstance(v, float) else v for k, v in row.items()})
        self.row, self.score = {}, 0.

    @torch.no_grad()
    def probe(self, input: torch.Tensor, autocast: Callable) -> None:
        """Look at the activations of a sample."""
        found: Dict[str, torch.Tensor] = {}

        def see_block(name: str) -> Callable:
            def hook(module: nn.Module, inputs: Any, output: Any) -> None:
                outputs = output if isinstance(output, tuple) else (output,)
                found[f'{name}.activation'] = sum(x.float() for x in outputs if x is not None).square().mean().sqrt()
            return hook

        def see_mixer(name: str) -> Callable:
            def hook(module: nn.Module, inputs: Any) -> None:
                seen = [scan_statistics(s) for s in module.project(inputs[0])]
                for key in seen[0]:
                    extreme = min if key.endswith('min') else max
                    found[f'{name}.{key}'] = extreme(s[key] for s in seen)
            return hook

        hooks = [block.register_forward_hook(see_block(name)) for name, block in self.blocks.items()]
        hooks += [mixer.register_forward_pre_hook(see_mixer(name)) for name, mixer in self.mixers.items()]
        try:
            with evaluating(self.model), autocast():
                self.model(input)
        finally:
            for hook in hooks:
                hook.remove()
        self.row.update({name: float(value) for name, value in found.items()})


def norm(tensors: List[Optional[torch.Tensor]]) -> float:
    """The norm of all of them together."""
    tensors = [t for t in tensors if t is not None]
    if not tensors:
        return 0.
    total = torch.nn.utils.get_total_norm(tensors)
    return float(total.full_tensor() if isinstance(total, DTensor) else total)


def scan_statistics(s: ScanInputs) -> Dict[str, torch.Tensor]:
    """Ranges of dt, exp(dt A) and the state of one direction, of one sample."""
    n = s.A.shape[1]
    dt = step_sizes(s)
    low, high = dt.amin((0, 1))[:, None], dt.amax((0, 1))[:, None]
    decays = torch.cat([low * s.A, high * s.A]).exp()  # exp is monotonous: the extremes are at those of dt
    keep = slice(-MAX_TOKENS, None) if s.reverse else slice(MAX_TOKENS)
    # a scan whose C picks one component of the state returns that, so a batch of them returns the state
    pick = torch.eye(n, device=dt.device)[:, None].expand(n, dt[:, keep].shape[1], n)
    u, delta, B = (x[:, keep].float().expand(n, *x[:, keep].shape[1:]).contiguous() for x in (s.u, s.delta, s.B))
    C = (pick if B.ndim == 3 else pick[:, :, None].expand_as(B)).contiguous()
    with torch.autocast(dt.device.type, enabled=False):
        states = selective_scan(u, delta, s.A.float(), B, C, delta_bias=s.delta_bias.float(), reverse=s.reverse)
    return dict(
        dt_min=dt.min(), dt_max=dt.max(), decay_min=decays.min(), decay_max=decays.max(), state_max=states.abs().max())
