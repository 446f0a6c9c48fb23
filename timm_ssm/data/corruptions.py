"""Corruptions of images and clips in five severities, after those of ImageNet-C (https://arxiv.org/abs/1903.12261).

Kinds and severities are those of the paper's data set, whose images are of 224 pixels; lengths grow and shrink with the
image. The random textures are other ones: there frost is photographs, fog a plasma fractal, and water has edges; here
all of them are noise of several octaves. So the numbers compare models, but not with those published for the data set.
"""
import io
import math
import zlib
from typing import Callable, Dict, List, Tuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

SEVERITIES = (1, 2, 3, 4, 5)
#: Of ImageNet-C, the mean over which is a model's robustness.
CORRUPTIONS = (
    'gaussian_noise', 'shot_noise', 'impulse_noise', 'defocus_blur', 'glass_blur', 'motion_blur', 'zoom_blur', 'snow',
    'frost', 'fog', 'brightness', 'contrast', 'elastic_transform', 'pixelate', 'jpeg_compression')
#: Of ImageNet-C, to choose a model by.
EXTRA_CORRUPTIONS = ('speckle_noise', 'gaussian_blur', 'spatter', 'saturate')
#: What videos suffer from. Noise is another one in each frame, motion blur the same in all.
CLIP_CORRUPTIONS = (
    'gaussian_noise', 'shot_noise', 'impulse_noise', 'speckle_noise', 'motion_blur', 'video_compression', 'frame_drop')


def corrupt(x: torch.Tensor, name: str, severity: int, seed: int = 0) -> torch.Tensor:
    """Corrupt an image, or the frames of a clip.

    Args:
        x: (N, 3, H, W) uint8; one image, or the frames of one clip.
        name: One of `CORRUPTIONS`, `EXTRA_CORRUPTIONS` and, with several frames, `CLIP_CORRUPTIONS`.
        severity: 1 to 5.
        seed: The same seed draws the same.

    Returns:
        As x.
    """
    if name not in _FUNCTIONS:
        raise ValueError(f'corruption: got {name!r}, needs one of {", ".join(_FUNCTIONS)}')
    if severity not in SEVERITIES:
        raise ValueError(f'severity: got {severity}, needs 1 to 5')
    if x.ndim != 4 or x.shape[1] != 3 or x.dtype != torch.uint8:
        raise ValueError(f'x: got {x.dtype} of shape {tuple(x.shape)}, needs torch.uint8 of shape (N, 3, H, W)')
    if name in ('video_compression', 'frame_drop') and len(x) == 1:
        raise ValueError(f'corruption: got {name!r} for a single image, needs a clip')
    generator = torch.Generator().manual_seed(seed)
    y = _FUNCTIONS[name](x.float() / 255, severity - 1, generator)
    return (y.clamp(0, 1) * 255).round().byte()


class Corrupt:
    """A transform that corrupts Pillow's images; what it draws depends on the seed and the image alone.

    Args:
        name: As of `corrupt`.
        severity: As of `corrupt`.
        seed: Of the draws.
    """

    def __init__(self, name: str, severity: int, seed: int = 0):
        self.name = name
        self.severity = severity
        self.seed = seed

    def __call__(self, image: Image.Image) -> Image.Image:
        x = pil_to_tensor(image.convert('RGB'))[None]
        return to_pil_image(self.frames(x)[0]).convert(image.mode)

    def frames(self, x: torch.Tensor) -> torch.Tensor:
        """Corrupt an image or a clip (N, 3, H, W), uint8."""
        key = zlib.crc32(x.numpy().tobytes())
        seed = int(np.random.SeedSequence((self.seed, key)).generate_state(1)[0])
        return corrupt(x, self.name, self.severity, seed)


def _scale(x: torch.Tensor) -> float:
    return min(x.shape[-2:]) / 224


