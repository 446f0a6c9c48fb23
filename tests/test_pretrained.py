"""Weights from the Hub: a server on this machine speaks its protocol and serves files of the released names."""
import io
import json
import os
import socket
from argparse import Namespace
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError
from safetensors.torch import save as to_safetensors
from timm.models import save_for_hf

from tests.fixtures.synthesize import synthesize
from tests.models.utils import released_shapes
from timm_ssm.hub.checkpoints import find
from timm_ssm.hub.convert import convert
from timm_ssm.zoo.registry import cached_file, list_names

FIXTURES = Path(__file__).parent / 'fixtures'
NAME, REPO, FILE = 'videomamba_tiny_patch16_224', 'OpenGVLab/VideoMamba', 'videomamba_t16_in1k_res224.pth'

def create(name: str = NAME, **kwargs):
    return timm.create_model(name, pretrained=True, depth=2, **kwargs)


def to_bytes(checkpoint) -> bytes:
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    return buffer.getvalue()


def released_checkpoint(depth: int = 24):
    """A checkpoint of the authors' VideoMamba-Ti: their names and shapes, other values."""
    names = json.loads((FIXTURES / 'checkpoints.json').read_text())['videomamba_tiny_224']
    absent = tuple(f'layers.{i}.' for i in range(depth, 24))
    return {name: synthesize(name, tuple(shape)) for name, shape in names.items() if not name.startswith(absent)}


@pytest.fixture(scope='module')
def released():
    """The first two layers of one, for speed."""
    return released_checkpoint(depth=2)


@pytest.fixture(scope='module')
def released_file(released) -> bytes:
    return to_bytes({'model': released})


def weights_in(folder: Path):
    """Complete and incomplete downloads in a cache."""
    return [p for p in folder.glob('models--*/blobs/*') if p.is_file()]


def as_ours(name: str) -> str:
    return name.replace('layers.', 'blocks.').replace('norm_f.', 'norm.')


def assert_loaded(model, released, but=()) -> None:
    state_dict = model.state_dict()
    assert {as_ours(k) for k in released} - set(but) == set(state_dict) - set(but)
    for k, v in released.items():
        if as_ours(k) not in but:
            assert torch.equal(state_dict[as_ours(k)], v), k


