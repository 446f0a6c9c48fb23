"""Batches of clips: their layout, what makes them repeat, and what happens to unreadable videos."""
import logging

import numpy as np
import pytest
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from timm_ssm.data import (
    ClipError,
    ClipLoader,
    ClipMixup,
    EvalClips,
    EvalTransform,
    FrameSampler,
    TooManyBadClips,
    TrainClips,
    create_clip_reader,
    create_train_transform,
)
from timm_ssm.data.sampling import reorder_frames

from .videos import read_numbers, write_dataset

CPU = torch.device('cpu')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp('clips') / 'train')


@pytest.fixture
def reader(folder):
    return create_clip_reader('video-folder', folder, 'any')


def damaged(folder, tmp_path, count):
    """A copy of the videos, the first `count` of them unreadable."""
    import shutil
    copy = shutil.copytree(folder, tmp_path / 'copy')
    for path in sorted(copy.rglob('*.mp4'))[:count]:
        path.write_bytes(b'no video')
    return create_clip_reader('video-folder', str(copy), 'any')


def train_clips(reader, size=(32, 32), num_frames=4, transform=None, **kwargs):
    transform = transform or create_train_transform(size, auto_augment_config='rand-m5-n2-mstd0.25-inc1')
    return TrainClips(reader, FrameSampler(num_frames), transform, size, **kwargs)


def eval_clips(reader, num_frames=4, size=64, crops=None, **kwargs):
    return EvalClips(reader, FrameSampler(num_frames), EvalTransform(size, crops), **kwargs)


def loader_of(dataset, batch_size=4, **kwargs):
    return ClipLoader(dataset, batch_size, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, CPU, **kwargs)


