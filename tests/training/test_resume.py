"""A run that was stopped goes on bit for bit."""
import argparse
import copy
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import timm
import torch

from timm_ssm.training.resume import load_optimizer

from .utils import (
    BUSY,
    MODEL,
    PLAIN,
    ROOT,
    VIDEOMAMBA,
    assert_same_run,
    crash_at_step,
    load,
    run,
    scripted_metrics,
    summary,
    tensors,
)


class TestResume:

    @pytest.mark.parametrize('flags', [
        [*BUSY, '--workers', '0'],
        [*BUSY, '--workers', '2', '--sched-on-updates', '--warmup-epochs', '1', '--lr-noise', '0.3', '0.9'],
        [*BUSY, '--workers', '2', '--no-prefetcher', '--amp', '--amp-dtype', 'bfloat16', '--grad-accum-steps', '3'],
        [*BUSY, '--amp', '--amp-dtype', 'float16', '--opt', 'lamb', '--sched', 'step', '--decay-epochs', '1'],
        ['--opt', 'momentum', '--lr', '0.1', '--val-split', '', '--mixup', '0.5', '--mixup-off-epoch', '2'],
        [*BUSY, '--workers', '1', *VIDEOMAMBA],
        ['--lr', '0.1', '--aug-splits', '2', '--jsd-loss', '--aa', 'rand-m5', '--model-dtype', 'bfloat16'],
    ], ids=['busy', 'updates', 'bfloat16', 'float16', 'plain', 'videomamba', 'splits'])
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

    def test_plateau(self, digits, tmp_path, monkeypatch):
        flags = ['--epochs', 6, '--lr', '0.1', '--sched', 'plateau', '--patience-epochs', 1, '--lr-noise', '0.1']
        top1 = [50, 40, 60, 50, 50, 50]
        scripted_metrics(monkeypatch, top1)
        whole = run(digits, tmp_path / 'a', *flags)
        done = 0
        for stop in (1, 4, 5, 6):  # the fourth and fifth count towards the patience
            scripted_metrics(monkeypatch, top1[done:])
            done = stop
            parts = run(digits, tmp_path / 'b', *flags, '--stop-epoch', stop, '--resume', 'auto')
        assert_same_run(whole, parts)
        rates = [float(row['lr']) for row in summary(whole)]
        assert rates[-1] < 0.05 < rates[0]

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

    @pytest.mark.slow
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


class TestOptimizer:

    def test_changed_settings_are_applied(self, digits, tmp_path, caplog):
        """With a constant learning rate, as no schedule sets it anew."""
        flags = ['--opt', 'adamw', '--sched', 'none', '--epochs', 2]
        before = ['--lr', '0.01', '--weight-decay', '0.1']
        after = ['--lr', '0.02', '--weight-decay', '0.2', '--opt-betas', '0.8', '0.9', '--opt-eps', '1e-4']
        unchanged = run(digits, tmp_path / 'a', *flags, *before)
        for folder in ('b', 'c'):
            run(digits, tmp_path / folder, *flags, *before, '--stop-epoch', 1)
        resumed = run(digits, tmp_path / 'b', *flags, *before, '--resume', 'auto')
        assert_same_run(unchanged, resumed)
        caplog.clear()
        resumed = run(digits, tmp_path / 'c', *flags, *after, '--resume', 'auto')
        assert 'weight_decay 0.1 -> 0.2' in caplog.text and 'opt_betas None -> [0.8, 0.9]' in caplog.text
        a, c = (load(folder / 'last.pth.tar') for folder in (unchanged, resumed))
        groups = c['optimizer']['param_groups']
        assert [group['weight_decay'] for group in groups] == [0., 0.2]
        assert all((g['lr'], tuple(g['betas']), g['eps']) == (0.02, (0.8, 0.9), 1e-4) for g in groups)
        assert [group['weight_decay'] for group in a['optimizer']['param_groups']] == [0., 0.1]
        assert not torch.equal(a['state_dict']['head.weight'], c['state_dict']['head.weight'])

    @pytest.mark.parametrize('opt', ['adam', 'lion', 'radam', 'nadamw', 'sgd', 'momentum', 'lamb'])
    def test_another_optimizer_is_refused(self, digits, tmp_path, opt):
        folder = run(digits, tmp_path, '--epochs', 2, '--opt', 'adamw', '--stop-epoch', 1)
        flags = ['--epochs', 2, '--opt', opt, '--lr', '0.001', '--resume', 'auto']
        with pytest.raises(SystemExit, match=rf'\(opt adamw -> {opt}\); --no-resume-opt starts it anew'):
            run(digits, tmp_path, *flags)
        run(digits, tmp_path, *flags, '--no-resume-opt')
        assert load(folder / 'last.pth.tar')['epoch'] == 1

    def test_settings_that_change_the_groups_are_refused(self, digits, tmp_path):
        run(digits, tmp_path, '--epochs', 2, '--opt', 'adamw', '--stop-epoch', 1)
        for flags in (['--weight-decay', '0'], ['--layer-decay', '0.5']):
            with pytest.raises(SystemExit, match='does not fit this model and optimiser'):
                run(digits, tmp_path, '--epochs', 2, '--opt', 'adamw', '--resume', 'auto', *flags)

    def test_weights_to_start_from_have_no_effect(self, digits, tmp_path, caplog):
        run(digits, tmp_path, '--epochs', 2, '--stop-epoch', 1)
        run(digits, tmp_path, '--epochs', 2, '--resume', 'auto', '--initial-checkpoint', 'nowhere.pth')
        assert 'Without effect on a resumed run: initial_checkpoint  -> nowhere.pth' in caplog.text

    # fused and bnb need other packages; adahessian draws from a generator of its own, which no checkpoint holds
    @pytest.mark.parametrize('opt', [
        pytest.param(name, marks=pytest.mark.slow) if name == 'kron' else name  # which compiles
        for name in timm.optim.list_optimizers(exclude_filters=['fused*', 'bnb*', 'adahessian'])])
    def test_every_optimizer_goes_on(self, opt):
        def train(optimizer, model, steps):
            for step in steps:
                torch.manual_seed(step)
                optimizer.zero_grad()
                model(torch.randn(4, 3)).square().mean().backward()
                optimizer.step()

        def start():
            torch.manual_seed(0)
            model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 3))
            return model, timm.optim.create_optimizer_v2(model, opt=opt, lr=0.01, weight_decay=0.1)

        model, optimizer = start()
        train(optimizer, model, range(7))
        half, optimizer = start()
        train(optimizer, half, range(4))
        saved, (half, resumed) = [copy.deepcopy(x.state_dict()) for x in (half, optimizer)], start()
        half.load_state_dict(saved[0])
        load_optimizer(resumed, saved[1])
        train(resumed, half, range(4, 7))
        assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), half.state_dict().values()))


