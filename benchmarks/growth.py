"""How a forward pass grows with tokens, and a scan with tokens, batch and channels: time, memory, fitted exponents.

    python benchmarks/growth.py [--largest 50176]

VideoMamba-Ti on one square image, timm's DeiT-Ti beside it while its attention takes seconds; the bidirectional scan
by itself. Every point is a process of its own. Exponents are slopes of the line through the logarithms of the last
three points, where constant costs hardly show. The machine should be idle.
"""
import argparse
import csv
import statistics
import time
from multiprocessing import get_context
from typing import Callable, Dict, Iterator, List, Tuple

import numpy as np
import timm
import torch
from harness import RESULTS, environment, process_memory

import timm_ssm  # noqa: F401  registers the models
from timm_ssm.ops import bidirectional_selective_scan
from timm_ssm.plot.style import figure, save, style

SIDES = (7, 14, 28, 56, 112, 224)  # patches
MODELS = {'videomamba_tiny_patch16_224': 50176, 'deit_tiny_patch16_224': 12544}  # and the most patches to give them
SCAN = dict(batch=1, tokens=197, channels=384)  # with 16 states
SCANS = dict(
    tokens=[n * n + 1 for n in SIDES],
    batch=[1, 4, 16, 64, 256],
    channels=[96, 384, 1536, 6144],
)


def model_run(name: str, side: int) -> Callable[[], object]:
    model = timm.create_model(name, img_size=16 * side).eval()
    x = torch.randn(1, 3, 16 * side, 16 * side)
    return lambda: model(x)


def scan_run(batch: int, tokens: int, channels: int) -> Callable[[], object]:
    def pair(*shape: int) -> Tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(shape), torch.randn(shape)

    B, L, D, N = batch, tokens, channels, 16
    A = tuple(-x.exp() for x in pair(D, N))
    args = (pair(B, L, D), pair(B, L, D), A, pair(B, L, N), pair(B, L, N), pair(D))
    z, bias = torch.randn(B, L, D), pair(D)
    return lambda: bidirectional_selective_scan(*args, z=z, delta_bias=bias)


@torch.inference_mode()
def measure(prepare: Callable[..., Callable[[], object]], *args: object) -> Tuple[float, float]:
    """Median seconds of a call of what `prepare` makes, and MiB by which the process grows in the first."""
    run, before = prepare(*args), process_memory('VmRSS')
    run()
    peak = process_memory('VmHWM')
    times: List[float] = []
    while len(times) < 3 or sum(times) < .5:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times), (peak - before) / 2 ** 20


def curves(largest: int) -> Iterator[Tuple[str, int, tuple]]:
    """The name of a curve, a value on its x axis and the arguments of `measure`."""
    for name, most in MODELS.items():
        for side in SIDES:
            if side ** 2 <= min(most, largest):
                yield f'{name}, tokens', side ** 2, (model_run, name, side)
    for what, values in SCANS.items():
        for x in values:
            if x <= largest + 1:
                yield f'scan, {what}', x, (scan_run, *dict(SCAN, **{what: x}).values())


def exponent(points: Dict[int, float]) -> float:
    return float(np.polyfit(np.log(list(points)[-3:]), np.log(list(points.values())[-3:]), 1)[0])


@style()
def draw(rows: List[dict], env: Dict[str, str]) -> None:
    fig, axes = figure(columns=2)
    for ax, key, label in zip(axes, ('seconds', 'mib'), ('seconds', 'peak memory, MiB')):
        for name in dict.fromkeys(row['curve'] for row in rows):
            points = {row['x']: row[key] for row in rows if row['curve'] == name}
            ax.plot(points.keys(), points.values(), label=f'{name}: {exponent(points):.2f}')
        ax.set(xscale='log', yscale='log', xlabel='tokens, images or channels', ylabel=label)
        ax.legend(fontsize=7, title='exponent', title_fontsize=7)
    fig.suptitle(f'a forward pass: {env["cpu"]}, {env["threads"]} threads, torch {env["torch"]}', fontsize=9)
    save(fig, RESULTS.parents[1] / 'docs' / 'pictures' / 'growth.png')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--largest', type=int, default=50176, help='most tokens, images or channels')
    args = parser.parse_args()
    rows, env = [], environment()
    for name, x, task in curves(args.largest):
        with get_context('spawn').Pool(1) as process:
            seconds, mib = process.apply(measure, task)
        rows.append(dict(curve=name, x=x, seconds=round(seconds, 6), mib=round(mib, 1)))
        print(rows[-1], flush=True)
    with open(RESULTS / 'growth.csv', 'w', newline='') as f:
        f.writelines(f'# {k}: {v}\n' for k, v in env.items())
        writer = csv.DictWriter(f, fieldnames=list(rows[0]), lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows)
    draw(rows, env)


if __name__ == '__main__':
    main()
