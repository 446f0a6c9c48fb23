"""Training on scikit-learn's digits."""
import csv
import os
import socket
import subprocess
import sys
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from timm.task import ClassificationTask
from torchvision.transforms.functional import pil_to_tensor

from timm_ssm.training import train

ROOT = Path(__file__).parents[2]
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
SGD = ['--opt', 'momentum', '--momentum', '0', '--weight-decay', '0', '--sched', 'none', '--smoothing', '0', '--no-aug']


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


def crash_at_step(monkeypatch, number, task=ClassificationTask):
    """Make the forward pass of a training step, counted from 1, fail."""
    forward, calls = task.forward, []

    def failing(self, *args):
        calls.append(1)
        if len(calls) == number:
            raise RuntimeError('power cut')
        return forward(self, *args)

    monkeypatch.setattr(task, 'forward', failing)


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


def begin_worker():
    """Begin a script of `run_worker`; returns its arguments."""
    torch.set_num_threads(1)
    # one process group for all the runs of a script: the store of torchrun takes no second one
    init = torch.distributed.init_process_group
    torch.distributed.init_process_group = lambda **kwargs: torch.distributed.is_initialized() or init(**kwargs)
    torch.distributed.destroy_process_group = lambda: None
    return sys.argv[1:]


def run_worker(script, tmp_path, *args):
    """Run the text of a script in two processes."""
    (tmp_path / 'worker.py').write_text(script)
    return subprocess.run(
        [*torchrun(), str(tmp_path / 'worker.py'), *map(str, args)],
        env={**os.environ, 'PYTHONPATH': str(ROOT)}, capture_output=True, text=True, timeout=300)


def torchrun():
    """The command line to run a script in two processes, on a port that is free."""
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    return [
        sys.executable, '-m', 'torch.distributed.run', '--nproc-per-node', '2', '--master-addr', '127.0.0.1',
        '--master-port', str(port)]
