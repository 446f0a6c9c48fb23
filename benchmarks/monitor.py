"""What `--monitor` costs: training steps with and without the statistics, timed in turns.

    python benchmarks/monitor.py

The rows go to benchmarks/results/monitor.csv.
"""
import tempfile
from contextlib import nullcontext
from pathlib import Path

import timm
import torch
from harness import Row, report, time_in_turns

from timm_ssm.training.monitor import Monitor

INTERVAL, BATCH_SIZE = 50, 4


def measure(name: str, seconds: float, **kwargs) -> Row:
    """The share of a step that one in INTERVAL with statistics adds, in per cent."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, **kwargs).train()
    optimizer = torch.optim.AdamW(model.parameters())
    size = kwargs.get('img_size', 224)
    x, target = torch.randn(BATCH_SIZE, 3, size, size), torch.arange(BATCH_SIZE)
    with tempfile.TemporaryDirectory() as folder:
        monitor = Monitor(model, str(Path(folder) / 'monitor.csv'), 0)

        def step(watched: bool = False) -> None:
            loss = torch.nn.functional.cross_entropy(model(x), target)
            loss.backward()
            if watched:
                monitor.before_step()
            optimizer.step()
            if watched:
                monitor.after_step()
                monitor.record(0, 1, loss.item(), 1e-3, x, nullcontext)
            optimizer.zero_grad()

        times = time_in_turns(dict(plain=step, watched=lambda: step(True)), seconds)
    plain, watched = times['plain'], times['watched']
    return Row(
        f'{name}, {size} x {size}', 100 * (watched - plain) / plain / INTERVAL, 3., less=True,
        detail=f'a step takes {plain:.3f} s, one with statistics {watched:.3f} s')


def main() -> None:
    torch.set_num_threads(2)
    report('monitor', [
        measure('videomamba_tiny_patch16_224', 30.),
        measure('videomamba_tiny_patch16_224', 15., img_size=64),
        measure('vmamba_tiny', 30.),
    ], interval=str(INTERVAL), batch=str(BATCH_SIZE), unit='per cent of a step')


if __name__ == '__main__':
    main()
