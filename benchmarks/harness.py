"""What the benchmark scripts share: timing alternatives in turns, and reporting a table, a CSV file and a plot.

Speed is a ratio of things timed in turns in one run, since absolute times depend on the machine and its load.
"""
import csv
import importlib.util
import platform
import statistics
import time
from pathlib import Path
from typing import Callable, Dict, List, NamedTuple, Optional, Sequence

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


def _rows_beside(path: Path, head: List[str]) -> Dict[str, Sequence]:
    """The rows of a file by name if it begins with the lines `head`, dates apart, else none."""
    lines = path.read_text().splitlines() if path.exists() else []
    if [x for x in lines[:len(head)] if not x.startswith('# date')] != [x for x in head if not x.startswith('# date')]:
        return {}
    return {row[0]: row for row in csv.reader(lines[len(head) + 1:])}


def report(name: str, rows: List[Row], keep: bool = False, **extra: str) -> None:
    """Print the rows as a table and write results/<name>.csv and, if matplotlib is there, results/<name>.png.

    With `keep`, the file's other rows stay if they are of the same machine and versions.
    """
    env = dict(environment(), **extra)
    print('  '.join(f'{k}={v}' for k, v in env.items()))
    width = max(len(row.name) for row in rows)
    for row in rows:
        sign = '<=' if row.less else '>='
        goal = '' if row.goal is None else f'{sign} {row.goal:g}'
        stretch = '' if row.stretch is None else f'({sign} {row.stretch:g})'
        print(f'{row.name:{width}}  {row.value:10.4g}  {goal:>9} {stretch:>10}  {row.met():8} {row.detail}')

    RESULTS.mkdir(exist_ok=True)
    path, head = RESULTS / f'{name}.csv', [f'# {k}: {v}' for k, v in env.items()]
    table = _rows_beside(path, head) if keep else {}
    table.update((row.name, (*row, row.met())) for row in rows)
    with open(path, 'w', newline='') as f:
        f.writelines(f'{line}\n' for line in head)
        writer = csv.writer(f)
        writer.writerow((*Row._fields, 'met'))
        writer.writerows(table.values())
    if importlib.util.find_spec('matplotlib'):
        from timm_ssm.plot import plot

        plot([str(RESULTS / f'{name}.csv')], str(RESULTS / f'{name}.png'))
