"""Training and validation on videos, through train.py and validate.py."""
import argparse
import csv
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from timm.models import save_for_hf

from timm_ssm.data import FrameSampler, decode
from timm_ssm.hub.classify import class_names, classify, load_model
from timm_ssm.hub.convert import convert
from timm_ssm.training import train, validate
from timm_ssm.training.data import resolve_data
from timm_ssm.training.tasks import TokenAlignmentTask

from ..data.videos import write_dataset
from .utils import assert_same_run, crash_at_step, initial_weights, load, run_worker, summary

SMALL = dict(embed_dim=16, depth=2)
MODEL = [
    '--model', 'videomamba_tiny_patch16_f8_224', '--model-kwargs', *(f'{k}={v}' for k, v in SMALL.items()),
    '--num-frames', '4', '--img-size', '32', '--num-classes', '2']
PLAIN = ['--device', 'cpu', '--workers', '0', '--batch-size', '4', '--warmup-epochs', '0', '--log-interval', '100']
# everything that draws random numbers or keeps a state
BUSY = [
    '--opt', 'adamw', '--lr', '0.01', '--mixup', '0.8', '--cutmix', '1.0', '--reprob', '0.5', '--remode', 'pixel',
    '--aa', 'rand-m5-n2-mstd0.5-inc1', '--drop-path', '0.3', '--model-ema', '--model-ema-decay', '0.9',
    '--clip-grad', '1.0', '--num-sample', '2']


@pytest.fixture(autouse=True)
def frame_cache(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))


@pytest.fixture(scope='module')
def videos(tmp_path_factory):
    """12 videos to train on and 5 to validate on, of two classes."""
    root = tmp_path_factory.mktemp('videos')
    write_dataset(root / 'train', videos=6, height=40, width=64)
    write_dataset(root / 'validation', videos=3, height=40, width=64)
    os.remove(root / 'validation/b/2.mp4')
    return root


def run(videos, output, *flags):
    train.main([str(videos), *MODEL, *PLAIN, '--output', str(output), '--experiment', 'run', *map(str, flags)])
    return output / 'run'


def measure(videos, *flags):
    """The row of results, JSON or not."""
    return validate.main([str(videos), '--device', 'cpu', '--workers', '0', '-b', '4', *map(str, flags)])[0]


