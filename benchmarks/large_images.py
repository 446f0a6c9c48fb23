"""Backbones at the sizes of detection: maps of one image of 1024 x 1024 pixels, on the CPU.

    python benchmarks/large_images.py time | memory [--size 1024] [--seconds 60]

Median seconds of a forward pass, timed in turns, on a machine that should be idle; or what a forward pass and a
training step (forward and backward pass) take of memory above the model, at their peak, each in a process of its own.
"""
import argparse
import subprocess
import sys
from functools import partial
from typing import Callable, Iterator, List

import timm
import torch
from harness import Row, process_memory, report, time_in_turns
from torch import nn

import timm_ssm  # noqa: F401  registers the models

#: with what they need for other sizes than their own; the isotropic ones give the map of their last block
MODELS = {
    'videomamba_small_patch16_224': dict(dynamic_img_size=True, out_indices=[-1]),
    'vit_small_patch16_224': dict(dynamic_img_size=True, out_indices=[-1]),
    'mambavision_tiny': {},
    'groupmamba_tiny': {},
    'swin_tiny_patch4_window7_224': {},
}


def create_backbone(name: str, size: int) -> nn.Module:
    kwargs = dict(MODELS[name])
    if name.startswith('swin'):
        kwargs['img_size'] = size
    return timm.create_model(name, features_only=True, **kwargs)


def step(model: nn.Module, x: torch.Tensor) -> None:
    sum(y.mean() for y in model.train()(x)).backward()


def forward(model: nn.Module, x: torch.Tensor) -> List[torch.Tensor]:
    with torch.inference_mode():
        return model.eval()(x)


def peak(run: Callable, name: str, size: int) -> int:
    """Bytes above the model's."""
    model, x = create_backbone(name, size), torch.randn(1, 3, size, size)
    before = process_memory('VmRSS')
    run(model, x)
    return process_memory('VmHWM') - before


def time_rows(size: int, seconds: float) -> Iterator[Row]:
    x = torch.randn(1, 3, size, size)
    models = {name: create_backbone(name, size) for name in MODELS}
    times = time_in_turns({name: partial(forward, model, x) for name, model in models.items()}, seconds)
    for name, time in times.items():
        maps = ', '.join('x'.join(map(str, y.shape[1:])) for y in forward(models[name], x))
        yield Row(f'{name}: seconds of a forward pass', time, less=True, detail=f'maps of {maps}')


def memory_rows(size: int) -> Iterator[Row]:
    for name in MODELS:
        for what in (forward, step):
            command = [sys.executable, __file__, 'memory', '--size', str(size), '--peak', what.__name__, name]
            done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
            yield Row(f'{name}: MiB of a {what.__name__}', int(done.stdout) / 2 ** 20, less=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('what', choices=('time', 'memory'))
    parser.add_argument('--size', type=int, default=1024)
    parser.add_argument('--seconds', type=float, default=60., help='time to spend on the forward passes')
    parser.add_argument('--peak', nargs=2, help=argparse.SUPPRESS)  # print one peak
    args = parser.parse_args()
    if args.peak:
        print(peak(dict(forward=forward, step=step)[args.peak[0]], args.peak[1], args.size))
    else:
        rows = time_rows(args.size, args.seconds) if args.what == 'time' else memory_rows(args.size)
        report(f'large_images_{args.what}', list(rows))


if __name__ == '__main__':
    main()
