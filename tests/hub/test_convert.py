import argparse
import json
import os
import resource
import sys

import pytest
import timm
import torch
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import load_file, save_file

from timm_ssm.cli import main
from timm_ssm.hub import checkpoints
from timm_ssm.hub.convert import convert
from timm_ssm.models._checkpoints import Checkpoint, read_checkpoint
from timm_ssm.models._integrity import save_weights

from ..models.utils import released_shapes, synthetic_checkpoint
from .utils import Terminal, released, small, small_clips, to_bytes

REPO, FILE = 'OpenGVLab/VideoMamba', 'videomamba_t16_in1k_res224.pth'
NAME = 'videomamba_tiny_patch16_224'


def as_ours(name: str) -> str:
    return name.replace('layers.', 'blocks.').replace('norm_f.', 'norm.')


class TestConvert:

    def test_released_file_from_the_hub(self, hub, cache, tmp_path, capsys):
        weights = released()
        hub.add(REPO, {FILE: to_bytes({'model': weights})})
        assert main(['convert', f'{REPO}/{FILE}', str(tmp_path / 'out')]) == 0
        out = capsys.readouterr().out
        assert f'{NAME}.in1k (certain' in out and '7,148,008 parameters' in out
        assert sorted(p.name for p in (tmp_path / 'out').iterdir()) == ['README.md', 'config.json', 'model.safetensors']
        converted = load_file(tmp_path / 'out' / 'model.safetensors')
        assert set(converted) == {as_ours(k) for k in weights}
        assert all(torch.equal(converted[as_ours(k)], v) for k, v in weights.items())
        readme = (tmp_path / 'out' / 'README.md').read_text()
        assert '76.9 %' in readme
        assert list(tmp_path.glob('.out_*')) == []

    def test_recognised_with_its_arguments(self, hub, cache, tmp_path):
        """A model fine-tuned on other images and classes, in a file of any name, loads from a folder and the Hub."""
        (tmp_path / 'my_videomamba.pth').write_bytes(to_bytes({'state_dict': small()}))
        (tmp_path / 'labels.txt').write_text('\n'.join('abcdefg'))
        out = tmp_path / 'out'
        assert main(['convert', f'{tmp_path}/my_videomamba.pth', str(out), '--labels', f'{tmp_path}/labels.txt']) == 0
        config = json.loads((out / 'config.json').read_text())
        assert config['architecture'] == NAME and config['model_args'] == {'img_size': 32}
        assert config['num_classes'] == 7 and config['label_names'] == list('abcdefg')
        readme = (out / 'README.md').read_text()
        assert 'in1k' not in readme and '76.9' not in readme and 'license:' not in readme
        hub.add('me/mine', {p.name: p.read_bytes() for p in out.iterdir()})
        x = torch.randn(1, 3, 32, 32)
        logits = [timm.create_model(n, pretrained=True).eval()(x) for n in (f'local-dir:{out}', 'hf-hub:me/mine')]
        assert logits[0].shape == (1, 7) and torch.equal(*logits)

    def test_training_checkpoint(self, tmp_path):
        """What train.py writes: an architecture's name, arguments, and averaged weights, which are taken."""
        model = timm.create_model(
            NAME, depth=2, num_classes=3, img_size=48, patch_size=8, in_chans=1, global_pool='avg')
        averaged = {k: torch.full_like(v, .01) for k, v in model.state_dict().items()}
        args = dict(model_kwargs=dict(depth=2, patch_size=8, drop_path_rate=.1), gp='avg', mean=[.5], std=[.25],
                    crop_pct=.9, img_size=48, input_size=None, num_classes=3)
        (tmp_path / 'classes.txt').write_text('one\ntwo\nthree')
        (tmp_path / 'model_best.pth.tar').write_bytes(to_bytes(dict(
            arch=NAME, epoch=3, args=argparse.Namespace(**args), state_dict=model.state_dict(),
            state_dict_ema=averaged, optimizer={'state': {}})))
        done = convert(str(tmp_path / 'model_best.pth.tar'), tmp_path / 'out')
        assert done.name == NAME and done.certainty == 'certain, the checkpoint names it'
        assert (load_file(tmp_path / 'out' / 'model.safetensors')['pos_embed'] == .01).all()
        loaded = timm.create_model(f'local-dir:{tmp_path}/out', pretrained=True)
        assert loaded.global_pool == 'avg' and len(loaded.blocks) == 2 and loaded.in_chans == 1
        data = timm.data.resolve_data_config(model=loaded)
        assert tuple(data['input_size']) == (1, 48, 48)
        assert (data['mean'], data['std'], data['crop_pct']) == ([.5], [.25], .9)
        assert loaded.pretrained_cfg['label_names'] == ['one', 'two', 'three']

    def test_safetensors_and_prefix(self, tmp_path):
        path = tmp_path / 'videomamba.safetensors'
        save_file({f'module.{k}': v for k, v in small().items()}, path)
        (tmp_path / 'out').mkdir()  # an empty folder is as good as none
        assert convert(str(path), tmp_path / 'out').name == NAME
        assert len(list((tmp_path / 'out').iterdir())) == 3

    def test_clips(self, hub, cache, tmp_path):
        hub.add('me/clips', {'weights.pth': to_bytes({'module': small_clips()})})
        done = convert('me/clips', tmp_path / 'out')
        assert done.name == 'videomamba_tiny_patch16_f8_224' and done.certainty.startswith('certain')
        config = json.loads((tmp_path / 'out' / 'config.json').read_text())
        assert config['num_classes'] == 7 and config['model_args'] == {'img_size': 32}
        model = timm.create_model(f'local-dir:{tmp_path}/out', pretrained=True).eval()
        assert model(torch.randn(1, 3, 8, 32, 32)).shape == (1, 7)
        assert 'pipeline_tag: video-classification' in (tmp_path / 'out' / 'README.md').read_text()

    def test_class_names_of_a_released_clip_checkpoint(self, hub, cache, tmp_path):
        file = 'videomamba_t16_k400_f8_res224.pth'
        clips = released(
            temporal_pos_embedding=(1, 8, 192), patch_embed__proj__weight=(192, 3, 1, 16, 16),
            head__weight=(400, 192), head__bias=(400,))
        hub.add(REPO, {file: to_bytes({'module': clips})})
        assert convert(f'{REPO}/{file}', tmp_path / 'out').name == 'videomamba_tiny_patch16_f8_224.k400'
        names = json.loads((tmp_path / 'out' / 'config.json').read_text())['label_names']
        assert len(names) == 400 and [names[i] for i in (0, 341)] == ['riding a bike', 'abseiling']
        cfg = timm.create_model(f'local-dir:{tmp_path}/out', device='meta').pretrained_cfg
        assert cfg['label_names'] == names

    def test_training_checkpoint_of_another_size(self, tmp_path):
        """A model that takes any size is prepared images of the size that it was trained at."""
        kwargs = dict(stem_dim=8, embed_dims=[16, 32, 48, 64], depths=[1, 1, 1, 1])
        model = timm.create_model('groupmamba_tiny', num_classes=3, **kwargs)
        args = dict(model='groupmamba_tiny', model_kwargs=kwargs, num_classes=3, img_size=64, input_size=[3, 64, 64])
        (tmp_path / 'last.pth.tar').write_bytes(to_bytes(dict(
            arch='groupmamba_tiny', args=args, state_dict=model.state_dict())))
        convert(str(tmp_path / 'last.pth.tar'), tmp_path / 'out')
        loaded = timm.create_model(f'local-dir:{tmp_path}/out', pretrained=True)
        assert tuple(timm.data.resolve_data_config(model=loaded)['input_size']) == (3, 64, 64)
        rebuilt = checkpoints.rebuild(read_checkpoint(tmp_path / 'last.pth.tar'))
        assert all(torch.equal(v, rebuilt.state_dict()[k]) for k, v in loaded.state_dict().items())
        assert tuple(rebuilt.pretrained_cfg['input_size']) == (3, 64, 64)

    def test_nothing_is_left_if_the_result_differs(self, tmp_path, capsys, monkeypatch):
        def save_others(tensors, path):
            save_weights({k: v + .1 for k, v in tensors.items()}, path)

        monkeypatch.setattr(sys.modules[convert.__module__], 'save_weights', save_others)
        (tmp_path / 'x.pth').write_bytes(to_bytes(small()))
        assert main(['convert', f'{tmp_path}/x.pth', f'{tmp_path}/out', '--model', NAME]) == 1
        assert 'x.pth: the logits differ by' in capsys.readouterr().err
        assert [p.name for p in tmp_path.iterdir()] == ['x.pth']

    def test_progress_on_a_terminal(self, tmp_path, monkeypatch):
        (tmp_path / 'x.pth').write_bytes(to_bytes(small()))
        monkeypatch.setattr(sys, 'stderr', Terminal())
        convert(str(tmp_path / 'x.pth'), tmp_path / 'out', model=NAME)
        assert all(step in sys.stderr.getvalue() for step in ('reading', 'running', 'writing', 'reloading', '6/6'))

    def test_a_taken_folder_stays(self, tmp_path, capsys):
        (tmp_path / 'x.pth').write_bytes(to_bytes(small()))
        out = tmp_path / 'out'
        out.mkdir()
        (out / 'something').write_text('dear')
        assert main(['convert', f'{tmp_path}/x.pth', str(out), '--model', NAME]) == 1
        assert 'folder:' in capsys.readouterr().err
        assert (out / 'something').read_text() == 'dear' and len(list(out.iterdir())) == 1

    def test_disk_full(self, tmp_path, capsys):
        """A limit on the size of files stands in for a full disk: one line, and nothing is left behind."""
        (tmp_path / 'x.pth').write_bytes(to_bytes(small()))
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
        try:
            assert main(['convert', f'{tmp_path}/x.pth', f'{tmp_path}/out', '--model', NAME]) == 1
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        message = capsys.readouterr().err.partition('timm-ssm convert: ')[2]
        assert 'File too large' in message and len(message.splitlines()) == 1
        assert [p.name for p in tmp_path.iterdir()] == ['x.pth']

    @pytest.mark.slow
    def test_transformers_wrapper(self, tmp_path):
        transformers = pytest.importorskip('transformers')
        (tmp_path / 'x.pth').write_bytes(to_bytes(small()))
        convert(str(tmp_path / 'x.pth'), tmp_path / 'out', model=NAME)
        wrapped = transformers.TimmWrapperForImageClassification.from_pretrained(tmp_path / 'out').eval()
        x = torch.randn(1, 3, 32, 32)
        expected = timm.create_model(f'local-dir:{tmp_path}/out', pretrained=True).eval()(x)
        assert torch.allclose(wrapped(x).logits, expected, atol=1e-6)


