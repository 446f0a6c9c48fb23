"""Models against timm's of the same size on the CPU, and the memory of a training step.

    python benchmarks/models_cpu.py [--seconds 20]

Ratios of median images/s, the models timed in turns, once with an allocator that keeps freed memory and once with the
system's. The machine should be idle.
"""
import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Callable, Iterator, List, NamedTuple

import timm
import torch
from harness import Row, process_memory, report, time_in_turns

import timm_ssm  # noqa: F401, registers the models


class Pair(NamedTuple):
    """Two models to compare by images/s, of a forward pass or of a training step."""
    ours: str
    theirs: str
    size: int
    batch: int
    goal: float
    stretch: float
    training: bool = False


PAIRS = [
    Pair('videomamba_tiny_patch16_224', 'deit_tiny_patch16_224', 224, 1, .70, .85),
    Pair('videomamba_tiny_patch16_224', 'deit_tiny_patch16_224', 224, 8, .70, .85),
    Pair('videomamba_small_patch16_224', 'deit_small_patch16_224', 224, 1, .75, .90),
    Pair('videomamba_small_patch16_224', 'deit_small_patch16_224', 224, 8, .78, .90),
    Pair('videomamba_tiny_patch16_224', 'deit_tiny_patch16_224', 576, 1, 1.25, 1.5),
    Pair('mambavision_tiny', 'swin_tiny_patch4_window7_224', 224, 8, 1.2, 1.4),
    Pair('groupmamba_tiny', 'swin_tiny_patch4_window7_224', 224, 8, .5, .7),
    Pair('videomamba_tiny_patch16_224', 'deit_tiny_patch16_224', 224, 16, .55, .7, training=True),
]

#: The GNU C library may return freed memory to the system, depending on what a process did before, and getting it back
#: can take as long as the computation. With these it keeps it, as jemalloc and tcmalloc do.
KEEP_MEMORY = {'MALLOC_TRIM_THRESHOLD_': '4000000000', 'MALLOC_MMAP_THRESHOLD_': '4000000000'}


def run_alone(*args: object, **env: str) -> List[float]:
    """The numbers that this script prints for `args`, in a process of its own."""
    path = os.pathsep.join([str(Path(timm_ssm.__file__).parents[1]), *sys.path])
    run = subprocess.run(
        [sys.executable, __file__, *map(str, args)], env=dict(os.environ, PYTHONPATH=path, **env),
        stdout=subprocess.PIPE, text=True, check=True)
    return [float(word) for word in run.stdout.split()]


def time_pair(pair: Pair, seconds: float) -> List[float]:
    """Seconds that our model and timm's take for a batch."""
    x = torch.randn(pair.batch, 3, pair.size, pair.size)

    def prepare(name: str) -> Callable[[], object]:
        model = timm.create_model(name, **{} if pair.size == 224 else dict(img_size=pair.size))
        if not pair.training:
            return torch.inference_mode()(lambda model=model.eval(): model(x))
        optimizer = torch.optim.AdamW(model.parameters())

        def step():
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x), torch.zeros(pair.batch, dtype=torch.long)).backward()
            optimizer.step()
        return step

    names = (pair.ours, pair.theirs)
    times = time_in_turns({name: prepare(name) for name in names}, seconds)
    return [times[name] for name in names]


def speed_rows(seconds: float) -> Iterator[Row]:
    for index, pair in enumerate(PAIRS):
        for title, env in (('', KEEP_MEMORY), (', default malloc', {})):
            t_ours, t_theirs = run_alone('--pair', index, '--seconds', seconds, **env)
            what = 'training step, ' if pair.training else ''
            yield Row(
                f'{pair.ours} / {pair.theirs}, {what}{pair.size} x {pair.size}, batch {pair.batch}{title}',
                t_theirs / t_ours, pair.goal, pair.stretch,
                detail=f'{pair.batch / t_ours:.1f} against {pair.batch / t_theirs:.1f} images/s')


def train_step(how: str) -> int:
    """Bytes by which a training step's memory peaks above the model's.

    `how`: a backend's name, or 'autograd' for the specification with gradients left to autograd.
    """
    from timm_ssm.layers import bimamba, mixer
    from timm_ssm.ops import naive

    if how == 'autograd':
        def both_scans(*pairs, residual, mask_diagonal):  # neither is VideoMamba's
            def one(i):
                return [x[i] if isinstance(x, tuple) else x for x in pairs]
            return naive.selective_scan_naive(*one(0)) + naive.selective_scan_naive(*one(1), reverse=True)

        def both_convs(x, weight, bias):
            return tuple(naive.causal_conv1d_naive(x, weight[i], bias[i], reverse=i == 1) for i in (0, 1))

        mixer.bidirectional_selective_scan, bimamba.bidirectional_causal_conv1d = both_scans, both_convs
    model = timm.create_model('videomamba_tiny_patch16_224').train()
    x = torch.randn(8, 3, 224, 224)
    before = process_memory('VmRSS')
    torch.nn.functional.cross_entropy(model(x), torch.zeros(8, dtype=torch.long)).backward()
    return process_memory('VmHWM') - before


def step_memory(how: str) -> float:
    return run_alone('--step', how, TIMM_SSM_BACKEND='' if how == 'autograd' else how)[0]


def memory_rows() -> Iterator[Row]:
    if not Path('/proc/self/status').exists():
        print('no /proc/self/status: cannot measure memory')
        return
    native = step_memory('native')
    for how, goal in (('autograd', .35), ('eager', None)):
        other = step_memory(how)
        yield Row(f'peak memory of a training step, videomamba_tiny batch 8, native / {how}', native / other, goal,
                  less=True, detail=f'{native / 2 ** 20:.0f} against {other / 2 ** 20:.0f} MiB')


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--seconds', type=float, default=20., help='time to spend on each pair of models')
    parser.add_argument('--pair', type=int, help=argparse.SUPPRESS)  # print one comparison's times
    parser.add_argument('--step', help=argparse.SUPPRESS)  # print one step's memory
    args = parser.parse_args()
    if args.pair is not None:
        print(*time_pair(PAIRS[args.pair], args.seconds))
    elif args.step:
        print(train_step(args.step))
    else:
        report('models_cpu', [*speed_rows(args.seconds), *memory_rows()])


if __name__ == '__main__':
    main()
