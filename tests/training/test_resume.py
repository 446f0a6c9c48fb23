"""A run that was stopped goes on bit for bit."""
import argparse
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from .utils import BUSY, MODEL, PLAIN, ROOT, VIDEOMAMBA, assert_same_run, crash_at_step, load, run, tensors


class TestResume:

    @pytest.mark.parametrize('flags', [
        [*BUSY, '--workers', '0'],
        [*BUSY, '--workers', '2', '--sched-on-updates', '--warmup-epochs', '1', '--lr-noise', '0.3', '0.9'],
        [*BUSY, '--workers', '2', '--no-prefetcher', '--amp', '--amp-dtype', 'bfloat16', '--grad-accum-steps', '3'],
        [*BUSY, '--amp', '--amp-dtype', 'float16', '--opt', 'lamb', '--sched', 'step', '--decay-epochs', '1'],
        ['--opt', 'momentum', '--lr', '0.1', '--val-split', '', '--mixup', '0.5', '--mixup-off-epoch', '2'],
        [*BUSY, '--workers', '1', *VIDEOMAMBA],
    ], ids=['busy', 'updates', 'bfloat16', 'float16', 'plain', 'videomamba'])
    def test_between_epochs(self, digits, tmp_path, flags):
        whole = run(digits, tmp_path / 'a', '--epochs', 3, *flags)
        run(digits, tmp_path / 'b', '--epochs', 3, *flags, '--stop-epoch', 1, '--resume', 'auto')
        first = load(tmp_path / 'b' / 'run' / 'last.pth.tar')
        parts = run(digits, tmp_path / 'b', '--epochs', 3, *flags, '--resume', 'auto')
        assert_same_run(whole, parts)
        assert_same_run(whole, parts, 'checkpoint-1')
        last = load(parts / 'last.pth.tar')
        assert first['epoch'] == 0 and last['epoch'] == 2
        assert not torch.equal(first['state_dict']['head.weight'], last['state_dict']['head.weight'])

    @pytest.mark.parametrize('flags', [
        [*BUSY, '--workers', '0'],
        [*BUSY, '--workers', '2', '--grad-accum-steps', '3', '--sched-on-updates'],
        [*BUSY, '--workers', '2', '--no-prefetcher', '--warmup-epochs', '2'],
    ], ids=['prefetcher', 'workers', 'no-prefetcher'])
    @pytest.mark.parametrize('epoch', [0, 1])
    def test_within_an_epoch(self, digits, tmp_path, monkeypatch, flags, epoch):
        flags = [*flags, '--epochs', 2, '--recovery-interval', 1, '--resume', 'auto']
        whole = run(digits, tmp_path / 'a', *flags)
        crash_at_step(monkeypatch, 10 * epoch + 7)
        with pytest.raises(RuntimeError, match='power cut'):
            run(digits, tmp_path / 'b', *flags)
        monkeypatch.undo()
        assert len(list((tmp_path / 'b' / 'run').glob('recovery-*'))) == 1
        parts = run(digits, tmp_path / 'b', *flags)
        assert_same_run(whole, parts)
        assert not list(parts.glob('recovery-*'))

    def test_after_a_kill(self, digits, tmp_path):
        flags = [*BUSY, '--epochs', '40', '--workers', '1', '--checkpoint-hist', '2']
        whole = run(digits, tmp_path / 'a', *flags)
        command = [
            sys.executable, str(ROOT / 'train.py'), str(digits), *MODEL, *PLAIN, '--output', str(tmp_path / 'b'),
            '--experiment', 'run', '--resume', 'auto', '--recovery-interval', '3', *flags]
        folder, kills = tmp_path / 'b' / 'run', 0
        while True:
            process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
            before = set(folder.glob('*.pth.tar'))
            while process.poll() is None and set(folder.glob('*.pth.tar')) == before:
                time.sleep(0.01)
            time.sleep(0.3 + 0.1 * kills)
            if kills == 2:
                assert process.wait(120) == 0
                break
            os.killpg(process.pid, signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL  # it had not ended by itself
            kills += 1
            for path in folder.glob('*.pth.tar'):
                load(path)
        assert_same_run(whole, folder)
        assert_same_run(whole, folder, 'model_best')

    def test_refuses_what_is_no_checkpoint(self, digits, tmp_path):
        folder = run(digits, tmp_path, '--epochs', 1)
        whole = (folder / 'last.pth.tar').read_bytes()
        (tmp_path / 'half.pth.tar').write_bytes(whole[:len(whole) // 2])
        torch.save(load(folder / 'last.pth.tar')['state_dict'], tmp_path / 'weights.pth')
        for path, message in {
            'missing.pth.tar': 'no such file',
            'half.pth.tar': 'half.pth.tar: it is no checkpoint, or damaged',
            'weights.pth': 'no optimiser state in it',
        }.items():
            with pytest.raises(SystemExit, match=message):
                run(digits, tmp_path / 'b', '--epochs', 2, '--resume', tmp_path / path)
        with pytest.raises(SystemExit, match='does not fit'):
            run(digits, tmp_path / 'b', '--resume', folder / 'last.pth.tar', '--num-classes', 11)

    def test_refuses_other_settings_within_an_epoch(self, digits, tmp_path, monkeypatch):
        crash_at_step(monkeypatch, 5)
        with pytest.raises(RuntimeError, match='power cut'):
            run(digits, tmp_path, '--epochs', 1, '--recovery-interval', 1)
        monkeypatch.undo()
        with pytest.raises(SystemExit, match='batch_size 16 -> 8'):
            run(digits, tmp_path, '--epochs', 1, '--resume', 'auto', '--batch-size', 8)

    def test_takes_a_checkpoint_of_timm(self, digits, tmp_path):
        """timm's CheckpointSaver keeps the arguments as a Namespace and no history."""
        folder = run(digits, tmp_path / 'a', '--epochs', 2)
        state = load(folder / 'checkpoint-0.pth.tar')
        del state['history']
        state['args'] = argparse.Namespace(**state['args'])
        torch.save(state, tmp_path / 'timm.pth.tar')
        resumed = run(digits, tmp_path / 'b', '--epochs', 2, '--resume', tmp_path / 'timm.pth.tar')
        a, b = (load(f / 'last.pth.tar') for f in (folder, resumed))
        assert all(torch.equal(x, y) for x, y in zip(tensors(a['state_dict']), tensors(b['state_dict'])))
