import json

import pytest
import timm
import torch
from huggingface_hub import constants

from timm_ssm.cli import main
from timm_ssm.models._integrity import save_weights
from timm_ssm.zoo import cards

NAME = 'videomamba_tiny_patch16_224'
ARGS = dict(depth=2, embed_dim=48, img_size=32, num_classes=7)


@pytest.fixture
def folder(tmp_path):
    """A small model as `timm-ssm convert` would write it."""
    torch.manual_seed(0)
    model = timm.create_model(NAME, **ARGS)
    out = tmp_path / 'converted'
    out.mkdir()
    config = cards.model_config(NAME, model, ARGS)
    (out / 'config.json').write_text(cards.to_json(config))
    (out / 'README.md').write_text(cards.card(NAME, config, model))
    save_weights(model.state_dict(), out / 'model.safetensors')
    return out


@pytest.fixture
def token(monkeypatch):
    monkeypatch.setenv('HF_TOKEN', 'hf_of_the_tests')


def test_push_and_load(hub, cache, folder, token, capsys):
    assert main(['push', str(folder), 'me/mine']) == 0
    assert f'{hub.url}/me/mine/commit/' in capsys.readouterr().out
    assert hub.repos['me/mine'].files['main'] == {p.name: p.read_bytes() for p in folder.iterdir()}
    assert not hub.repos['me/mine'].private
    x = torch.randn(1, 3, 32, 32)
    theirs = timm.create_model('hf-hub:me/mine', pretrained=True).eval()(x)
    assert torch.equal(theirs, timm.create_model(f'local-dir:{folder}', pretrained=True).eval()(x))


def test_push_to_a_private_branch(hub, cache, folder, token):
    for _ in range(2):  # the second time everything exists
        assert main(['push', str(folder), 'me/mine', '--private', '--revision', 'v2', '--message', 'Second']) == 0
    repo = hub.repos['me/mine']
    assert repo.private and 'model.safetensors' in repo.files['v2'] and not repo.files['main']


def test_nothing_else_is_uploaded(hub, cache, folder, token):
    (folder / 'secret.txt').write_text('mine')
    assert main(['push', str(folder), 'me/mine']) == 0
    assert 'secret.txt' not in hub.repos['me/mine'].files['main']


def test_dry_run(hub, folder, capsys):
    assert main(['push', str(folder), 'me/mine', '--private', '--dry-run']) == 0
    out = capsys.readouterr().out
    assert 'private me/mine, branch main' in out and f'{(folder / "model.safetensors").stat().st_size:,} bytes' in out
    assert not hub.repos and not hub.requests


def test_without_a_token(hub, cache, folder, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(constants, 'HF_TOKEN_PATH', str(tmp_path / 'none'))
    assert main(['push', str(folder), 'me/mine']) == 1
    err = capsys.readouterr().err
    assert err.startswith('timm-ssm push: me/mine: ') and '401 ' in err and '\n' not in err.strip()
    assert not hub.repos


def test_server_errors(hub, cache, folder, token, capsys):
    """Uploads are tried again; a failed commit is one error, and leaves the repository as it was."""
    hub.fail('/upload/', method='PUT', status=500, times=2)
    hub.fail('/commit/', method='POST', status=503)
    assert main(['push', str(folder), 'me/mine']) == 1
    assert 'me/mine/commit/main' in capsys.readouterr().err.partition('timm-ssm push: ')[2]
    assert not hub.repos['me/mine'].files['main']
    assert main(['push', str(folder), 'me/mine']) == 0
    assert hub.repos['me/mine'].files['main']['model.safetensors'] == (folder / 'model.safetensors').read_bytes()


@pytest.mark.parametrize('damage, error', [
    (lambda f: (f / 'config.json').unlink(), 'has no config.json, needs what `timm-ssm convert` writes'),
    (lambda f: (f / 'config.json').write_text('{'), 'config.json: not a timm configuration'),
    (lambda f: (f / 'config.json').write_text('[]'), 'config.json: not a timm configuration'),
    (lambda f: (f / 'config.json').write_text(json.dumps(dict(architecture='x'))), 'there is no architecture x'),
    (lambda f: flip(f / 'model.safetensors'), 'model.safetensors: it is no checkpoint, or damaged'),
])
def test_a_wrong_folder_is_not_pushed(hub, folder, token, capsys, damage, error):
    damage(folder)
    for dry_run in ([], ['--dry-run']):
        assert main(['push', str(folder), 'me/mine', *dry_run]) == 1
        assert error in capsys.readouterr().err
    assert not hub.requests


def flip(path) -> None:
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
