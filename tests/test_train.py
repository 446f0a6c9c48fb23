"""train.py, run on scikit-learn's digits."""
import csv
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models import save_for_hf
from timm.task import ClassificationTask
from torchvision.transforms.functional import pil_to_tensor

import train
import train_files

ROOT = Path(__file__).parents[1]
MODEL_KWARGS = dict(embed_dim=16, depth=2, num_heads=2, patch_size=4)
MODEL = [
    '--model', 'vit_tiny_patch16_224', '--model-kwargs', *(f'{k}={v}' for k, v in MODEL_KWARGS.items()),
    '--img-size', '8', '--in-chans', '1', '--mean', '0.5', '--std', '0.5', '--num-classes', '10',
]
VIDEOMAMBA = ['--model', 'videomamba_tiny_patch16_224', '--model-kwargs', 'embed_dim=16', 'depth=2', 'patch_size=4']
PLAIN = ['--device', 'cpu', '--workers', '0', '--batch-size', '16', '--warmup-epochs', '0', '--log-interval', '100']
# everything that draws random numbers or keeps a state
BUSY = [
    '--opt', 'adamw', '--lr', '0.01', '--mixup', '0.8', '--cutmix', '1.0', '--reprob', '0.5', '--aa', 'rand-m5-mstd0.5',
    '--drop', '0.1', '--drop-path', '0.3', '--model-ema', '--model-ema-decay', '0.9', '--clip-grad', '1.0',
]


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    # models this small only lose by a second thread, and lose a lot where cores are shared
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    yield
    torch.set_num_threads(threads)


def run(digits, output, *flags):
    """Train in this process as the run `run` in the folder `output`; returns the folder of the run."""
    train.main([str(digits), *MODEL, *PLAIN, '--output', str(output), '--experiment', 'run', *map(str, flags)])
    return output / 'run'


def load(path):
    return torch.load(path, weights_only=True)


