"""timm's augmentations under the Pillow that pip gives, in every way to come by them."""
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from timm.data import auto_augment, create_loader
from torch.nn import functional as F

import train
from timm_ssm._compat import mend_posterize, posterize

ROOT = Path(__file__).parents[1]
# those of the papers, for images and for clips
POLICIES = [
    'v0', 'rand-m7-mstd0.25', 'rand-m9-mstd0.5', 'rand-m9-mstd0.5-inc1',
    'rand-m5-n2-mstd0.25-inc1', 'rand-m7-n4-mstd0.5-inc1',
]
NO_BITS = 'rand-m10-n15-p1-inc1'  # nearly every image loses all its bits


def image(seed=0, mode='RGB', size=(12, 9)):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.mark.parametrize('mode, mean', [('RGB', (124, 116, 104)), ('L', (116,))])
@pytest.mark.parametrize('name', auto_augment.NAME_TO_OP)
def test_every_op_at_every_magnitude(name, mode, mean):
    img = image(mode=mode)
    for magnitude in np.arange(0, 31, .5).tolist():  # `mmax` allows more than 10
        op = auto_augment.AugmentOp(
            name, prob=1., magnitude=magnitude, hparams=dict(translate_const=5, img_mean=mean, magnitude_max=30))
        out = op(img)
        assert out.size == img.size and out.mode == img.mode


@pytest.mark.parametrize('mode', ['RGB', 'L'])
@pytest.mark.parametrize('name', ['Posterize', 'PosterizeIncreasing', 'PosterizeOriginal'])
def test_posterize(name, mode):
    img = image(mode=mode)
    pixels = np.asarray(img)
    for bits in range(-4, 9):
        expected = pixels >> 8 - bits << 8 - bits if bits > 0 else np.zeros_like(pixels)
        assert np.array_equal(auto_augment.NAME_TO_OP[name](img, bits, fillcolor=0), expected)


def test_mends_only_what_is_broken(monkeypatch):
    def refuse(image, bits):
        raise ValueError('bits must be between or equal to 1 and 8')

    ops = dict(Posterize=auto_augment.posterize, Other=auto_augment.invert)
    monkeypatch.setattr(auto_augment, 'NAME_TO_OP', ops)
    monkeypatch.setattr(ImageOps, 'posterize', lambda image, bits: image)
    mend_posterize()
    assert ops == dict(Posterize=auto_augment.posterize, Other=auto_augment.invert)
    monkeypatch.setattr(ImageOps, 'posterize', refuse)
    mend_posterize()
    assert ops == dict(Posterize=posterize, Other=auto_augment.invert)


class Images(torch.utils.data.Dataset):
    """1000 noisy images of four brightnesses, which are their labels."""

    def __init__(self):
        self.images = [Image.blend(image(i), Image.new('RGB', (12, 9), (i % 4 * 80,) * 3), .7) for i in range(100)]

    def __len__(self):
        return 1000

    def __getitem__(self, i):
        return self.transform(self.images[i % 100]), i % 4


@pytest.mark.parametrize('policy', POLICIES)
def test_trains_500_batches(policy):
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    loader = create_loader(
        Images(), input_size=(3, 8, 8), batch_size=2, is_training=True, auto_augment=policy, num_workers=0,
        device=torch.device('cpu'))
    weight = torch.zeros(4, 3, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=.1)
    losses = []
    for x, target in loader:
        losses.append(F.cross_entropy(x.mean((2, 3)) @ weight.T, target))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(losses) == 500 and torch.stack(losses).isfinite().all()


def run_train(digits, output, *flags):
    model = ['--model', 'videomamba_tiny_patch16_224', '--model-kwargs', 'embed_dim=16', 'depth=1', 'patch_size=4']
    train.main([
        str(digits), *model, '--img-size', '8', '--num-classes', '10', '--device', 'cpu', '--workers', '0',
        '--output', str(output), '--experiment', 'run', *flags])
    return (output / 'run' / 'summary.csv').read_text().splitlines()[1:]


@pytest.mark.slow
@pytest.mark.parametrize('policy', POLICIES)
def test_train_py_trains_500_batches(policy, digits, tmp_path):
    epochs = run_train(digits, tmp_path, '--aa', policy, '--batch-size', '4', '--epochs', '13')
    assert len(epochs) == 13  # of 40 batches


@pytest.mark.parametrize('in_chans', ['3', '1'])
def test_train_py_with_no_bits(in_chans, digits, tmp_path):
    assert len(run_train(digits, tmp_path, '--aa', NO_BITS, '--in-chans', in_chans, '--epochs', '1')) == 1


SCRIPT = f'''
import sys
import torch
from PIL import Image
from timm.data import create_transform
IMPORT

class Images(torch.utils.data.Dataset):
    def __init__(self):
        self.transform = create_transform((3, 8, 8), is_training=True, auto_augment={NO_BITS!r})

    def __len__(self):
        return 20

    def __getitem__(self, i):
        return self.transform(Image.new('RGB', (8, 8), 'red'))

if __name__ == '__main__':
    torch.set_num_threads(1)
    loader = torch.utils.data.DataLoader(Images(), num_workers=1, multiprocessing_context=sys.argv[1])
    print(len(list(loader)))
'''


@pytest.mark.parametrize('launcher, line, method', [
    (['-m', 'timm_ssm'], '', 'spawn'),  # a new process, which imports nothing of ours by itself
    ([], 'import timm_ssm', 'fork'),
])
def test_scripts_with_processes_that_load(launcher, line, method, tmp_path):
    script = tmp_path / 'script.py'
    script.write_text(SCRIPT.replace('IMPORT', line))
    env = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}
    done = subprocess.run(
        [sys.executable, *launcher, str(script), method], env=env, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, '20\n'), done.stderr
