#!/usr/bin/env python3
"""Write a dataset of clips whose class is the motion: photographs panned, zoomed and rotated, encoded as H.264.

    python demo/make_motion_clips.py FOLDER

A clip pans to the right, zooms in or turns clockwise, by positions 0 to 7 of its motion. The class is the order of
these positions: forward, backward, there and back, or back and forth. So all classes have the same frames, and neither
one of them nor all of them out of order tell which class it is. Photographs are those that come with scikit-image and
scikit-learn; those of the validation split are not in the training split.
"""
import argparse
import math
from pathlib import Path
from typing import Tuple

import av
import numpy as np
import skimage.data
import torch
from sklearn.datasets import load_sample_image
from torch.nn import functional as F

ORDERS = {
    'forward': (0, 1, 2, 3, 4, 5, 6, 7),
    'backward': (7, 6, 5, 4, 3, 2, 1, 0),
    'there_and_back': (0, 2, 4, 6, 7, 5, 3, 1),
    'back_and_forth': (7, 5, 3, 1, 0, 2, 4, 6),
}
MOTIONS = ('pan', 'zoom', 'turn')
PHOTOGRAPHS = dict(
    train=('astronaut', 'brick', 'chelsea', 'coins', 'grass', 'hubble_deep_field', 'immunohistochemistry', 'moon',
           'retina', 'rocket', 'flower.jpg'),
    validation=('camera', 'coffee', 'gravel', 'china.jpg'),
)


def load_photograph(name: str) -> torch.Tensor:
    """A photograph (3, height, width) with values from 0 to 1."""
    image = load_sample_image(name) if name.endswith('.jpg') else getattr(skimage.data, name)()
    image = image[..., None].repeat(3, -1) if image.ndim == 2 else image[..., :3]
    return torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1).float() / 255


def render(photo: torch.Tensor, motion: str, order: Tuple[int, ...], size: int, rng: np.random.Generator) -> np.ndarray:
    """The frames of a clip (len(order), size, size, 3) uint8, from a random part of the photograph."""
    _, height, width = photo.shape
    scale = rng.uniform(1.2, 2.4)  # pixels of the photograph in one of the clip
    reach = scale * size * 1.3  # of the corners from the centre, whatever the motion
    centre = [rng.uniform(reach, length - reach) if length > 2 * reach else length / 2 for length in (width, height)]
    turned, mirrored = rng.uniform(0, 2 * math.pi), rng.choice((-1, 1))
    matrices = []
    for position in order:
        s = position / 7 - .5
        zoom = math.exp(-.7 * s) if motion == 'zoom' else 1.
        angle = turned - (1.2 * s if motion == 'turn' else 0.) * mirrored
        shift = .6 * s if motion == 'pan' else 0.
        cos, sin = (scale * zoom * size * f(angle) for f in (math.cos, math.sin))
        matrix = np.array([[mirrored * cos, -sin], [mirrored * sin, cos]])
        offset = matrix @ (-shift, 0) + centre
        # grid_sample counts from -1 to 1 over the photograph
        matrices.append(np.concatenate([
            matrix / [[width], [height]], (2 * offset / (width, height) - 1)[:, None]], axis=1))
    grid = F.affine_grid(torch.tensor(np.stack(matrices)).float(), [len(order), 3, size, size], align_corners=False)
    frames = F.grid_sample(
        photo.expand(len(order), -1, -1, -1), grid, mode='bilinear', padding_mode='reflection', align_corners=False)
    return (frames * 255).round().byte().permute(0, 2, 3, 1).numpy()


def write_clip(path: Path, frames: np.ndarray) -> None:
    with av.open(str(path), 'w') as container:
        stream = container.add_stream('libx264', rate=8, options=dict(crf='18', preset='veryfast'))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = 'yuv420p'
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, 'rgb24')))
        container.mux(stream.encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', type=Path)
    parser.add_argument('--train', type=int, default=3000, help='clips to train on')
    parser.add_argument('--validation', type=int, default=400, help='clips to validate on')
    parser.add_argument('--size', type=int, default=32, help='height and width of the clips')
    args = parser.parse_args()

    rng = np.random.default_rng(0)
    for split, photographs in PHOTOGRAPHS.items():
        photos = [load_photograph(name) for name in photographs]
        for name in ORDERS:
            (args.folder / split / name).mkdir(parents=True)
        for i in range(getattr(args, split)):
            name = list(ORDERS)[i % 4]
            motion = MOTIONS[i // 4 % 3]
            frames = render(photos[rng.integers(len(photos))], motion, ORDERS[name], args.size, rng)
            write_clip(args.folder / split / name / f'{motion}_{i:05}.mp4', frames)


if __name__ == '__main__':
    main()
