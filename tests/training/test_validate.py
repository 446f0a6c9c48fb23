"""validate.py, on checkpoints that train.py writes."""
import csv
import json
import os
import random
import subprocess
import sys

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models import load_checkpoint, register_model, save_for_hf
from torch import nn

from timm_ssm.training import train, validate

from .utils import MODEL_KWARGS, PLAIN, ROOT, images_of

MODEL = [
    '--model', 'vit_tiny_patch16_224', '--model-kwargs', *(f'{k}={v}' for k, v in MODEL_KWARGS.items()),
    '--img-size', '8', '--in-chans', '1', '--mean', '0.5', '--std', '0.5', '--num-classes', '10', '--crop-pct', '1',
]
FLAGS = ['--device', 'cpu', '--workers', '0', '--batch-size', '16']


@pytest.fixture(scope='module')
def run(digits, tmp_path_factory):
    """The folder of a short training run, with averaged weights."""
    output = tmp_path_factory.mktemp('run')
    train.main([
        str(digits), *MODEL, *PLAIN, '--output', str(output), '--experiment', 'run', '--epochs', '3', '--opt', 'adamw',
        '--lr', '0.01', '--no-aug', '--model-ema', '--model-ema-decay', '0.9'])
    return output / 'run'


def expected(digits, checkpoint, use_ema):
    """Loss, top-1 and top-5 of a checkpoint, without any of the script's machinery."""
    model = timm.create_model('vit_tiny_patch16_224', img_size=8, in_chans=1, num_classes=10, **MODEL_KWARGS).eval()
    load_checkpoint(model, str(checkpoint), use_ema=use_ema)
    images, classes = images_of(digits, 'validation')
    with torch.no_grad():
        output = model(images)
    order = output.argsort(dim=1, descending=True)
    hits = order == classes[:, None]
    return F.cross_entropy(output, classes).item(), *(100 * hits[:, :k].any(1).float().mean().item() for k in (1, 5))


def assert_result(result, loss, top1, top5):
    assert result['loss'] == pytest.approx(loss, abs=1e-4)
    assert result['top1'] == pytest.approx(top1, abs=1e-3) and result['top1_err'] == pytest.approx(100 - top1, abs=1e-3)
    assert result['top5'] == pytest.approx(top5, abs=1e-3)


@pytest.mark.parametrize('use_ema', [True, False])
def test_checkpoint_that_says_which_model_it_is(digits, run, use_ema):
    flags = ['--use-ema'] if use_ema else []
    result, = validate.main([str(digits), *FLAGS, '--checkpoint', str(run / 'last.pth.tar'), *flags])
    assert_result(result, *expected(digits, run / 'last.pth.tar', use_ema))
    assert result['model'] == 'vit_tiny_patch16_224' and result['img_size'] == 8 and result['crop_pct'] == 1


@pytest.mark.parametrize('flags', [
    ['--no-prefetcher'],
    ['--channels-last', '--batch-size', '7'],
    ['--torchcompile', 'aot_eager'],
    ['--workers', '2', '--retry'],
], ids=lambda flags: flags[0])
def test_ways_to_the_same_result(digits, run, tmp_path, flags):
    """From bare weights, with the model given by flags."""
    torch.save(torch.load(run / 'last.pth.tar', weights_only=True)['state_dict'], tmp_path / 'weights.pth')
    result, = validate.main([str(digits), *MODEL, *FLAGS, '--checkpoint', str(tmp_path / 'weights.pth'), *flags])
    assert_result(result, *expected(digits, run / 'last.pth.tar', False))


def test_mixed_precision(digits, run):
    flags = ['--amp', '--amp-dtype', 'bfloat16']
    result, = validate.main([str(digits), *FLAGS, '--checkpoint', str(run / 'last.pth.tar'), *flags])
    loss, *_ = expected(digits, run / 'last.pth.tar', False)
    assert 1e-5 < abs(result['loss'] - loss) < 0.05


