"""Damaged and odd checkpoint files by every way in: each gives one clear error, or loads with the right values."""
import collections
import itertools
import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from timm_ssm.hub import checkpoints
from timm_ssm.hub.convert import convert
from timm_ssm.models._checkpoints import CheckpointError, load_checkpoint, read_checkpoint
from timm_ssm.training import train, validate
from timm_ssm.zoo import cards

from .checkpoints import ARGS, NAME, ODD_FILES, as_ours, damaged, small_weights, whole_files


@pytest.fixture(scope='module')
def weights():
    return small_weights()


@pytest.fixture(scope='module')
def files(weights, tmp_path_factory):
    return whole_files(weights, tmp_path_factory.mktemp('whole'))


def from_file(path):
    """`pretrained=True` with a file."""
    overlay = dict(file=str(path), num_classes=ARGS['num_classes'])
    return timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=overlay, **ARGS).state_dict()


def from_folder(path):
    """`local-dir:`, in a folder that has nothing else."""
    folder = path.parent / f'{path.name} folder'
    folder.mkdir()
    content = path.read_bytes()
    config = cards.model_config(NAME, timm.create_model(NAME, device='meta', **ARGS), ARGS)
    (folder / 'config.json').write_text(json.dumps(config))
    name = 'model.safetensors' if path.suffix == '.safetensors' else 'pytorch_model.bin'
    (folder / name).write_bytes(content)
    try:
        return timm.create_model(f'local-dir:{folder}', pretrained=True).state_dict()
    except CheckpointError as e:
        raise CheckpointError(str(e).replace(str(folder / name), str(path))) from e
    except ValueError as e:  # of a model that it does not fit
        raise ValueError(str(e).replace(str(folder / name), str(path))) from e


def from_load_checkpoint(path):
    """`--initial-checkpoint` of training, into a finished model."""
    model = timm.create_model(NAME, **ARGS)
    load_checkpoint(model, path)
    return model.state_dict()


def from_comparison(path):
    """What `timm-ssm convert` does first: to read it, and compare it with a model."""
    state_dict = read_checkpoint(path).state_dict
    found = checkpoints.compare(NAME, ARGS, state_dict)
    if not found.complete:
        raise ValueError(f'{path}: {found}'.replace('\n', ' '))
    return {as_ours(k): v for k, v in state_dict.items()}


WAYS = [from_file, from_folder, from_load_checkpoint, from_comparison]


def outcome(way, path, wanted):
    """'error' or 'loads'; anything but one clear error or the right values fails the test."""
    try:
        loaded = way(path)
    except (ValueError, RuntimeError) as e:
        assert str(path) in str(e) and len(str(e).splitlines()) == 1, f'{way.__name__}: {e}'
        assert 'weights_only' not in str(e), e
        return 'error'
    assert loaded.keys() == wanted.keys()
    for k, v in wanted.items():
        assert torch.equal(loaded[k].float(), v), f'{way.__name__}, {path.name}: {k} loads silently wrong'
    return 'loads'


@pytest.mark.parametrize('way', WAYS)
def test_damaged_files(files, weights, tmp_path, way, cases):
    wanted = {as_ours(k): v for k, v in weights.items()}
    outcomes = collections.Counter()
    for i, rng in enumerate(cases(64)):
        suffix, content, kind = damaged(rng, files)
        path = tmp_path / f'{i}{suffix}'
        path.write_bytes(content)
        outcomes[kind, outcome(way, path, wanted)] += 1
        path.unlink()
    print(f'{way.__name__}: {dict(sorted(outcomes.items()))}')
    assert not outcomes['truncated', 'loads']
    errors = {kind for kind, what in outcomes if what == 'error'}
    assert sum(outcomes.values()) < 64 or {'truncated', 'flipped', 'overwritten', 'renamed'} <= errors


@pytest.mark.parametrize('odd', ODD_FILES)
def test_odd_files(weights, tmp_path, odd):
    path = tmp_path / f'odd{ODD_FILES[odd].suffix}'
    path.write_bytes(ODD_FILES[odd].content(weights))
    if ODD_FILES[odd].loads:
        wanted = from_comparison(path)
        assert all(outcome(way, path, {k: v.float() for k, v in wanted.items()}) == 'loads' for way in WAYS)
        for k, v in weights.items():
            assert odd == 'huge values' or torch.allclose(wanted[as_ours(k)].float(), v, rtol=.01, atol=1e-6)
    else:
        assert [outcome(way, path, {}) for way in WAYS] == ['error'] * len(WAYS)


@pytest.mark.parametrize('odd, parameter', [
    ('integers', 'cls_token is of type torch.int32'), ('one of integers', 'norm.weight is of type torch.int64'),
    ('booleans', 'blocks.0.mixer.D is of type torch.bool'), ('not a number', 'layers.0.mixer.A_log is not finite'),
    ('float8', 'blocks.0.mixer.out_proj.weight is of type torch.float8_e4m3fn'),
    ('infinite', 'head.bias is not finite')])