class TestDetect:

    @pytest.mark.parametrize('key', released_shapes())
    def test_every_released_checkpoint(self, key):
        """By names and shapes alone, or with the help of the file's name where two families share them."""
        shapes = released_shapes()[key]
        state_dict = {k: torch.empty(s, device='meta') for k, s in shapes.items()}
        family, size, *_ = key.split('_')
        if not timm.list_models(f'{family}_*'):
            pytest.skip(f'no {family} yet')
        source = checkpoints.Source(None, f'{family}/checkpoint.pth')
        found, sure = checkpoints.detect(Checkpoint(state_dict), source)
        assert found.name.startswith(f'{family}_{size}') and found.complete and not found.resampled
        assert found.name == key.removesuffix('_224') or not family.startswith(('vmamba', 'spatialmamba'))
        assert set(found.kwargs) <= {'num_classes'}
        alike = family in ('videomamba', 'vim') and size != 'middle' and 'video_' not in key
        assert sure.startswith('likely' if alike else 'certain')

    def test_families_that_are_alike(self):
        """VideoMamba and Vim call their parameters the same."""
        checkpoint = Checkpoint(released())
        with pytest.raises(ValueError, match=f'x.pth fits .*{NAME}.* alike; say which it is with --model') as e:
            checkpoints.detect(checkpoint, checkpoints.Source(None, 'x.pth'))
        assert 'vim_tiny_patch16_224' in str(e.value)
        found, sure = checkpoints.detect(checkpoint, checkpoints.Source(None, 'hustvl/Vim-tiny/x.pth'))
        assert found.name == 'vim_tiny_patch16_224' and sure.startswith('likely')
        found, sure = checkpoints.detect(checkpoint, checkpoints.Source(None, 'x.pth'), NAME)
        assert found.name == NAME and sure == 'as told'

    @pytest.mark.parametrize('model', [None, 'vmamba_tiny'])
    def test_first_version_of_vmamba(self, model):
        """It is refused by its name, not with a table of parameters."""
        checkpoint = Checkpoint({
            'patch_embed.0.weight': torch.zeros(96, 3, 4, 4),
            'layers.0.blocks.0.op.in_proj.weight': torch.zeros(384, 96),
            'layers.0.blocks.0.op.conv2d.bias': torch.zeros(192)})
        with pytest.raises(ValueError, match=r'^checkpoint: it is of the first version of VMamba \(v0, [^\n]*$'):
            checkpoints.detect(checkpoint, checkpoints.Source(None, 'vssmtiny_dp01_ckpt_epoch_292.pth'), model)

    def test_nothing_known(self):
        vit = timm.create_model('vit_tiny_patch16_224', device='meta').state_dict()
        with pytest.raises(ValueError, match='x.pth is of none of the models here') as e:
            checkpoints.detect(Checkpoint(vit), checkpoints.Source(None, 'x.pth'))
        lines = str(e.value).splitlines()
        assert len(lines) < 20 and any('blocks.0.attn.qkv.weight' in line and 'unknown' in line for line in lines)

    def test_missing_and_unknown_names(self):
        weights = released()
        weights['layers.3.mixer.extra'] = weights.pop('layers.3.mixer.D')
        weights['layers.4.mixer.extra'] = weights.pop('layers.4.mixer.D')
        with pytest.raises(ValueError) as e:
            checkpoints.detect(Checkpoint(weights), checkpoints.Source(None, 'x.pth'), NAME)
        table = [line.split() for line in str(e.value).splitlines()]
        assert ['missing', '2', 'blocks.3.mixer.D'] in table and ['unknown', '2', 'blocks.3.mixer.extra'] in table

    def test_another_shape(self):
        with pytest.raises(ValueError, match=r'of another shape +1 +norm.weight: \[191\], needs \[192\]'):
            checkpoints.detect(
                Checkpoint(released(norm_f__weight=(191,))), checkpoints.Source(None, 'x.pth'), NAME)

    def test_unknown_model(self):
        with pytest.raises(ValueError, match='model: there is no nonsense'):
            checkpoints.detect(Checkpoint(released()), checkpoints.Source(None, 'x.pth'), 'nonsense')