def test_folder_of_checkpoints(digits, run, tmp_path, capsys):
    results = validate.main([
        str(digits), *FLAGS, '--checkpoint', str(run), '--results-file', str(tmp_path / 'results.csv')])
    names = [os.path.basename(r['checkpoint']) for r in results]
    assert sorted(names) == sorted(path.name for path in run.glob('*.pth.tar')) and len(names) == 5
    assert [r['top1'] for r in results] == sorted((r['top1'] for r in results), reverse=True)
    for result in results:
        assert_result(result, *expected(digits, result['checkpoint'], False))
    with open(tmp_path / 'results.csv', newline='') as f:
        rows = list(csv.DictReader(f))
    assert [float(row['top1']) for row in rows] == [r['top1'] for r in results]
    printed = capsys.readouterr().out
    assert json.loads(printed.partition('--result\n')[2]) == results  # as timm's script, for tools that read it


def test_several_models(digits, tmp_path):
    """Released weights, from folders as they would come from the Hub; one of them is missing."""
    names = []
    for seed in range(2):
        torch.manual_seed(seed)
        model = timm.create_model('vit_tiny_patch16_224', img_size=8, in_chans=1, num_classes=10, **MODEL_KWARGS)
        args = dict(img_size=8, in_chans=1, **MODEL_KWARGS)
        save_for_hf(model, str(tmp_path / f'model{seed}'), model_args=args)
        config = json.loads((tmp_path / f'model{seed}' / 'config.json').read_text())
        config['model_args'].pop('num_classes', None)  # timm 1.0.31 writes it twice
        (tmp_path / f'model{seed}' / 'config.json').write_text(json.dumps(config))
        names.append(f'local-dir:{tmp_path}/model{seed}')
    (tmp_path / 'names.txt').write_text('\n'.join(names))
    command = [
        str(digits), *FLAGS, '--mean', '0.5', '--std', '0.5', '--in-chans', '1', '--img-size', '8', '--results-file',
        str(tmp_path / 'results.json'), '--results-format', 'json', '--model']
    results = validate.main([*command, str(tmp_path / 'names.txt')])
    assert {r['model'] for r in results} == set(names) and len({r['loss'] for r in results}) == 2

    with pytest.raises(SystemExit, match='1 of 2 models failed'):
        validate.main([*command, names[0], f'local-dir:{tmp_path}/nowhere'])
    done, failed = json.loads((tmp_path / 'results.json').read_text())
    assert done['top1'] == next(r for r in results if r['model'] == names[0])['top1']
    assert failed['model'].endswith('nowhere') and failed['error']


class FewClasses(nn.Module):
    """Three classes told apart by the brightness of the image; takes no more than `limit` images at a time."""

    limit = 10 ** 6
    batch_sizes = []

    def __init__(self, num_classes=3, **kwargs):
        super().__init__()
        self.num_classes = num_classes
        self.weight = nn.Parameter(torch.zeros(()))
        self.pretrained_cfg = dict(input_size=(3, 8, 8), crop_pct=1., mean=(0.,) * 3, std=(1.,) * 3)

    def forward(self, x):
        self.batch_sizes.append(len(x))
        if len(x) > self.limit:
            torch.empty(2 ** 60)  # what the CPU's allocator says to this is the real thing
        return -(x.mean((1, 2, 3))[:, None] - torch.tensor([0., 0.5, 1.])).abs() + self.weight


@register_model
def test_few_classes(pretrained=False, **kwargs):
    return FewClasses(**kwargs)


test_few_classes.__test__ = False  # a model, not a test


@pytest.fixture
def bands(tmp_path):
    """Black, grey and white images, 7 of each, one of the white ones black."""
    from PIL import Image
    for i, name in enumerate(('black', 'grey', 'white')):
        folder = tmp_path / 'bands' / name
        folder.mkdir(parents=True)
        for j in range(7):
            Image.new('RGB', (8, 8), (127 * i if (i, j) != (2, 0) else 0,) * 3).save(folder / f'{j}.png')
    return str(tmp_path / 'bands')


def test_fewer_than_five_classes(bands):
    result, = validate.main([bands, *FLAGS, '--model', 'test_few_classes'])
    assert result['top1'] == pytest.approx(100 * 20 / 21, abs=1e-3) and result['top5'] == 100


