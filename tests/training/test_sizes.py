"""--train-img-sizes: sizes that change from batch to batch."""
import re

import pytest
import torch
from timm.task import ClassificationTask

from timm_ssm.training.arguments import parse_args
from timm_ssm.training.optim import global_batch

from .utils import BUSY, assert_same_run, crash_at_step, run

SIZES = ['--model-kwargs', 'embed_dim=16', 'depth=2', 'num_heads=2', 'patch_size=4', 'dynamic_img_size=True',
         '--train-img-sizes', '4', '8', '12', '--train-batch-sizes', '32', '16', '8']


@pytest.fixture
def shapes(monkeypatch):
    """Batch size and image size of each training step."""
    seen, forward = [], ClassificationTask.forward

    def seeing(self, input, target):
        seen.append((len(input), input.shape[-1]))
        return forward(self, input, target)

    monkeypatch.setattr(ClassificationTask, 'forward', seeing)
    return seen


@pytest.mark.parametrize('workers', [0, pytest.param(2, marks=pytest.mark.slow)])
def test_resume(digits, tmp_path, monkeypatch, shapes, workers):
    """A run that crashed in its third epoch goes on bit for bit, with the sizes that were due."""
    flags = [
        *BUSY, *SIZES, '--train-size-schedule', 'progressive', '--train-batches-per-epoch', 7, '--epochs', 4,
        '--variable-batch-loss-scale', 'sqrt', '--workers', workers, '--recovery-interval', 1, '--resume', 'auto']
    whole, due = run(digits, tmp_path / 'a', *flags), list(shapes)
    assert len(due) == 28 and set(due) == {(32, 4), (16, 8), (8, 12)}
    first, last = ([size for _, size in part] for part in (due[:14], due[14:]))
    assert sum(first) < sum(last)
    shapes.clear()
    with monkeypatch.context() as crash:
        crash_at_step(crash, 18)
        with pytest.raises(RuntimeError, match='power cut'):
            run(digits, tmp_path / 'b', *flags)
    assert_same_run(whole, run(digits, tmp_path / 'b', *flags))
    assert shapes == due


def test_gradients_grow_with_batches(digits, tmp_path, monkeypatch, shapes):
    """As timm's script scales them; the learning rate goes by the mean batch."""
    flags = [str(digits), '--train-img-sizes', '8', '16', '--train-batch-sizes', '32', '8', '--lr-base', '0.1']
    args = parse_args([*flags, '--train-size-probs', '1', '3'])
    args.world_size = 2
    assert global_batch(args) == 2 * (32 + 3 * 8) / 4

    scales, backward = {}, torch.Tensor.backward

    def seeing(self, **kwargs):
        scales[shapes[-1]] = float(self.detach() / losses[-1])
        return backward(self, **kwargs)

    losses, forward = [], ClassificationTask.forward

    def keeping(self, *args):
        result = forward(self, *args)
        losses.append(result['loss'].detach())
        return result

    monkeypatch.setattr(ClassificationTask, 'forward', keeping)
    monkeypatch.setattr(torch.Tensor, 'backward', seeing)
    run(digits, tmp_path, *SIZES, '--variable-batch-loss-scale', 'linear', '--epochs', 1)
    mean = (32 + 16 + 8) / 3
    assert scales == pytest.approx({(n, size): n / mean for n, size in scales}) and len(scales) > 1


@pytest.mark.parametrize('flags, message', [
    (['--train-batch-sizes', '8', '16'], '--train-batch-sizes: needs --train-img-sizes'),
    (['--train-img-sizes', '8', '--train-size-probs', '1', '2'], '--train-size-probs: got 2 values, needs one for'),
    (['--train-img-sizes', '8', '0'], '--train-img-sizes: got 0, needs 1 or more'),
    (['--train-img-sizes', '8', '--train-size-probs', '0'], r'--train-size-probs: got \[0.0\], needs'),
    (['--train-img-sizes', '8', '--train-size-schedule', 'progressive'], 'needs two --train-img-sizes or more'),
    (['--train-img-sizes', '8', '--train-batch-sizes', '9', '--mixup', '1'], 'got 9, mixup and cutmix need even'),
])
def test_mistakes(digits, capsys, flags, message):
    with pytest.raises(SystemExit):
        parse_args([str(digits), *flags])
    assert re.search(message, capsys.readouterr().err)


def test_model_of_one_size(digits, tmp_path):
    with pytest.raises(SystemExit, match='takes images of one size, and of any with --model-kwargs dynamic_img_size'):
        run(digits, tmp_path, '--train-img-sizes', 8, 12)
    with pytest.raises(SystemExit, match='needs multiples of 4'):
        run(digits, tmp_path, *SIZES, '--train-img-sizes', 4, 8, 10)
