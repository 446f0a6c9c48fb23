import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data import ImageNetInfo

from timm_ssm.cli import main
from timm_ssm.data import EvalTransform, FrameSampler, Video
from timm_ssm.zoo import cards, registry
from timm_ssm.zoo.datasets import class_names

from ..data.videos import write_video
from .utils import Terminal

NAME = 'videomamba_tiny_patch16_224'


def save_model(folder, label_names=None, **kwargs):
    torch.manual_seed(0)
    args = dict(depth=1, embed_dim=48, img_size=32, **kwargs)
    model = timm.create_model(NAME, **args).eval()
    with torch.no_grad():
        model.head.weight.mul_(50)  # so that the classes differ
    folder.mkdir()
    (folder / 'config.json').write_text(cards.to_json(cards.model_config(NAME, model, args, label_names)))
    save_file(model.state_dict(), folder / 'model.safetensors')
    return model


def save_clip_model(folder, **kwargs):
    torch.manual_seed(0)
    args, name = dict(depth=1, embed_dim=48, img_size=32, **kwargs), 'videomamba_tiny_patch16_f8_224.k400'
    model = timm.create_model(name, **args).eval()
    with torch.no_grad():
        model.head.weight.mul_(50)
    folder.mkdir()
    (folder / 'config.json').write_text(cards.to_json(cards.model_config(name, model, args)))
    save_file(model.state_dict(), folder / 'model.safetensors')
    return model