def test_smaller_batches_while_memory_runs_out(bands, monkeypatch, caplog):
    monkeypatch.setattr(FewClasses, 'limit', 5)
    monkeypatch.setattr(FewClasses, 'batch_sizes', [])
    result, = validate.main([bands, *FLAGS, '--model', 'test_few_classes'])
    assert FewClasses.batch_sizes == [16, 12, 8, 6, 4, 4, 4, 4, 4, 1]
    assert result['top1'] == pytest.approx(100 * 20 / 21, abs=1e-3)
    assert 'Out of memory with batches of 16; trying 12.' in caplog.text

    monkeypatch.setattr(FewClasses, 'limit', 0)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        validate.main([bands, *FLAGS, '--model', 'test_few_classes'])


def test_other_errors_are_not_retried(bands, monkeypatch):
    def forward(self, x):
        self.batch_sizes.append(len(x))
        raise RuntimeError('another error')

    monkeypatch.setattr(FewClasses, 'batch_sizes', [])
    monkeypatch.setattr(FewClasses, 'forward', forward)
    with pytest.raises(RuntimeError, match='another error'):
        validate.main([bands, *FLAGS, '--model', 'test_few_classes'])
    assert len(FewClasses.batch_sizes) == 1


def test_mistakes(digits, run, tmp_path):
    (tmp_path / 'empty').mkdir()
    for flags, message in (
            (['--checkpoint', str(tmp_path / 'nowhere.pth')], 'no such file or folder'),
            (['--checkpoint', str(tmp_path / 'empty')], 'no .pth.tar, .pth or .safetensors'),
            (['--model', 'no_such_model'], 'no model of this name'),
            ([], '--model is needed'),
            (['--checkpoint', str(run / 'last.pth.tar'), '--model', 'resnet18', 'resnet34'], 'goes with one --model'),
    ):
        with pytest.raises(SystemExit, match=message):
            validate.main([str(digits), *FLAGS, *flags])
    with pytest.raises(SystemExit, match='no dataset at'):
        validate.main([str(tmp_path / 'nowhere'), *FLAGS, *MODEL])


def test_left_out_flags(digits, capsys):
    with pytest.raises(SystemExit):
        validate.main([str(digits), '--torchscript'])
    assert '--torchscript: left out of this script' in capsys.readouterr().err


def test_log(digits, run):
    command = [sys.executable, str(ROOT / 'validate.py'), str(digits), *FLAGS, '--log-freq', '2']
    done = subprocess.run([*command, '--checkpoint', str(run / 'last.pth.tar')], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert [line.split('[')[1].split(']')[0].strip() for line in lines if 'img/s' in line] == ['2/3', '3/3']
    assert any(line.startswith(' * Acc@1') for line in lines)
    assert len(json.loads(done.stdout.partition('--result\n')[2])) > 5


def test_damaged_files(digits, run, tmp_path):
    """One line that names the file, which never says to read it less safely."""
    rng = random.Random(0)
    content = (run / 'last.pth.tar').read_bytes()
    for case in range(60):
        damaged = bytearray(content)
        kind = rng.choice(['truncated', 'flipped', 'zeroed', 'foreign'])
        if kind == 'truncated':
            del damaged[rng.randrange(len(content)):]
        elif kind == 'flipped':
            damaged[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        elif kind == 'zeroed':
            start = rng.randrange(len(content))
            damaged[start:start + 64] = bytes(len(damaged[start:start + 64]))
        else:
            damaged = bytearray(rng.randbytes(rng.randrange(2000)))
        path = tmp_path / f'{case}{rng.choice([".pth.tar", ".pth", ".bin", ".safetensors"])}'
        path.write_bytes(damaged)
        try:
            result, = validate.main([str(digits), *FLAGS, '--checkpoint', str(path)])
        except SystemExit as e:
            message = str(e)
            assert message.startswith(f'--checkpoint {path}: ') and '\n' not in message, message
            assert 'weights_only' not in message and 'False' not in message, message
        else:  # nothing that matters was hit, such as padding between the records
            assert_result(result, *expected(digits, run / 'last.pth.tar', False))
