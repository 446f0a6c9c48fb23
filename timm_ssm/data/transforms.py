"""Augmentation of whole clips, one draw for all frames of a clip, and the views that models are evaluated on.

Clips are (T, C, H, W) uint8. Random erasing, mixup and cutmix come after normalisation, in the loader.
"""
import random
from functools import lru_cache
from typing import Callable, List, Optional, Sequence, Tuple

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import augment_and_mix_transform, auto_augment_transform, rand_augment_transform
from torchvision.transforms import InterpolationMode, v2

RESIZES = ('opencv', 'torchvision')


class FrozenAugment:
    """A transform of timm for images, on all frames of a clip with the same draws.

    Args:
        augment: Draws from the generators of `random` and NumPy.
    """

    def __init__(self, augment: Callable[[Image.Image], Image.Image]):
        self.augment = augment

    def __call__(self, clip: torch.Tensor) -> torch.Tensor:
        seed = random.getrandbits(32)
        frames = []
        for frame in clip.permute(0, 2, 3, 1).numpy():
            random.seed(seed)
            np.random.seed(seed)
            frames.append(np.asarray(self.augment(Image.fromarray(np.ascontiguousarray(frame)))))
        return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)


def auto_augment(config: str, size: Tuple[int, int]) -> FrozenAugment:
    """RandAugment, AutoAugment or AugMix by timm's configuration strings.

    As in the released video code, images are resampled bicubically and grey fills what moves in from outside.
    """
    hparams = dict(translate_const=int(min(size) * 0.45), img_mean=(128, 128, 128), interpolation=Image.BICUBIC)
    if config.startswith('rand'):
        return FrozenAugment(rand_augment_transform(config, hparams))
    if config.startswith('augmix'):
        return FrozenAugment(augment_and_mix_transform(config, dict(hparams, translate_pct=0.3)))
    return FrozenAugment(auto_augment_transform(config, hparams))


class JitterCrop:
    """Resize the short side to a random length, then cut out a square anywhere.

    Args:
        size: Height and width in pixels.
        short_side: Least and greatest length of the short side.
    """

    def __init__(self, size: Tuple[int, int], short_side: Tuple[int, int]):
        if not max(size) <= short_side[0] <= short_side[1]:
            raise ValueError(f'short_side: got {short_side}, needs a range from {max(size)}, the size of the crop, on')
        self.size = size
        self.short_side = short_side

    def __call__(self, clip: torch.Tensor) -> torch.Tensor:
        clip = v2.functional.resize(clip, [random.randint(*self.short_side)], antialias=False)
        top = random.randint(0, clip.shape[-2] - self.size[0])
        left = random.randint(0, clip.shape[-1] - self.size[1])
        return clip[..., top:top + self.size[0], left:left + self.size[1]]


