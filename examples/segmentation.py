"""Train a segmenter on a backbone of this package: a linear head over the maps of a small VideoMamba.

    python examples/segmentation.py [--steps 160] [--output segmentation.png]

It learns which pixels of a photograph are handwriting, from scratch, on parts of 128 x 128 pixels. The picture that it
writes shows what it makes of whole photographs, of sizes that it never saw: with dynamic_img_size the position
embedding follows. For your own pictures take released weights: timm.create_model('videomamba_small_patch16_224',
pretrained=True, features_only=True, dynamic_img_size=True).
"""
import argparse
import time
from pathlib import Path
from typing import List

import matplotlib.pyplot as plt
import timm
import torch
from digits_on_photographs import Picture, Pictures
from torch import nn
from torch.nn import functional as F

import timm_ssm  # noqa: F401  registers the models

SIZE, BATCH, PATCH = 128, 8, 8


class Segmenter(nn.Module):
    """Logits (B, H, W): those of all pixels of a patch are linear in the maps of three blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.body = timm.create_model(
            'videomamba_tiny_patch16_224', features_only=True, out_indices=(1, 3, 5), img_size=SIZE,
            dynamic_img_size=True, patch_size=PATCH, embed_dim=96, depth=6, d_state=8)
        channels = sum(self.body.feature_info.channels())
        self.norm = nn.GroupNorm(3, channels)
        self.head = nn.Conv2d(channels, PATCH ** 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        height, width = x.shape[2:]
        x = F.pad(x, (0, -width % PATCH, 0, -height % PATCH))
        x = self.norm(torch.cat(self.body(x), 1))
        return F.pixel_shuffle(self.head(x), PATCH)[:, 0, :height, :width]


def prepare(pictures: List[Picture]) -> torch.Tensor:
    return (torch.stack([p.image for p in pictures]) - .45) / .25


def predict(segmenter: Segmenter, picture: Picture) -> torch.Tensor:
    with torch.inference_mode():
        return segmenter.eval()(prepare([picture]))[0] > 0


def iou(segmenter: Segmenter, pictures: List[Picture]) -> float:
    """Intersection over union of what is found and what there is, over the pixels of all pictures."""
    both = either = 0
    for picture in pictures:
        found, there = predict(segmenter, picture), picture.mask
        both, either = both + int((found & there).sum()), either + int((found | there).sum())
    return both / either


def draw(segmenter: Segmenter, pictures: List[Picture], path: Path) -> None:
    fig, axes = plt.subplots(2, len(pictures), figsize=(6 * len(pictures), 9), layout='constrained')
    for (above, below), picture in zip(axes.T, pictures):
        above.imshow(picture.image.permute(1, 2, 0).clip(0, 1))
        below.imshow(predict(segmenter, picture), cmap='gray')
        above.set_axis_off()
        below.set_axis_off()
    fig.savefig(path, dpi=60)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--steps', type=int, default=160)
    parser.add_argument('--output', type=Path, default=Path('segmentation.png'))
    args = parser.parse_args()
    torch.manual_seed(0)
    train, validation = Pictures('train'), Pictures('validation')
    held_out = validation.batch(32)
    segmenter = Segmenter()
    optimizer = torch.optim.AdamW(segmenter.parameters(), lr=2e-3, weight_decay=.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, args.steps)
    start = time.time()
    for step in range(1, args.steps + 1):
        pictures = train.batch(BATCH)
        logits = segmenter.train()(prepare(pictures))
        loss = F.binary_cross_entropy_with_logits(logits, torch.stack([p.mask for p in pictures]).float())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(segmenter.parameters(), 1.)
        optimizer.step()
        schedule.step()
        if step % 40 == 0 or step == args.steps:
            print(f'step {step}, {time.time() - start:.0f} s: loss {loss.item():.3f}, '
                  f'IoU {iou(segmenter, held_out):.0%}', flush=True)
    draw(segmenter, [validation.make(None, photograph=i, n=10) for i in range(2)], args.output)
    print(f'wrote {args.output}')


if __name__ == '__main__':
    main()
