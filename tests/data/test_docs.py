"""What docs/video.md and the README say of videos works: every snippet runs, with models small enough."""
import re
import shlex
from pathlib import Path

import pytest
import timm
import torch
from timm.models import save_for_hf

from timm_ssm import cli
from timm_ssm.training import arguments, train, validate

from .videos import write_dataset, write_video

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / 'docs/video.md').read_text()
README = (ROOT / 'README.md').read_text().partition('## Videos')[2].partition('\n## ')[0]
TEXT = GUIDE + README
CODE = re.findall(r'```python\n(.*?)```', TEXT, re.DOTALL)
COMMANDS = [
    line for block in re.findall(r'```sh\n(.*?)```', TEXT, re.DOTALL)
    for line in re.sub(r'\\\n', '', re.sub(r'\s+#.*', '', block)).splitlines()]

SIZE = dict(embed_dim=16, depth=2)
CLIPS, IMAGES = 'videomamba_tiny_patch16_f8_224', 'videomamba_tiny_patch16_224'
SMALLER = ['--device', 'cpu', '--workers', '0', '--batch-size', '2']
BRIEFER = ['--img-size', '32', '--epochs', '1', '--warmup-epochs', '0', '--experiment', 'docs']


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Everything that snippets name, small."""
    folder = tmp_path_factory.mktemp('docs')
    write_video(folder / 'clip.mp4')
    for split in ('train', 'validation'):
        write_dataset(folder / 'CLIPS' / split, videos=1, num_frames=8)
    (folder / 'LISTS').mkdir()
    for name in ('train', 'LISTS/val'):
        (folder / f'{name}.csv').write_text(f'{folder}/clip.mp4 17\n')
    image = timm.create_model(IMAGES, img_size=32, **SIZE)
    save_for_hf(image, str(folder / IMAGES), model_args=dict(SIZE, img_size=32))
    clips = timm.create_model(f'{CLIPS}.k400', img_size=32, **SIZE)
    save_for_hf(clips, str(folder / CLIPS), model_args=dict(SIZE, img_size=32))
    for run, model in (('images', image), ('run', timm.create_model(CLIPS, img_size=32, num_classes=2, **SIZE))):
        (folder / f'output/train/{run}').mkdir(parents=True)
        torch.save(dict(
            arch=CLIPS if run == 'run' else IMAGES, state_dict=model.state_dict(),
            args=dict(model_kwargs=SIZE, num_classes=model.num_classes, img_size=32),
        ), folder / f'output/train/{run}/model_best.pth.tar')
    return folder


def with_small_models(text):
    return text.replace(f'{CLIPS}.k400', f'local-dir:{CLIPS}').replace(f'{IMAGES}.in1k', f'local-dir:{IMAGES}')


@pytest.mark.parametrize('code', CODE)
def test_python(code, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    names = {}
    exec(with_small_models(code), names)
    if 'views' in names:
        assert names['views'].shape == (6, 4, 3, 32, 32) and names['reader'].label(0) == 0 and not names['failures']
    elif 'frames' in names:
        assert names['frames'].shape == (3, 3, 64, 96) and names['frames'].dtype == torch.uint8
        assert names['times'][1] == pytest.approx(.04)
    else:
        assert len(names['classes']) == 5 and names['classes'][0]['name'] in capsys.readouterr().out


@pytest.mark.parametrize('command', [c for c in COMMANDS if re.match('python|timm-ssm', c)])
def test_commands(command, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    program, *argv = [word for word in shlex.split(with_small_models(command)) if word != '...']
    if program == 'timm-ssm':
        assert cli.main(argv) == 0 and capsys.readouterr().out
        return
    script, *argv = argv
    if script == 'validate.py':
        row, = validate.main([*argv, *SMALLER])
        assert (row['videos'], row['views'], row['missing']) == (1 if 'LISTS' in command else 2, 12, 0)
        return
    if CLIPS in argv:
        argv += ['--model-kwargs', *(f'{k}={v}' for k, v in SIZE.items())]
    model = train.main([*argv, *SMALLER, *BRIEFER, '--output', str(tmp_path)]).get_trainable_module()
    assert model.patch_embed.num_frames == 8 and (tmp_path / 'docs/model_best.pth.tar').exists()


def test_other_commands():
    others = [c.split()[:2] for c in COMMANDS if not re.match('python|timm-ssm', c)]
    assert others == [['pip', 'install'], ['make', 'demo-video']]
    assert re.search('^demo-video:', (ROOT / 'Makefile').read_text(), re.MULTILINE)


def test_every_flag_for_videos_is_described():
    described = set(re.findall(r'--[a-z-]+', GUIDE))
    for module in (arguments, validate):
        group = next(g for g in module.make_parser()._action_groups if g.title == 'Videos')
        for action in group._group_actions:
            assert action.option_strings[-1] in described
