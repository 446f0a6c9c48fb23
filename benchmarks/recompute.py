"""What `--activation-budget` saves, and computes again, by recomputing blocks partly and wholly.

    python benchmarks/recompute.py          # counts, and the time of a step
    python benchmarks/recompute.py --count  # counts alone

The rows go to benchmarks/results/recompute.csv: the share of the activations that is kept. Bytes and operations are
counted without running the models, times are on this CPU.
"""
import argparse
import functools

import timm
import torch
from harness import Row, report, time_in_turns
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import timm_ssm  # noqa: F401  (registers the models)
from timm_ssm.training.recompute import keep_costly, recompute, saved_activations
from timm_ssm.training.sharding import named_blocks

MODELS = ('videomamba_tiny_patch16_224', 'vmamba_tiny', 'mambavision_tiny')
WAYS = ('kept', 'partly', 'every second wholly', 'wholly')
SHAPE, BATCH_SIZE = (3, 224, 224), 4


def create(name: str, way: str, device: str) -> nn.Module:
    torch.manual_seed(0)
    with torch.device(device):
        model = timm.create_model(name).train()
    blocks = [block for _, block in named_blocks(model)]
    for block in {'kept': [], 'every second wholly': blocks[::2]}.get(way, blocks):
        recompute(block, keep_costly if way == 'partly' else None)
    return model


def step(model: nn.Module, device: str, backward: bool = True) -> None:
    loss = model(torch.ones(BATCH_SIZE, *SHAPE, device=device)).sum()
    if backward:
        loss.backward()


def operations(name: str, way: str, backward: bool = True) -> int:
    with FlopCounterMode(display=False) as counter:
        step(create(name, way, 'meta'), 'meta', backward)
    return counter.get_total_flops()


def measure(name: str, count: bool) -> list:
    a = saved_activations(create(name, 'kept', 'meta'), SHAPE)
    saving = {n: a.blocks[n] - a.inputs[n] for n in a.blocks}
    kept = dict(zip(WAYS, (a.total - x for x in (
        0, sum(saving[n] - a.costly[n] for n in saving), sum(list(saving.values())[::2]), sum(saving.values())))))
    computed = {way: operations(name, way) for way in WAYS}
    again = {way: (computed[way] - computed['kept']) / operations(name, 'kept', backward=False) for way in WAYS}
    times = {} if count else time_in_turns(
        {way: functools.partial(step, create(name, way, 'cpu'), 'cpu') for way in WAYS}, 60.)
    return [Row(
        f'{name}, {way}', kept[way] / a.total, less=True,
        detail=f'{kept[way] / 2 ** 20:.1f} MiB a sample; {again[way]:.1%} of the operations of a forward pass again'
               + (f'; {times[way] / times["kept"]:.2f} of the time' if times else ''))
        for way in WAYS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--count', action='store_true', help='no times')
    args = parser.parse_args()
    report('recompute', [row for name in MODELS for row in measure(name, args.count)], batch=str(BATCH_SIZE))


if __name__ == '__main__':
    main()