class TestFromTheHub:

    def test_loads_the_released_values(self, hub, cache):
        released = released_checkpoint()
        hub.add(REPO, {FILE: to_bytes({'model': released})})
        model = timm.create_model(NAME, pretrained=True)
        assert_loaded(model, released)
        assert model.pretrained_cfg['tag'] == 'in1k'

    def test_downloads_once(self, hub, cache, released, released_file):
        hub.add(REPO, {FILE: released_file})
        for _ in range(2):
            assert_loaded(create(f'{NAME}.in1k'), released)
        assert hub.asked().count(f'/{REPO}/resolve/main/{FILE}') == 1

    def test_num_classes(self, hub, cache, released, released_file):
        hub.add(REPO, {FILE: released_file})
        head = ('head.weight', 'head.bias')
        model = create(num_classes=10)
        assert model.head.weight.shape == (10, 192)
        assert_loaded(model, released, but=head)
        model = create(num_classes=0)
        assert isinstance(model.head, torch.nn.Identity)
        assert_loaded(model, released, but=head)

    @pytest.mark.parametrize('in_chans', [1, 4])
    def test_in_chans(self, hub, cache, released, released_file, in_chans):
        hub.add(REPO, {FILE: released_file})
        model = create(in_chans=in_chans)
        assert_loaded(model, released, but=('patch_embed.proj.weight',))
        weight = released['patch_embed.proj.weight']
        wanted = weight.sum(1, keepdim=True) if in_chans == 1 else weight[:, [0, 1, 2, 0]] * 3 / 4
        assert torch.allclose(model.patch_embed.proj.weight, wanted, atol=1e-6)

    def test_img_size(self, hub, cache, released, released_file):
        hub.add(REPO, {FILE: released_file})
        model = create(img_size=(96, 160))
        assert model.pos_embed.shape == (1, 1 + 6 * 10, 192)
        assert torch.equal(model.pos_embed[:, 0], released['pos_embed'][:, 0])
        assert_loaded(model, released, but=('pos_embed',))

    def test_features_only(self, hub, cache, released, released_file):
        hub.add(REPO, {FILE: released_file})
        model = create(features_only=True, out_indices=2)
        state_dict = {k.removeprefix('model.'): v for k, v in model.state_dict().items()}
        assert torch.equal(state_dict['blocks.1.mixer.in_proj.weight'], released['layers.1.mixer.in_proj.weight'])

    @pytest.mark.parametrize('name', [n for n in list_names(pretrained=True) if not timm.get_pretrained_cfg(n).url])
    def test_asks_for_its_file(self, hub, cache, name):
        """And for nothing else."""
        cfg = timm.get_pretrained_cfg(name)
        hub.add(cfg.hf_hub_id, {'README.md': b''})
        path = f'{cfg.hf_hub_id}/resolve/main/{cfg.hf_hub_filename}'
        with pytest.raises(EntryNotFoundError, match=path):
            timm.create_model(name, pretrained=True, device='meta')
        assert hub.asked('HEAD') == [f'/{path}']

    @pytest.mark.parametrize('checkpoint, name, wrap', [
        ('videomamba_small_video_f8_224', 'videomamba_small_patch16_f8_224.k400', lambda s: {'module': s}),
        ('vim_tiny_224', 'vim_tiny_patch16_224.in1k', lambda s: {'model': s, 'args': Namespace(lr=1.), 'epoch': 3}),
        ('groupmamba_tiny_224', 'groupmamba_tiny.in1k', lambda s: s),
        ('mambavision_tiny_224', 'mambavision_tiny.in1k', lambda s: {
            'arch': 'x', 'args': Namespace(lr=1.), 'state_dict': {f'module.{k}': v for k, v in s.items()}}),
    ])
    def test_every_family(self, hub, cache, checkpoint, name, wrap):
        """Full-size files; each parameter has one value throughout, so that they are small."""
        shapes = released_shapes()[checkpoint]
        state_dict = {
            k: torch.tensor(i, dtype=torch.long if k.endswith('tracked') else torch.float).expand(s)
            for i, (k, s) in enumerate(shapes.items(), 1)}
        cfg = timm.get_pretrained_cfg(name)
        hub.add(cfg.hf_hub_id, {cfg.hf_hub_filename: to_bytes(wrap(state_dict))})
        loaded = timm.create_model(name, pretrained=True).state_dict()
        assert all((v == v.flatten()[0]).all() for v in loaded.values())
        assert sorted(v.flatten()[0].item() for v in loaded.values()) == list(range(1, len(shapes) + 1))


class TestElsewhere:
    """Files under a URL, as VMamba's on GitHub; the server here stands in for it."""

    NAME, PATH = 'vmamba_tiny.in1k', 'MzeroMiko/VMamba/resolve/main/vssm1_tiny_0230s_ckpt_epoch_264.pth'

    @pytest.fixture
    def url(self, hub, tmp_path, monkeypatch):
        monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch'))
        return f'{hub.url}/{self.PATH}'

    def test_the_file_that_the_authors_evaluate(self, hub, url):
        """Not the averaged weights, should it hold them too, and not from a file that the user downloaded either."""
        shapes = released_shapes()['vmamba_tiny_224']
        state_dict = {k: torch.tensor(float(i)).expand(s) for i, (k, s) in enumerate(shapes.items(), 1)}
        content = to_bytes({'model': state_dict, 'model_ema': {k: -v for k, v in state_dict.items()}, 'epoch': 264})
        hub.add('MzeroMiko/VMamba', {Path(self.PATH).name: content})
        for _ in range(2):
            model = timm.create_model(self.NAME, pretrained=True, pretrained_cfg_overlay=dict(url=url))
        assert hub.asked() == [f'/{self.PATH}']  # once
        kept, = Path(os.environ['TORCH_HOME']).rglob('*.pth')
        local = timm.create_model(self.NAME, pretrained=True, pretrained_cfg_overlay=dict(file=str(kept)))
        for loaded in (model.state_dict(), local.state_dict()):
            assert {v.flatten()[0].item() for v in loaded.values()} == set(range(1, len(shapes) + 1))
        found = find(self.NAME)  # the released file is in the cache under the name that its URL has
        assert found.path == cached_file(self.NAME) == kept and found.name == self.NAME

    def test_no_such_file(self, hub, url):
        hub.add('MzeroMiko/VMamba', {})
        with pytest.raises(RuntimeError, match=f'^vmamba_tiny: cannot load {url}: .*404') as e:
            timm.create_model(self.NAME, pretrained=True, pretrained_cfg_overlay=dict(url=url))
        assert '\n' not in str(e.value)


