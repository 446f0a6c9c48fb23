"""Each analysis on released weights as they are: files of the authors' names and shapes, with other values."""
import csv
import math

import numpy as np
import pytest
from PIL import Image

from timm_ssm import cli
from timm_ssm.hub.convert import convert
from timm_ssm.training import validate

from ..data.videos import write_video
from ..hub.utils import released, small, small_clips, to_bytes

NAME = 'videomamba_tiny_patch16_224'
CLIPS = 'videomamba_tiny_patch16_f8_224'
LAYERS = 24


@pytest.fixture(autouse=True)
def frame_cache(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    """Folders of a model of images of 32 pixels and of one of clips, of 7 classes, and something to show them."""
    root = tmp_path_factory.mktemp('released')
    for kind, weights in ('image', {'model': small()}), ('clip', {'module': small_clips()}):
        (root / f'{kind}.pth').write_bytes(to_bytes(weights))
        convert(str(root / f'{kind}.pth'), root / kind, NAME if kind == 'image' else CLIPS)
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(root / 'a.png')
    write_video(root / 'a.mp4', num_frames=16, height=40, width=60)
    (root / 'clips.csv').write_text(''.join(f'{root}/a.mp4 {label}\n' for label in range(7)))
    return root


def analyse(root, *argv):
    """The rows of a table, all of whose values that are numbers are finite."""
    argv = [str(root / word) if (root / word).exists() else word for word in argv]
    assert cli.main(['analyse', *argv, '--output', str(root / 'out.png')]) == 0
    with open(root / 'out.csv', newline='') as f:
        rows = list(csv.DictReader(f))
    for row in rows:
        for value in row.values():
            assert not value.lstrip('-').startswith(('nan', 'inf')), row
    return rows


@pytest.mark.slow
@pytest.mark.parametrize('argv, rows', [
    ('frequency a.png --model image', 8 * LAYERS),
    ('attribution a.png --model image', 3),
    ('attribution a.mp4 --model clip', 3),
    ('attention a.png --model image --token 0 --mixer 11', 5),
    ('delta a.png --model image', 2 * LAYERS),
    ('delta a.mp4 --model clip', 2 * LAYERS),
    ('field a.png --model image --img-size 32 48', 2),
    ('order clips.csv --model clip --order sequential reversed --workers 0', 2),
    ('memory a.png --model image', 2 * 16 * LAYERS),
    ('memory a.mp4 --model clip', 2 * 16 * LAYERS),
])
def test_analyses(root, argv, rows):
    assert len(analyse(root, *argv.split())) == rows


def test_by_its_tag(hub, cache, tmp_path):
    """At full size, as the released file lies on the Hub."""
    hub.add('OpenGVLab/VideoMamba', {'videomamba_t16_in1k_res224.pth': to_bytes({'model': released()})})
    Image.new('RGB', (50, 40), 'teal').save(tmp_path / 'a.png')
    rows = analyse(tmp_path, 'memory', 'a.png', '--model', f'{NAME}.in1k')
    assert len(rows) == 2 * 16 * LAYERS and rows[0]['model'] == f'{NAME}.in1k'
    for row in rows[:16]:  # A is about -1, -2, ..., -16: the slower a state, the longer it lasts
        assert float(row['shortest']) <= float(row['median']) <= float(row['longest']) < math.inf
    assert float(rows[0]['median']) > 8 * float(rows[15]['median'])


def test_corruptions(digits, tmp_path):
    """The file given as --checkpoint, here its first two layers."""
    ten = released(depth=2, pos_embed=(1, 1 + 4, 192), head__weight=(10, 192), head__bias=(10,))
    (tmp_path / 'ten.pth').write_bytes(to_bytes({'model': ten}))
    rows = validate.main([
        str(digits), '--model', NAME, '--checkpoint', str(tmp_path / 'ten.pth'), '--model-kwargs', 'depth=2',
        '--img-size', '32', '--num-classes', '10', '--corruptions', 'contrast', '--workers', '0', '--device', 'cpu'])
    assert [(r['corruption'], r['severity']) for r in rows] == [('none', 0), *(('contrast', s) for s in range(1, 6))]
    assert len({r['loss'] for r in rows}) == 6 and all(math.isfinite(r['loss']) for r in rows)


@pytest.mark.slow
def test_corruptions_of_clips(root):
    rows = validate.main([
        str(root / 'clips.csv'), '--model', CLIPS, '--checkpoint', str(root / 'clip.pth'),
        '--img-size', '32', '--num-classes', '7', '--corruptions', 'frame_drop', '--workers', '0', '--device', 'cpu'])
    assert [r['severity'] for r in rows] == list(range(6)) and len({r['loss'] for r in rows}) > 3
    assert all(r['top1'] == pytest.approx(100 / 7, abs=1e-3) for r in rows)  # each class has the same clip