@pytest.fixture(scope='module')
def finished(digits, tmp_path_factory):
    return run(digits, tmp_path_factory.mktemp('finished'), '--epochs', 3, '--opt', 'adamw', '--lr', '0.01')


class TestDamage:

    @pytest.mark.parametrize('damage', ['empty', 'flipped', 'zeroed', 'truncated'])
    def test_falls_back_to_what_is_intact(self, digits, tmp_path, finished, caplog, damage):
        """A damaged recovery beside an intact last, and a damaged last beside intact epochs."""
        folder = tmp_path / 'run'
        shutil.copytree(finished, folder)
        spoil(folder / 'checkpoint-2.pth.tar', damage, folder / 'recovery-3-5.pth.tar')
        flags = ['--epochs', 3, '--opt', 'adamw', '--lr', '0.01', '--resume', 'auto']
        run(digits, tmp_path, *flags)
        assert load(folder / 'last.pth.tar')['epoch'] == 2
        assert 'recovery-3-5.pth.tar: it is no checkpoint, or damaged' in caplog.text
        assert 'going on from' in caplog.text and 'last.pth.tar instead' in caplog.text
        (folder / 'recovery-3-5.pth.tar').unlink()
        for name in ('last', 'checkpoint-2', 'model_best'):
            spoil(folder / f'{name}.pth.tar', damage)
        run(digits, tmp_path, *flags)
        assert 'checkpoint-1.pth.tar instead' in caplog.text
        assert_same_run(finished, folder)

    def test_nothing_intact(self, digits, tmp_path):
        run(digits, tmp_path, '--epochs', 1)
        for path in (tmp_path / 'run').glob('*.pth.tar'):
            path.write_bytes(b'')
        with pytest.raises(SystemExit, match='--resume auto: last.pth.tar, checkpoint-0.pth.tar cannot be read; '):
            run(digits, tmp_path, '--epochs', 1, '--resume', 'auto')

    @pytest.mark.parametrize('damage', ['empty', 'flipped', 'zeroed', 'truncated'])
    def test_a_damaged_file_by_name_is_refused(self, digits, tmp_path, finished, damage):
        path = tmp_path / 'last.pth.tar'
        spoil(finished / 'last.pth.tar', damage, path)
        with pytest.raises(SystemExit, match=f'^--resume {path}: it is no checkpoint, or damaged'):
            run(digits, tmp_path, '--resume', path)


def spoil(path, damage, target=None):
    """Damage a checkpoint in the middle of a tensor."""
    content = bytearray(path.read_bytes())
    middle = content.index(load(path)['state_dict']['blocks.0.mlp.fc1.weight'].numpy().tobytes()) + 100
    if damage == 'flipped':
        content[middle] ^= 4
    elif damage == 'zeroed':
        content[middle:middle + 512] = bytes(512)
    target = target or path
    target.unlink(missing_ok=True)  # another name of the same file stays whole
    target.write_bytes(content[:{'empty': 0, 'truncated': middle}.get(damage)])
