#!/usr/bin/env python3
"""Write a dataset of clips whose class is the motion: photographs panned, zoomed and turned, encoded as H.264.

    python demo/make_motion_clips.py FOLDER

A photograph pans to the right, zooms in or turns clockwise, which is the class 'forward', or it does the opposite,
which is 'backward'. Clips of both classes have the same frames, so that neither one of them nor all of them out of
order tell which class it is. Photographs are those that come with scikit-image and scikit-learn; those in
FOLDER/motions/validation are in no clip of FOLDER/motions/train.

FOLDER/photographs has lists of half of the training clips, and a tenth to validate on, with the name of the photograph
as their class.
"""
import argparse
import math
from pathlib import Path

import numpy as np
import skimage.data
import torch
from sklearn.datasets import load_sample_image
from torch.nn import functional as F

from timm_ssm.data.encode import write_clip

FRAMES, SIZE = 8, 24
CLASSES = ('forward', 'backward')
MOTIONS = ('pan', 'zoom', 'turn')
PHOTOGRAPHS = dict(
    train=(
        'astronaut', 'chelsea', 'coins', 'hubble_deep_field', 'immunohistochemistry', 'retina', 'rocket', 'flower.jpg'),
    validation=('camera', 'coffee', 'china.jpg'),
)


def load_photograph(name: str) -> torch.Tensor:
    """A photograph (3, height, width) with values from 0 to 1."""
    image = load_sample_image(name) if name.endswith('.jpg') else getattr(skimage.data, name)()
    image = image[..., None].repeat(3, -1) if image.ndim == 2 else image[..., :3]
    return torch.tensor(image).permute(2, 0, 1) / 255


def render(photo: torch.Tensor, motion: str, rng: np.random.Generator, size: int = SIZE) -> np.ndarray:
    """The frames (FRAMES, size, size, 3) uint8 of a clip that goes forward, from a random part of the photograph."""
    _, height, width = photo.shape
    scale = size * rng.uniform(1.2, 2.4)  # pixels of the photograph across a frame
    reach = 1.3 * scale  # of a frame's corners from the middle of the part, whatever the motion
    centre = [rng.uniform(reach, length - reach) if length > 2 * reach else length / 2 for length in (width, height)]
    direction, mirror = rng.uniform(0, 2 * math.pi), rng.choice((-1, 1))
    transforms = []
    for s in np.linspace(-.5, .5, FRAMES):
        zoom = scale * math.exp(-s if motion == 'zoom' else 0.)
        angle = direction - mirror * (1.8 * s if motion == 'turn' else 0.)
        cos, sin = zoom * math.cos(angle), zoom * math.sin(angle)
        matrix = np.array([[mirror * cos, -sin], [mirror * sin, cos]])
        middle = centre + matrix @ (-.6 * s if motion == 'pan' else 0., 0.)
        # affine_grid counts from -1 to 1 over the photograph
        transforms.append(np.column_stack([matrix / [[width], [height]], 2 * middle / (width, height) - 1]))
    grid = F.affine_grid(torch.tensor(np.stack(transforms)).float(), [FRAMES, 3, size, size], align_corners=False)
    frames = F.grid_sample(
        photo.expand(FRAMES, -1, -1, -1), grid, mode='bilinear', padding_mode='reflection', align_corners=False)
    return (frames * 255).round().byte().permute(0, 2, 3, 1).numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', type=Path)
    parser.add_argument('--train', type=int, default=4000, help='clips to train on')
    parser.add_argument('--validation', type=int, default=400, help='clips to validate on')
    args = parser.parse_args()

    rng = np.random.default_rng(0)
    lines = []  # of a list by photograph
    for split, photographs in PHOTOGRAPHS.items():
        photos = [load_photograph(name) for name in photographs]
        for i in range(getattr(args, split)):
            name, motion, number = CLASSES[i % 2], MOTIONS[i // 2 % 3], rng.integers(len(photos))
            path = args.folder / 'motions' / split / name / f'{motion}_{i:05}.mp4'
            path.parent.mkdir(parents=True, exist_ok=True)
            frames = render(photos[number], motion, rng)
            while frames.std(axis=(1, 2)).mean() < 6:  # sky, for one: nothing moves
                frames = render(photos[number], motion, rng)
            frames = frames if name == 'forward' else frames[::-1]
            write_clip(path, frames, rate=FRAMES, crf='18', preset='veryfast', threads='1')
            if split == 'train':
                lines.append(f'../{path.relative_to(args.folder)} {photographs[number]}\n')
    (args.folder / 'photographs').mkdir()
    half = len(lines) // 2
    (args.folder / 'photographs/train.txt').write_text(''.join(lines[:half]))
    (args.folder / 'photographs/validation.txt').write_text(''.join(lines[-len(lines) // 10:]))
    print(f'{args.train} clips to train on and {args.validation} to validate on written to {args.folder}')


if __name__ == '__main__':
    main()
