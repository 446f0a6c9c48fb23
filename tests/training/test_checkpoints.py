"""The files of a run."""


import os

import pytest
import timm
import torch
from safetensors.torch import save_file

from timm_ssm.training import checkpoints

from .utils import BUSY, MODEL_KWARGS, assert_same_run, load, run, scripted_metrics, summary


class TestCheckpoints:

    def test_full_disk_while_writing(self, digits, tmp_path, monkeypatch):
        """A write that fails half way leaves the last checkpoint, from which the run goes on as if nothing was."""
        whole = run(digits, tmp_path / 'a', *BUSY, '--epochs', 3)
        save, calls = torch.save, []

        def failing(state, f):
            calls.append(1)
            if len(calls) == 2:
                f.write(b'half of a checkpoint')
                raise OSError('No space left on device')
            save(state, f)

        monkeypatch.setattr(checkpoints.torch, 'save', failing)
        with pytest.raises(OSError, match='No space left'):
            run(digits, tmp_path / 'b', *BUSY, '--epochs', 3)
        monkeypatch.undo()
        folder = tmp_path / 'b' / 'run'
        assert load(folder / 'last.pth.tar')['epoch'] == load(folder / 'model_best.pth.tar')['epoch'] == 0
        assert_same_run(whole, run(digits, tmp_path / 'b', *BUSY, '--epochs', 3, '--resume', 'auto'))

    def test_kill_between_the_files_of_one_save(self, digits, tmp_path, monkeypatch):
        """`last` is in place, its copies as best and as numbered checkpoint are not: resuming makes up for it."""
        scripted_metrics(monkeypatch, [10., 20.])
        finish_save = checkpoints.Checkpoints.finish_save

        def failing(self, epoch):
            if epoch == 1:
                raise RuntimeError('power cut')
            finish_save(self, epoch)

        monkeypatch.setattr(checkpoints.Checkpoints, 'finish_save', failing)
        with pytest.raises(RuntimeError, match='power cut'):
            run(digits, tmp_path, '--epochs', 2)
        monkeypatch.setattr(checkpoints.Checkpoints, 'finish_save', finish_save)
        folder = tmp_path / 'run'
        assert load(folder / 'last.pth.tar')['epoch'] == 1 and load(folder / 'model_best.pth.tar')['epoch'] == 0
        run(digits, tmp_path, '--epochs', 2, '--resume', 'auto')
        assert load(folder / 'model_best.pth.tar')['epoch'] == load(folder / 'checkpoint-1.pth.tar')['epoch'] == 1

    @pytest.mark.parametrize('hard_links', [True, False])
    def test_files_are_whole_at_every_moment(self, tmp_path, monkeypatch, hard_links):
        """Before and after each change in the folder: neither name goes away, nor holds less than a checkpoint."""
        saver = checkpoints.Checkpoints(str(tmp_path), max_history=2, decreasing=False)
        saver.save(dict(epoch=0, weights=torch.zeros(100)), 1.)
        changes = []

        def check(change, result=None):
            changes.append(change)
            for name in ('last', 'model_best'):
                assert load(tmp_path / f'{name}.pth.tar')['weights'].shape == (100,), change
            return result

        for name in ('replace', 'remove', 'link'):
            function = getattr(os, name)

            def wrapped(*args, name=name, function=function):
                check((name, *args))
                if name == 'link' and not hard_links:
                    raise OSError('this file system has no hard links')
                return check((name, *args), function(*args))

            monkeypatch.setattr(checkpoints.os, name, wrapped)
        for epoch in range(1, 6):
            saver.save(dict(epoch=epoch, weights=torch.full((100,), float(epoch))), float(epoch % 3))
            assert load(tmp_path / 'last.pth.tar')['epoch'] == epoch
            assert len(list(tmp_path.glob('checkpoint-*'))) == 2
        assert len(changes) > 20
        assert load(tmp_path / 'model_best.pth.tar')['epoch'] == 2
        assert not list(tmp_path.glob('*.tmp'))

    def test_history(self, digits, tmp_path, monkeypatch):
        scripted_metrics(monkeypatch, [30., 50., 20., 50., 40.])
        folder = run(digits, tmp_path, '--epochs', 5, '--checkpoint-hist', 2, '--save-epochs', 1, 3, '--stop-epoch', 4)
        folder = run(digits, tmp_path, '--epochs', 5, '--checkpoint-hist', 2, '--resume', 'auto')
        kept = {path.name.removesuffix('.pth.tar'): load(path)['epoch'] for path in folder.glob('*.pth.tar')}
        assert kept == {
            'last': 4, 'model_best': 1, 'checkpoint-1': 1, 'checkpoint-3': 3, 'milestone-1': 0, 'milestone-3': 2}
        assert [float(row['eval_top1']) for row in summary(folder)] == [30., 50., 20., 50., 40.]

    def test_best_by_loss(self, digits, tmp_path, monkeypatch):
        scripted_metrics(monkeypatch, [0.3, 0.1, 0.2], name='loss')
        folder = run(digits, tmp_path, '--epochs', 3, '--eval-metric', 'loss')
        assert load(folder / 'model_best.pth.tar')['epoch'] == 1

    def test_an_unvalidated_epoch_is_saved_but_not_ranked(self, digits, tmp_path):
        folder = run(digits, tmp_path, '--epochs', 4, '--val-interval', 3, '--stop-epoch', 2)
        assert [row['eval_top1'] == '' for row in summary(folder)] == [True, False]
        folder = run(digits, tmp_path / 'b', '--epochs', 3, '--val-interval', 2)
        assert [row['eval_top1'] == '' for row in summary(folder)] == [True, False, False]
        assert [epoch for epoch, _ in load(folder / 'last.pth.tar')['history']] != [0, 1, 2]

    def test_another_run_is_not_overwritten(self, digits, tmp_path):
        folder = run(digits, tmp_path, '--epochs', 2)
        before = {path: path.read_bytes() for path in folder.iterdir()}
        for flags in ([], ['--resume', folder / 'checkpoint-0.pth.tar']):
            with pytest.raises(SystemExit, match='another --experiment'):
                run(digits, tmp_path, '--epochs', 2, *flags)
        assert before == {path: path.read_bytes() for path in folder.iterdir()}

    def test_timm_reads_it(self, digits, tmp_path):
        folder = run(digits, tmp_path, '--epochs', 1, '--model-ema', '--model-ema-decay', '0.5')
        state = load(folder / 'last.pth.tar')
        for use_ema, key in ((True, 'state_dict_ema'), (False, 'state_dict')):
            model = timm.create_model('vit_tiny_patch16_224', img_size=8, in_chans=1, num_classes=10, **MODEL_KWARGS)
            timm.models.load_checkpoint(model, str(folder / 'last.pth.tar'), use_ema=use_ema)
            assert torch.equal(model.head.weight, state[key]['head.weight'])
        assert not torch.equal(state['state_dict']['head.weight'], state['state_dict_ema']['head.weight'])
        assert (folder / 'classes.txt').read_text().split() == [f'class_{i}' for i in range(10)]

    def test_channels_last_is_saved_contiguous(self, digits, tmp_path):
        """As safetensors takes them; without it the weights are channels-last, see test_loop."""
        flags = ['--channels-last', '--model-ema', '--model-ema-decay', '0.5', '--opt', 'adamw']
        whole = run(digits, tmp_path / 'a', '--epochs', 2, *flags)
        state = load(whole / 'last.pth.tar')
        for key in ('state_dict', 'state_dict_ema'):
            assert all(t.is_contiguous() for t in state[key].values())
        save_file(state['state_dict'], tmp_path / 'weights.safetensors')
        run(digits, tmp_path / 'b', '--epochs', 2, *flags, '--stop-epoch', 1)
        assert_same_run(whole, run(digits, tmp_path / 'b', '--epochs', 2, *flags, '--resume', 'auto'))
