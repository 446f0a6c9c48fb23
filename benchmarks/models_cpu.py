"""VideoMamba against DeiT of the same size on the CPU, and the memory of a training step.

    python benchmarks/models_cpu.py [--seconds 20]

Ratios of median images/s, the models timed in turns, once with an allocator that keeps freed memory and once with the
system's. The machine should be idle.
"""
import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Iterator, List

import timm
import torch
from harness import Row, process_memory, report, time_in_turns

import timm_ssm  # noqa: F401, registers the models

#: ours, timm's, image size, batch size, goal, stretch
PAIRS = [
    ('videomamba_tiny_patch16_224', 'deit_tiny_patch16_224', 224, 1, .65, .80),
    ('videomamba_tiny_patch16_224', 'deit_tiny_patch16_224', 224, 8, .60, .75),
    ('videomamba_small_patch16_224', 'deit_small_patch16_224', 224, 1, .70, .85),
    ('videomamba_small_patch16_224', 'deit_small_patch16_224', 224, 8, .70, .85),
    ('videomamba_tiny_patch16_224', 'deit_tiny_patch16_224', 576, 1, 1.2, None),
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


def time_pair(index: int, seconds: float) -> List[float]:
    """Seconds that our model and timm's take for a batch."""
    *names, size, batch, _, _ = PAIRS[index]
    x = torch.randn(batch, 3, size, size)
    models = {name: timm.create_model(name, img_size=size).eval() for name in names}
    with torch.inference_mode():
        times = time_in_turns({name: lambda model=model: model(x) for name, model in models.items()}, seconds)
    return [times[name] for name in names]


def speed_rows(seconds: float) -> Iterator[Row]:
    for index, (ours, theirs, size, batch, goal, stretch) in enumerate(PAIRS):
        for title, env in (('', KEEP_MEMORY), (', default malloc', {})):
            t_ours, t_theirs = run_alone('--pair', index, '--seconds', seconds, **env)
            yield Row(f'{ours} / {theirs}, {size} x {size}, batch {batch}{title}', t_theirs / t_ours, goal, stretch,
                      detail=f'{batch / t_ours:.1f} against {batch / t_theirs:.1f} images/s')


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
        print(*time_pair(args.pair, args.seconds))
    elif args.step:
        print(train_step(args.step))
    else:
        report('models_cpu', [*speed_rows(args.seconds), *memory_rows()])


if __name__ == '__main__':
    main()
