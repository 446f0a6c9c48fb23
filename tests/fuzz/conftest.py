"""Cases at random, a few in the default run of the tests and as many as time allows in `make fuzz SECONDS=…`.

A test takes the fixture `cases` and loops over `cases(count)`, which yields a `random.Random` a case, each seeded by a
number of its own: 0, 1, … in the default run, from a random number on under `make fuzz`. A failure names the seed, and
FUZZ_SEED=n repeats that case alone. The counts are reported at the end.
"""
import os
import random
import time
from typing import Callable, Dict, Iterator

import pytest

SECONDS = float(os.environ.get('FUZZ_SECONDS') or 0)
SEED = os.environ.get('FUZZ_SEED')
COUNTS: Dict[str, int] = {}
_share = 0.


def pytest_collection_modifyitems(items) -> None:
    global _share
    fuzz = [item for item in items if 'cases' in getattr(item, 'fixturenames', ())]
    _share = SECONDS / max(1, len(fuzz))


@pytest.fixture
def cases(request) -> Callable[[int], Iterator[random.Random]]:
    name, seed = request.node.nodeid, None

    def generate(count: int) -> Iterator[random.Random]:
        nonlocal seed
        end = time.monotonic() + _share
        first = int(SEED) if SEED else random.SystemRandom().randrange(1 << 32) if SECONDS else 0
        seed = first
        while seed == first if SEED else time.monotonic() < end if SECONDS else seed < count:
            yield random.Random(seed)
            seed += 1
            COUNTS[name] = seed - first

    yield generate
    if request.node.stash.get(_FAILED, False):
        print(f'\nrepeat with FUZZ_SEED={seed} pytest "{name}"')


_FAILED = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    report = yield
    if report.when == 'call':
        item.stash[_FAILED] = report.failed
    return report


def pytest_terminal_summary(terminalreporter) -> None:
    if COUNTS and SECONDS:
        terminalreporter.section('fuzz')
        for name, count in COUNTS.items():
            terminalreporter.line(f'{count:8} cases  {name}')
        terminalreporter.line(f'{sum(COUNTS.values()):8} cases')