def denormalised(clips):
    mean, std = (torch.tensor(x).view(3, 1, 1, 1) for x in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    return ((clips * std + mean) * 255).round().byte()


def test_eval_batches_are_the_frames_of_the_videos(reader):
    loader = loader_of(eval_clips(reader), batch_size=3)
    batches = list(loader)
    assert [clips.shape for clips, _ in batches] == [(3, 3, 4, 64, 64), (3, 3, 4, 64, 64), (2, 3, 4, 64, 64)]
    assert torch.cat([tags for _, tags in batches]).tolist() == [[row, 0, 1] for row in range(8)]
    row = 0
    for clips, _ in batches:
        for clip in denormalised(clips):
            video = reader.open(row)
            frames = video.read(FrameSampler(4).val(12))
            assert torch.equal(clip.transpose(0, 1), frames[..., 16:80])  # the centre of 96
            row += 1


def test_eval_views_are_tagged_clip_by_clip(reader):
    dataset = eval_clips(reader, num_frames=3, crops=3, clips=2)
    loader = loader_of(dataset, batch_size=2)
    clips, tags = next(iter(loader))
    assert clips.shape == (12, 3, 3, 64, 64) and dataset.num_views == 6
    assert tags.tolist() == [[row, view, 1] for row in (0, 1) for view in range(6)]
    frames = FrameSampler(3).test(12, 2)
    clips = denormalised(clips)
    for row in range(2):
        for view in (0, 3):  # the first crop shows the number
            assert read_numbers(clips[6 * row + view].transpose(0, 1)) == [16 * row + t for t in frames[view // 3]]
        full = reader.open(row).read(frames[1])
        for crop, left in enumerate((0, 16, 32)):
            assert torch.equal(clips[6 * row + 3 + crop].transpose(0, 1), full[..., left:left + 64])


@pytest.mark.parametrize('order', ('reversed', 'shuffled', 'block-2', 'interleaved'))
def test_frames_of_evaluation_can_be_reordered(reader, order):
    dataset = EvalClips(reader, FrameSampler(6), EvalTransform(64, 3), clips=1, frame_order=order)
    for row in range(3):
        views, _, _ = dataset[row]
        frames = FrameSampler(6).test(12, 1)[0][reorder_frames(6, order, seed=row)]
        assert read_numbers(views[0]) == [16 * row + t for t in frames]


def test_single_frames_are_images(reader):
    clips, _ = next(iter(loader_of(eval_clips(reader, num_frames=1))))
    assert clips.shape == (4, 3, 64, 64)
    clips, _ = next(iter(loader_of(train_clips(reader, num_frames=1))))
    assert clips.shape == (4, 3, 32, 32)


def test_training_batches(reader):
    torch.manual_seed(0)
    batches = list(loader_of(train_clips(reader), batch_size=3))
    assert [clips.shape for clips, _ in batches] == [(3, 3, 4, 32, 32)] * 2  # 8 videos: the rest is dropped
    labels = torch.cat([labels for _, labels in batches])
    assert labels.dtype == torch.int64 and set(labels.tolist()) == {0, 1}


def test_repeated_samples_are_of_the_same_frames(reader):
    def as_it_is(clip):
        torch.rand(())
        return clip[..., :64]

    clips, labels = next(iter(loader_of(train_clips(reader, (64, 64), transform=as_it_is, num_sample=2))))
    assert clips.shape == (8, 3, 4, 64, 64) and torch.equal(labels[::2], labels[1::2])
    assert torch.equal(clips[::2], clips[1::2])
    clips, _ = next(iter(loader_of(train_clips(reader, num_sample=2))))
    assert not torch.equal(clips[::2], clips[1::2])  # of augmentation, each has its own draws


def epoch_of(reader, workers=0, epoch=3, skip=0, seed=7, **kwargs):
    dataset = train_clips(reader, seed=seed)
    dataset.set_epoch(epoch)
    loader = loader_of(dataset, batch_size=2, num_workers=workers, re_prob=.5, re_mode='pixel', **kwargs)
    loader.skip_to(skip)
    torch.manual_seed(11)  # the order of videos
    np.random.seed(0)
    import random
    random.seed(5)  # random erasing
    return list(loader)


def test_an_epoch_repeats_with_any_number_of_workers(reader):
    alone = epoch_of(reader)
    for again in (epoch_of(reader), epoch_of(reader, workers=2)):
        for (clips, labels), (other, other_labels) in zip(alone, again):
            assert torch.equal(clips, other) and torch.equal(labels, other_labels)
    assert not torch.equal(alone[0][0], epoch_of(reader, epoch=4)[0][0])
    assert not torch.equal(alone[0][0], epoch_of(reader, seed=8)[0][0])


def test_skipped_batches_are_not_read_and_those_after_them_the_same(reader, monkeypatch):
    whole = epoch_of(reader)
    opened, real = [], type(reader).open
    monkeypatch.setattr(type(reader), 'open', lambda self, row: opened.append(row) or real(self, row))
    rest = epoch_of(reader, skip=2)
    assert len(opened) == 4 and len(rest) == 4
    for (clips, labels), (other, other_labels) in zip(whole[2:], rest[2:]):
        assert torch.equal(clips, other) and torch.equal(labels, other_labels)


def test_random_erasing_is_one_box_through_all_frames(reader):
    def grey(clip):
        return torch.full((4, 3, 32, 32), 128, dtype=torch.uint8)

    dataset = train_clips(reader, transform=grey)
    torch.manual_seed(0)
    clips, _ = next(iter(loader_of(dataset, batch_size=8, re_prob=1., re_mode='pixel')))
    untouched = loader_of(dataset, batch_size=8)
    erased = clips != next(iter(untouched))[0]
    boxes = set()
    for clip in erased:
        rows, columns = clip[0, 0].any(1).nonzero().flatten(), clip[0, 0].any(0).nonzero().flatten()
        box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
        assert clip[:, :, box[0], box[1]].all() and clip.sum() == clip[:, :, box[0], box[1]].sum()
        assert .02 <= clip[0, 0].float().mean() <= .36 and clip[0, 0].float().mean() < 1
        boxes.add((rows[0].item(), columns[0].item()))
    assert len(boxes) > 4  # of its own for each clip
    noise = clips[erased]
    assert abs(noise.mean()) < .1 and abs(noise.std() - 1) < .1
    first = clips[0][:, :, erased[0, 0, 0]]
    assert not torch.equal(first[:, 0], first[:, 1])  # noise of its own for each frame


@pytest.mark.parametrize('kwargs', (dict(mixup_alpha=0., cutmix_alpha=1.), dict(mixup_alpha=.8, cutmix_alpha=0.)))
def test_mixup_and_cutmix_are_of_whole_clips(kwargs):
    x = torch.stack([torch.zeros(3, 5, 24, 32), torch.ones(3, 5, 24, 32)])
    mix = ClipMixup(label_smoothing=0., num_classes=2, **kwargs)
    shares = set()
    for seed in range(8):
        np.random.seed(seed)
        mixed, target = mix(x.clone(), torch.tensor([0, 1]))
        assert mixed.shape == x.shape
        frame = mixed[0, 0, 0]
        assert (mixed[0] == frame).all() and torch.allclose(mixed[1], 1 - mixed[0])  # alike in channels and frames
        assert target[0, 1].item() == pytest.approx(frame.mean().item(), abs=1e-6)  # the share that was mixed in
        shares.add(round(target[0, 1].item(), 3))
        if kwargs['cutmix_alpha']:
            assert set(frame.unique().tolist()) <= {0., 1.}
    assert len(shares) > 4


def test_windows_of_one_video_have_views_of_their_own(tmp_path):
    from .videos import write_video
    write_video(tmp_path / 'a.mp4', num_frames=100, fps=25)
    (tmp_path / 'val.csv').write_text('a.mp4 0\n')
    reader = create_clip_reader('', str(tmp_path), 'val')
    dataset = EvalClips(reader, FrameSampler(2), EvalTransform(64, 3), windows=(2., 1.), clips=1)
    tags = [dataset[i][1].tolist() for i in range(len(dataset))]
    assert tags == [[[0, 3 * w + crop, 1] for crop in range(3)] for w in range(4)]
    firsts = [read_numbers(dataset[i][0][0])[0] for i in range(4)]
    assert np.allclose(np.diff(firsts[:3]), 25, atol=1) and firsts[0] == 12  # a quarter of the first 50 frames
    with pytest.raises(ValueError, match="^windows: got .*, needs 'sparse'"):
        EvalClips(reader, FrameSampler(2, 'dense'), EvalTransform(64), windows=(2., 1.))


def test_evaluation_does_not_put_another_video_in_the_place_of_an_unreadable_one(folder, tmp_path, caplog):
    reader = damaged(folder, tmp_path, 2)
    with caplog.at_level(logging.WARNING):
        clips, tags = zip(*loader_of(eval_clips(reader, clips=2), batch_size=4))
    tags, clips = torch.cat(tags), denormalised(torch.cat(clips))
    assert tags[:, 2].tolist() == [0] * 4 + [1] * 12 and tags[:, 0].tolist() == [row // 2 for row in range(16)]
    assert not clips[:4].any() and clips[4:].flatten(1).any(1).all()
    messages = [r.getMessage() for r in caplog.records]
    assert len(messages) == 2 and all('Unreadable: a/' in m and '.mp4' in m for m in messages)


@pytest.mark.parametrize('workers', (0, 1))
def test_training_skips_unreadable_videos_up_to_a_share(folder, tmp_path, caplog, workers):
    reader = damaged(folder, tmp_path, 2)
    with caplog.at_level(logging.WARNING):
        batches = list(loader_of(train_clips(reader), batch_size=2, num_workers=workers, max_bad_clips=.25))
    assert len(batches) == 4 and all(len(clips) == 2 and clips.flatten(1).std(1).min() > 0 for clips, _ in batches)
    *named, counted = [r.getMessage() for r in caplog.records]
    assert {m.split()[1] for m in named} == {'a/0.mp4', 'a/1.mp4'} and len(named) == 2
    assert counted == '2 of 8 videos could not be read and were left out'
    with pytest.raises(TooManyBadClips, match='of 8 videos cannot be read, more than --max-bad-clips 0.2'):
        list(loader_of(train_clips(reader), batch_size=2, num_workers=workers, max_bad_clips=.2))


def test_only_ten_unreadable_videos_are_named(tmp_path, caplog):
    reader = damaged(write_dataset(tmp_path / 'many', videos=8, num_frames=1), tmp_path, 14)
    with caplog.at_level(logging.WARNING):
        list(loader_of(eval_clips(reader, num_frames=1)))
    assert len(caplog.records) == 10
    dataset = train_clips(damaged(tmp_path / 'many', tmp_path / 'other', 16), num_frames=1)
    with pytest.raises(ClipError, match='10 videos in a row cannot be read'):
        list(loader_of(dataset, max_bad_clips=1.))


def test_mistakes_in_sampling_do_not_pass_for_unreadable_videos(reader, monkeypatch):
    monkeypatch.setattr(FrameSampler, 'train', lambda self, n: np.array([n]))
    monkeypatch.setattr(FrameSampler, 'val', lambda self, n: np.array([n]))
    for dataset in (train_clips(reader), eval_clips(reader)):
        with pytest.raises((ValueError, IndexError)):
            list(loader_of(dataset))


@pytest.mark.parametrize('make, name', (
    (lambda r: train_clips(r, num_sample=0), 'num_sample'),
    (lambda r: eval_clips(r, clips=0), 'clips'),
    (lambda r: eval_clips(r, frame_order='backwards'), 'order'),
))
def test_errors_name_the_argument(reader, make, name):
    with pytest.raises(ValueError, match=f'^{name}: got .*, needs '):
        make(reader)
