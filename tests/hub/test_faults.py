"""The Hub's bad days, as `timm-ssm` and `create_model` meet them; tests/test_pretrained.py has the plainer ones."""
import os
import resource
import subprocess
import sys

import pytest
import timm
import torch
from huggingface_hub import constants

from timm_ssm.cli import main

from .utils import released, to_bytes

NAME, REPO, FILE = 'videomamba_tiny_patch16_224', 'OpenGVLab/VideoMamba', 'videomamba_t16_in1k_res224.pth'


@pytest.fixture(scope='module')
def weights():
    return released(depth=2)


@pytest.fixture(scope='module')
def content(weights) -> bytes:
    return to_bytes({'model': weights})


def create():
    return timm.create_model(NAME, pretrained=True, depth=2)


def assert_right(model, weights) -> None:
    assert all(torch.equal(model.state_dict()[k.replace('layers.', 'blocks.').replace('norm_f.', 'norm.')], v)
               for k, v in weights.items())


def blobs(cache):
    return list(cache.glob('models--*/blobs/*'))


def test_dropped_and_resumed(hub, cache, weights, content):
    """Every attempt brings some bytes, and the next asks for the rest only."""
    hub.add(REPO, {FILE: content})
    for _ in range(3):
        hub.fail(FILE, cut_after=len(content) // 5)
    assert_right(create(), weights)
    assert hub.asked().count(f'/{REPO}/resolve/main/{FILE}') == 4
    assert [b.stat().st_size for b in blobs(cache)] == [len(content)]


def test_killed_in_the_download(hub, cache, weights, content):
    """What a killed process leaves behind is never taken for the file."""
    hub.add(REPO, {FILE: content})
    hub.fail(FILE, cut_after=len(content) // 2)
    code = f'''
import os, tqdm, huggingface_hub.file_download as d
write = d.http_get
def http_get(url, temp_file, **kwargs):
    class Killed:
        def write(self, chunk):
            temp_file.write(chunk[:1000]); temp_file.flush(); os._exit(9)
        def tell(self): return 0
    write(url, Killed(), **kwargs)
d.http_get = http_get
import timm, timm_ssm
timm.create_model({NAME!r}, pretrained=True, depth=2)
'''
    run = subprocess.run([sys.executable, '-c', code], env=process_env(cache), capture_output=True, text=True)
    assert run.returncode == 9, run.stderr
    assert [b.suffix for b in blobs(cache)] == ['.incomplete']
    assert_right(create(), weights)


def process_env(cache, **more):
    return {**os.environ, 'PYTHONPATH': os.pathsep.join(sys.path), 'HF_HUB_CACHE': str(cache), **more}


def test_two_processes_at_once(hub, cache, weights, content):
    hub.add(REPO, {FILE: content})
    hub.fail(FILE, wait=2., times=2)  # so that the second comes while the first downloads
    code = (
        'import timm, timm_ssm, sys, torch;'
        f'm = timm.create_model({NAME!r}, pretrained=True, depth=2);'
        'print(m.pos_embed.double().sum().item())')
    runs = [
        subprocess.Popen([sys.executable, '-c', code], env=process_env(cache), stdout=subprocess.PIPE, text=True)
        for _ in range(2)]
    sums = [float(run.communicate(timeout=120)[0]) for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    assert sums == [weights['pos_embed'].double().sum().item()] * 2
    assert len(blobs(cache)) == 1
    assert_right(create(), weights)


def test_private_repository(hub, cache, weights, content, monkeypatch):
    hub.add(REPO, {FILE: content}, private=True)
    with pytest.raises(OSError, match=r'401[\s\S]*private'):
        create()
    monkeypatch.setenv('HF_TOKEN', 'hf_of_the_tests')
    assert_right(create(), weights)


def test_server_error_then_success(hub, cache, weights, content):
    """huggingface_hub tries again at first; in the download itself it does not, but the next call has what it needs."""
    hub.add(REPO, {FILE: content})
    hub.fail(FILE, method='HEAD', status=502, times=3)
    hub.fail(FILE, status=503)
    with pytest.raises(OSError, match=f'503[\\s\\S]*{REPO}/resolve/main/{FILE}'):
        create()
    assert_right(create(), weights)


def test_disk_full(hub, cache, weights, content):
    """A limit on the size of files stands in for a full disk."""
    hub.add(REPO, {FILE: content})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(content) // 2, limits[1]))
    try:
        with pytest.raises(RuntimeError, match=f'{NAME}: cannot load {FILE} of {REPO} .*File too large'):
            create()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not blobs(cache)
    assert_right(create(), weights)


class TestOffline:

    def test_with_a_cache(self, hub, cache, weights, content, monkeypatch):
        hub.add(REPO, {FILE: content})
        create()
        hub.requests.clear()
        monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
        assert_right(create(), weights)
        assert not hub.requests

    def test_without_a_cache(self, hub, cache, content, monkeypatch, capsys, tmp_path):
        hub.add(REPO, {FILE: content})
        monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
        with pytest.raises(RuntimeError, match=f'{NAME}: cannot load {FILE} of {REPO} .*HF_HUB_OFFLINE'):
            create()
        assert main(['convert', f'{NAME}.in1k', str(tmp_path / 'out')]) == 1
        err = capsys.readouterr().err
        assert f'{REPO}/{FILE}' in err and 'HF_HUB_OFFLINE' in err
        assert not hub.requests and not blobs(cache) and not (tmp_path / 'out').exists()


@pytest.mark.parametrize('fault, error', [
    (dict(cut_after=0, times=100), 'peer closed connection'),
    (dict(status=500, times=100), '500'),
    (dict(body=b'x' * 5), 'should be of size'),
])
def test_command_line_says_which_file(hub, cache, content, tmp_path, capsys, fault, error):
    hub.add(REPO, {FILE: content})
    hub.fail(FILE, **fault)
    assert main(['convert', f'{REPO}/{FILE}', str(tmp_path / 'out')]) == 1
    last = capsys.readouterr().err.partition('timm-ssm convert: ')[2]
    assert REPO in last and FILE in last and error in last
    assert not (tmp_path / 'out').exists() and not blobs(cache)