class TestFind:

    def test_only_file(self, hub, cache):
        hub.add('me/mine', {'README.md': b'', 'weights.pth': b'x'})
        found = checkpoints.find('me/mine')
        assert found.origin == 'me/mine/weights.pth' and found.path.read_bytes() == b'x' and found.name is None

    def test_several_files(self, hub, cache):
        hub.add('me/mine', {'a.pth': b'x', 'b.pth': b'y'})
        with pytest.raises(ValueError, match='me/mine holds a.pth, b.pth; needs one, as me/mine/FILE'):
            checkpoints.find('me/mine')
        assert checkpoints.find('hf-hub:me/mine/b.pth').path.read_bytes() == b'y'

    def test_revision(self, hub, cache):
        hub.add('me/mine', {'a.pth': b'x'})
        hub.repos['me/mine'].files['v1'] = {'sub/a.pth': b'old'}
        assert checkpoints.find('me/mine@v1/sub/a.pth').path.read_bytes() == b'old'

    def test_released_names(self, hub, cache, tmp_path):
        hub.add(REPO, {FILE: b'x'})
        for source in (f'{REPO}/{FILE}', f'{NAME}.in1k', NAME):
            assert checkpoints.find(source).name == f'{NAME}.in1k'
        (tmp_path / FILE).write_bytes(b'x')
        assert checkpoints.find(str(tmp_path / FILE)).name == f'{NAME}.in1k'

    @pytest.mark.parametrize('source, error', [
        ('/no/such/file.pth', 'source: there is no file'),
        ('no_such_file.pth', 'source: there is no file'),
        ('.', 'source: . is a folder'),
    ])
    def test_nothing(self, source, error):
        with pytest.raises(ValueError, match=error):
            checkpoints.find(source)

    def test_missing_on_the_hub(self, hub, cache, capsys, tmp_path):
        hub.add('me/mine', {})
        with pytest.raises(EntryNotFoundError):
            checkpoints.find('me/mine/a.pth')
        assert main(['convert', 'me/mine/a.pth', f'{tmp_path}/out']) == 1
        assert 'me/mine/resolve/main/a.pth' in capsys.readouterr().err

    def test_damaged_in_the_download(self, hub, cache):
        hub.add('me/mine', {'a.pth': b'right'})
        hub.fail('a.pth', body=b'wrong')
        with pytest.raises(RuntimeError, match='me/mine/a.pth: damaged in the download.*deleted'):
            checkpoints.find('me/mine/a.pth')
        assert checkpoints.find('me/mine/a.pth').path.read_bytes() == b'right'