def _convolve(x: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    """Each channel of x (N, C, H, W) with a kernel (h, w) of odd sides that sums to 1, the border replicated."""
    h, w = kernel.shape
    padded = F.pad(x, (w // 2, w // 2, h // 2, h // 2), mode='replicate')
    channels = x.shape[1]
    return F.conv2d(padded, kernel.expand(channels, 1, h, w), groups=channels)


def _blur(x: torch.Tensor, sigma: float) -> torch.Tensor:
    """Gaussian blur."""
    radius = max(1, math.ceil(4 * sigma))
    kernel = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / sigma) ** 2)
    kernel /= kernel.sum()
    return _convolve(_convolve(x, kernel[None]), kernel[:, None])


def _octaves(x: torch.Tensor, decay: float, generator: torch.Generator) -> torch.Tensor:
    """Noise from 0 to 1 (1, 1, H, W), each octave `decay` times as weak as that of half its frequency."""
    size = x.shape[-2:]
    total = torch.zeros(1, 1, *size)
    for k in range(1, 1 + math.ceil(math.log2(max(size)))):
        noise = torch.rand(1, 1, 1 + 2 ** k, 1 + 2 ** k, generator=generator)
        total += F.interpolate(noise, size, mode='bilinear', align_corners=True) / decay ** k
    low, high = total.aminmax()
    return (total - low) / (high - low)


def _gaussian_noise(x: torch.Tensor, severity: int, generator: torch.Generator) -> torch.Tensor:
    sigma = (.08, .12, .18, .26, .38)[severity]
    return x + sigma * torch.randn(x.shape, generator=generator)


def _shot_noise(x: torch.Tensor, severity: int, generator: torch.Generator) -> torch.Tensor:
    photons = (60, 25, 12, 5, 3)[severity]
    return torch.poisson(photons * x, generator=generator) / photons


def _impulse_noise(x: torch.Tensor, severity: int, generator: torch.Generator) -> torch.Tensor:
    amount = (.03, .06, .09, .17, .27)[severity]
    hit, salt = torch.rand((2, *x.shape), generator=generator)
    return torch.where(hit < amount, (salt < .5).float(), x)


def _speckle_noise(x: torch.Tensor, severity: int, generator: torch.Generator) -> torch.Tensor:
    sigma = (.15, .2, .35, .45, .6)[severity]
    return x + x * sigma * torch.randn(x.shape, generator=generator)


def _gaussian_blur(x: torch.Tensor, severity: int, generator: torch.Generator) -> torch.Tensor:
    return _blur(x, _scale(x) * (1, 2, 3, 4, 6)[severity])


def _defocus_blur(x: torch.Tensor, severity: int, generator: torch.Generator) -> torch.Tensor:
    radius, sigma = ((3, .1), (4, .5), (6, .5), (8, .5), (10, .5))[severity]
    radius = radius * _scale(x)
    across = torch.arange(-math.ceil(radius), math.ceil(radius) + 1.)
    disk = (radius + .5 - torch.hypot(across[:, None], across)).clamp(0, 1)
    return _blur(_convolve(x, disk / disk.sum()), sigma * _scale(x))


def _glass_blur(x: torch.Tensor, severity: int, generator: torch.Generator) -> torch.Tensor:
    """Pixels change places with neighbours between two blurs; here they are drawn from neighbours."""
    sigma, reach, times = ((.7, 1, 2), (.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2))[severity]
    sigma, reach = sigma * _scale(x), max(1, round(reach * _scale(x)))
    x = _blur(x, sigma)
    height, width = x.shape[-2:]
    for _ in range(times):
        down, right = torch.randint(-reach, reach + 1, (2, height, width), generator=generator)
        rows = (torch.arange(height)[:, None] + down).clamp(0, height - 1)
        columns = (torch.arange(width) + right).clamp(0, width - 1)
        x = x[..., rows, columns]
    return _blur(x, sigma)


def _move(x: torch.Tensor, length: float, sigma: float, angle: float) -> torch.Tensor:
    """Motion blur that trails off to one side, over a length in pixels and at an angle in degrees."""
    radius = math.ceil(length)
    kernel = torch.zeros(2 * radius + 1, 2 * radius + 1)
    along = torch.linspace(0, length, 8 * radius + 1)
    weights = torch.exp(-0.5 * (along / sigma) ** 2)
    across, down = along * math.cos(math.radians(angle)), along * math.sin(math.radians(angle))
    for row, column, weight in zip(down.tolist(), across.tolist(), weights.tolist()):
        r, c = math.floor(row), math.floor(column)
        for dr, share_r in ((0, 1 - (row - r)), (1, row - r)):
            for dc, share_c in ((0, 1 - (column - c)), (1, column - c)):
                if share_r * share_c:
                    kernel[radius + r + dr, radius + c + dc] += weight * share_r * share_c
    return _convolve(x, kernel / kernel.sum())


def _uniform(low: float, high: float, generator: torch.Generator) -> float:
    return low + (high - low) * torch.rand((), generator=generator).item()


def _motion_blur(x: torch.Tensor, severity: int, generator: torch.Generator) -> torch.Tensor:
    radius, sigma = ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))[severity]
    s = _scale(x)
    return _move(x, 2 * radius * s, sigma * s, _uniform(-45, 45, generator))


def _zoom(x: torch.Tensor, factor: float) -> torch.Tensor:
    theta = torch.tensor([[[1 / factor, 0, 0], [0, 1 / factor, 0]]]).expand(len(x), 2, 3)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode='border', align_corners=False)