@pytest.fixture
def images(tmp_path):
    rng = np.random.default_rng(0)
    folder = tmp_path / 'images'
    (folder / 'sub').mkdir(parents=True)
    for name in ('a.png', 'b.jpg', 'sub/c.png'):
        Image.fromarray(rng.integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(folder / name)
    (folder / 'notes.txt').write_text('not an image')
    return folder


def expected(model, path, k=5):
    data = timm.data.resolve_data_config({'input_size': (3, 32, 32)}, model=model)
    x = timm.data.create_transform(**data)(Image.open(path).convert('RGB'))
    with torch.no_grad():
        return model(x[None]).softmax(-1)[0].topk(k)


class TestClassify:

    def test_imagenet_names(self, tmp_path, images, capsys):
        model = save_model(tmp_path / 'model')
        assert main(['classify', str(images / 'a.png'), '--model', str(tmp_path / 'model')]) == 0
        lines = capsys.readouterr().out.splitlines()
        top = expected(model, images / 'a.png')
        assert lines[0] == str(images / 'a.png') and len(lines) == 6
        for line, p, i in zip(lines[1:], top.values, top.indices):
            assert line.split(maxsplit=1) == [f'{p:.2%}', ImageNetInfo().index_to_description(int(i))]

    def test_json_and_own_names(self, tmp_path, images, capsys):
        model = save_model(tmp_path / 'model', list('abc'), num_classes=3)
        args = ['classify', str(images), '--model', f'local-dir:{tmp_path}/model', '--json', '--batch-size', '2']
        assert main(args) == 0
        results = json.loads(capsys.readouterr().out)
        assert [r['image'] for r in results] == [str(images / n) for n in ('a.png', 'b.jpg', 'sub/c.png')]
        for r in results:
            top = expected(model, r['image'], 3)  # there are but three
            assert [c['index'] for c in r['classes']] == top.indices.tolist()
            assert [c['name'] for c in r['classes']] == ['abc'[i] for i in top.indices]
            assert [c['probability'] for c in r['classes']] == pytest.approx(top.values.tolist(), abs=1e-5)

    def test_topk_and_numbered_classes(self, tmp_path, images, capsys):
        save_model(tmp_path / 'model', num_classes=7)
        assert main(['classify', str(images / 'b.jpg'), '--model', str(tmp_path / 'model'), '--topk', '2']) == 0
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 3 and all(line.split()[1] == 'class' for line in lines[1:])

    def test_grey_images(self, tmp_path, images, capsys):
        save_model(tmp_path / 'model', num_classes=7, in_chans=1)
        assert main(['classify', str(images / 'a.png'), '--model', str(tmp_path / 'model')]) == 0
        assert len(capsys.readouterr().out.splitlines()) == 6

    def test_url(self, hub, tmp_path, images, capsys):
        save_model(tmp_path / 'model', num_classes=7)
        hub.add('me/images', {'a.png': (images / 'a.png').read_bytes()})
        sources = [f'{hub.url}/me/images/resolve/main/a.png', str(images / 'a.png')]
        assert main(['classify', *sources, '--model', str(tmp_path / 'model')]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[1:6] == lines[7:12]

    def test_model_on_the_hub(self, hub, cache, tmp_path, images, capsys, monkeypatch):
        """On a terminal there are bars, of the download and of the images."""
        save_model(tmp_path / 'model', num_classes=7)
        hub.add('me/mine', {p.name: p.read_bytes() for p in (tmp_path / 'model').iterdir()})
        monkeypatch.setattr(sys, 'stderr', Terminal())
        assert main(['classify', str(images / 'a.png'), '--model', 'hf-hub:me/mine', '--topk', '1']) == 0
        assert len(capsys.readouterr().out.splitlines()) == 2
        assert '0/1' in sys.stderr.getvalue() and 'config.json' in sys.stderr.getvalue()

    def test_images_that_cannot_be_opened(self, hub, tmp_path, images, capsys):
        """They are reported; the others are still classified."""
        save_model(tmp_path / 'model', num_classes=7)
        whole = (images / 'a.png').read_bytes()
        (images / 'half.png').write_bytes(whole[:len(whole) // 2])
        sources = [str(images / 'notes.txt'), str(images / 'half.png'), str(images / 'none.png'), f'{hub.url}/none.png']
        model = str(tmp_path / 'model')
        assert main(['classify', *sources, str(images / 'a.png'), '--model', model, '--json']) == 1
        out, err = capsys.readouterr()
        assert [r['image'] for r in json.loads(out)] == [str(images / 'a.png')]
        for source in sources:
            assert f'image: cannot open {source}' in err

    def test_empty_folder(self, tmp_path, capsys):
        (tmp_path / 'empty').mkdir()
        save_model(tmp_path / 'model', num_classes=7)
        assert main(['classify', str(tmp_path / 'empty'), '--model', str(tmp_path / 'model')]) == 1
        assert f'there are no images in {tmp_path}/empty' in capsys.readouterr().err

    def test_videos(self, hub, tmp_path, images, capsys):
        """The clip that a model is validated on, by any way in; names are the released ones, by index."""
        frames, folder = 4, tmp_path / 'videos'
        folder.mkdir()
        for i in range(2):
            write_video(folder / f'{i}.mp4', num_frames=30, height=40, width=60, seed=i)
        (folder / 'bad.mkv').write_bytes(b'no video')
        model = save_clip_model(tmp_path / 'model', num_frames=frames)
        url = f'{hub.url}/me/videos/resolve/main/0.mp4'
        hub.add('me/videos', {'0.mp4': (folder / '0.mp4').read_bytes()})
        args = ['--model', str(tmp_path / 'model'), '--topk', '3']
        assert main(['classify', str(folder), str(images / 'a.png'), url, *args, '--json']) == 1
        out, err = capsys.readouterr()
        results = json.loads(out)
        paths = [str(path) for path in (folder / '0.mp4', folder / '1.mp4', images / 'a.png', url)]
        assert [r['video'] for r in results] == paths
        assert f'video: cannot open {folder}/bad.mkv' in err
        mean, std = (torch.tensor(model.pretrained_cfg[k]).view(3, 1, 1, 1) for k in ('mean', 'std'))
        for i in range(2):
            # a middle frame of each quarter, the short side is 32 already
            frame = Video(str(folder / f'{i}.mp4'), cache='').read(FrameSampler(frames).val(30))
            view = EvalTransform(32)(frame)[0].transpose(0, 1)
            with torch.no_grad():
                top = model(((view / 255 - mean) / std)[None]).softmax(-1)[0].topk(3)
            assert [c['index'] for c in results[i]['classes']] == top.indices.tolist()
            assert [c['name'] for c in results[i]['classes']] == [class_names('k400')[i] for i in top.indices]
        assert results[3]['classes'] == results[0]['classes']
        assert main(['classify', str(folder / '1.mp4'), *args]) == 0
        assert len(capsys.readouterr().out.splitlines()) == 4
        assert main(['classify', str(tmp_path / 'images'), *args]) == 1
        assert f'there are no videos in {images}' in capsys.readouterr().err

    def test_unknown_model(self, images, capsys):
        assert main(['classify', str(images), '--model', 'nonsense']) == 1
        assert 'Unknown model (nonsense)' in capsys.readouterr().err


class TestList:

    def test_table(self, hub, cache, capsys):
        assert main(['list', 'videomamba_tiny_patch16_224']) == 0
        header, _, row = capsys.readouterr().out.splitlines()
        assert header.split('  ')[0] == 'model'
        assert row.split() == ['videomamba_tiny_patch16_224.in1k', '76.9', '7.1', '1.6', '224×224', 'apache-2.0']
        assert not hub.requests

    def test_cached(self, hub, cache, capsys):
        from huggingface_hub import hf_hub_download
        hub.add('OpenGVLab/VideoMamba', {'videomamba_t16_in1k_res224.pth': b'x'})
        hf_hub_download('OpenGVLab/VideoMamba', 'videomamba_t16_in1k_res224.pth')
        assert main(['list', 'videomamba_tiny_*in1k', '--json']) == 0
        rows = {r['name']: r for r in json.loads(capsys.readouterr().out)}
        assert rows['videomamba_tiny_patch16_224.in1k']['cached']
        assert not rows['videomamba_tiny_patch16_448.in1k']['cached']

    def test_clips(self, hub, cache, capsys):
        assert main(['list', 'videomamba_small_patch16_f64_384']) == 0
        _, _, row = capsys.readouterr().out.splitlines()
        assert row.split() == [
            'videomamba_small_patch16_f64_384.k400', '82.7', '25.7', '1006.7', '64×384×384', 'apache-2.0']

    def test_everything_is_known(self, hub, cache):
        rows = [registry.describe(name) for name in registry.list_names(pretrained=True)]
        assert len(rows) > 60
        assert all(r['top1'] and r['params'] and r['gmacs'] and r['license'] and not r['cached'] for r in rows)

    def test_all(self, hub, cache, capsys):
        assert main(['list', '--all', 'stable']) == 0
        _, _, *rows = capsys.readouterr().out.splitlines()
        assert ['stablemamba_tiny_patch16_224', '77.4', '7.0', '1.5', '224×224'] in [r.split() for r in rows]
        assert all(r.startswith('stable') for r in rows)

    def test_closed_pipe(self, hub, cache, capsys, monkeypatch):
        """As `| head` closes it: no complaint."""
        read, write = os.pipe()
        os.close(read)
        with open(write, 'w') as stdout:
            monkeypatch.setattr(sys, 'stdout', stdout)
            assert main(['list']) == 141
        assert not capsys.readouterr().err


class TestCommandLine:

    def test_entry_point(self):
        from importlib.metadata import entry_points
        scripts = [e for e in entry_points(group='console_scripts') if e.name == 'timm-ssm']
        setup = (Path(__file__).parents[2] / 'setup.cfg').read_text()
        assert 'timm-ssm = timm_ssm.cli:main' in setup
        assert all(e.value == 'timm_ssm.cli:main' for e in scripts)  # none where the package is not installed

    @pytest.mark.parametrize('argv', ['', 'nonsense', 'classify x', 'classify x --model y --topk 0'])
    def test_usage(self, argv, capsys):
        with pytest.raises(SystemExit) as e:
            main(argv.split())
        assert e.value.code == 2 and 'usage: timm-ssm' in capsys.readouterr().err

    def test_env(self, capsys):
        assert main(['env']) == 0
        out = capsys.readouterr().out
        assert torch.__version__ in out and timm.__version__ in out and 'naive' in out

    def test_help(self, capsys):
        with pytest.raises(SystemExit) as e:
            main(['--help'])
        out = capsys.readouterr().out
        assert e.value.code == 0 and all(c in out for c in ('list', 'convert', 'push', 'classify', 'env'))
