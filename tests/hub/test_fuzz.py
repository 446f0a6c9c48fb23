"""Damaged checkpoints: each gives one clear error or loads with the right values."""
import random

import pytest
import timm
import torch
from safetensors.torch import load_file

from timm_ssm.hub import checkpoints
from timm_ssm.models._checkpoints import read_checkpoint
from timm_ssm.models._integrity import save_weights

from ..fixtures.synthesize import synthesize
from .utils import to_bytes

NAME = 'videomamba_tiny_patch16_224'
ARGS = dict(depth=1, embed_dim=16, img_size=32, patch_size=8, num_classes=5)
CASES = 200


@pytest.fixture(scope='module')
def model():
    return timm.create_model(NAME, **ARGS)


@pytest.fixture(scope='module')
def weights(model):
    """Under the authors' names."""
    ours = {k.replace('blocks.', 'layers.').replace('norm.weight', 'norm_f.weight') if 'blocks' not in k
            else k.replace('blocks.', 'layers.'): v for k, v in model.state_dict().items()}
    return {k: synthesize(k, tuple(v.shape)) for k, v in ours.items()}


def as_ours(name: str) -> str:
    return name.replace('layers.', 'blocks.').replace('norm_f.', 'norm.')


@pytest.fixture(scope='module')
def files(weights, tmp_path_factory):
    """Whole checkpoints: zip archives with and without a wrapper, and safetensors as this package writes them."""
    save_weights(weights, tmp_path_factory.mktemp('whole') / 'x.safetensors')
    path = tmp_path_factory.mktemp('whole') / 'x.safetensors'
    save_weights(weights, path)
    return {'.pth': to_bytes(weights), '.pth.tar': to_bytes({'state_dict': weights, 'epoch': 3}),
            '.safetensors': path.read_bytes()}


def damage(rng: random.Random, files):
    """One damaged file: its name and content, and what was done to it."""
    suffix = rng.choice(sorted(files))
    content = bytearray(files[suffix])
    kind = rng.choice(['truncated', 'flipped', 'flipped near the ends', 'renamed', 'overwritten', 'extended'])
    if kind == 'truncated':
        del content[rng.randrange(len(content)):]
    elif kind == 'flipped':
        for _ in range(rng.choice([1, 1, 2, 8])):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif kind == 'flipped near the ends':  # the directories: of safetensors in front, of zip archives at the back
        i = rng.randrange(4000)
        content[rng.choice([i, -i - 1])] ^= 1 << rng.randrange(8)
    elif kind == 'overwritten':
        start, size = rng.randrange(len(content)), rng.randrange(1, 2000)
        content[start:start + size] = bytes(len(content[start:start + size]))
    elif kind == 'extended':
        content += rng.randbytes(rng.randrange(1, 100))
    elif kind == 'renamed':
        suffix = rng.choice(sorted({'.pth', '.safetensors', '.bin', ''} - {suffix}))
    return f'x{suffix}', bytes(content), kind


def values(state_dict):
    return {as_ours(k): v for k, v in state_dict.items()}


@pytest.mark.parametrize('group', range(10))
def test_damaged_files(files, weights, tmp_path, group):
    """Both ways in: create_model with a file, and what `timm-ssm convert` reads."""
    wanted = values(weights)
    outcomes = set()
    for case in range(group * CASES // 10, (group + 1) * CASES // 10):
        rng = random.Random(case)
        name, content, kind = damage(rng, files)
        path = tmp_path / f'{case}{name}'
        path.write_bytes(content)
        for way in (from_create_model, from_read):
            try:
                loaded = way(path)
            except (ValueError, RuntimeError) as e:
                assert str(path) in str(e), (case, kind, e)
                assert len(str(e).splitlines()) <= (1 if way is from_create_model else 12), (case, kind, e)
                outcomes.add((kind, 'error'))
            else:
                assert loaded.keys() == wanted.keys(), (case, kind)
                for k, v in wanted.items():
                    assert torch.equal(loaded[k], v), f'{kind} file {case} loads silently wrong: {k}'
                outcomes.add((kind, 'loads'))
        path.unlink()
    assert any(outcome == 'error' for _, outcome in outcomes)


def from_create_model(path):
    overlay = dict(file=str(path), num_classes=ARGS['num_classes'])
    return timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=overlay, **ARGS).state_dict()


def from_read(path):
    """Reading, and holding names and shapes to those of the model, as `convert` does."""
    state_dict = read_checkpoint(path).state_dict
    found = checkpoints.compare(NAME, ARGS, state_dict)
    if not found.complete:
        raise ValueError(f'{path}: {found}'.replace('\n', ' '))
    return values(state_dict)


def test_whole_files_load(files, weights, tmp_path):
    for suffix, content in files.items():
        path = tmp_path / f'x{suffix}'
        path.write_bytes(content)
        for way in (from_create_model, from_read):
            loaded = way(path)
            assert all(torch.equal(loaded[as_ours(k)], v) for k, v in weights.items())


def test_safetensors_of_others_need_no_checksum(files, weights, tmp_path):
    from safetensors.torch import save_file
    path = tmp_path / 'x.safetensors'
    save_file(weights, path)
    assert all(torch.equal(v, weights[k]) for k, v in load_file(path).items())
    from_create_model(path)
