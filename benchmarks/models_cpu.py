"""VideoMamba against DeiT of the same size on the CPU, and the memory of a training step.

    python benchmarks/models_cpu.py [--seconds 20]

Ratios of median images/s, the models timed in turns. The machine should be idle.
"""
import argparse
import os
import resource
import subprocess
import sys
from pathlib import Path

import timm
import torch
from harness import Row, report, time_in_turns

import timm_ssm  # noqa: F401, registers the models

#: ours, timm's, image size, batch size, goal, stretch
PAIRS = [
    ('videomamba_tiny_patch16_224', 'deit_tiny_patch16_224', 224, 1, .65, .80),
    ('videomamba_tiny_patch16_224', 'deit_tiny_patch16_224', 224, 8, .60, .75),
    ('videomamba_small_patch16_224', 'deit_small_patch16_224', 224, 1, .70, .85),
    ('videomamba_small_patch16_224', 'deit_small_patch16_224', 224, 8, .70, .85),
    ('videomamba_tiny_patch16_224', 'deit_tiny_patch16_224', 576, 1, 1.2, None),
]


def speed_row(ours, theirs, size, batch, goal, stretch, seconds):
    x = torch.randn(batch, 3, size, size)
    models = {name: timm.create_model(name, img_size=size).eval() for name in (ours, theirs)}
    with torch.inference_mode():
        t = time_in_turns({name: lambda model=model: model(x) for name, model in models.items()}, seconds)
    return Row(f'{ours} / {theirs}, {size} x {size}, batch {batch}', t[theirs] / t[ours], goal, stretch,
               detail=f'{batch / t[ours]:.1f} against {batch / t[theirs]:.1f} images/s')


def step_memory(how: str) -> int:
    """Bytes by which a training step's memory peaks above the model's, in a process of its own."""
    backend = '' if how == 'autograd' else how
    path = os.pathsep.join([str(Path(timm_ssm.__file__).parents[1]), *sys.path])
    env = dict(os.environ, TIMM_SSM_BACKEND=backend, PYTHONPATH=path)
    run = subprocess.run(
        [sys.executable, __file__, '--step', how], env=env, capture_output=True, text=True, check=True)
    return int(run.stdout)


def train_step(how: str) -> int:
    """`how`: a backend's name, or 'autograd' for the specification with gradients left to autograd."""
    from timm_ssm.layers import bimamba
    from timm_ssm.ops import naive

    if how == 'autograd':
        def both_scans(*pairs, residual, mask_diagonal):  # neither is VideoMamba's
            def one(i):
                return [x[i] if isinstance(x, tuple) else x for x in pairs]
            return naive.selective_scan_naive(*one(0)) + naive.selective_scan_naive(*one(1), reverse=True)

        def both_convs(x, weight, bias):
            return tuple(naive.causal_conv1d_naive(x, weight[i], bias[i], reverse=i == 1) for i in (0, 1))

        bimamba.bidirectional_selective_scan, bimamba.bidirectional_causal_conv1d = both_scans, both_convs
    model = timm.create_model('videomamba_tiny_patch16_224').train()
    x = torch.randn(8, 3, 224, 224)
    pages = int(Path('/proc/self/statm').read_text().split()[1])
    before = pages * os.sysconf('SC_PAGE_SIZE')
    torch.nn.functional.cross_entropy(model(x), torch.zeros(8, dtype=torch.long)).backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before  # ru_maxrss is in KiB on Linux


def memory_rows():
    if not Path('/proc/self/statm').exists():
        print('no /proc/self/statm: cannot measure memory')
        return
    native = step_memory('native')
    for how, goal in (('autograd', .35), ('naive', None)):
        other = step_memory(how)
        yield Row(f'peak memory of a training step, videomamba_tiny batch 8, native / {how}', native / other, goal,
                  less=True, detail=f'{native / 2 ** 20:.0f} against {other / 2 ** 20:.0f} MiB')


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--seconds', type=float, default=20., help='time to spend on each pair of models')
    parser.add_argument('--step', help=argparse.SUPPRESS)  # a process of its own: print the memory of one step
    args = parser.parse_args()
    if args.step:
        print(train_step(args.step))
        return
    report('models_cpu', [*(speed_row(*pair, args.seconds) for pair in PAIRS), *memory_rows()])


if __name__ == '__main__':
    main()