@pytest.fixture(scope='module')
def trained(videos, tmp_path_factory):
    """A checkpoint."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path_factory.mktemp('cache')))
        folder = run(videos, tmp_path_factory.mktemp('trained'), '--epochs', 1, '--clip-sampling', 'dense',
                     '--sampling-rate', 2)
    return folder / 'last.pth.tar'


@pytest.mark.parametrize('flags', [
    [*BUSY, '--workers', '2'],
    [*BUSY, '--workers', '1', '--amp', '--amp-dtype', 'bfloat16', '--grad-accum-steps', '2', '--clip-sampling', 'dense',
     '--sampling-rate', '2', '--layer-decay', '0.75', '--grad-checkpointing', '--channels-last'],
], ids=['workers', 'bfloat16'])
def test_resumes_bit_for_bit_within_an_epoch(videos, tmp_path, monkeypatch, flags):
    flags = [*flags, '--epochs', 2, '--recovery-interval', 1, '--resume', 'auto']
    whole = run(videos, tmp_path / 'a', *flags)
    crash_at_step(monkeypatch, 6)  # the last of three in the second epoch
    with pytest.raises(RuntimeError, match='power cut'):
        run(videos, tmp_path / 'b', *flags)
    monkeypatch.undo()
    assert list((tmp_path / 'b/run').glob('recovery-1-*'))
    parts = run(videos, tmp_path / 'b', *flags)
    assert_same_run(whole, parts)
    first, last = (load(whole / f'{name}.pth.tar')['state_dict'] for name in ('checkpoint-0', 'last'))
    assert not torch.equal(first['temporal_pos_embed'], last['temporal_pos_embed'])


def test_resuming_does_not_read_what_is_behind(videos, tmp_path, monkeypatch):
    flags = [*BUSY, '--epochs', 1, '--recovery-interval', 1, '--resume', 'auto', '--val-split', '']
    crash_at_step(monkeypatch, 3)
    with pytest.raises(RuntimeError, match='power cut'):
        run(videos, tmp_path, *flags)
    monkeypatch.undo()
    read, real = [], decode.Video.read
    monkeypatch.setattr(decode.Video, 'read', lambda self, *args: read.append(self.source) or real(self, *args))
    run(videos, tmp_path, *flags)
    assert len(read) == 4  # one batch of three


def test_the_number_of_workers_changes_nothing(videos, tmp_path):
    folders = [run(videos, tmp_path / n, *BUSY, '--epochs', 1, '--workers', n) for n in ('0', '2')]
    assert_same_run(*folders)


WORKER = '''
import torch

from tests.training.utils import begin_worker
from timm_ssm.training import train, validate

argv = begin_worker()
cut = argv.index('VALIDATE')
train.main(argv[:cut])
torch.distributed.barrier()  # the first process has written the checkpoint
validate.main(argv[cut + 1:])
'''


def test_two_processes_train_and_count_each_video_once(videos, tmp_path):
    checkpoint = str(tmp_path / 'run/last.pth.tar')
    test = ['--test-num-segment', '2', '--test-num-crop', '3', '--device', 'cpu', '-b', '4', '--workers', '1']
    done = run_worker(
        WORKER, tmp_path, videos, *MODEL, *PLAIN, *BUSY, '--epochs', '1', '--workers', '1', '--output', tmp_path,
        '--experiment', 'run', '--batch-size', '2', 'VALIDATE', videos, '--checkpoint', checkpoint, *test,
        '--scores-file', tmp_path / 'two.npz', '--results-file', tmp_path / 'two.json', '--results-format', 'json')
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('--result') == 1
    two = json.loads((tmp_path / 'two.json').read_text())[0]
    one = measure(videos, '--checkpoint', checkpoint, *test, '--scores-file', tmp_path / 'one.npz')
    assert one['videos'] == two['videos'] == 5 and one['views'] == 6  # two processes take three each
    assert one == two
    with np.load(tmp_path / 'one.npz') as a, np.load(tmp_path / 'two.npz') as b:
        assert np.allclose(a['scores'], b['scores'], atol=1e-6) and a['names'].tolist() == b['names'].tolist()


def test_validation_goes_by_how_the_checkpoint_was_trained(videos, trained, tmp_path):
    result = measure(videos, '--checkpoint', trained, '--scores-file', tmp_path / 'a.csv')
    assert result['clip_sampling'] == 'dense' and result['num_frames'] == 4
    assert (result['videos'], result['missing'], result['views']) == (5, 0, 1)
    row = summary(trained.parent)[-1]
    assert result['top1'] == pytest.approx(float(row['eval_top1']), abs=1e-4)
    assert result['loss'] == pytest.approx(float(row['eval_loss']), abs=1e-5)
    with open(tmp_path / 'a.csv', newline='') as f:
        rows = list(csv.reader(f))[1:]
    named = [('a/0.mp4', '0'), ('a/1.mp4', '0'), ('a/2.mp4', '0'), ('b/0.mp4', '1'), ('b/1.mp4', '1')]
    assert [(r[0], r[1]) for r in rows] == named
    assert all(abs(float(r[3]) + float(r[4]) - 1) < 1e-5 for r in rows)

    model = load_model(str(trained))  # of 4 frames, dense, which is neither the name's nor the default
    for (_, classes), row in zip(classify(model, [str(videos / 'validation' / r[0]) for r in rows]), rows):
        assert {c['name']: c['probability'] for c in classes} == pytest.approx(
            dict(a=float(row[3]), b=float(row[4])), abs=1e-5)
    assert convert(trained, tmp_path / 'converted').name == 'videomamba_tiny_patch16_f8_224'
    converted = load_model(str(tmp_path / 'converted'))
    assert converted.patch_embed.num_frames == 4 and class_names(converted) == ['a', 'b']


def test_a_converted_checkpoint_says_how_its_clips_were_sampled(videos, trained, tmp_path, monkeypatch, hub, cache):
    convert(trained, tmp_path / 'dense')
    sampling = json.loads((tmp_path / 'dense/config.json').read_text())['clip_args']
    assert sampling == dict(num_frames=4, clip_sampling='dense', sampling_rate=2, sampling_compat='corrected')
    hub.add('me/dense', {path.name: path.read_bytes() for path in (tmp_path / 'dense').iterdir()})
    assert load_model('hf-hub:me/dense').clip_args == sampling
    model = f'local-dir:{tmp_path}/dense'
    expected, found = measure(videos, '--checkpoint', trained), measure(videos, '--model', model)
    assert {k: found[k] for k in expected if k not in ('model', 'checkpoint')} == {
        k: expected[k] for k in expected if k not in ('model', 'checkpoint')}
    paths = [str(path) for path in sorted((videos / 'validation').rglob('*.mp4'))]
    assert list(classify(load_model(model), paths)) == list(classify(load_model(str(trained)), paths))
    assert measure(videos, '--model', model, '--clip-sampling', 'ssv2')['clip_sampling'] == 'ssv2'

    samplers, from_args = [], FrameSampler.from_args
    monkeypatch.setattr(FrameSampler, 'from_args', lambda args: samplers.append(from_args(args)) or samplers[-1])
    train.main([str(videos), '--model', model, '--pretrained', *PLAIN, '--epochs', '1', '--output', str(tmp_path)])
    assert {(sampler.method, sampler.rate) for sampler in samplers} == {('dense', 2)}


def test_a_released_tag_is_validated_at_its_image_size():
    model = timm.create_model('videomamba_tiny_patch16_f64_384.k400', depth=1, device='meta')
    config = resolve_data(argparse.Namespace(), model, use_test_size=True)
    assert config['input_size'] == (3, 384, 384)


def test_views_are_averaged_after_softmax(videos, trained, tmp_path):
    """Against the model run by hand on each view."""
    from timm_ssm.data import EvalTransform, Video

    measure(videos, '--checkpoint', trained, '--test-num-segment', 2, '--test-num-crop', 3, '--clip-sampling', 'sparse',
            '--scores-file', tmp_path / 'a.npz')
    model = timm.create_model('videomamba_tiny_patch16_f8_224', **SMALL, num_frames=4, img_size=32, num_classes=2)
    model.load_state_dict(load(trained)['state_dict'])
    model.eval()
    mean, std = (torch.tensor(model.pretrained_cfg[k]).view(3, 1, 1, 1) for k in ('mean', 'std'))
    video = Video(str(videos / 'validation/a/1.mp4'))
    scores = []
    for frames in FrameSampler(4).test(12, 2):
        for view in EvalTransform(32, 3)(video.read(frames)):
            with torch.no_grad():
                scores.append(model(((view.transpose(0, 1) / 255 - mean) / std)[None]).softmax(-1)[0])
    with np.load(tmp_path / 'a.npz') as file:
        assert np.allclose(file['scores'][1], torch.stack(scores).mean(0), atol=1e-5)


def test_unreadable_videos_in_validation(videos, trained, tmp_path, caplog):
    copy = shutil.copytree(videos, tmp_path / 'copy')
    (copy / 'validation/a/0.mp4').write_bytes(b'no video')
    whole = measure(videos, '--checkpoint', trained, '--scores-file', tmp_path / 'whole.npz')
    result = measure(copy, '--checkpoint', trained, '--scores-file', tmp_path / 'part.npz')
    assert (result['videos'], result['missing']) == (5, 1)
    assert any('1 of 5 videos could not be read and count as wrong' in r.getMessage() for r in caplog.records)
    with np.load(tmp_path / 'whole.npz') as a, np.load(tmp_path / 'part.npz') as b:
        assert np.allclose(a['scores'][1:], b['scores'][1:]) and b['read'].tolist() == [False, True, True, True, True]
        hits = (a['scores'].argmax(1) == a['labels'])[1:].sum()
    assert result['top1'] == pytest.approx(100 * hits / 5) and result['top1_read'] == pytest.approx(100 * hits / 4)
    assert whole['missing'] == 0
    assert measure(copy, '--checkpoint', trained, '--merge-by', 'name')['videos'] == 3  # 0, 1 and 2 of both classes


def test_unreadable_videos_in_training(videos, tmp_path, caplog):
    copy = shutil.copytree(videos, tmp_path / 'copy')
    (copy / 'train/a/0.mp4').write_bytes(b'no video')
    with pytest.raises(SystemExit, match='Training stopped: 1 of 12 videos cannot be read, more than --max-bad-clips'):
        run(copy, tmp_path / 'a', '--epochs', 1)
    run(copy, tmp_path / 'b', '--epochs', 1, '--max-bad-clips', .1)
    assert any('Unreadable: a/0.mp4' in r.getMessage() for r in caplog.records)


def test_order_of_frames(videos, trained, tmp_path):
    scores = {}
    for order in ('sequential', 'reversed', 'shuffled', 'block-2', 'interleaved'):
        measure(videos, '--checkpoint', trained, '--clip-sampling', 'sparse', '--frame-order', order,
                '--scores-file', tmp_path / f'{order}.npz')
        scores[order] = np.load(tmp_path / f'{order}.npz')['scores']
    assert len({s.tobytes() for s in scores.values()}) == 5


@pytest.mark.parametrize('source', ('file', 'tag'))
def test_clip_model_starts_from_an_image_model(videos, tmp_path, monkeypatch, source):
    torch.manual_seed(3)
    image = timm.create_model('videomamba_tiny_patch16_224', **SMALL, img_size=32, num_classes=5)
    if source == 'file':
        path = tmp_path / 'image.pth'
        torch.save(dict(state_dict=image.state_dict()), path)
    else:
        path = f'local-dir:{tmp_path}/image'
        save_for_hf(image, str(tmp_path / 'image'), model_args=dict(SMALL, img_size=32))
    start = initial_weights(monkeypatch)
    run(videos, tmp_path, '--epochs', 1, '--initial-checkpoint', path)
    assert torch.equal(start['patch_embed.proj.weight'][:, :, 0], image.patch_embed.proj.weight)
    assert torch.equal(start['blocks.1.mixer.A_log'], image.blocks[1].mixer.A_log)
    assert not start['temporal_pos_embed'].any() and start['head.weight'].shape == (2, 16)


def test_distillation_from_a_teacher_of_clips(videos, tmp_path, monkeypatch):
    teacher = timm.create_model('videomamba_tiny_patch16_f8_224', **SMALL, num_frames=4, img_size=32, num_classes=2)
    teacher.pretrained_cfg.update(mean=(.1, .2, .3), std=(.5, .6, .7))
    save_for_hf(teacher, str(tmp_path / 'teacher'), model_args=dict(SMALL, num_frames=4, img_size=32))
    seen, forward = [], type(teacher).forward

    def spying(self, x):
        seen.append(x.detach())
        return forward(self, x)

    monkeypatch.setattr(type(teacher), 'forward', spying)
    run(videos, tmp_path, '--epochs', 1, '--val-split', '', '--kd-model-name', f'local-dir:{tmp_path}/teacher')

    def pixels(x, mean, std):
        return x * torch.tensor(std).view(3, 1, 1, 1) + torch.tensor(mean).view(3, 1, 1, 1)

    assert len(seen) == 6  # three batches, each to both models, whichever comes first
    ours, theirs = ((.485, .456, .406), (.229, .224, .225)), ((.1, .2, .3), (.5, .6, .7))
    a, b = seen[:2]
    assert not torch.equal(a, b) and any(
        torch.allclose(pixels(a, *first), pixels(b, *second), atol=1e-4)
        for first, second in ((ours, theirs), (theirs, ours)))


def test_alignment_with_a_teacher_of_larger_clips_resumes(videos, tmp_path, monkeypatch):
    """Clips of another size and normalisation."""
    kwargs = dict(SMALL, embed_dim=24, num_frames=4, img_size=48, num_classes=2)
    teacher = timm.create_model('videomamba_tiny_patch16_f8_224', **kwargs)
    teacher.pretrained_cfg.update(mean=(.1, .2, .3), std=(.5, .6, .7))
    save_for_hf(teacher, str(tmp_path / 'teacher'), model_args=kwargs)
    seen, forward = [], type(teacher).forward_features

    def spying(self, x):
        seen.append(x.detach()) if self.embed_dim == 24 else None
        return forward(self, x)

    flags = [
        *BUSY, '--amp', '--amp-dtype', 'bfloat16', '--kd-model-name', f'local-dir:{tmp_path}/teacher',
        '--kd-distill-type', 'alignment', '--epochs', 2, '--recovery-interval', 1, '--resume', 'auto']
    with monkeypatch.context() as patch:
        patch.setattr(type(teacher), 'forward_features', spying)
        whole = run(videos, tmp_path / 'a', *flags)
    assert len(seen) == 6 and {x.shape[1:] for x in seen} == {(3, 4, 48, 48)}
    with monkeypatch.context() as patch:
        crash_at_step(patch, 5, TokenAlignmentTask)
        with pytest.raises(RuntimeError, match='power cut'):
            run(videos, tmp_path / 'b', *flags)
    assert_same_run(whole, run(videos, tmp_path / 'b', *flags))


def test_single_frames_of_videos_train_an_image_model(videos, tmp_path):
    flags = ['--num-frames', '1', '--dataset', 'video']
    folder = run(videos, tmp_path, '--epochs', 1, *flags)
    assert load(folder / 'last.pth.tar')['state_dict']['patch_embed.proj.weight'].ndim == 4
    assert measure(videos, '--checkpoint', folder / 'last.pth.tar', '--dataset', 'video')['num_frames'] == 1


def test_lists_with_names_of_classes(videos, tmp_path):
    for split, folder in (('train', 'train'), ('val', 'validation')):
        paths = sorted((videos / folder).rglob('*.mp4'))
        (tmp_path / f'{split}.csv').write_text(''.join(f'{p} {p.parent.name}\n' for p in paths))
    folder = run(tmp_path, tmp_path, '--epochs', 1, '--val-split', 'val')
    assert (folder / 'classes.txt').read_text() == 'a\nb\n'
    (tmp_path / 'val.csv').write_text(f'{videos}/validation/b/0.mp4 b\n')  # alone, b would be the first class
    measure(tmp_path, '--checkpoint', folder / 'last.pth.tar', '--split', 'val', '--scores-file', tmp_path / 's.npz')
    assert np.load(tmp_path / 's.npz')['labels'].tolist() == [1]


def test_lists_with_root_class_map_and_windows(videos, trained, tmp_path):
    (tmp_path / 'val.txt').write_text('b/0.mp4,b,0.48\na/1.mp4,A,0.48\n')
    (tmp_path / 'names.txt').write_text('b\na\n')
    flags = ['--checkpoint', trained, '--split', 'val', '--dataset', 'video-list', '--clip-sampling', 'sparse',
             '--video-root', videos / 'validation', '--class-map', tmp_path / 'names.txt', '--scores-file']
    measure(tmp_path, *flags, tmp_path / 'whole.npz')
    measure(tmp_path, *flags, tmp_path / 'windows.npz', '--clip-windows', '0.2', '0.1')
    with np.load(tmp_path / 'whole.npz') as whole, np.load(tmp_path / 'windows.npz') as windows:
        assert whole['labels'].tolist() == windows['labels'].tolist() == [0, 1]
        assert np.abs(whole['scores'] - windows['scores']).max() > 1e-6  # a mean over windows


def test_folders_get_the_classes_of_the_released_head(videos, tmp_path):
    """Kinetics' order, not that of the alphabet."""
    for old, new in (('a', 'riding_a_bike'), ('b', 'Abseiling')):
        shutil.copytree(videos / 'validation' / old, tmp_path / 'validation' / new)
    model = timm.create_model('videomamba_tiny_patch16_f8_224.k400', **SMALL, num_frames=4, img_size=32)
    save_for_hf(model, str(tmp_path / 'model'), model_args=dict(SMALL, num_frames=4, img_size=32))
    measure(tmp_path, '--model', f'local-dir:{tmp_path}/model', '--scores-file', tmp_path / 's.npz')
    file = np.load(tmp_path / 's.npz')
    assert file['scores'].shape == (5, 400)
    assert dict(zip(file['names'].tolist(), file['labels'].tolist())) == {
        'riding_a_bike/0.mp4': 0, 'riding_a_bike/1.mp4': 0, 'riding_a_bike/2.mp4': 0,
        'Abseiling/0.mp4': 341, 'Abseiling/1.mp4': 341}
    (tmp_path / 'validation/Abseiling').rename(tmp_path / 'validation/juggling')
    with pytest.raises(ValueError, match="got label 'juggling', needs one of the 400 classes"):
        measure(tmp_path, '--model', f'local-dir:{tmp_path}/model')


