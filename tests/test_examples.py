"""The examples run, and they learn."""
import re
import runpy
import sys
from pathlib import Path

import pytest
from PIL import Image

EXAMPLES = Path(__file__).parents[1] / 'examples'


def run(monkeypatch, capsys, name, *args):
    """What the example printed of its last step."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(sys, 'argv', [name, *map(str, args)])
    runpy.run_path(str(EXAMPLES / name), run_name='__main__')
    return capsys.readouterr().out.splitlines()[-2]


@pytest.fixture(autouse=True)
def packages(monkeypatch):
    for name in ('skimage', 'mlxtend', 'matplotlib'):
        pytest.importorskip(name)
    monkeypatch.setenv('MPLBACKEND', 'agg')


@pytest.mark.slow  # a minute
@pytest.mark.parametrize('name, at_least', [('detection.py', [70, 50]), ('segmentation.py', [10])])
def test_learning(name, at_least, tmp_path, monkeypatch, capsys):
    """In percent, what detection found and what of it was right, and segmentation's intersection over union."""
    last = run(monkeypatch, capsys, name, '--output', tmp_path / 'out.png')
    assert all(int(x) > y for x, y in zip(re.findall(r'(\d+)%', last), at_least, strict=True)), last
    assert min(Image.open(tmp_path / 'out.png').size) > 300
    assert len((EXAMPLES / name).read_text().splitlines()) <= 150


def test_pictures(monkeypatch):
    """Boxes enclose the masks of their digits tightly, and splits share nothing."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from digits_on_photographs import PHOTOGRAPHS, Pictures

    assert not set(PHOTOGRAPHS['train']) & set(PHOTOGRAPHS['validation'])
    splits = {split: Pictures(split) for split in PHOTOGRAPHS}
    assert not {d.numpy().tobytes() for d in splits['train'].digits} & {
        d.numpy().tobytes() for d in splits['validation'].digits}
    for pictures in splits.values():
        for picture in pictures.batch(10):
            rest = picture.mask.clone()
            for left, top, right, bottom in picture.boxes.int().tolist():
                part = rest[top:bottom, left:right]
                assert part[0].any() and part[-1].any() and part[:, 0].any() and part[:, -1].any()
                part.zero_()
            assert not rest.any() and len(picture.boxes)
            assert picture.image.shape == (3, 128, 128) and 0 <= picture.image.min() and picture.image.max() <= 1
