"""The training loop: steps, precision, what it says, and when it stops."""
import re
import sys
from types import SimpleNamespace

import pytest
import timm
import torch
from PIL import Image
from timm.models import save_for_hf
from timm.task import ClassificationTask
from torchvision.transforms.functional import pil_to_tensor

from timm_ssm.training import train
from timm_ssm.training.loop import save_picture

from .utils import (
    MODEL,
    MODEL_KWARGS,
    PLAIN,
    SGD,
    initial_weights,
    load,
    run,
    spy_on_batches,
    summary,
    tensors,
    train_by_hand,
)


class TestTraining:

    def test_learns(self, digits, tmp_path):
        rows = summary(run(digits, tmp_path, '--epochs', 20, '--opt', 'adamw', '--lr', '0.01', '--no-aug'))
        assert float(rows[-1]['eval_top1']) > 75 > float(rows[0]['eval_top1'])
        assert float(rows[-1]['train_loss']) < 1 < float(rows[0]['train_loss'])

    @pytest.mark.parametrize('accum', [1, 4])
    def test_gradient_accumulation(self, digits, tmp_path, monkeypatch, accum):
        """10 batches in 10 updates, and in updates of 4, 4 and 2 batches."""
        seen, start = spy_on_batches(monkeypatch, digits), initial_weights(monkeypatch)
        folder = run(digits, tmp_path, *SGD, '--lr', '0.1', '--epochs', 1, '--grad-accum-steps', accum)
        assert sorted(sum(seen, [])) == list(range(160))
        expected = train_by_hand(digits, [seen[i:i + accum] for i in range(0, 10, accum)], 0.1, start)
        for key, value in load(folder / 'last.pth.tar')['state_dict'].items():
            torch.testing.assert_close(value, expected[key], atol=1e-5, rtol=1e-4)

    def test_accumulated_batches_equal_a_large_one(self, digits, tmp_path):
        flags = [*SGD, '--lr', '0.1', '--epochs', 2]
        large = run(digits, tmp_path / 'a', *flags, '--batch-size', 32)
        small = run(digits, tmp_path / 'b', *flags, '--batch-size', 8, '--grad-accum-steps', 4)
        a, b = (load(folder / 'last.pth.tar')['state_dict'] for folder in (large, small))
        assert all(torch.allclose(a[k], b[k], atol=1e-5, rtol=1e-4) for k in a)

    def test_mixed_precision_on_the_cpu(self, digits, tmp_path):
        dtypes = set()

        def record_dtype(module, args, output):
            if isinstance(module, torch.nn.Linear):
                dtypes.add(output.dtype)

        handle = torch.nn.modules.module.register_module_forward_hook(record_dtype)
        flags = ['--epochs', 4, '--opt', 'adamw', '--lr', '0.01', '--no-aug', '--amp', '--amp-dtype', 'bfloat16']
        folder = run(digits, tmp_path, *flags)
        handle.remove()
        assert dtypes == {torch.bfloat16}
        state = load(folder / 'last.pth.tar')
        assert all(t.dtype == torch.float32 for t in state['state_dict'].values())
        assert 'amp_scaler' not in state
        losses = [float(row['train_loss']) for row in summary(folder)]
        assert losses[-1] < losses[0] - 0.1
        assert torch.tensor(losses[0]).bfloat16().item() != losses[0]  # the loss itself is in float32

    @pytest.mark.parametrize('flags', [
        ['--grad-checkpointing'],
        ['--channels-last'],
        ['--torchcompile', 'aot_eager'],
        pytest.param(['--torchcompile'], marks=pytest.mark.slow),
    ], ids=lambda flags: flags[-1])
    def test_other_ways_to_the_same_weights(self, digits, tmp_path, flags):
        common = [*SGD, '--lr', '0.1', '--epochs', 1, '--model-ema', '--model-ema-decay', '0.5']
        plain = run(digits, tmp_path / 'a', *common)
        other = run(digits, tmp_path / 'b', *common, *flags)
        a, b = (load(folder / 'last.pth.tar') for folder in (plain, other))
        for key in ('state_dict', 'state_dict_ema'):
            assert a[key].keys() == b[key].keys()
            assert all(torch.allclose(a[key][k], b[key][k], atol=1e-5, rtol=1e-4) for k in a[key])
        assert summary(plain)[0]['eval_top1'] == summary(other)[0]['eval_top1']

    def test_gradient_checkpointing_and_channels_last_reach_the_model(self, digits, tmp_path):
        task = train.main([
            str(digits), *MODEL, *PLAIN, '--output', str(tmp_path), '--epochs', '1', '--grad-checkpointing',
            '--channels-last'])
        model = task.get_trainable_module()
        assert model.grad_checkpointing
        assert model.patch_embed.proj.weight.is_contiguous(memory_format=torch.channels_last)

    def test_layer_decay(self, digits, tmp_path):
        flags = ['--epochs', 1, '--opt', 'adamw', '--lr', '0.01', '--sched', 'step', '--layer-decay', '0.5']
        folder = run(digits, tmp_path, *flags)
        groups = load(folder / 'last.pth.tar')['optimizer']['param_groups']
        # embeddings, two blocks, then the last norm and the head: each half of the rate of the one above
        assert sorted({group['lr_scale'] for group in groups}) == [0.125, 0.25, 0.5, 1.]
        assert all(group['lr'] == pytest.approx(0.01 * group['lr_scale']) for group in groups)

    def test_average_of_the_weights(self, digits, tmp_path):
        """After the first update the average starts from the weights; with a decay of 0 it stays at them."""
        folder = run(digits, tmp_path, *SGD, '--lr', '0.1', '--epochs', 1, '--model-ema', '--model-ema-decay', '0')
        state = load(folder / 'last.pth.tar')
        assert all(torch.equal(state['state_dict'][k], v) for k, v in state['state_dict_ema'].items())

    def test_learning_rate(self, digits, tmp_path):
        folder = run(
            digits, tmp_path, '--epochs', 4, '--lr-base', '0.4', '--lr-base-size', 64, '--grad-accum-steps', 2,
            '--warmup-epochs', 2, '--warmup-lr', '0.01', '--sched', 'step', '--decay-epochs', 3)
        rates = [float(row['lr']) for row in summary(folder)]
        assert rates == pytest.approx([0.01, 0.105, 0.2, 0.02])  # 0.4 * 32 / 64, linear warm-up, a step down by 10

    @pytest.mark.parametrize('source', ['pretrained-path', 'initial-checkpoint'])
    def test_starts_from_given_weights(self, digits, tmp_path, monkeypatch, source):
        folder = run(digits, tmp_path / 'a', '--epochs', 1)
        weights = load(folder / 'last.pth.tar')['state_dict']
        torch.save(weights, tmp_path / 'weights.pth')
        start = initial_weights(monkeypatch)
        # this model of timm's looks for an .npz file of its authors otherwise
        flags = ['--pretrained-cfg-overlay', 'custom_load=False']
        run(digits, tmp_path / 'b', '--epochs', 1, f'--{source}', tmp_path / 'weights.pth', *flags)
        same = {key for key in weights if torch.equal(weights[key], start[key])}
        head = {'head.weight', 'head.bias'} if source == 'pretrained-path' else set()  # pretrained: with a new head
        assert same == weights.keys() - head

    def test_distillation(self, digits, tmp_path):
        """A student of labels and teacher; the teacher comes from a folder, as it would from the Hub."""
        teacher = timm.create_model('vit_tiny_patch16_224', img_size=8, in_chans=1, num_classes=10, **MODEL_KWARGS)
        teacher.pretrained_cfg.update(mean=(0.5,), std=(0.5,))
        save_for_hf(teacher, str(tmp_path / 'teacher'), model_args=dict(img_size=8, in_chans=1, **MODEL_KWARGS))
        config = tmp_path / 'teacher' / 'config.json'
        plain = run(digits, tmp_path / 'a', '--epochs', 1)
        losses = [summary(plain)[0]['train_loss']]
        for kind in ('logit', 'feature'):
            folder = run(
                digits, tmp_path / kind, '--epochs', 1, '--kd-model-name', f'local-dir:{tmp_path / "teacher"}',
                '--kd-distill-type', kind, '--distill-loss-weight', 0.5)
            losses.append(summary(folder)[0]['train_loss'])
            assert load(folder / 'last.pth.tar')['state_dict'].keys() == teacher.state_dict().keys()
        assert config.exists() and len(set(losses)) == 3

    def test_wandb(self, digits, tmp_path, monkeypatch):
        calls = []
        fake = SimpleNamespace(init=lambda **kwargs: calls.append(kwargs), log=calls.append)
        monkeypatch.setitem(sys.modules, 'wandb', fake)
        run(digits, tmp_path, '--epochs', 1, '--log-wandb', '--wandb-project', 'digits')
        assert calls[0]['project'] == 'digits' and calls[0]['name'] == 'run'
        assert calls[1]['epoch'] == 0 and 'eval_top1' in calls[1]


    def test_pictures_of_batches(self, digits, tmp_path):
        folder = run(digits, tmp_path, '--epochs', 1, '--log-interval', 4, '--save-images')
        assert {path.name for path in folder.glob('*.jpg')} == {f'train-batch-{i}.jpg' for i in (3, 7, 9)}
        assert Image.open(folder / 'train-batch-3.jpg').size == (8 * 8, 2 * 8)  # 16 digits of 8 x 8
        clips = torch.zeros(2, 3, 4, 8, 8)
        clips[1, :, 2] = 1.  # of the second clip the third frame
        save_picture(clips, str(tmp_path / 'clips.png'))
        rows = pil_to_tensor(Image.open(tmp_path / 'clips.png')).bool().all(0)
        assert rows.shape == (16, 32) and rows[8:, 16:24].all() and rows.sum() == 64

    def test_modules_of_devices(self, digits, tmp_path, monkeypatch):
        (tmp_path / 'my_device.py').write_text("raise RuntimeError('imported')")
        monkeypatch.syspath_prepend(tmp_path)
        with pytest.raises(RuntimeError, match='imported'):
            run(digits, tmp_path / 'output', '--epochs', 1, '--device-modules', 'my_device')


