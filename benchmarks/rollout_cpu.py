"""Time and memory of one rollout map on the CPU.

    python benchmarks/rollout_cpu.py [--seconds 5]

Medians of calls of `timm_ssm.analysis.rollout` in turns, the forward pass included. Memory is the growth of the peak of
a process that calls it twice, weights and libraries not counted. The machine should be idle.
"""
import argparse
import subprocess
import sys
from functools import partial

import timm
import torch
from harness import Row, report, time_in_turns

from timm_ssm.analysis import rollout

# name of the model, size of its input, and the goals in seconds and in bytes
MODELS = {
    'videomamba_tiny_patch16_224': ((3, 224, 224), 2., 2 ** 30),
    'mambavision_tiny': ((3, 224, 224), None, None),
    'groupmamba_tiny': ((3, 224, 224), None, None),
}
MEMORY = '''
import re, sys, timm, torch, timm_ssm
from timm_ssm.analysis import rollout

def peak():
    return int(re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1])

model, x = timm.create_model(sys.argv[1]).eval(), torch.randn(1, *eval(sys.argv[2]))
before = peak()
rollout(model, x), rollout(model, x)
print(1024 * (peak() - before))
'''


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--seconds', type=float, default=5., help='of each measurement of time')
    args = parser.parse_args()
    rows = []
    for name, (size, seconds, memory) in MODELS.items():
        model, x = timm.create_model(name).eval(), torch.randn(1, *size)
        found, = time_in_turns({name: partial(rollout, model, x)}, args.seconds).values()
        rows.append(Row(f'seconds of a map, {name}', found, seconds, less=True))
        peak = subprocess.run([sys.executable, '-c', MEMORY, name, repr(size)], stdout=subprocess.PIPE, check=True)
        rows.append(Row(
            f'MiB of a map, {name}', int(peak.stdout) / 2 ** 20, memory and memory / 2 ** 20, less=True))
    report('rollout_cpu', rows)


if __name__ == '__main__':
    main()
