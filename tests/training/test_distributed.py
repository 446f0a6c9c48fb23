"""Training in two processes."""
import pytest
import timm
import torch
import torch.nn.functional as F

from .utils import (
    MODEL_KWARGS,
    assert_same_run,
    images_of,
    load,
    run_worker,
    summary,
    train_by_hand,
)

# Run by torchrun in each of two processes: records what a process starts from, sees and ends with.
WORKER = '''
import os
from pathlib import Path

import pytest
import timm
import torch

from tests.training import utils
from tests.training.utils import BUSY, SGD
from timm_ssm.training import train

digits, tmp_path = map(Path, utils.begin_worker())
with pytest.MonkeyPatch.context() as monkeypatch:
    start, seen = utils.initial_weights(monkeypatch), utils.spy_on_batches(monkeypatch, digits)
    task = train.main([
        str(digits), *utils.MODEL, *utils.PLAIN, *SGD, '--output', str(tmp_path), '--experiment', 'sgd',
        '--epochs', '2', '--lr', '0.1', '--grad-accum-steps', '2', '--batch-size', '8'])
weights = task.get_trainable_module().module.state_dict()
torch.save(dict(start=start, seen=seen, weights=weights), tmp_path / f'rank{os.environ["RANK"]}.pth')

flags = [*BUSY, '--epochs', '2', '--workers', '1', '--recovery-interval', '1', '--resume', 'auto']
if hasattr(timm.utils, 'trim_summary'):  # earlier versions of timm do not repeat images of sets this small
    flags += ['--aug-repeats', '2']
utils.run(digits, tmp_path / 'whole', *flags)
with pytest.MonkeyPatch.context() as monkeypatch:
    utils.crash_at_step(monkeypatch, 7)
    with pytest.raises(RuntimeError, match='power cut'):
        utils.run(digits, tmp_path / 'parts', *flags)
utils.run(digits, tmp_path / 'parts', *flags)
utils.run(digits, tmp_path / 'nan', '--epochs', '1', '--lr', '1e30')
'''


def test_distributed(digits, tmp_path):
    done = run_worker(WORKER, tmp_path, digits, tmp_path)
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
