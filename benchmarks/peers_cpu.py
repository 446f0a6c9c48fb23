"""The selective scan on the CPU beside every other implementation of it that installs: one table.

    python benchmarks/peers_cpu.py [--lengths 197 1569 12545] [--threads 1 2] [--peers NAME ...]
        [--python NAME=PYTHON ...]

Each implementation (peers.py) runs in a process of its own, with the Python that --python names for it, this one
without, on as many cores as it has threads. Its results have to agree with ours; then the processes take turns. A row
is an implementation's time over ours, above 1 where ours is faster. What is not installed, wrong or slower than --limit
is a row with the reason. `forward + backward` is timed of those that have gradients.

Rows of other lengths that an earlier run on the same machine with the same versions left in results/peers_cpu.csv stay
there. The machine should be idle.
"""
import argparse
import csv
import json
import os
import select
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Dict, Iterator, List

import numpy as np
import peers
import torch
from harness import RESULTS, Row, environment, report
from scan_cpu import make_inputs

from timm_ssm.ops import selective_scan

TOLERANCE = 1e-3  # of the largest value


class Worker:
    """A process that holds one implementation and its inputs."""

    def __init__(self, name: str, python: str, inputs: Path, threads: int) -> None:
        env = dict(os.environ, OMP_NUM_THREADS=str(threads), TORCHINDUCTOR_COMPILE_THREADS='1')
        if python != sys.executable:
            env.pop('PYTHONPATH', None)
        self.process = subprocess.Popen(
            [python, peers.__file__, name, str(inputs), str(threads)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env=env, start_new_session=True)

    def ask(self, limit: float, *request: object) -> dict:
        """The reply, or a reason why there is none, after which the process is gone."""
        try:
            self.process.stdin.write(json.dumps(request).encode() + b'\n')
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # there is nothing to read then, either
        if not select.select([self.process.stdout], [], [], limit)[0]:
            self.close()
            return {'reason': f'took more than {limit:g} s'}
        line = self.process.stdout.readline()
        return json.loads(line) if line else {'reason': f'its process ended ({self.process.wait()})'}

    def close(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def save_inputs(file: Path, shape: tuple) -> None:
    """Inputs, a gradient of the output, and what ours makes of them."""
    inputs = [a.contiguous().requires_grad_() for a in make_inputs(*shape)]
    grad = torch.randn(shape[:3])
    out = selective_scan(*inputs, backend='native')
    gradients = torch.autograd.grad(out, inputs, grad)
    arrays = dict(zip(peers.ORDER, inputs), out=out, grad=grad)
    arrays.update({f'grad_{k}': g for k, g in zip(peers.ORDER, gradients)})
    np.savez(file, **{k: a.detach().numpy() for k, a in arrays.items()})


def time_in_turns(workers: Dict[str, Worker], kind: str, seconds: float, limit: float) -> Dict[str, float]:
    """Median seconds of a call of each, as `harness.time_in_turns`."""
    samples: Dict[str, List[float]] = {name: [] for name in workers}
    end, turns = time.perf_counter() + seconds, 0
    while time.perf_counter() < end or turns < 5:
        turns += 1
        for name, worker in workers.items():
            samples[name] += worker.ask(10 * limit, kind, .1)['times']
    return {name: statistics.median(times) for name, times in samples.items()}


def rows_of(
        workers: Dict[str, Worker],
        kind: str,
        label: str,
        args: argparse.Namespace,
        given_up: Dict[tuple, str],
        versions: Dict[str, str],
) -> Iterator[Row]:
    errors = {}
    for name, worker in workers.items():
        if kind != peers.KINDS[0] and (name, peers.KINDS[0]) in given_up:
            continue
        reply = {'reason': given_up[name, kind]} if (name, kind) in given_up else worker.ask(args.limit, kind, None)
        reason = reply.get('reason')
        if reason is None and not reply['error'] <= TOLERANCE:
            reason = f'differs by {reply["error"]:.1g}'
        if reason is None:
            errors[name], versions[name] = reply['error'], reply['version']
        else:
            given_up[name, kind] = reason
            if reason:  # else it has no gradients
                yield Row(f'{name}, {label}', float('nan'), detail=reason)
    t = time_in_turns({name: workers[name] for name in errors}, kind, args.seconds, args.limit)
    for name, seconds in t.items():
        yield Row(f'{name}, {label}', seconds / t['ours'], None if name == 'ours' else 1,
                  detail=f'{seconds * 1e3:.3f} ms, error {errors[name]:.1g}')


def earlier_rows(env: Dict[str, str], measured: List[Row]) -> Iterator[Row]:
    """The rows of other names in the file of an earlier run in the same environment."""
    file = RESULTS / 'peers_cpu.csv'
    lines = file.read_text().splitlines() if file.exists() else []
    facts = dict(line[2:].split(': ', 1) for line in lines if line.startswith('#'))
    if all(facts.get(k) == v for k, v in env.items() if k not in ('threads', 'date')):
        names = {row.name for row in measured}
        for row in csv.DictReader(line for line in lines if not line.startswith('#')):
            if row['name'] not in names:
                yield Row(row['name'], float(row['value']), float(row['goal']) if row['goal'] else None,
                          detail=row['detail'])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--lengths', type=int, nargs='+', default=[197, 1569, 12545], help='tokens')
    parser.add_argument('--threads', type=int, nargs='+', default=[1, 2])
    parser.add_argument('--channels', type=int, default=384)
    parser.add_argument('--peers', nargs='+', choices=peers.PEERS, metavar='NAME', default=list(peers.PEERS),
                        help=f'some of {", ".join(peers.PEERS)}; ours always')
    parser.add_argument('--python', nargs='+', metavar='NAME=PYTHON', default=[])
    parser.add_argument('--seconds', type=float, default=10., help='time to spend on each comparison')
    parser.add_argument('--limit', type=float, default=90., help='seconds for the first call, imports and all')
    args = parser.parse_args()
    pythons = dict(item.rpartition('=')[::2] for item in args.python)
    if not pythons.keys() <= peers.PEERS.keys():
        parser.error(f'--python: got {", ".join(pythons)}, needs some of {", ".join(peers.PEERS)}')

    rows: List[Row] = []
    given_up: Dict[tuple, str] = {}  # what failed or took too long does so with more tokens or threads
    versions: Dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        for length in sorted(args.lengths):
            file = Path(folder) / f'{length}.npz'
            save_inputs(file, (1, length, args.channels, 16))
            for threads in args.threads:
                workers = {name: Worker(name, pythons.get(name, sys.executable), file, threads)
                           for name in dict.fromkeys(('ours', *args.peers))}
                try:
                    for kind in peers.KINDS:
                        label = f'{kind}, {length} tokens, {threads} thread{"s" if threads > 1 else ""}'
                        rows += rows_of(workers, kind, label, args, given_up, versions)
                finally:
                    for worker in workers.values():
                        worker.close()
    rows = [*earlier_rows(dict(environment(), channels=str(args.channels)), rows), *rows]
    versions.pop('ours')
    report('peers_cpu', rows, threads=' and '.join(map(str, args.threads)), channels=str(args.channels), **versions)


if __name__ == '__main__':
    main()