def test_flips_are_off_where_classes_tell_left_from_right(videos, tmp_path, caplog):
    copy = shutil.copytree(videos, tmp_path / 'copy')
    for split in ('train', 'validation'):
        (copy / split / 'a').rename(copy / split / 'pushing_left')
    run(copy, tmp_path / 'a', '--epochs', 1)
    assert any('No horizontal flips: classes tell left from right' in r.getMessage() for r in caplog.records)
    caplog.clear()
    run(videos, tmp_path / 'b', '--epochs', 1)
    assert not any('No horizontal flips' in r.getMessage() for r in caplog.records)
    run(videos, tmp_path / 'c', '--epochs', 1, '--no-hflip')
    assert any('No horizontal flips: --no-hflip' in r.getMessage() for r in caplog.records)
    caplog.clear()
    run(videos, tmp_path / 'd', '--epochs', 1, '--clip-sampling', 'ssv2')
    assert any('No horizontal flips: classes tell left from right' in r.getMessage() for r in caplog.records)


def test_log_shows_how_long_the_loop_waits_for_data(videos, tmp_path, caplog, monkeypatch):
    import time
    real = decode.Video.read
    monkeypatch.setattr(decode.Video, 'read', lambda self, *args: time.sleep(.2) or real(self, *args))
    run(videos, tmp_path, '--epochs', 1, '--log-interval', 1)
    import re
    shares = [int(m[1]) for r in caplog.records if (m := re.search(r' clips/s  data (\d+)%', r.getMessage()))]
    assert len(shares) == 3 and shares[-1] > 50


