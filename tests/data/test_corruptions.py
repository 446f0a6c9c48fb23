"""Corruptions by their known properties."""
import numpy as np
import pytest
import torch
from PIL import Image

from timm_ssm.data.corruptions import (
    CLIP_CORRUPTIONS,
    CORRUPTIONS,
    EXTRA_CORRUPTIONS,
    Corrupt,
    corrupt,
    corruptions_of,
)

IMAGES = CORRUPTIONS + EXTRA_CORRUPTIONS


def photograph(size=224):
    import skimage.data

    image = Image.fromarray(skimage.data.astronaut()).resize((size, size))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]


@pytest.fixture(scope='module')
def image():
    return photograph()


@pytest.fixture(scope='module')
def clip():
    """A photograph that pans."""
    wide = photograph(80)
    return torch.cat([wide[..., 8:72, i:64 + i] for i in range(0, 16, 2)])


def psnr(x, y):
    return -10 * torch.log10(((x.float() - y.float()) / 255).square().mean().clamp_min(1e-10)).item()


def means(x, name, count=1):
    """Mean PSNR over seeds, by severity."""
    return [np.mean([psnr(x, corrupt(x, name, s, seed)) for seed in range(count)]) for s in range(1, 6)]


# whose published parameters change in two ways from one severity to another
UNEVEN = ('elastic_transform', 'saturate', 'frost', 'fog', 'pixelate')


@pytest.mark.parametrize('name', [n for n in IMAGES if n not in ('elastic_transform', 'saturate')])
def test_severity(image, name):
    """Each severity is further from the image than the one before, or the last than the first."""
    values = means(image, name)
    if name not in UNEVEN:
        assert all(a > b for a, b in zip(values, values[1:])), values
    assert 5 < values[-1] < values[0] < 45


def test_two_that_change_their_kind(image):
    """ImageNet-C's elastic_transform goes from moved images to wobbles, its saturate from less colour to more."""
    elastic = means(image, 'elastic_transform', 3)
    assert max(elastic[:2]) < elastic[4] < elastic[3] < elastic[2]
    saturate = means(image, 'saturate')
    assert saturate[0] > saturate[1] and saturate[2] > saturate[3] > saturate[4]
    colour = [(corrupt(image, 'saturate', s).float().amax(1) - corrupt(image, 'saturate', s).float().amin(1)).mean()
              for s in range(1, 6)]
    own = (image.float().amax(1) - image.float().amin(1)).mean()
    assert colour[1] < colour[0] < own < colour[2] < colour[3] < colour[4]


@pytest.mark.parametrize('name', CLIP_CORRUPTIONS)
def test_severity_of_clips(clip, name):
    values = means(clip, name, 3)
    assert all(a > b for a, b in zip(values, values[1:])), values


@pytest.mark.parametrize('name', dict.fromkeys(IMAGES + CLIP_CORRUPTIONS))
def test_seeds(clip, name):
    """The same seed draws the same; the input is left as it was; the global generators, too."""
    before, state = clip.clone(), torch.get_rng_state()
    first, again = corrupt(clip, name, 3, 5), corrupt(clip, name, 3, 5)
    assert torch.equal(first, again) and first.shape == clip.shape and first.dtype == torch.uint8
    assert torch.equal(clip, before) and torch.equal(torch.get_rng_state(), state)
    random = name not in (
        'defocus_blur', 'zoom_blur', 'brightness', 'contrast', 'pixelate', 'jpeg_compression', 'gaussian_blur',
        'saturate', 'video_compression')
    assert torch.equal(first, corrupt(clip, name, 3, 6)) != random


