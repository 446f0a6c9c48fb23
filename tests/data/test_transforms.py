"""Clips in training, and in evaluation as the released code does it (fixtures/video_crops.json, video_eval.json)."""
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch.nn import functional as F

from timm_ssm.data import FrameSampler
from timm_ssm.data.transforms import (
    EvalTransform,
    auto_augment,
    create_train_transform,
    resize_like_opencv,
    resized_size,
    view_boxes,
)

FIXTURES = Path(__file__).parent.parent / 'fixtures'
CROPS = json.loads((FIXTURES / 'video_crops.json').read_text())['crops']
EVAL = json.loads((FIXTURES / 'video_eval.json').read_text())['cases']


def formula_frames(frames, height, width):
    """The video of video_eval.json: v(t, y, x, c), as (T, 3, H, W) uint8."""
    t, c, y, x = (torch.as_tensor(a).view(s) for a, s in zip(
        (frames, torch.arange(3), torch.arange(height), torch.arange(width)),
        ((-1, 1, 1, 1), (-1, 1, 1), (-1, 1), (-1,))))
    return ((13 * t + 5 * x + 3 * y + 40 * c + 2 * ((x ^ y) & 31) + x * y // 97) % 256).byte()


@pytest.mark.parametrize('record', CROPS, ids=lambda r: f"{r['h']}x{r['w']}-{r['short_side']}-{r['crop']}")
def test_boxes_are_those_of_the_released_code(record):
    short_side = record['short_side']
    height, width = resized_size(record['h'], record['w'], short_side)
    assert [height, width] == record['resized']
    assert [list(box) for box in view_boxes(height, width, record['crop'], None)] == [record['val_centre']]
    assert [list(box) for box in view_boxes(height, width, short_side, 3)] == record['test_views']
    assert [list(box) for box in view_boxes(height, width, short_side, 1)] == [record['test_one_crop']]


@pytest.mark.parametrize('resize', ('opencv', 'torchvision'))
@pytest.mark.parametrize('case', EVAL, ids=lambda c: f"{c['sampler']}-{c['mode']}-{c['video']['h']}x{c['video']['w']}")
def test_views_are_those_of_the_released_code(case, resize):
    video = case['video']
    method = dict(ssv2_video='ssv2').get(case['sampler'], case['sampler'])
    sampler = FrameSampler(case['frames'], method, rate=case.get('rate', 4))
    if case['mode'] == 'test':
        clips = sampler.test(video['n'], case['clips'])
        transform = EvalTransform(case['short_side'], case['crops'], resize=resize)
    else:
        clips = sampler.val(video['n'])[None]
        transform = EvalTransform(case['crop'], crop_pct=case['crop'] / case['short_side'], resize=resize)
    mean = torch.tensor(IMAGENET_DEFAULT_MEAN).view(3, 1, 1, 1)
    std = torch.tensor(IMAGENET_DEFAULT_STD).view(3, 1, 1, 1)
    views = []
    for frames in clips:
        for view in transform(formula_frames(frames, video['h'], video['w'])):
            assert view.dtype == torch.uint8
            views.append((view.transpose(0, 1) / 255 - mean) / std)
    assert len(views) == len(case['views'])
    exact = resize == 'opencv'
    pixel, means, relative = (1e-5, 1e-5, 1e-6) if exact else (0.018, 3e-3, 3e-4)
    for view, expected in zip(views, case['views']):
        assert list(view.shape) == expected['shape']
        assert view.double().abs().sum().item() == pytest.approx(expected['abs_sum'], rel=relative)
        assert view.mean((1, 2, 3)).tolist() == pytest.approx(expected['channel_mean'], abs=means)
        assert view.mean((0, 2, 3)).tolist() == pytest.approx(expected['frame_mean'], abs=means)
        for *place, value in expected['pixels']:
            assert view[tuple(place)].item() == pytest.approx(value, abs=pixel)


@pytest.mark.parametrize('size', ((120, 160), (63, 97), (48, 64), (200, 300), (240, 321)))
def test_integer_resize_is_bilinear(size):
    clip = formula_frames([0, 7], 96, 128)
    resized = resize_like_opencv(clip, *size)
    reference = F.interpolate(clip.float(), size, mode='bilinear')
    assert resized.shape == (2, 3, *size)
    assert (resized - reference).abs().max() <= (1.01 if size != (48, 64) else .51)


def clip_of(frames=3, height=60, width=80):
    """A clip whose frames are alike, so that transforms can be told to treat them alike."""
    return formula_frames([5], height, width).expand(frames, -1, -1, -1)


def seed(value):
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)


TRANSFORMS = dict(
    rrc=dict(),
    bicubic=dict(interpolation='random'),
    jitter=dict(crop_mode='jitter', short_side=(32, 50)),
    color=dict(color_jitter=.4),
    color_sometimes=dict(color_jitter=.4, color_jitter_prob=.5),
    rand=dict(auto_augment_config='rand-m7-n4-mstd0.5-inc1', color_jitter=.4),
    auto=dict(auto_augment_config='v0'),
    augmix=dict(auto_augment_config='augmix-m3-w3'),
    grey_and_blur=dict(grayscale_prob=.5, gaussian_blur_prob=.5, vflip=.5),
)


@pytest.mark.parametrize('kwargs', TRANSFORMS.values(), ids=TRANSFORMS)
def test_all_frames_of_a_clip_get_the_same_draws(kwargs):
    transform, clip = create_train_transform((32, 24), **kwargs), clip_of()
    outputs = []
    for i in range(20):
        seed(i)
        outputs.append(transform(clip))
        assert outputs[-1].shape == (3, 3, 32, 24) and outputs[-1].dtype == torch.uint8
        assert torch.equal(outputs[-1][0], outputs[-1][1]) and torch.equal(outputs[-1][0], outputs[-1][2])
    assert len({output.float().mean().item() for output in outputs}) > 15  # but clips get draws of their own
    seed(3)
    assert torch.equal(transform(clip), outputs[3])


def test_flips_are_of_whole_clips_and_can_be_off():
    clip = clip_of(width=60)
    sometimes, never = (create_train_transform((60, 60), scale=(1., 1.), ratio=(1., 1.), hflip=p) for p in (.5, 0.))
    seed(0)
    assert 10 < sum(torch.equal(sometimes(clip), clip.flip(-1)) for _ in range(50)) < 40
    assert all(torch.equal(never(clip), clip) for _ in range(20))


def test_randaugment_sees_whole_frames_with_the_magnitude_of_the_config():
    clip, grey = clip_of(2), 128
    shifted = 0
    for i in range(40):
        seed(i)
        out = auto_augment('rand-m9-n1-mstd0-p1', (32, 32))(clip)
        assert out.shape == clip.shape and torch.equal(out[0], out[1])
        shifted += bool((out[0, :, :, :8] == grey).all() or (out[0, :, :, -8:] == grey).all())
    assert shifted  # a translation by 9 tenths of 45 % of 80 pixels, filled with grey


@pytest.mark.parametrize('call, name', (
    (lambda: create_train_transform((32, 32), crop_mode='squash'), 'crop_mode'),
    (lambda: create_train_transform((300, 300), crop_mode='jitter'), 'short_side'),
    (lambda: EvalTransform(224, resize='pil'), 'resize'),
    (lambda: EvalTransform(224, crops=0), 'crops'),
))
def test_errors_name_the_argument(call, name):
    with pytest.raises(ValueError, match=f'^{name}: got .*, needs '):
        call()