def test_what_validation_prints(videos, trained, capsys, caplog):
    measure(videos, '--checkpoint', trained, '--test-num-crop', 3)
    assert json.loads(capsys.readouterr().out.partition('--result')[2])['views'] == 3
    assert any('Clip 0, crop 2: top-1' in r.getMessage() for r in caplog.records)


@pytest.mark.parametrize('flags, message', (
    (['--dataset', 'hfds/x'], '--dataset hfds/x: .* takes clips of 4 frames'),
    (['--dataset', 'video-disc'], "dataset: got 'video-disc', needs one of"),
    (['--no-prefetcher'], '--no-prefetcher: for images only'),
    (['--in-chans', '1'], 'input_size: got .*, videos need three channels'),
    (['--train-split', 'test'], "data: got .*, needs in it .* for the split 'test'"),
    (['--num-classes', '1'], '--num-classes 1: .* has 2 classes'),
    (['--clip-duration', '2'], "clip_duration: got 2.0 with 'sparse'"),
    (['--batch-size', '14'], '--batch-size 14: the 12 training videos do not fill one batch'),
    (['--train-crop-mode', 'rkrc'], "crop_mode: got 'rkrc', needs rrc or jitter"),
    (['--initial-checkpoint', 'nothing.pth'], '--initial-checkpoint nothing.pth: no such file'),
))
def test_what_makes_no_sense_is_refused(videos, tmp_path, flags, message):
    with pytest.raises(SystemExit) as error:
        run(videos, tmp_path, '--epochs', 1, *flags)
    import re
    assert re.search(message, str(error.value))
    assert not list(Path(tmp_path).rglob('*.pth.tar'))
