"""validate.py on corrupted data."""
import csv
import os

import pytest
import timm
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from timm_ssm.data.corruptions import CLIP_CORRUPTIONS, CORRUPTIONS, EXTRA_CORRUPTIONS, Corrupt
from timm_ssm.training import robustness, validate

from .test_validate import FLAGS, MODEL
from .utils import MODEL_KWARGS


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    """A model of random weights that tells digits apart a little, as its logits are far apart."""
    torch.manual_seed(0)
    model = timm.create_model('vit_tiny_patch16_224', img_size=8, in_chans=1, num_classes=10, **MODEL_KWARGS).eval()
    for p in model.parameters():
        p.data += 0.3 * torch.randn_like(p)
    path = tmp_path_factory.mktemp('weights') / 'weights.pth'
    torch.save(model.state_dict(), path)
    return model, path


def run(digits, weights, *flags):
    data = [str(digits)] if digits else []
    return validate.main([*data, *MODEL, *FLAGS, '--checkpoint', str(weights[1]), *map(str, flags)])


def top1(model, digits, change=lambda image: image):
    """By hand."""
    dataset = timm.data.create_dataset('', root=str(digits), split='validation', input_img_mode='L')
    images, classes = zip(*[dataset[i] for i in range(len(dataset))])
    x = torch.stack([pil_to_tensor(change(image)) for image in images]).float() / 127.5 - 1
    with torch.no_grad():
        return 100 * (model(x).argmax(1) == torch.tensor(classes)).float().mean().item()


def read(path):
    with open(path, newline='') as f:
        return list(csv.DictReader(f))


def test_on_the_fly(digits, weights, tmp_path, monkeypatch):
    """Each row is the accuracy on images that are corrupted; what is in the file is not measured again."""
    file = tmp_path / 'corrupted.csv'
    flags = ['--corruptions', 'gaussian_noise', 'contrast', '--seed', '3', '--results-file', file]
    rows = run(digits, weights, *flags)
    assert [(r['corruption'], r['severity']) for r in rows] == [
        ('none', 0), *((name, s) for name in ('gaussian_noise', 'contrast') for s in range(1, 6))]
    for r in rows:
        change = Corrupt(r['corruption'], r['severity'], 3) if r['severity'] else (lambda image: image)
        assert r['top1'] == pytest.approx(top1(weights[0], digits, change), abs=1e-3), r
    assert len({r['top1'] for r in rows}) > 1
    assert [r['top1'] for r in read(file)] == [str(r['top1']) for r in rows]
    with Image.open(file.with_suffix('.png')) as picture:
        assert picture.width > 1000

    calls = []
    measure = validate.measure
    monkeypatch.setattr(validate, 'measure', lambda args, *rest: calls.append(rest[-1]) or measure(args, *rest))
    before = file.read_text().splitlines()
    file.write_text('\n'.join(before[:-2]) + '\n')  # as if it had been stopped there
    assert [r['top1'] for r in run(digits, weights, *flags, '--batch-size', '7')] == [r['top1'] for r in rows]
    assert [(c.name, c.severity) for c in calls] == [('contrast', 4), ('contrast', 5)]
    assert file.read_text().splitlines() == before
    run(digits, weights, *flags)
    assert len(calls) == 2
    assert len(run(digits, weights, *flags, '--crop-pct', '0.8')) == 2 * 11 and len(calls) == 2 + 11  # other results


def test_imagenet_c(digits, weights, tmp_path, capsys):
    """From folders, of a kind of corruption or not; mCE by hand."""
    root = tmp_path / 'imagenet-c'
    for i, name in enumerate(CORRUPTIONS):
        for severity in range(1, 6):
            at = root / ('noise' if i < 3 else '') / name / str(severity)
            at.parent.mkdir(parents=True, exist_ok=True)
            if (name, severity) == ('fog', 5):
                os.symlink(digits / 'train', at)  # other images
            else:
                os.symlink(digits / 'validation', at)
    rows = run(None, weights, '--imagenet-c', root)
    assert [(r['corruption'], r['severity']) for r in rows] == [(n, s) for n in CORRUPTIONS for s in range(1, 6)]
    error = 100 - top1(weights[0], digits)
    fog, = (r['top1_err'] for r in rows if (r['corruption'], r['severity']) == ('fog', 5))
    assert fog != pytest.approx(error, abs=0.1)
    expected = sum(
        100 * (error * 4 + fog if name == 'fog' else error * 5) / 5 / robustness.ALEXNET[name] for name in CORRUPTIONS)
    assert robustness.mean_corruption_error(rows) == pytest.approx(expected / 15, rel=1e-4)
    assert all(r['crop_pct'] == 1 for r in rows)


def test_mce():
    """AlexNet's is 100 by definition; the four extra corruptions do not count; a missing one is not made up for."""
    rows = [
        dict(corruption=name, severity=s, top1_err=robustness.ALEXNET[name] + (s - 3))
        for name in CORRUPTIONS for s in range(1, 6)]
    assert robustness.mean_corruption_error(rows) == pytest.approx(100)
    extra = [dict(corruption=name, severity=s, top1_err=0.) for name in EXTRA_CORRUPTIONS for s in range(1, 6)]
    assert robustness.mean_corruption_error(rows + extra) == pytest.approx(100)
    assert robustness.mean_corruption_error(rows[1:]) is None
    assert set(robustness.ALEXNET) == set(CORRUPTIONS + EXTRA_CORRUPTIONS)


def test_errors(digits, weights, tmp_path, capsys):
    (tmp_path / 'other.csv').write_text('model,top1\na,1\n')
    (tmp_path / 'c' / 'gaussian_noise' / '1').mkdir(parents=True)
    for data, flags, message in (
            (digits, ['--corruptions', 'rain'], "--corruptions: got 'rain', needs all, or some of gaussian_noise"),
            (digits, ['--corruptions', 'frame_drop'], "--corruptions: got 'frame_drop', needs all"),
            (digits, ['--corruptions', 'fog', '--results-file', tmp_path / 'other.csv'], 'other.csv: is there and'),
            (None, ['--imagenet-c', tmp_path / 'c'], 'there is no folder gaussian_noise/2')):
        with pytest.raises(SystemExit, match=message):
            run(data, weights, *flags)
    for flags, message in (
            (['--imagenet-c', tmp_path, '--corruptions', 'fog'], 'give one of the two'),
            (['--imagenet-c', tmp_path / 'no'], 'no such folder'),
            (['--corruptions', 'fog', '--results-format', 'json'], 'are resumed from csv')):
        with pytest.raises(SystemExit):
            run(digits, weights, *flags)
        assert message in capsys.readouterr().err
    assert (tmp_path / 'other.csv').read_text() == 'model,top1\na,1\n'


def test_clips():
    """All corruptions of clips by default."""
    parser = validate.make_parser()
    args = parser.parse_args(['data', '--corruptions', 'all'])
    args.data_dir = 'data'
    found = [(name, s) for name, s, _ in robustness.conditions(args, clips=True)]
    assert found == [('none', 0), *((name, s) for name in CLIP_CORRUPTIONS for s in range(1, 6))]