def _zoom_blur(x: torch.Tensor, severity: int, generator: torch.Generator) -> torch.Tensor:
    end, step = ((1.11, .01), (1.16, .01), (1.21, .02), (1.26, .02), (1.31, .03))[severity]
    factors = np.arange(1, end, step)
    return (x + sum(_zoom(x, float(f)) for f in factors)) / (1 + len(factors))


def _snow(x: torch.Tensor, severity: int, generator: torch.Generator) -> torch.Tensor:
    mean, std, zoom, least, radius, sigma, mix = (
        (.1, .3, 3, .5, 10, 4, .8), (.2, .3, 2, .5, 12, 4, .7), (.55, .3, 4, .9, 12, 8, .7),
        (.55, .3, 4.5, .85, 12, 8, .65), (.55, .3, 2.5, .85, 12, 12, .55))[severity]
    s = _scale(x)
    flakes = _zoom(mean + std * torch.randn(1, 1, *x.shape[-2:], generator=generator), max(1., zoom * s))
    flakes = torch.where(flakes < least, 0., flakes).clamp(0, 1)
    flakes = _move(flakes, 2 * radius * s, sigma * s, _uniform(-135, -45, generator))
    pale = 1.5 * _grey(x) + .5
    return mix * x + (1 - mix) * torch.maximum(x, pale) + flakes + flakes.flip(2, 3)


def _grey(x: torch.Tensor) -> torch.Tensor:
    return (x * torch.tensor([.299, .587, .114]).view(3, 1, 1)).sum(1, keepdim=True)


def _frost(x: torch.Tensor, severity: int, generator: torch.Generator) -> torch.Tensor:
    """Crystals are where noise of several octaves is at the middle of its range, along lines."""
    clear, frozen = ((1, .4), (.8, .6), (.7, .7), (.65, .7), (.6, .75))[severity]
    crystals = 1 - (2 * _octaves(x, 1.6, generator) - 1).abs()
    blue = torch.tensor([.75, .9, 1.]).view(3, 1, 1)
    return clear * x + frozen * crystals ** 3 * blue


def _fog(x: torch.Tensor, severity: int, generator: torch.Generator) -> torch.Tensor:
    amount, decay = ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4))[severity]
    brightest = x.max()
    return (x + amount * _octaves(x, decay, generator)) * brightest / (brightest + amount)


def _brightness(x: torch.Tensor, severity: int, generator: torch.Generator) -> torch.Tensor:
    """More of HSV's value, which is the highest channel: the others keep their share of it."""
    value = x.amax(1, keepdim=True)
    brighter = (value + (.1, .2, .3, .4, .5)[severity]).clamp(0, 1)
    return torch.where(value > 0, x / value.clamp_min(1e-6), 1.) * brighter


def _saturate(x: torch.Tensor, severity: int, generator: torch.Generator) -> torch.Tensor:
    """HSV's saturation, the distance of the lowest channel from the highest, times one number, plus another."""
    factor, more = ((.3, 0), (.1, 0), (2, 0), (5, .1), (20, .2))[severity]
    value = x.amax(1, keepdim=True)
    distance = (value - x) / value.clamp_min(1e-6)
    saturation = distance.amax(1, keepdim=True)
    red = torch.tensor([0., 1., 1.]).view(3, 1, 1).expand_as(x)  # the hue of what has none
    hue = torch.where(saturation > 0, distance / saturation.clamp_min(1e-6), red)
    return value * (1 - hue * (factor * saturation + more).clamp(0, 1))


def _contrast(x: torch.Tensor, severity: int, generator: torch.Generator) -> torch.Tensor:
    mean = x.mean((2, 3), keepdim=True)
    return mean + (x - mean) * (.4, .3, .2, .1, .05)[severity]


def _elastic_transform(x: torch.Tensor, severity: int, generator: torch.Generator) -> torch.Tensor:
    """A random affine map, and displacements that are alike within some distance."""
    strength, sigma, shift = (
        (2, .7, .1), (2, .08, .2), (.05, .01, .02), (.07, .01, .02), (.12, .01, .02))[severity]  # over the side
    height, width = x.shape[-2:]
    side = min(height, width) * 244 / 224
    points = torch.tensor([[1., 1.], [1., -1.], [-1., -1.]]) / 3  # from the middle, over the side
    moved = points + shift * (2 * torch.rand(3, 2, generator=generator) - 1)
    ones = torch.ones(3, 1)
    affine = torch.linalg.solve(torch.cat([moved, ones], 1), torch.cat([points, ones], 1)).T[None, :2]
    grid = F.affine_grid(affine.expand(len(x), 2, 3), list(x.shape), align_corners=False)
    noise = 2 * torch.rand(1, 2, height, width, generator=generator) - 1
    pixels = strength * side * _blur(noise, max(sigma * side, .1))
    grid = grid + 2 * pixels.permute(0, 2, 3, 1) / torch.tensor([width, height])
    return F.grid_sample(x, grid, padding_mode='reflection', align_corners=False)