class TestRead:

    def read(self, tmp_path, content: bytes, name: str = 'x.pth') -> Checkpoint:
        (tmp_path / name).write_bytes(content)
        return read_checkpoint(tmp_path / name)

    def test_code_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match=r'x.pth: reading it would run code \(posix.getpid\), which is refused'):
            self.read(tmp_path, to_bytes({'model': _Code()}))

    @pytest.mark.parametrize('content, error', [
        (b'', 'no checkpoint, or damaged'),
        (b'<html>Please log in</html>', 'no checkpoint, or damaged'),
        (b'version https://git-lfs.github.com/spec/v1\noid sha256:1', 'a pointer to a file in Git LFS'),
        (to_bytes([1, 2]), 'it holds a list'),
        (to_bytes({'epoch': 3}), 'it holds no parameters, but epoch'),
        (to_bytes({'model': {'w': torch.tensor([1., float('nan')])}}), 'w is not finite'),
        (to_bytes({1: torch.ones(1)}), 'needs a dict of parameters by name'),
    ])
    def test_no_checkpoint(self, tmp_path, content, error):
        with pytest.raises(ValueError, match=error) as e:
            self.read(tmp_path, content)
        assert str(tmp_path / 'x.pth') in str(e.value) and '\n' not in str(e.value)

    def test_not_from_zip(self, tmp_path):
        torch.save({'w': torch.ones(3)}, tmp_path / 'x.pth', _use_new_zipfile_serialization=False)
        assert read_checkpoint(tmp_path / 'x.pth').state_dict['w'].tolist() == [1, 1, 1]


class _Code:
    """A pickle that would run a function."""

    def __reduce__(self):
        return os.getpid, ()


def test_fixture_is_the_released_checkpoint():
    assert released().keys() == synthetic_checkpoint('videomamba_tiny_224').keys()
