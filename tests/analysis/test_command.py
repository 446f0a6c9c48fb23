"""`timm-ssm analyse`: what it writes."""
import csv
import json
import shlex

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.models import save_for_hf

import timm_ssm  # noqa: F401  registers the models
from timm_ssm import cli
from timm_ssm.analysis import half_lives, hidden_attention
from timm_ssm.hub.classify import create_opener, load_model
from timm_ssm.training import validate

ARGS = dict(img_size=32, patch_size=8, embed_dim=32, depth=2)


def save(folder, name, **kwargs):
    """A folder that `load_model` takes, of a model of random weights."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=4, **{**ARGS, **kwargs})
    save_for_hf(model, str(folder), model_args={**ARGS, **kwargs})
    config = json.loads((folder / 'config.json').read_text())
    config['model_args'].pop('num_classes', None)  # timm 1.0.31 writes it twice
    config['pretrained_cfg']['input_size'] = [3, 32, 32]
    (folder / 'config.json').write_text(json.dumps(config))
    return model.eval()


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Two models of images and one of clips, and images."""
    root = tmp_path_factory.mktemp('analyse')
    save(root / 'mamba', 'videomamba_tiny_patch16_224')
    save(root / 'vit', 'vit_tiny_patch16_224', num_heads=2)
    rng = np.random.default_rng(0)
    for name in 'ab':
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(root / f'{name}.png')
    return root


def analyse(folder, *argv):
    """Run the command; its table, as the checks for what all have in common pass."""
    argv = ['analyse', *map(str, argv), '--output', str(folder / 'out' / 'picture.png')]
    assert cli.main(argv) == 0
    picture = folder / 'out' / 'picture.png'
    with Image.open(picture) as image:
        assert image.width > 1000 and np.asarray(image.convert('L')).std() > 10
    command = shlex.split(picture.with_suffix('.sh').read_text())
    assert command == ['timm-ssm', *argv] and cli.parser().parse_known_args(command[1:])
    with open(picture.with_suffix('.csv'), newline='') as f:
        return list(csv.DictReader(f))


def test_attribution(folder):
    rows = analyse(folder, 'attribution', folder / 'a.png', '--model', folder / 'mamba', folder / 'vit')
    assert [(r['model'], r['kind']) for r in rows] == [
        (m, k) for m in ('mamba', 'vit') for k in ('rollout', 'Grad-CAM', 'random')]
    assert all(0 <= float(r[k]) <= 1 for r in rows for k in ('deletion', 'insertion'))


@torch.no_grad()
def test_attention(folder):
    rows = analyse(
        folder, 'attention', folder / 'a.png', '--model', folder / 'mamba', '--mixer', '0', '--token', '0', '5')
    assert len(rows) == 2 * 17 and rows[0]['mixer'] == 'blocks.0.mixer'
    model = load_model(str(folder / 'mamba'))
    x = create_opener(model)(str(folder / 'a.png'))[None]
    block = model.blocks[0]
    expected = hidden_attention(block.mixer, block.norm(model._embed(model.patch_embed(x))), [0, 5])
    found = torch.tensor([float(r['attention']) for r in rows]).view(1, 2, 17)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


def test_memory(folder):
    rows = analyse(folder, 'memory', folder / 'a.png', '--model', folder / 'mamba')
    assert len(rows) == 2 * 2 * 16
    model = load_model(str(folder / 'mamba'))
    lives = half_lives(model, create_opener(model)(str(folder / 'a.png'))[None])['blocks.1.mixer']
    row = next(r for r in rows if (r['mixer'], r['direction'], r['state']) == ('blocks.1.mixer', '1', '3'))
    assert float(row['longest']) == pytest.approx(lives[1, :, 3].max().item(), rel=1e-4)


@pytest.mark.parametrize('argv, rows', [
    (['delta', 'a.png', '--model', 'mamba'], 4),
    (['field', 'a.png', '--model', 'mamba', '--img-size', '32', '64'], 2),
    (['frequency', 'a.png', '--model', 'mamba', 'vit'], 2 * 8 * 2),
])
def test_others(folder, argv, rows):
    argv = [folder / word if (folder / word).exists() else word for word in argv]
    assert len(analyse(folder, *argv)) == rows


def test_order(folder, monkeypatch):
    """Each order is validated with the flags that follow."""
    calls = []

    def fake(argv):
        calls.append(argv)
        return [dict(model='m', top1=50. + len(calls), top5=100.)]
    monkeypatch.setattr(validate, 'main', fake)
    rows = analyse(folder, 'order', 'clips', '--model', folder / 'mamba', '--order', 'sequential', 'block-4',
                   '--batch-size', '3')
    assert [(r['frame_order'], float(r['top1'])) for r in rows] == [('sequential', 51), ('block-4', 52)]
    assert calls[1][:3] == ['clips', '--model', f'local-dir:{folder}/mamba'] and 'block-4' in calls[1]
    assert calls[1][-2:] == ['--batch-size', '3']


@pytest.mark.parametrize('argv, message', [
    (['attention', 'a.png', '--model', 'mamba', '--token', '17'],
     '--token: got 17, blocks.1.mixer of mamba has tokens 0 to 16'),
    (['attention', 'a.png', '--model', 'mamba', '--mixer', '2'], '--mixer: got 2, mamba has mixers 0 to 1'),
    (['memory', 'a.png', '--model', 'vit'], 'model: got VisionTransformer, needs one with scans'),
    (['delta', 'no.png', '--model', 'mamba'], 'image: cannot open no.png'),
    (['delta', 'a.png', '--model', 'mamba', '--output', 'x.txt'], '--output: got x.txt, needs a name in .png'),
])
def test_errors(folder, argv, message, capsys):
    argv = [str(folder / word) if (folder / word).exists() else word for word in argv]
    assert cli.main(['analyse', *argv]) == 1
    assert f'timm-ssm analyse: {message}' in capsys.readouterr().err


def test_flags_that_are_not_there(folder, capsys):
    with pytest.raises(SystemExit):
        cli.main(['analyse', 'delta', 'a.png', '--model', 'mamba', '--batch-size', '3'])
    assert 'unrecognized arguments: --batch-size 3' in capsys.readouterr().err