def tensors(value):
    """The tensors in nested dicts and lists, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    values = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else []
    return [t for v in values for t in tensors(v)]


def assert_same_run(a, b, name='last'):
    """Two runs have bitwise the same weights, averages and optimiser state, and the same summary."""
    a_state, b_state = (load(folder / f'{name}.pth.tar') for folder in (a, b))
    assert a_state['epoch'] == b_state['epoch']
    assert a_state['history'] == b_state['history']
    for key in ('state_dict', 'state_dict_ema', 'optimizer', 'amp_scaler'):
        assert (key in a_state) == (key in b_state)
        a_tensors, b_tensors = tensors(a_state.get(key)), tensors(b_state.get(key))
        assert len(a_tensors) == len(b_tensors)
        assert all(torch.equal(x, y) for x, y in zip(a_tensors, b_tensors)), key
    assert a_state['optimizer']['param_groups'] == b_state['optimizer']['param_groups']
    assert (a / 'summary.csv').read_text() == (b / 'summary.csv').read_text()


def summary(folder):
    with open(folder / 'summary.csv', newline='') as f:
        return list(csv.DictReader(f))


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
            'half.pth.tar': 'not a whole checkpoint',
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
        state['args'] = train.argparse.Namespace(**state['args'])
        torch.save(state, tmp_path / 'timm.pth.tar')
        resumed = run(digits, tmp_path / 'b', '--epochs', 2, '--resume', tmp_path / 'timm.pth.tar')
        a, b = (load(f / 'last.pth.tar') for f in (folder, resumed))
        assert all(torch.equal(x, y) for x, y in zip(tensors(a['state_dict']), tensors(b['state_dict'])))


def crash_at_step(monkeypatch, number):
    """Make the forward pass of a training step, counted from 1, fail."""
    forward, calls = ClassificationTask.forward, []

    def failing(self, *args):
        calls.append(1)
        if len(calls) == number:
            raise RuntimeError('power cut')
        return forward(self, *args)

    monkeypatch.setattr(ClassificationTask, 'forward', failing)


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

        monkeypatch.setattr(train_files.torch, 'save', failing)
        with pytest.raises(OSError, match='No space left'):
            run(digits, tmp_path / 'b', *BUSY, '--epochs', 3)
        monkeypatch.undo()
        folder = tmp_path / 'b' / 'run'
        assert load(folder / 'last.pth.tar')['epoch'] == load(folder / 'model_best.pth.tar')['epoch'] == 0
        assert_same_run(whole, run(digits, tmp_path / 'b', *BUSY, '--epochs', 3, '--resume', 'auto'))

    def test_kill_between_the_files_of_one_save(self, digits, tmp_path, monkeypatch):
        """`last` is in place, its copies as best and as numbered checkpoint are not: resuming makes up for it."""
        scripted_metrics(monkeypatch, [10., 20.])
        settle = train_files.Checkpoints.settle

        def failing(self, epoch):
            if epoch == 1:
                raise KeyboardInterrupt
            settle(self, epoch)

        monkeypatch.setattr(train_files.Checkpoints, 'settle', failing)
        with pytest.raises(KeyboardInterrupt):
            run(digits, tmp_path, '--epochs', 2)
        monkeypatch.setattr(train_files.Checkpoints, 'settle', settle)
        folder = tmp_path / 'run'
        assert load(folder / 'last.pth.tar')['epoch'] == 1 and load(folder / 'model_best.pth.tar')['epoch'] == 0
        run(digits, tmp_path, '--epochs', 2, '--resume', 'auto')
        assert load(folder / 'model_best.pth.tar')['epoch'] == load(folder / 'checkpoint-1.pth.tar')['epoch'] == 1

    @pytest.mark.parametrize('hard_links', [True, False])
    def test_files_are_whole_at_every_moment(self, tmp_path, monkeypatch, hard_links):
        """Before and after each change in the folder: neither name goes away, nor holds less than a checkpoint."""
        checkpoints = train_files.Checkpoints(str(tmp_path), max_history=2, decreasing=False)
        checkpoints.save(dict(epoch=0, weights=torch.zeros(100)), 1.)
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

            monkeypatch.setattr(train_files.os, name, wrapped)
        for epoch in range(1, 6):
            checkpoints.save(dict(epoch=epoch, weights=torch.full((100,), float(epoch))), float(epoch % 3))
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


def scripted_metrics(monkeypatch, values, name='top1'):
    values = iter(values)
    metrics = dict(loss=1., top1=1., top5=1.)
    monkeypatch.setattr(train, 'evaluate', lambda *args: {**metrics, name: next(values)})


def images_of(digits, split='train'):
    """All images of a split as the model gets them without augmentation, and their classes, in the order of timm."""
    dataset = timm.data.create_dataset('', root=str(digits), split=split, input_img_mode='L')
    images, classes = zip(*[dataset[i] for i in range(len(dataset))])
    return torch.stack([pil_to_tensor(image) for image in images]).float() / 127.5 - 1, torch.tensor(classes)


def train_by_hand(digits, updates, lr, state_dict):
    """SGD on given images: `updates` lists, for each update, the batches of indices to average the gradient over."""
    images, classes = images_of(digits)
    model = timm.create_model('vit_tiny_patch16_224', img_size=8, in_chans=1, num_classes=10, **MODEL_KWARGS)
    model.load_state_dict(state_dict)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for update in updates:
        optimizer.zero_grad()
        torch.stack([F.cross_entropy(model(images[i]), classes[i]) for i in update]).mean().backward()
        optimizer.step()
    return model.state_dict()


def spy_on_batches(monkeypatch, digits):
    """Record the indices of the images of each training batch, found by their pixels."""
    images, _ = images_of(digits)
    seen, forward = [], ClassificationTask.forward

    def spying(self, input, target):
        distance = (input.flatten(1)[:, None] - images.flatten(1)).abs().amax(dim=2)
        assert distance.min(dim=1).values.max() < 1e-4
        seen.append(distance.argmin(dim=1).tolist())
        return forward(self, input, target)

    monkeypatch.setattr(ClassificationTask, 'forward', spying)
    return seen


def initial_weights(monkeypatch):
    """Record the weights that training starts from."""
    weights, create_task = {}, train.create_task

    def recording(args, model, *rest):
        weights.update({k: v.clone() for k, v in model.state_dict().items()})
        return create_task(args, model, *rest)

    monkeypatch.setattr(train, 'create_task', recording)
    return weights


COLOUR = ['--in-chans', 3]
SGD = ['--opt', 'momentum', '--momentum', '0', '--weight-decay', '0', '--sched', 'none', '--smoothing', '0', '--no-aug']


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


class TestNotFinite:

    def test_loss(self, digits, tmp_path):
        run(digits, tmp_path, '--epochs', 2, '--stop-epoch', 1, '--lr', '0.1')
        folder = tmp_path / 'run'
        before = (folder / 'last.pth.tar').read_bytes()
        with pytest.raises(SystemExit) as error:
            run(digits, tmp_path, '--epochs', 2, '--lr', '1e30', '--resume', 'auto', '--log-interval', 3)
        message = str(error.value)
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

    def test_exit_status(self, digits, tmp_path):
        command = [sys.executable, str(ROOT / 'train.py'), str(digits), *MODEL, *PLAIN, '--output', str(tmp_path)]
        done = subprocess.run([*command, '--lr', '1e30', '--epochs', '1'], capture_output=True, text=True)
        assert done.returncode == 1
        assert 'Training stopped: the loss is' in done.stderr and 'Traceback' not in done.stderr


class TestLog:

    def test_plain_lines(self, digits, tmp_path, caplog):
        run(digits, tmp_path, '--epochs', 1, '--log-interval', 4)
        lines = [record.message for record in caplog.records if record.name == 'train']
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


class TestData:

    def test_what_is_wrong_with_it(self, digits, tmp_path):
        for flags, message in {
            ('--val-split', 'nowhere'): "no folder 'nowhere' in",
            ('--train-split', 'nowhere'): "no folder 'nowhere' in",
            ('--num-classes', '9'): 'the dataset has 10 classes',
            ('--batch-size', '500'): 'the 160 training images do not fill one batch',
        }.items():
            with pytest.raises(SystemExit, match=message):
                run(digits, tmp_path, '--epochs', 1, *flags)
        with pytest.raises(SystemExit, match='no dataset at'):
            run(tmp_path / 'nowhere', tmp_path)
        other = tmp_path / 'other'
        for split, classes in (('train', 'abc'), ('validation', 'abd')):
            for name in classes:
                (other / split / name).mkdir(parents=True)
                source = digits / 'train' / 'class_0' / '00.png'
                (other / split / name / '0.png').write_bytes(source.read_bytes())
        with pytest.raises(SystemExit, match=r"different classes: \['c', 'd'\]"):
            run(other, tmp_path, '--batch-size', 2)

    def test_reader_by_name(self, digits, tmp_path, monkeypatch):
        names, create_dataset = [], train.create_dataset

        def recording(name, **kwargs):
            names.append(name)
            return create_dataset(name, **kwargs)

        monkeypatch.setattr(train, 'create_dataset', recording)
        run(digits, tmp_path, '--epochs', 1, '--dataset', 'torch/image_folder', *COLOUR)
        assert names == ['torch/image_folder'] * 2


# Run by torchrun in each of two processes: records what a process starts from, sees and ends with.
WORKER = '''
import sys

import pytest
import timm
import torch

import train
from tests import test_train
from tests.test_train import BUSY, SGD

digits, tmp_path = map(test_train.Path, sys.argv[1:])
torch.set_num_threads(1)
# one process group for all the runs below: the store of torchrun takes no second one
init = torch.distributed.init_process_group
torch.distributed.init_process_group = lambda **kwargs: torch.distributed.is_initialized() or init(**kwargs)
torch.distributed.destroy_process_group = lambda: None
with pytest.MonkeyPatch.context() as monkeypatch:
    start, seen = test_train.initial_weights(monkeypatch), test_train.spy_on_batches(monkeypatch, digits)
    task = train.main([
        str(digits), *test_train.MODEL, *test_train.PLAIN, *SGD, '--output', str(tmp_path), '--experiment', 'sgd',
        '--epochs', '2', '--lr', '0.1', '--grad-accum-steps', '2', '--batch-size', '8'])
weights = task.get_trainable_module().module.state_dict()
torch.save(dict(start=start, seen=seen, weights=weights), tmp_path / f'rank{train.os.environ["RANK"]}.pth')

flags = [*BUSY, '--epochs', '2', '--workers', '1', '--recovery-interval', '1', '--resume', 'auto']
if hasattr(timm.utils, 'trim_summary'):  # earlier versions of timm do not repeat images of sets this small
    flags += ['--aug-repeats', '2']
test_train.run(digits, tmp_path / 'whole', *flags)
with pytest.MonkeyPatch.context() as monkeypatch:
    test_train.crash_at_step(monkeypatch, 7)
    with pytest.raises(RuntimeError, match='power cut'):
        test_train.run(digits, tmp_path / 'parts', *flags)
test_train.run(digits, tmp_path / 'parts', *flags)
test_train.run(digits, tmp_path / 'nan', '--epochs', '1', '--lr', '1e30')
'''


def torchrun():
    """The command line to run a script in two processes, on a port that is free."""
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    return [
        sys.executable, '-m', 'torch.distributed.run', '--nproc-per-node', '2', '--master-addr', '127.0.0.1',
        '--master-port', str(port)]


def test_distributed(digits, tmp_path):
    (tmp_path / 'worker.py').write_text(WORKER)
    done = subprocess.run(
        [*torchrun(), str(tmp_path / 'worker.py'), str(digits), str(tmp_path)],
        env={**os.environ, 'PYTHONPATH': str(ROOT)}, capture_output=True, text=True, timeout=300)
    assert done.stderr.count('Training stopped: the loss is') == 1 and done.returncode != 0, done.stderr[-3000:]

    # both start from the same weights, see one half of the images each epoch and end with the same weights
    a, b = (load(tmp_path / f'rank{rank}.pth') for rank in (0, 1))
    assert all(torch.equal(a['start'][k], b['start'][k]) for k in a['start'])
    for epoch in (0, 1):
        halves = [sum(rank['seen'][10 * epoch:10 * (epoch + 1)], []) for rank in (a, b)]
        assert sorted(halves[0] + halves[1]) == list(range(160))
    assert a['seen'][:10] != a['seen'][10:]
    assert all(torch.equal(a['weights'][k], b['weights'][k]) for k in a['weights'])

    # those of one process that averages over the two batches of both in each update
    updates = [[*a['seen'][i:i + 2], *b['seen'][i:i + 2]] for i in range(0, 20, 2)]
    expected = train_by_hand(digits, updates, 0.1, a['start'])
    for key, value in a['weights'].items():
        torch.testing.assert_close(value, expected[key], atol=1e-5, rtol=1e-4)

    # accuracy counts each of the 41 images once, though two processes take 21 each
    images, classes = images_of(digits, 'validation')
    model = timm.create_model('vit_tiny_patch16_224', img_size=8, in_chans=1, num_classes=10, **MODEL_KWARGS).eval()
    model.load_state_dict(a['weights'])
    with torch.no_grad():
        output = model(images)
    row = summary(tmp_path / 'sgd')[-1]
    assert float(row['eval_loss']) == pytest.approx(F.cross_entropy(output, classes).item(), abs=1e-4)
    assert float(row['eval_top1']) == pytest.approx(100 * (output.argmax(1) == classes).float().mean().item())

    assert_same_run(tmp_path / 'whole' / 'run', tmp_path / 'parts' / 'run')
