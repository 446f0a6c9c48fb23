"""Train a detector on a backbone of this package: torchvision's FCOS over the maps of a small MambaVision.

    python examples/detection.py [--steps 160] [--output detection.png]

It learns where on photographs handwritten digits are, from scratch, on parts of 128 x 128 pixels. The picture that it
writes shows what it finds on whole photographs, of sizes that it never saw. For your own pictures take a released
backbone: timm.create_model('mambavision_tiny', pretrained=True, features_only=True, out_indices=(1, 2, 3)).
"""
import argparse
import time
from pathlib import Path
from typing import Dict, List, Tuple

import matplotlib.pyplot as plt
import timm
import torch
from digits_on_photographs import Picture, Pictures
from torch import nn
from torchvision.models.detection import FCOS
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork, box_iou

import timm_ssm  # noqa: F401  registers the models

SIZE, BATCH = 128, 8


class Pyramid(nn.Module):
    """Maps of strides 8, 16 and 32, all of the same width."""

    def __init__(self, out_channels: int = 64) -> None:
        super().__init__()
        self.body = timm.create_model(
            'mambavision_tiny', features_only=True, out_indices=(1, 2, 3), img_size=SIZE,
            stem_dim=16, embed_dim=32, depths=(1, 2, 4, 2))
        self.fpn = FeaturePyramidNetwork(self.body.feature_info.channels(), out_channels)
        self.out_channels = out_channels

    def forward(self, x: torch.Tensor) -> Dict[str, torch.Tensor]:
        return self.fpn({str(i): y for i, y in enumerate(self.body(x))})


def create_detector() -> FCOS:
    anchors = AnchorGenerator(((8,), (16,), (32,)), ((1.,),) * 3)  # one point for each pixel of each map
    return FCOS(Pyramid(), num_classes=1, min_size=SIZE, anchor_generator=anchors, score_thresh=.4, nms_thresh=.4)


def find(detector: FCOS, picture: Picture) -> Dict[str, torch.Tensor]:
    """Boxes and scores, at the picture's own size; the detector pads it to multiples of 32."""
    detector.transform.min_size = (min(picture.image.shape[1:]),)
    with torch.inference_mode():
        return detector.eval()([picture.image])[0]


def evaluate(detector: FCOS, pictures: List[Picture]) -> Tuple[float, float]:
    """Which part of the digits is found, and which part of what is found is right, to an IoU of 0.5."""
    digits = detections = found = right = 0
    for picture in pictures:
        match = box_iou(picture.boxes, find(detector, picture)['boxes']) > .5
        digits, detections = digits + match.shape[0], detections + match.shape[1]
        found, right = found + int(match.any(1).sum()), right + int(match.any(0).sum())
    return found / digits, right / max(detections, 1)


def draw(detector: FCOS, pictures: List[Picture], path: Path) -> None:
    fig, axes = plt.subplots(1, len(pictures), figsize=(6 * len(pictures), 5), layout='constrained')
    for ax, picture in zip(axes, pictures):
        ax.imshow(picture.image.permute(1, 2, 0).clip(0, 1))
        ax.set_axis_off()
        found = find(detector, picture)
        for (left, top, right, bottom), score in zip(found['boxes'].tolist(), found['scores'].tolist()):
            ax.add_patch(plt.Rectangle((left, top), right - left, bottom - top, fill=False, color='cyan', linewidth=2))
            ax.text(left, top - 3, f'{score:.0%}', color='black', backgroundcolor='cyan', fontsize=9)
    fig.savefig(path, dpi=80)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--steps', type=int, default=160)
    parser.add_argument('--output', type=Path, default=Path('detection.png'))
    args = parser.parse_args()
    torch.manual_seed(0)
    train, validation = Pictures('train'), Pictures('validation')
    held_out = validation.batch(32)
    detector = create_detector()
    optimizer = torch.optim.AdamW(detector.parameters(), lr=2e-3, weight_decay=.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, args.steps)
    start = time.time()
    for step in range(1, args.steps + 1):
        pictures = train.batch(BATCH)
        targets = [dict(boxes=p.boxes, labels=torch.zeros(len(p.boxes), dtype=torch.long)) for p in pictures]
        loss = sum(detector.train()([p.image for p in pictures], targets).values())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(detector.parameters(), 1.)
        optimizer.step()
        schedule.step()
        if step % 40 == 0 or step == args.steps:
            recall, precision = evaluate(detector, held_out)
            print(f'step {step}, {time.time() - start:.0f} s: loss {loss.item():.3f}; of the digits '
                  f'{recall:.0%} are found, of the detections {precision:.0%} are right', flush=True)
    draw(detector, [validation.make(None, photograph=i, n=10) for i in range(2)], args.output)
    print(f'wrote {args.output}')


if __name__ == '__main__':
    main()