def create_train_transform(
        size: Tuple[int, int],
        crop_mode: str = 'rrc',
        scale: Sequence[float] = (0.08, 1.),
        ratio: Sequence[float] = (3 / 4, 4 / 3),
        short_side: Tuple[int, int] = (256, 320),
        interpolation: str = 'bilinear',
        auto_augment_config: Optional[str] = None,
        color_jitter: Optional[float] = None,
        color_jitter_prob: Optional[float] = None,
        grayscale_prob: float = 0.,
        gaussian_blur_prob: float = 0.,
        hflip: float = 0.5,
        vflip: float = 0.,
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Random transform of clips, to (T, C, *size).

    Args:
        size: Height and width in pixels.
        crop_mode: 'rrc', a random resized crop; or 'jitter', a crop after jitter of the short side.
        scale: Least and greatest share of the area, of 'rrc'.
        ratio: Least and greatest aspect ratio, of 'rrc'.
        short_side: Least and greatest short side in pixels, of 'jitter'.
        interpolation: 'bilinear', 'bicubic', or 'random' for either; without antialiasing, as in the released code.
        auto_augment_config: As timm's, of whole frames; in place of colour jitter.
        color_jitter: Strength of changes in brightness, contrast and saturation.
        color_jitter_prob: Probability of colour jitter; always if None.
        grayscale_prob: Probability of greyscale.
        gaussian_blur_prob: Probability of blur.
        hflip: Probability of a horizontal flip.
        vflip: Probability of a vertical flip.
    """
    transforms: List[Callable] = []
    if auto_augment_config:
        transforms.append(auto_augment(auto_augment_config, size))
    if crop_mode == 'jitter':
        transforms.append(JitterCrop(size, short_side))
    elif crop_mode == 'rrc':
        modes = ('bilinear', 'bicubic') if interpolation == 'random' else (interpolation,)
        crops = [
            v2.RandomResizedCrop(size, tuple(scale), tuple(ratio), InterpolationMode(mode), antialias=False)
            for mode in modes]
        transforms.append(v2.RandomChoice(crops))
    else:
        raise ValueError(f'crop_mode: got {crop_mode!r}, needs rrc or jitter')
    transforms += [v2.RandomHorizontalFlip(hflip), v2.RandomVerticalFlip(vflip)]
    if color_jitter and not auto_augment_config:
        jitter = v2.ColorJitter(color_jitter, color_jitter, color_jitter)
        transforms.append(jitter if color_jitter_prob is None else v2.RandomApply([jitter], color_jitter_prob))
    if grayscale_prob:
        transforms.append(v2.RandomGrayscale(grayscale_prob))
    if gaussian_blur_prob:
        transforms.append(v2.RandomApply([v2.GaussianBlur(23, (0.1, 2.))], gaussian_blur_prob))
    return v2.Compose(transforms)


class EvalTransform:
    """The views of a clip that a model is evaluated on.

    Args:
        size: Side of a view in pixels.
        crops: Views along the longer side, after the short side was resized to `size`; None for one at the centre.
        crop_pct: `size` over the short side after resizing, for the one at the centre.
        resize: 'opencv' is bilinear on integers, in every bit as OpenCV and so the released code resizes; 'torchvision'
            is bilinear, quicker, and differs from it by one grey level at most. Neither is antialiased.
    """

    def __init__(self, size: int, crops: Optional[int] = None, crop_pct: float = 1., resize: str = 'opencv'):
        if resize not in RESIZES:
            raise ValueError(f'resize: got {resize!r}, needs one of {", ".join(RESIZES)}')
        if crops is not None and crops < 1:
            raise ValueError(f'crops: got {crops}, needs 1 or more')
        self.size = size
        self.crops = crops
        self.short_side = size if crops else int(size / crop_pct)
        self.method = resize

    def __call__(self, clip: torch.Tensor) -> torch.Tensor:
        """Views (crops or 1, T, C, size, size) of a clip (T, C, H, W)."""
        return self.crop(self.resize(clip))

    def resize(self, frames: torch.Tensor) -> torch.Tensor:
        """Frames (..., C, H, W), the short side resized."""
        height, width = resized_size(*frames.shape[-2:], self.short_side)
        if frames.shape[-2:] == (height, width):
            return frames
        if self.method == 'opencv':
            return resize_like_opencv(frames, height, width)
        return v2.functional.resize(frames.float(), [height, width], antialias=False).round_().byte()

    def crop(self, frames: torch.Tensor) -> torch.Tensor:
        """Views (crops or 1, ..., size, size) of resized frames."""
        boxes = view_boxes(*frames.shape[-2:], self.size, self.crops)
        return torch.stack([frames[..., top:bottom, left:right] for top, left, bottom, right in boxes])


def resized_size(height: int, width: int, short_side: int) -> Tuple[int, int]:
    """Height and width after the short side was resized."""
    if min(height, width) == short_side:
        return height, width
    if width < height:
        return int(short_side * height / width), short_side
    return short_side, int(short_side * width / height)


def view_boxes(height: int, width: int, size: int, crops: Optional[int]) -> List[Tuple[int, int, int, int]]:
    """Top, left, bottom and right of each view of a resized frame, arguments as of EvalTransform."""
    if crops is None:
        top, left = round((height - size) / 2), round((width - size) / 2)  # half to even
        return [(top, left, top + size, left + size)]
    spare = max(height, width) - size
    offsets = [int(spare / 2)] if crops == 1 else [int(p * (spare / (crops - 1))) for p in range(crops)]
    if height >= width:
        return [(offset, 0, offset + size, size) for offset in offsets]
    return [(0, offset, size, offset + size) for offset in offsets]


def resize_like_opencv(clip: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Bilinear resizing of (..., C, H, W) uint8 on integers, as OpenCV does: weights of 11 bits, no antialias."""
    H, W = clip.shape[-2:]
    if (H, W) == (2 * height, 2 * width):
        quads = clip.int().unflatten(-1, (width, 2)).unflatten(-3, (height, 2)).sum((-1, -3), dtype=torch.int32)
        return (quads + 2 >> 2).byte()
    left, right, a0, a1 = _taps(W, width, keep_weight_outside=False)
    upper, lower, b0, b1 = _taps(H, height, keep_weight_outside=True)
    frames = []
    for frame in clip.reshape(-1, *clip.shape[-3:]):  # one by one, which the processor's caches hold
        x = frame.transpose(-1, -2).contiguous().int()  # whole columns are quicker to pick than pixels
        x = x.index_select(-2, left).mul_(a0).add_(x.index_select(-2, right).mul_(a1)).__irshift__(4)
        x = x.transpose(-1, -2).contiguous()
        x0 = x.index_select(-2, upper).mul_(b0).__irshift__(16)
        x1 = x.index_select(-2, lower).mul_(b1).__irshift__(16)
        frames.append(x0.add_(x1).add_(2).__irshift__(2).byte())
    return torch.stack(frames).view(*clip.shape[:-2], height, width)


@lru_cache(maxsize=64)
def _taps(length: int, new_length: int, keep_weight_outside: bool) -> Tuple[torch.Tensor, ...]:
    """Both positions that each new one is made of, and their weights of 2048 together."""
    at = ((np.arange(new_length) + 0.5) * (length / new_length) - 0.5).astype(np.float32)
    first = np.floor(at)
    weight = at - first
    first = first.astype(np.int64)
    if not keep_weight_outside:
        weight[(first < 0) | (first >= length - 1)] = 0
    weights = (np.rint(2048 * (1 - weight)), np.rint(2048 * weight))
    return (
        *(torch.from_numpy(np.clip(first + i, 0, length - 1)) for i in (0, 1)),
        *(torch.from_numpy(w.astype(np.int32))[:, None] for w in weights))