def test_errors_name_the_parameter(weights, tmp_path, odd, parameter):
    path = tmp_path / 'odd.pth'
    path.write_bytes(ODD_FILES[odd].content(weights))
    for way in (from_file, from_load_checkpoint):
        with pytest.raises(ValueError, match=parameter):
            way(path)


@pytest.mark.parametrize('odd', ['integers', 'one of integers', 'bytes', 'booleans', 'float8', 'complex'])
def test_checkpoint_path_refuses_other_types(weights, tmp_path, odd):
    """timm reads the file by itself, and knows only parameters of our own names."""
    path = tmp_path / 'odd.pth'
    path.write_bytes(ODD_FILES[odd].content(weights))
    torch.save({as_ours(k): v for k, v in torch.load(path, weights_only=True).items()}, path)
    with pytest.raises(RuntimeError, match='is of type .*, needs one of torch.float16'):
        timm.create_model(NAME, checkpoint_path=str(path), **ARGS)


def test_missing(tmp_path):
    for way in (from_file, from_load_checkpoint, from_comparison):
        assert outcome(way, tmp_path / 'none.pth', {}) == 'error'
        assert outcome(way, tmp_path, {}) == 'error'
    with pytest.raises(CheckpointError, match=f'{tmp_path}: there is no weights file in this folder'):
        config = cards.model_config(NAME, timm.create_model(NAME, device='meta', **ARGS), ARGS)
        (tmp_path / 'config.json').write_text(json.dumps(config))
        timm.create_model(f'local-dir:{tmp_path}', pretrained=True)


def test_whole_files_load(files, weights, tmp_path):
    wanted = {as_ours(k): v for k, v in weights.items()}
    for suffix, content in files.items():
        path = tmp_path / f'x{suffix}'
        path.write_bytes(content)
        assert [outcome(way, path, wanted) for way in WAYS] == ['loads'] * len(WAYS)


def test_safetensors_of_others_need_no_checksum(weights, tmp_path):
    path = tmp_path / 'x.safetensors'
    save_file(weights, path)
    assert all(torch.equal(v, weights[k]) for k, v in load_file(path).items())
    from_file(path)


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp('images'), np.random.default_rng(0)
    for split, i, j in itertools.product(('train', 'validation'), range(5), range(2)):
        folder = root / split / f'class_{i}'
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(folder / f'{j}.png')
    return root


def run_training(images, output, *flags):
    model = ['--model', NAME, '--model-kwargs', 'depth=1', 'embed_dim=16', 'patch_size=8', '--img-size', '32']
    train.main([
        str(images), *model, '--num-classes', '5', '--device', 'cpu', '--workers', '0', '--batch-size', '5',
        '--epochs', '1', '--warmup-epochs', '0', '--output', str(output), '--experiment', 'run', *map(str, flags)])
    return output / 'run' / 'last.pth.tar'


@pytest.fixture(scope='module')
def trained(images, tmp_path_factory):
    return run_training(images, tmp_path_factory.mktemp('trained')).read_bytes()


def run_command(command, path, images, output):
    if command == 'validate':
        validate.main([str(images), '--checkpoint', str(path), '--device', 'cpu', '--workers', '0'])
    elif command == 'convert':
        convert(str(path), output)
    else:
        run_training(images, output, command, path)


COMMANDS = ['convert', 'validate', '--initial-checkpoint', '--resume']


@pytest.mark.parametrize('command', COMMANDS)
def test_commands_on_damaged_files(trained, images, tmp_path, command, cases):
    outcomes = collections.Counter()
    for i, rng in enumerate(cases(12)):
        suffix, content, kind = damaged(rng, {'.pth.tar': trained})
        path = tmp_path / f'{i}{suffix}'
        path.write_bytes(content)
        try:
            run_command(command, path, images, tmp_path / f'out{i}')
            outcomes[kind, 'loads'] += 1
        except (SystemExit, ValueError, RuntimeError) as e:
            assert str(path) in str(e) and 'weights_only' not in str(e), (kind, e)
            outcomes[kind, 'error'] += 1
        path.unlink()
    print(f'{command}: {dict(sorted(outcomes.items()))}')
    assert not outcomes['truncated', 'loads']
    assert sum(outcomes.values()) < 12 or outcomes['truncated', 'error'] and outcomes['flipped', 'error']


@pytest.mark.parametrize('command', COMMANDS)
def test_commands_on_a_whole_file(trained, images, tmp_path, command):
    (tmp_path / 'x.pth.tar').write_bytes(trained)
    run_command(command, tmp_path / 'x.pth.tar', images, tmp_path / 'out')