def _pixelate(x: torch.Tensor, severity: int, generator: torch.Generator) -> torch.Tensor:
    share = (.6, .5, .4, .3, .25)[severity]
    size = [max(1, int(n * share)) for n in x.shape[-2:]]
    return F.interpolate(F.interpolate(x, size, mode='area'), x.shape[-2:], mode='nearest-exact')


def _jpeg_compression(x: torch.Tensor, severity: int, generator: torch.Generator) -> torch.Tensor:
    out = []
    for image in x:
        file = io.BytesIO()
        to_pil_image(image).save(file, 'JPEG', quality=(25, 18, 15, 10, 7)[severity])
        out.append(pil_to_tensor(Image.open(file)).float() / 255)
    return torch.stack(out)


def _spatter(x: torch.Tensor, severity: int, generator: torch.Generator) -> torch.Tensor:
    """Drops of water, or of mud in the last two severities."""
    mean, std, sigma, least, strength, mud = (
        (.65, .3, 4, .69, .6, False), (.65, .3, 3, .68, .6, False), (.65, .3, 2, .68, .5, False),
        (.65, .3, 1, .65, 1.5, True), (.67, .4, 1, .65, 1.5, True))[severity]
    s = _scale(x)
    layer = _blur(mean + std * torch.randn(1, 1, *x.shape[-2:], generator=generator), sigma * s)
    if mud:
        drops = _blur((layer > least).float(), strength * s)
        drops = torch.where(drops < .8, 0., drops)
        return x * (1 - drops) + torch.tensor([63, 42, 20]).view(3, 1, 1) / 255 * drops
    drops = (layer - least).clamp_min(0)
    return x + strength * drops / drops.max().clamp_min(1e-6) * torch.tensor([175, 238, 238]).view(3, 1, 1) / 255


def _video_compression(x: torch.Tensor, severity: int, generator: torch.Generator) -> torch.Tensor:
    """Encoding as H.264 of a low quality, and decoding."""
    import av

    from .encode import write_clip

    height, width = x.shape[-2:]
    x = F.pad(x, (0, width % 2, 0, height % 2), mode='replicate')  # which needs even sides
    frames = (x * 255).round().byte().permute(0, 2, 3, 1).numpy()
    file = io.BytesIO()
    crf = str((30, 35, 40, 45, 50)[severity])
    write_clip(file, frames, rate=25, crf=crf, preset='veryfast', threads='1')  # one thread: the same file at any time
    file.seek(0)
    with av.open(file) as container:
        decoded = np.stack([frame.to_ndarray(format='rgb24') for frame in container.decode(video=0)])
    return torch.from_numpy(decoded).permute(0, 3, 1, 2)[..., :height, :width].float() / 255


def _frame_drop(x: torch.Tensor, severity: int, generator: torch.Generator) -> torch.Tensor:
    """Frames are lost, and the last one before them stands still; the more severe, the more of the same ones."""
    lost = torch.randperm(len(x) - 1, generator=generator)[:math.ceil((.1, .2, .35, .5, .7)[severity] * (len(x) - 1))]
    shown = torch.arange(len(x))
    shown[1 + lost] = 0
    return x[shown.cummax(0).values]


_FUNCTIONS: Dict[str, Callable[[torch.Tensor, int, torch.Generator], torch.Tensor]] = {
    f.__name__[1:]: f for f in (
        _gaussian_noise, _shot_noise, _impulse_noise, _defocus_blur, _glass_blur, _motion_blur, _zoom_blur, _snow,
        _frost, _fog, _brightness, _contrast, _elastic_transform, _pixelate, _jpeg_compression, _speckle_noise,
        _gaussian_blur, _spatter, _saturate, _video_compression, _frame_drop)}


def corruptions_of(names: List[str], clips: bool) -> Tuple[str, ...]:
    """The corruptions that are meant by names, 'all' being those of ImageNet-C or, for clips, CLIP_CORRUPTIONS.

    Raises:
        ValueError: One is not known, or is for clips only.
    """
    known = tuple(_FUNCTIONS) if clips else CORRUPTIONS + EXTRA_CORRUPTIONS
    for name in names:
        if name not in (*known, 'all'):
            raise ValueError(f'corruptions: got {name!r}, needs all, or some of {", ".join(known)}')
    if 'all' in names:
        return CLIP_CORRUPTIONS if clips else CORRUPTIONS + EXTRA_CORRUPTIONS
    return tuple(dict.fromkeys(names))
