"""Folders of odd and damaged images: training and validation work, or end with one line that names the file."""
import io
import random
import re
import shutil
import warnings

import numpy as np
import pytest
from PIL import Image

from timm_ssm.hub.classify import to_mode
from timm_ssm.training import train, validate

MODEL = [
    '--model', 'vit_tiny_patch16_224', '--model-kwargs', 'embed_dim=8', 'depth=1', 'num_heads=1', 'patch_size=8',
    '--img-size', '16', '--num-classes', '2', '--workers', '0', '--device', 'cpu', '--batch-size', '2']


def png(image, format='PNG', **kwargs):
    buffer = io.BytesIO()
    image.save(buffer, format, **kwargs)
    return buffer.getvalue()


def noise(rng, *shape, dtype='uint8'):
    return np.random.default_rng(rng.randrange(1 << 30)).integers(0, np.iinfo(dtype).max, shape, dtype)


def colours(rng, mode='RGB', size=None):
    height, width = size or (rng.randrange(1, 60), rng.randrange(1, 60))
    return Image.fromarray(noise(rng, height, width, 3)).convert(mode)


WHOLE = {
    'grey.png': lambda rng: png(colours(rng, 'L')),
    'grey_alpha.png': lambda rng: png(colours(rng, 'LA')),
    'rgba.png': lambda rng: png(colours(rng, 'RGBA')),
    'black_white.png': lambda rng: png(colours(rng, '1')),
    'palette.png': lambda rng: png(colours(rng, 'P')),
    'palette_transparent.png': lambda rng: png(colours(rng, 'P'), transparency=0),
    'animated.gif': lambda rng: png(
        colours(rng, 'P', (9, 9)), 'GIF', save_all=True, append_images=[colours(rng, 'P', (9, 9))]),
    'cmyk.jpg': lambda rng: png(colours(rng, 'CMYK'), 'JPEG'),
    'sixteen_bit.png': lambda rng: png(Image.fromarray(noise(rng, 9, 9, dtype='uint16'))),
    'sixteen_bit.tiff': lambda rng: png(Image.fromarray(noise(rng, 9, 9, dtype='uint16')), 'TIFF'),
    'one_pixel.png': lambda rng: png(colours(rng, size=(1, 1))),
    'wide.png': lambda rng: png(Image.new('RGB', (100_000, 3))),
    'high.png': lambda rng: png(Image.new('L', (2, 100_000))),
    'png_in_fact.jpg': lambda rng: png(colours(rng)),
    'name with spaces ünd ümlauts.png': lambda rng: png(colours(rng)),
}
DAMAGED = {
    'empty.png': lambda rng: b'',
    'text.jpg': lambda rng: b'this is no image',
    'truncated.jpg': lambda rng: cut(rng, png(colours(rng, size=(50, 50)), 'JPEG')),
    'truncated.png': lambda rng: cut(rng, png(colours(rng, size=(50, 50)))),
    'flipped.png': lambda rng: flip(rng, png(colours(rng, size=(50, 50)))),
    'bomb.png': lambda rng: png(Image.new('1', (100_000, 2000))),
}


def cut(rng, content):
    return content[:rng.randrange(len(content) // 2)]


def flip(rng, content):
    content = bytearray(content)
    content[rng.randrange(60, len(content) - 30)] ^= 255  # in the pixels, which have a checksum
    return bytes(content)


@pytest.fixture
def folder(tmp_path):
    def make(rng, odd=()):
        """Two classes of three images in two splits, and in one of the classes those of `odd` by name."""
        root = tmp_path / 'data'
        shutil.rmtree(root, ignore_errors=True)
        for split in ('train', 'validation'):
            for name in 'ab':
                (root / split / name).mkdir(parents=True)
                for i in range(3):
                    (root / split / name / f'{i}.png').write_bytes(png(colours(rng, size=(20, 20))))
            for name in odd:
                (root / split / 'a' / name).write_bytes({**WHOLE, **DAMAGED}[name](rng))
        return root

    return make


def start(function, *args):
    """The message that a program ends with, None where it does not."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # Pillow's, of large images
            function(list(map(str, args)))
    except SystemExit as e:
        assert isinstance(e.code, str) and '\n' not in e.code, e.code
        return e.code


def train_and_validate(root, output, *flags):
    shutil.rmtree(output, ignore_errors=True)
    trained = start(train.main, root, *MODEL, *flags, '--epochs', '1', '--val-split', '', '--output', output)
    return trained, start(validate.main, root, *MODEL, *flags, '--checkpoint', checkpoint_of(output))


def checkpoint_of(output):
    return next(output.glob('*/last.pth.tar'), output)


def test_every_kind(cases, folder, tmp_path, caplog):
    for rng in cases(1):
        root = folder(rng, WHOLE)
        trained, validated = train_and_validate(
            root, tmp_path / 'out', '--in-chans', rng.choice([1, 3]), '--workers', rng.choice([0, 1]))
        assert trained is None and validated is None and 'Skipped' not in caplog.text, (trained, validated)
        for name in DAMAGED:
            root = folder(rng, [name])
            caplog.clear()
            trained, validated = train_and_validate(root, tmp_path / 'out', '--in-chans', rng.choice([1, 3]))
            assert trained is None and f'Skipped {root / "train" / "a" / name}' in caplog.text, (name, trained)
            assert validated and str(root / 'validation' / 'a' / name) in validated, (name, validated)


def test_error_in_loading_process(cases, folder, tmp_path):
    """Where a loading process meets a damaged image the message is as short."""
    for rng in cases(1):
        name = rng.choice(list(DAMAGED))
        root = folder(rng, [name])
        *_, validated = train_and_validate(root, tmp_path / 'out', '--workers', 1)
        assert validated.startswith(str(root / 'validation' / 'a' / name)), validated


def test_sixteen_bits_are_not_clipped(folder, tmp_path):
    """Pillow's own conversion makes everything above 255 white."""
    values = np.arange(0, 65536, 1024, dtype='uint16').reshape(8, 8)
    with Image.open(io.BytesIO(png(Image.fromarray(values)))) as image:
        for mode in ('L', 'RGB'):
            pixels = np.asarray(to_mode(image, mode)).reshape(64, -1)[:, 0]
            assert np.abs(pixels - values.reshape(64) / 257).max() <= 1


@pytest.mark.parametrize('change, message', [
    ('nested', 'the splits have different classes|the dataset has 3 classes'),
    ('empty class', 'the splits have different classes'),
    ('no images', 'Found 0 images'),
    ('a file', 'no folder|no such|Found 0 images|not a'),
])
def test_other_folders(folder, tmp_path, change, message):
    root = folder(random.Random(0))
    if change == 'nested':
        shutil.copytree(root / 'train' / 'a', root / 'train' / 'a' / 'c')
    elif change == 'empty class':
        for path in (root / 'train' / 'b').iterdir():
            path.unlink()
    elif change == 'no images':
        for path in (root / 'train').rglob('*.png'):
            path.unlink()
    else:
        shutil.rmtree(root / 'train')
        (root / 'train').write_text('a file')
    found = start(train.main, root, *MODEL, '--epochs', 1, '--output', tmp_path / 'out')
    assert found and re.search(message, found), found