class TestPublished:
    """Our own checkpoints: a config.json and a model.safetensors, in a Hub repository or a folder."""

    @pytest.fixture
    def folder(self, tmp_path):
        torch.manual_seed(0)
        args = dict(depth=2, embed_dim=48, img_size=64)
        model = timm.create_model(NAME, num_classes=7, **args)
        save_for_hf(model, tmp_path / 'published', model_args=args, safe_serialization=True)
        return model, tmp_path / 'published'

    def assert_same(self, model, other) -> None:
        assert type(other) is type(model)
        ours, theirs = model.state_dict(), other.state_dict()
        assert list(ours) == list(theirs) and all(torch.equal(ours[k], theirs[k]) for k in ours)

    def test_hf_hub(self, hub, cache, folder):
        model, path = folder
        hub.add('someone/tiny-mamba', {p.name: p.read_bytes() for p in path.iterdir()})
        self.assert_same(model, timm.create_model('hf-hub:someone/tiny-mamba', pretrained=True))
        other = timm.create_model('hf-hub:someone/tiny-mamba', pretrained=True, num_classes=3)
        assert other.head.weight.shape == (3, 48)
        assert torch.equal(other.pos_embed, model.pos_embed)

    def test_hf_hub_revision(self, hub, cache, folder):
        model, path = folder
        hub.add('someone/tiny-mamba', {'README.md': b'nothing here yet'})
        hub.repos['someone/tiny-mamba'].files['v1'] = {p.name: p.read_bytes() for p in path.iterdir()}
        self.assert_same(model, timm.create_model('hf-hub:someone/tiny-mamba@v1', pretrained=True))
        with pytest.raises(EntryNotFoundError, match='someone/tiny-mamba/resolve/main/config.json'):
            timm.create_model('hf-hub:someone/tiny-mamba', pretrained=True)

    def test_local_dir(self, folder):
        model, path = folder
        self.assert_same(model, timm.create_model(f'local-dir:{path}', pretrained=True))

    def test_local_dir_with_the_authors_file(self, folder, released_file, released):
        _, path = folder
        save_for_hf(timm.create_model(NAME, depth=2), path, model_args=dict(depth=2), safe_serialization=True)
        (path / 'model.safetensors').unlink()
        (path / FILE).write_bytes(released_file)
        assert_loaded(timm.create_model(f'local-dir:{path}', pretrained=True), released)

    def test_local_file(self, tmp_path, released_file, released):
        (tmp_path / FILE).write_bytes(released_file)
        overlay = dict(file=str(tmp_path / FILE))
        assert_loaded(create(pretrained_cfg_overlay=overlay), released)

    def test_local_dir_truncated(self, folder):
        _, path = folder
        weights = path / 'model.safetensors'
        weights.write_bytes(weights.read_bytes()[:-100])
        with pytest.raises(ValueError, match=f'{path}.*damaged'):
            timm.create_model(f'local-dir:{path}', pretrained=True)