class TestNotFinite:

    def test_loss(self, digits, tmp_path):
        run(digits, tmp_path, '--epochs', 2, '--stop-epoch', 1, '--lr', '0.1')
        folder = tmp_path / 'run'
        before = (folder / 'last.pth.tar').read_bytes()
        with pytest.raises(SystemExit) as error:
            run(digits, tmp_path, '--epochs', 2, '--lr', '1e30', '--resume', 'auto', '--log-interval', 3)
        message = error.value.code  # a text: Python writes it to the standard error and exits with 1
        assert message.startswith('Training stopped: the loss is')
        found = re.search(r'loss is (nan|inf) at epoch 1, batch (\d) of 10 \(update (\d+)\)', message)
        assert found and int(found[3]) == 10 + int(found[2]) and 1 <= int(found[2]) <= 3
        assert str(folder / 'last.pth.tar') in message
        assert (folder / 'last.pth.tar').read_bytes() == before

    @pytest.mark.parametrize('flags, when, kept', [
        ([], 'epoch 0', 'There is no checkpoint yet'),
        (['--recovery-interval', '9'], 'epoch 0, batch 8', 'There is no checkpoint yet'),
        (['--recovery-interval', '4'], 'epoch 0', r'.*recovery-0-8.pth.tar'),
    ], ids=['epoch', 'recovery', 'after-recovery'])
    def test_weights(self, digits, tmp_path, monkeypatch, flags, when, kept):
        """The loss of the last batch before a checkpoint is still finite, the update after it is not."""
        forward, steps = ClassificationTask.forward, []
        last = 9 if when == 'epoch 0' else 8

        def exploding(self, input, target):
            output = forward(self, input, target)
            if len(steps) == last:
                output['loss'].register_hook(lambda grad: grad * float('inf'))
            steps.append(output['loss'].item())
            return output

        monkeypatch.setattr(ClassificationTask, 'forward', exploding)
        message = f'weights are not finite after {when}. (The last good checkpoint is )?{kept}'
        with pytest.raises(SystemExit, match=message):
            run(digits, tmp_path, '--epochs', 1, *flags)
        assert len(steps) == last + 1
        for path in (tmp_path / 'run').glob('*.pth.tar'):
            assert all(t.isfinite().all() for t in tensors(load(path)['state_dict']))


class TestLog:

    def test_plain_lines(self, digits, tmp_path, caplog):
        run(digits, tmp_path, '--epochs', 1, '--log-interval', 4)
        lines = [record.message for record in caplog.records if record.name.startswith('timm_ssm.training')]
        steps = [line for line in lines if line.startswith('Epoch 0 [')]
        assert [re.search(r'\[ *(\d+)/10\]', line)[1] for line in steps] == ['4', '8', '10']
        pattern = r'loss \d+\.\d{4} \(\d+\.\d{4}\)  lr \d\.\d{3}e-\d\d  \d+\.\d img/s'
        assert all(re.search(pattern, line) for line in steps)
        assert any(line.startswith('epoch 0  train_loss') and 'eval_top1' in line for line in lines)
        assert lines[-1].startswith('Best top1')

    def test_progress_bar(self, digits, tmp_path, caplog, capsys, monkeypatch):
        monkeypatch.setattr(sys.stderr, 'isatty', lambda: True)
        run(digits, tmp_path, '--epochs', 1, '--log-interval', 4)
        shown = capsys.readouterr().err
        assert 'Epoch 0:' in shown and '10/10' in shown and 'loss' in shown
        assert not [record for record in caplog.records if 'Epoch 0 [' in record.message]
