"""How runs share folders, and how they end when they are told to."""
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace

import pytest
from timm.task import ClassificationTask

from timm_ssm.training import processes, train

from .utils import BUSY, MODEL, PLAIN, ROOT, assert_same_run, load, run, torchrun

ENV = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}


def command(digits, output, *flags):
    """The flags of a run that `run` of the same flags repeats in this process."""
    flags = [digits, *MODEL, *PLAIN, '--output', output, '--experiment', 'run', *flags]
    return [str(ROOT / 'train.py'), *map(str, flags)]


def start(*command):
    return subprocess.Popen(
        command, env=ENV, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def signal_at_step(monkeypatch, number, *signals):
    """Send signals to this process in the forward pass of a training step, counted from 1."""
    forward, calls = ClassificationTask.forward, []

    def signalling(self, *args):
        calls.append(1)
        if len(calls) == number:
            for s in signals:
                os.kill(os.getpid(), s)
        return forward(self, *args)

    monkeypatch.setattr(ClassificationTask, 'forward', signalling)


class TestStop:

    @pytest.mark.parametrize('flags, step, kept', [
        (['--workers', '2'], 7, 'recovery-0-7'),
        (['--grad-accum-steps', '3', '--no-prefetcher', '--workers', '1'], 14, 'recovery-1-6'),
        (['--grad-accum-steps', '3', '--sched-on-updates'], 10, 'recovery-0-10'),  # the last update has one batch
    ])
    def test_sigterm(self, digits, tmp_path, monkeypatch, capsys, flags, step, kept):
        """The step is done, the state is saved, and the run goes on bit for bit."""
        flags = [*BUSY, '--epochs', 2, '--resume', 'auto', *flags]
        whole = run(digits, tmp_path / 'a', *flags)
        signal_at_step(monkeypatch, step, signal.SIGTERM)
        with pytest.raises(SystemExit) as end:
            run(digits, tmp_path / 'b', *flags)
        monkeypatch.undo()
        folder = tmp_path / 'b' / 'run'
        assert end.value.code == 143 and list(folder.glob('recovery-*')) == [folder / f'{kept}.pth.tar']
        message, = [line for line in capsys.readouterr().err.splitlines() if line.startswith('Stopped')]
        assert 'SIGTERM' in message and f'{kept}.pth.tar' in message and '--experiment run --resume auto' in message
        assert_same_run(whole, run(digits, tmp_path / 'b', *flags))
        assert not list(folder.glob('recovery-*'))

    def test_sigterm_while_validating(self, digits, tmp_path, monkeypatch):
        """The epoch is trained but not yet saved: it goes on with its validation."""
        flags = [*BUSY, '--epochs', 2, '--resume', 'auto', '--validation-batch-size', 10]
        whole = run(digits, tmp_path / 'a', *flags)
        evaluate = train.evaluate

        def signalling(model, batches, *args):
            os.kill(os.getpid(), signal.SIGTERM)
            batches = list(batches)
            assert len(batches) == 1  # of 5
            return evaluate(model, batches, *args)

        monkeypatch.setattr(train, 'evaluate', signalling)
        with pytest.raises(SystemExit) as end:
            run(digits, tmp_path / 'b', *flags)
        monkeypatch.undo()
        assert end.value.code == 143 and (tmp_path / 'b' / 'run' / 'recovery-0-10.pth.tar').exists()
        assert not (tmp_path / 'b' / 'run' / 'last.pth.tar').exists()
        steps = []
        forward = ClassificationTask.forward
        monkeypatch.setattr(ClassificationTask, 'forward', lambda *args: steps.append(1) or forward(*args))
        assert_same_run(whole, run(digits, tmp_path / 'b', *flags))
        assert len(steps) == 10  # of the second epoch

    def test_ctrl_c(self, digits, tmp_path, monkeypatch, capfd):
        signal_at_step(monkeypatch, 3, signal.SIGINT)
        with pytest.raises(SystemExit) as end:
            run(digits, tmp_path / 'a', '--epochs', 2)
        assert end.value.code == 130 and 'recovery-0-3.pth.tar' in capfd.readouterr().err
        monkeypatch.undo()
        signal_at_step(monkeypatch, 13, signal.SIGINT, signal.SIGINT)  # impatient
        with pytest.raises(SystemExit) as end:
            run(digits, tmp_path / 'b', '--epochs', 2)
        error = capfd.readouterr().err
        assert end.value.code == 130 and 'Traceback' not in error
        assert error.splitlines()[-1].startswith('Stopped by Ctrl-C. ') and 'last.pth.tar' in error
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler  # as it was before

    def test_ctrl_c_before_the_first_step(self, digits, tmp_path, monkeypatch, capsys):
        def interrupted(*args):
            raise KeyboardInterrupt

        monkeypatch.setattr(train, 'create_data', interrupted)
        with pytest.raises(SystemExit) as end:
            run(digits, tmp_path)
        assert end.value.code == 130 and 'Stopped by Ctrl-C. There is no checkpoint yet.' in capsys.readouterr().err
        assert not (tmp_path / 'run').exists()

    @pytest.mark.parametrize('processes, everyone', [(1, True), (2, False)])
    def test_batch_system(self, digits, tmp_path, whole, processes, everyone):
        """SIGTERM to every process that there is, loading processes too, or to torchrun."""
        launch = [sys.executable] if processes == 1 else torchrun()
        process = start(*launch, *command(digits, tmp_path, *LONG))
        wait_for(lambda: summary_rows(tmp_path / 'run') > 0)
        family = descendants(process.pid)
        for pid in family if everyone else [process.pid]:
            os.kill(pid, signal.SIGTERM)
        _, error = process.communicate(timeout=120)
        assert process.returncode == 143 if processes == 1 else process.returncode != 0, error
        assert error.count('Stopped by SIGTERM') == 1 and 'Error' not in error.replace('SignalException', ''), error
        assert not any(map(alive, family)) and len(list((tmp_path / 'run').glob('recovery-*'))) == 1
        if processes == 1:
            run(digits, tmp_path, *LONG)
        else:
            subprocess.run([*torchrun(), *command(digits, tmp_path, *LONG)], env=ENV, check=True, timeout=300)
        assert_same_run(whole(processes), tmp_path / 'run')

    @pytest.mark.slow
    def test_torchrun_killed_alone(self, digits, tmp_path, whole):
        """Its processes save their state and end; before that nothing else trains in their folder."""
        process = start(*torchrun(), *command(digits, tmp_path, *LONG))
        wait_for(lambda: summary_rows(tmp_path / 'run') > 0)
        family = descendants(process.pid)
        for pid in family[1:]:
            os.kill(pid, signal.SIGSTOP)  # the moment between torchrun's death and theirs, held
        process.kill()
        process.wait()
        second = start(sys.executable, *command(digits, tmp_path, *LONG))
        assert second.wait(120) == 1 and 'another run is training there (process ' in second.stderr.read()
        for pid in family[1:]:
            os.kill(pid, signal.SIGCONT)
        wait_for(lambda: not any(map(alive, family)))
        assert len(list((tmp_path / 'run').glob('recovery-*'))) == 1
        subprocess.run([*torchrun(), *command(digits, tmp_path, *LONG)], env=ENV, check=True, timeout=300)
        assert_same_run(whole(2), tmp_path / 'run')


LONG = [*BUSY, '--epochs', '8', '--workers', '1', '--resume', 'auto']  # long enough to be stopped


@pytest.fixture(scope='module')
def whole(digits, tmp_path_factory):
    """The folder of a run that nothing stopped, by the number of processes."""
    done = {}

    def get(processes):
        if processes not in done:
            output = tmp_path_factory.mktemp('whole')
            if processes == 1:
                run(digits, output, *LONG)
            else:
                subprocess.run([*torchrun(), *command(digits, output, *LONG)], env=ENV, check=True, timeout=300)
            done[processes] = output / 'run'
        return done[processes]

    return get


def summary_rows(folder):
    path = folder / 'summary.csv'
    return len(path.read_text().splitlines()) - 1 if path.exists() else 0


def descendants(pid):
    """A process and all that it started, and they, in order."""
    found = [pid]
    for parent in found:
        path = f'/proc/{parent}/task'
        for task in os.listdir(path) if os.path.exists(path) else []:
            with open(f'{path}/{task}/children') as f:
                found += map(int, f.read().split())
    return found


def alive(pid):
    try:
        with open(f'/proc/{pid}/stat') as f:
            return f.read().rpartition(')')[2].split()[0] != 'Z'
    except FileNotFoundError:
        return False


class TestFolder:

    def test_second_run_is_refused_before_the_first_has_written(self, digits, tmp_path):
        args = Namespace(output=str(tmp_path), experiment='run', distributed=False, rank=0, world_size=1)
        with processes.run_folder(args) as folder:
            second = subprocess.run(
                [sys.executable, *command(digits, tmp_path, '--epochs', 1)], env=ENV, capture_output=True, text=True)
            assert second.returncode == 1 and 'Traceback' not in second.stderr
            assert f'{folder}: another run is training there (process {os.getpid()} on ' in second.stderr
            assert os.listdir(folder) == ['.lock']
        assert not os.path.exists(folder)

    @pytest.mark.slow
    def test_two_at_the_same_moment(self, digits, tmp_path):
        both = [start(sys.executable, *command(digits, tmp_path, '--epochs', 30)) for _ in range(2)]
        errors = [process.communicate(timeout=300)[1] for process in both]
        assert sorted(process.returncode for process in both) == [0, 1], errors
        refusal = next(error for process, error in zip(both, errors) if process.returncode)
        assert 'another run is training there' in refusal and 'Traceback' not in refusal
        assert load(tmp_path / 'run' / 'last.pth.tar')['epoch'] == 29

    def test_two_without_a_name_in_the_same_second(self, tmp_path, monkeypatch):
        args = Namespace(output=str(tmp_path), experiment='', model='vit', distributed=False, rank=0, world_size=1)

        class Noon(processes.datetime):
            @classmethod
            def now(cls):
                return cls(2025, 1, 1, 12)

        monkeypatch.setattr(processes, 'datetime', Noon)
        with processes.run_folder(args) as a, processes.run_folder(args) as b:
            assert [os.path.basename(f) for f in (a, b)] == ['20250101-120000-vit', '20250101-120000-vit-2']

    def test_a_killed_process_holds_no_folder(self, tmp_path):
        """Not even while a process that it started lives on."""
        script = (
            'import os, signal, sys, time\n'
            'from timm_ssm.training.processes import lock_folder\n'
            'lock = lock_folder(sys.argv[1])\n'
            'if os.fork() == 0:\n'
            '    time.sleep(60)\n'
            'print(flush=True)\n'
            'time.sleep(60)\n')
        process = subprocess.Popen(
            [sys.executable, '-c', script, str(tmp_path)], env=ENV, stdout=subprocess.PIPE, start_new_session=True)
        process.stdout.readline()
        with pytest.raises(SystemExit, match='another run is training there'):
            processes.lock_folder(str(tmp_path))
        process.kill()
        process.wait()
        try:
            (tmp_path / 'last.pth.tar.123.tmp').write_bytes(b'half')
            processes.lock_folder(str(tmp_path)).close()
            assert os.listdir(tmp_path) == ['.lock']
        finally:
            os.killpg(process.pid, signal.SIGKILL)

    def test_the_file_goes_away_while_another_waits(self, tmp_path, monkeypatch):
        """A run ends, and deletes its lock, between another's opening and locking of that file."""
        try_lock, calls = processes.try_lock, []

        def late(file):
            calls.append(file.name)
            if len(calls) == 1:
                os.remove(file.name)
                os.rmdir(tmp_path / 'run')
            return try_lock(file)

        monkeypatch.setattr(processes, 'try_lock', late)
        lock = processes.lock_folder(str(tmp_path / 'run'))
        assert len(calls) == 2 and os.path.samestat(os.fstat(lock.fileno()), os.stat(tmp_path / 'run' / '.lock'))
        lock.close()

    def test_file_system_without_locks(self, tmp_path, monkeypatch, caplog):
        def unsupported(*args):
            raise OSError(37, 'No locks available')

        monkeypatch.setattr(processes.fcntl, 'lockf', unsupported)
        processes.lock_folder(str(tmp_path)).close()
        assert 'cannot be locked (No locks available)' in caplog.text