class TestWhatGoesWrong:
    """One error that names the repository and the file; a later call starts from a sound cache."""

    def assert_recovers(self, hub, released, released_file) -> None:
        hub.repos.clear()
        hub.faults.clear()
        hub.add(REPO, {FILE: released_file})
        assert_loaded(create(), released)

    def test_missing_file(self, hub, cache, released, released_file):
        hub.add(REPO, {'README.md': b''})
        with pytest.raises(EntryNotFoundError, match=f'404.*\n.*\n.*{REPO}/resolve/main/{FILE}'):
            create()
        self.assert_recovers(hub, released, released_file)

    def test_missing_or_private_repository(self, hub, cache, released_file):
        with pytest.raises(RepositoryNotFoundError, match=f'401.*\n.*\n.*{REPO}/resolve/main/{FILE}'):
            create()
        hub.add(REPO, {FILE: released_file}, private=True)
        with pytest.raises(RepositoryNotFoundError, match='private or gated'):
            create()

    def test_unreachable(self, hub, cache, monkeypatch, released, released_file):
        with socket.socket() as s:
            s.bind(('127.0.0.1', 0))
            nobody = f'http://127.0.0.1:{s.getsockname()[1]}'
        with monkeypatch.context() as m:
            m.setattr(constants, 'HUGGINGFACE_CO_URL_TEMPLATE', nobody + '/{repo_id}/resolve/{revision}/{filename}')
            with pytest.raises(RuntimeError, match=f'{NAME}: cannot load {FILE} of {REPO} .*check your connection'):
                create()
        assert not weights_in(cache)
        self.assert_recovers(hub, released, released_file)

    def test_server_errors(self, hub, cache, released, released_file):
        hub.add(REPO, {FILE: released_file})
        hub.fail(FILE, method='HEAD', status=503, times=3)
        assert_loaded(create(), released)  # in the end

    def test_server_error_in_the_download(self, hub, cache, released, released_file):
        hub.add(REPO, {FILE: released_file})
        hub.fail(FILE, status=500, times=100)
        with pytest.raises(HfHubHTTPError, match=f'500.*{REPO}/resolve/main/{FILE}'):
            create()
        assert not weights_in(cache)
        self.assert_recovers(hub, released, released_file)

    def test_connection_cut_then_resumed(self, hub, cache, released, released_file):
        hub.add(REPO, {FILE: released_file})
        hub.fail(FILE, cut_after=1_000_000)
        assert_loaded(create(), released)
        assert hub.asked().count(f'/{REPO}/resolve/main/{FILE}') == 2

    def test_connection_cut_for_good(self, hub, cache, released, released_file):
        hub.add(REPO, {FILE: released_file})
        hub.fail(FILE, cut_after=1_000_000)
        hub.fail(FILE, cut_after=0, times=100)
        with pytest.raises(RuntimeError, match=f'{NAME}: cannot load {FILE} of {REPO} .*peer closed connection'):
            create()
        assert not weights_in(cache)
        self.assert_recovers(hub, released, released_file)

    @pytest.mark.parametrize('damage', ['bits', 'tail'])
    def test_damaged_in_the_download(self, hub, cache, released, released_file, damage):
        body = bytearray(released_file)
        if damage == 'bits':
            body[len(body) // 2] ^= 64  # torch.load notices nothing
        else:
            body[-5000:] = bytes(5000)
        hub.add(REPO, {FILE: released_file})
        hub.fail(FILE, body=bytes(body))
        with pytest.raises(RuntimeError, match=f'{FILE} of {REPO} .*: damaged in the download.*deleted'):
            create()
        assert not weights_in(cache)
        assert_loaded(create(), released)

    @pytest.mark.parametrize('content', ['truncated', 'empty', 'html', 'code'])
    def test_not_a_checkpoint(self, hub, cache, released, released_file, content):
        body = dict(
            truncated=released_file[:len(released_file) // 2],
            empty=b'',
            html=b'<html>Please log in</html>',
            code=to_bytes({'model': _Code()}),
        )[content]
        hub.add(REPO, {FILE: body})
        reason = dict(code=r'would run code \(posix.getpid\)', truncated='zip archive').get(content, 'damaged')
        with pytest.raises(RuntimeError, match=f'{NAME}: cannot load {FILE} of {REPO} .*{reason}') as e:
            create()
        assert '\n' not in str(e.value) and 'weights_only' not in str(e.value)
        assert str(weights_in(cache)[0]) in str(e.value)

    def test_damaged_in_the_cache(self, hub, cache, released, released_file):
        hub.add(REPO, {FILE: released_file})
        create()
        blob, = weights_in(cache)
        os.truncate(blob, 1_000_000)
        with pytest.raises(RuntimeError, match=f'{FILE} of {REPO} .*{blob}; if you delete it'):
            create()
        blob.unlink()  # as the error advises
        assert_loaded(create(), released)

    def test_bits_flipped_in_the_cache(self, hub, cache, released, released_file):
        """Whoever downloaded it, and whenever it was damaged: it is verified when it is read."""
        hub.add(REPO, {FILE: released_file})
        hf_hub_download(REPO, FILE)
        blob, = weights_in(cache)
        flip(blob)
        with pytest.raises(RuntimeError, match=f'{FILE} of {REPO} .*checksum of .* is wrong.*{blob}; if you delete it'):
            create()
        with pytest.raises(ValueError, match=f'{FILE}: .*checksum of .* is wrong'):
            convert(f'{REPO}/{FILE}', cache / 'out')
        blob.unlink()
        assert_loaded(create(), released)

    def test_bits_flipped_in_a_file_without_checksums(self, hub, cache, released):
        """It is held to the SHA-256 by which the cache names it."""
        hub.add('me/mine', {'model.safetensors': to_safetensors(released)})
        overlay = dict(hf_hub_id='me/mine', hf_hub_filename='model.safetensors')
        assert_loaded(create(pretrained_cfg_overlay=overlay), released)
        blob, = weights_in(cache)
        flip(blob)
        with pytest.raises(RuntimeError, match=f'model.safetensors of me/mine .*SHA-256 .*{blob}; if you delete it'):
            create(pretrained_cfg_overlay=overlay)

    def test_pytorch_model_bin(self, hub, cache, released, released_file):
        """timm's default name, of which there may be a safetensors version; offline, too."""
        hub.add('me/mine', {'pytorch_model.bin': released_file})
        overlay = dict(hf_hub_id='me/mine', hf_hub_filename=None)
        for _ in range(2):
            assert_loaded(create(pretrained_cfg_overlay=overlay), released)
        hub.add('me/mine', {'model.safetensors': to_safetensors({k: v + 1 for k, v in released.items()})})
        assert_loaded(create(pretrained_cfg_overlay=overlay), {k: v + 1 for k, v in released.items()})

    def test_another_model(self, hub, cache, released):
        hub.add(REPO, {FILE: to_bytes({f'backbone.{k}': v for k, v in released.items()})})
        with pytest.raises(ValueError, match=f'{FILE} of {REPO} .*not of {NAME}.*41 of 41.*backbone') as e:
            create()
        assert '\n' not in str(e.value)

    def test_another_size(self, hub, cache):
        small = timm.create_model('videomamba_small_patch16_224', depth=2, device='meta')
        sizes = {k: torch.zeros(()).expand(v.shape) for k, v in small.state_dict().items()}
        hub.add(REPO, {FILE: to_bytes(sizes)})
        with pytest.raises(ValueError, match=f'{FILE} of {REPO} .*not of {NAME}.*is .*384.*needs .*192'):
            create()

    def test_wrong_arguments_are_not_blamed_on_the_weights(self, hub, cache):
        with pytest.raises(TypeError, match='nonsense'):
            create(nonsense=1)
        with pytest.raises(ValueError, match='^global_pool: got'):
            create(global_pool='nonsense')
        assert not hub.asked('HEAD')


def flip(path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 64
    path.write_bytes(content)


class _Code:
    """A pickle that would run a function."""

    def __reduce__(self):
        return os.getpid, ()
