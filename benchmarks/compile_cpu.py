"""torch.compile on the CPU: forward passes and training steps against those of the same model, not compiled.

    python benchmarks/compile_cpu.py [--models NAME ...] [--seconds 10] [--batch 4]

Ratios of medians, timed in turns. Compiling takes minutes; a second run finds it in Inductor's cache. What the table in
results/ holds of other models stays there. The machine should be idle.
"""
import argparse
from functools import partial
from typing import Callable, Iterator, Sequence

import timm
import torch
from harness import Row, report, time_in_turns
from torch.nn import functional as F

import timm_ssm  # noqa: F401  registers the models

MODELS = ('videomamba_tiny_patch16_224', 'mambavision_tiny', 'groupmamba_tiny')


def forward(model: Callable, x: torch.Tensor) -> None:
    with torch.no_grad():
        model(x)


def step(model: Callable, x: torch.Tensor) -> None:
    F.cross_entropy(model(x), torch.zeros(len(x), dtype=torch.long)).backward()


def rows(models: Sequence[str], batch: int, seconds: float) -> Iterator[Row]:
    for name in models:
        model = timm.create_model(name).eval()
        compiled = torch.compile(model, fullgraph=True, dynamic=False)
        for run, size in ((forward, 1), (forward, batch), (step, batch)):
            x = torch.randn(size, 3, 224, 224)
            times = time_in_turns(dict(eager=partial(run, model, x), compiled=partial(run, compiled, x)), seconds)
            yield Row(
                f'{name}, batch {size}, {run.__name__}: speed, compiled / eager', times['eager'] / times['compiled'],
                detail=f'{times["compiled"] * 1e3:.1f} against {times["eager"] * 1e3:.1f} ms')


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--models', nargs='+', default=MODELS, choices=MODELS)
    parser.add_argument('--seconds', type=float, default=10., help='time to spend on each comparison')
    parser.add_argument('--batch', type=int, default=4)
    args = parser.parse_args()
    found = []
    for row in rows(args.models, args.batch, args.seconds):
        print(row.name, row.value, row.detail, flush=True)
        found.append(row)
    report('compile_cpu', found, keep=True)


if __name__ == '__main__':
    main()
