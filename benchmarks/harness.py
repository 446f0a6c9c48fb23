"""What the benchmark scripts share: timing alternatives in turns, and reporting a table, a CSV file and a plot.

Speed is a ratio of things timed in turns in one run, since absolute times depend on the machine and its load.
"""
import csv
import importlib.util
import platform
import statistics
import time
from pathlib import Path
from typing import Callable, Dict, List, NamedTuple, Optional

import timm
import torch

import timm_ssm

RESULTS = Path(__file__).parent / 'results'


class Row(NamedTuple):
    """One measurement; `goal` is a lower bound, or an upper one where `less` says that less is better."""
    name: str
    value: float
    goal: Optional[float] = None
    stretch: Optional[float] = None
    less: bool = False
    detail: str = ''

    def met(self) -> str:
        for name, bound in (('stretch', self.stretch), ('goal', self.goal)):
            if bound is not None and (self.value <= bound if self.less else self.value >= bound):
                return name
        return '' if self.goal is None else 'missed'


def time_in_turns(
        functions: Dict[str, Callable[[], object]],
        seconds: float = 5.,
        turn: float = .1,
) -> Dict[str, float]:
    """Median seconds of a call of each function.

    The functions take turns, at least five each, until `seconds` have passed. In a turn a function is called for `turn`
    seconds, at least once: what the others left in the caches and in the allocator, it finds in its first calls only.
    """
    samples: Dict[str, List[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()  # to warm up
    end, turns = time.perf_counter() + seconds, 0
    while time.perf_counter() < end or turns < 5:
        turns += 1
        for name, function in functions.items():
            until = time.perf_counter() + turn
            while True:
                start = time.perf_counter()
                function()
                now = time.perf_counter()
                samples[name].append(now - start)
                if now > until:
                    break
    return {name: statistics.median(times) for name, times in samples.items()}


def process_memory(field: str) -> int:
    """Bytes that this process holds now ('VmRSS') or held at most ('VmHWM'), on Linux.

    getrusage's maximum would count the process that started this one.
    """
    lines = Path('/proc/self/status').read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def environment() -> Dict[str, str]:
    """The machine and the versions that a measurement depends on."""
    cpu = platform.processor() or platform.machine()
    if Path('/proc/cpuinfo').exists():
        lines = Path('/proc/cpuinfo').read_text().splitlines()
        cpu = next((line.split(':', 1)[1].strip() for line in lines if line.startswith('model name')), cpu)
    return {
        'cpu': cpu,
        'threads': str(torch.get_num_threads()),
        'gpu': torch.cuda.get_device_name() if torch.cuda.is_available() else 'none',
        'python': platform.python_version(),
        'torch': torch.__version__,
        'timm': timm.__version__,
        'timm_ssm': timm_ssm.__version__,
        'date': time.strftime('%Y-%m-%d'),
    }


def report(name: str, rows: List[Row], **extra: str) -> None:
    """Print the rows as a table and write results/<name>.csv and, if matplotlib is there, results/<name>.png."""
    env = dict(environment(), **extra)
    print('  '.join(f'{k}={v}' for k, v in env.items()))
    width = max(len(row.name) for row in rows)
    for row in rows:
        sign = '<=' if row.less else '>='
        goal = '' if row.goal is None else f'{sign} {row.goal:g}'
        stretch = '' if row.stretch is None else f'({sign} {row.stretch:g})'
        print(f'{row.name:{width}}  {row.value:10.4g}  {goal:>9} {stretch:>10}  {row.met():8} {row.detail}')

    RESULTS.mkdir(exist_ok=True)
    with open(RESULTS / f'{name}.csv', 'w', newline='') as f:
        f.writelines(f'# {k}: {v}\n' for k, v in env.items())
        writer = csv.writer(f)
        writer.writerow((*Row._fields, 'met'))
        writer.writerows((*row, row.met()) for row in rows)
    if importlib.util.find_spec('matplotlib'):
        from timm_ssm.plot import plot

        plot([str(RESULTS / f'{name}.csv')], str(RESULTS / f'{name}.png'))