def test_known_values():
    grey = torch.full((1, 3, 64, 64), 128, dtype=torch.uint8)
    noise = corrupt(grey, 'gaussian_noise', 2).float() / 255 - 128 / 255
    assert noise.std().item() == pytest.approx(.12, rel=.03) and noise.mean().abs() < .005
    shots = corrupt(grey, 'shot_noise', 3).float() / 255
    assert shots.var().item() == pytest.approx(128 / 255 / 12, rel=.1)
    salt = corrupt(grey, 'impulse_noise', 5)
    assert (salt == 255).float().mean().item() == pytest.approx(.135, abs=.01)
    assert (salt == 0).float().mean().item() == pytest.approx(.135, abs=.01)
    for name in ('gaussian_blur', 'defocus_blur', 'glass_blur', 'motion_blur', 'zoom_blur', 'elastic_transform',
                 'pixelate', 'contrast'):
        assert torch.equal(corrupt(grey, name, 5), grey), name  # nothing to blur
    assert (corrupt(grey, 'brightness', 1) == round(128 + 25.5)).all()

    colours = torch.tensor([[200, 100, 50]], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 8, 8)
    import colorsys
    h, s, v = colorsys.rgb_to_hsv(200 / 255, 100 / 255, 50 / 255)
    for name, hsv in (('brightness', (h, s, min(1, v + .2))), ('saturate', (h, s * .1, v))):
        expected = torch.tensor(colorsys.hsv_to_rgb(*hsv)) * 255
        assert (corrupt(colours, name, 2)[0, :, 0, 0] - expected).abs().max() <= 1


def test_motion_goes_one_way():
    """A dot becomes a line of at most 45 degrees, the same in all frames."""
    dot = torch.zeros(2, 3, 96, 96, dtype=torch.uint8)
    dot[..., 48, 48] = 255
    line = corrupt(dot, 'motion_blur', 5, 3)
    assert torch.equal(line[0], line[1])
    rows, columns = line[0, 0].nonzero().T
    assert columns.float().std() > rows.float().std() and (columns.min() >= 47 or columns.max() <= 49)


def test_frames(clip):
    """Lost frames are replaced by those before them; noise is another one in each."""
    frames = corrupt(clip, 'frame_drop', 3)
    kept = [[torch.equal(f, c) for c in clip].index(True) for f in frames]
    assert kept[0] == 0 and kept == sorted(kept) and len(set(kept)) == 8 - 3
    still = clip[:1].expand(4, -1, -1, -1)
    noisy = corrupt(still, 'gaussian_noise', 1)
    assert not torch.equal(noisy[0], noisy[1])
    assert corrupt(clip[..., :63, :61], 'video_compression', 2).shape == (8, 3, 63, 61)


def test_transform():
    """What is drawn for an image depends on it, not on what came before; grey images stay grey."""
    a, b = (Image.fromarray(photograph(32 + n)[0].permute(1, 2, 0).numpy()) for n in (0, 1))
    transform = Corrupt('gaussian_noise', 3, seed=1)
    first = transform(a)
    transform(b)
    assert np.array_equal(first, transform(a)) and first.size == (32, 32)
    assert not np.array_equal(first, Corrupt('gaussian_noise', 3, seed=2)(a))
    grey = Corrupt('brightness', 1)(a.convert('L'))
    assert grey.mode == 'L' and np.asarray(grey).mean() > np.asarray(a.convert('L')).mean()


def test_errors(clip):
    for x, name, severity, message in (
            (clip, 'rain', 1, "corruption: got 'rain', needs one of gaussian_noise"),
            (clip, 'fog', 6, 'severity: got 6, needs 1 to 5'),
            (clip[:1], 'frame_drop', 1, "corruption: got 'frame_drop' for a single image, needs a clip"),
            (clip.float(), 'fog', 1, 'x: got torch.float32')):
        with pytest.raises(ValueError, match=message):
            corrupt(x, name, severity)
    assert corruptions_of(['all'], False) == IMAGES and corruptions_of(['all'], True) == CLIP_CORRUPTIONS
    assert corruptions_of(['fog', 'snow', 'fog'], True) == ('fog', 'snow')
    with pytest.raises(ValueError, match="corruptions: got 'frame_drop', needs all, or some of"):
        corruptions_of(['frame_drop'], False)
