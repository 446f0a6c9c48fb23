"""torchrun starts a group of processes again after one of them was killed."""
import logging
import os
import subprocess
import sys
from argparse import Namespace

import pytest

from timm_ssm.training.processes import setup_process

from .utils import ROOT, assert_same_run

# Run by torchrun in each process. In the first group all processes of the run `resumed` crash at a step, and it is
# resumed; then one process of the run `killed` is killed at that step, which the second group goes on with.
WORKER = '''
import os
import signal
import sys
from pathlib import Path

import pytest
import torch

from tests.training import utils
from tests.training.test_processes import signal_at_step

digits, tmp_path = map(Path, sys.argv[1:3])
victim, step = map(int, sys.argv[3:])
torch.set_num_threads(1)
# one process group for all the runs below: the store of torchrun takes no second one
init = torch.distributed.init_process_group
torch.distributed.init_process_group = lambda **kwargs: torch.distributed.is_initialized() or init(**kwargs)
torch.distributed.destroy_process_group = lambda: None


def run(name):
    flags = [*utils.BUSY, '--batch-size', '8', '--epochs', '2', '--recovery-interval', '2', '--resume', 'auto']
    utils.run(digits, tmp_path / name, *flags)


if os.environ['TORCHELASTIC_RESTART_COUNT'] == '0':
    run('whole')
    with pytest.MonkeyPatch.context() as monkeypatch:
        utils.crash_at_step(monkeypatch, step)
        with pytest.raises(RuntimeError, match='power cut'):
            run('resumed')
    run('resumed')
    if os.environ['RANK'] == str(victim):
        signal_at_step(pytest.MonkeyPatch(), step, signal.SIGKILL)
run('killed')
'''


@pytest.mark.slow
@pytest.mark.parametrize('processes, victim, step', [(2, 1, 4), (3, 0, 10), (3, 2, 4)])
def test_kill_9_of_one(digits, tmp_path, processes, victim, step):
    """The group goes on from the latest checkpoint, within the first epoch or the second, bit for bit as a resume."""
    (tmp_path / 'worker.py').write_text(WORKER)
    done = subprocess.run(
        [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', str(processes),
         '--max-restarts', '1', str(tmp_path / 'worker.py'), str(digits), str(tmp_path), str(victim), str(step)],
        env={**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1', 'TORCH_DISABLE_SHARE_RDZV_TCP_STORE': '1'},
        capture_output=True, text=True, timeout=400)
    assert done.returncode == 0 and '(exitcode: -9)' in done.stderr, done.stderr[-5000:]
    assert_same_run(tmp_path / 'resumed' / 'run', tmp_path / 'killed' / 'run')
    if processes == 2:  # sums of three depend on their order, which DistributedDataParallel changes after a first step
        assert_same_run(tmp_path / 'whole' / 'run', tmp_path / 'killed' / 'run')


@pytest.mark.parametrize('agent_store', [True, False])
def test_warning_of_what_restarts_need(monkeypatch, caplog, agent_store):
    monkeypatch.setenv('TORCHELASTIC_MAX_RESTARTS', '3')
    monkeypatch.setenv('TORCHELASTIC_USE_AGENT_STORE', str(agent_store))
    with caplog.at_level(logging.WARNING):
        setup_process(Namespace(device='cpu', device_modules=None))
    assert ('TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1' in caplog.text) == agent_store
