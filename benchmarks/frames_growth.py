"""How a training step grows with the frames of a clip: VideoMamba-Ti against a ViT with joint space-time attention.

    python benchmarks/frames_growth.py [--frames 8 16 32 64] [--size 224] [--batch 1] [--device cpu]

Both have width 192; the ViT has the 12 blocks and about the parameters of ViT-Ti, and PyTorch's fused attention. Time
(of all processors together, on CPUs) and peak memory of forward, loss and backward, each in a process of its own.
"""
import argparse
import csv
import subprocess
import sys
import time
from typing import List, Tuple

import timm
import torch
from harness import RESULTS, environment, process_memory
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import timm_ssm  # noqa: F401  registers the models

PICTURE = RESULTS.parents[1] / 'docs' / 'pictures' / 'frames_growth.png'
MODELS = ('videomamba_tiny', 'vit_tiny_joint')


class JointViT(VisionTransformer):
    """A ViT whose tokens are the patches of all frames, each attending to all."""

    def __init__(self, num_frames: int, **kwargs):
        super().__init__(patch_size=16, embed_dim=192, depth=12, num_heads=3, num_classes=400, **kwargs)
        self.temporal_pos_embed = nn.Parameter(torch.zeros(1, num_frames, 1, self.embed_dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, _, T, _, _ = x.shape
        x = self.patch_embed(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (B, T))
        x = x + self.pos_embed[:, None, 1:] + self.temporal_pos_embed
        cls_token = self.cls_token + self.pos_embed[:, :1]
        x = torch.cat([cls_token.expand(B, -1, -1), x.flatten(1, 2)], dim=1)
        return self.head(self.norm(self.blocks(x))[:, 0])


def create_model(name: str, num_frames: int, size: int) -> nn.Module:
    if name == 'vit_tiny_joint':
        return JointViT(num_frames, img_size=size)
    return timm.create_model('videomamba_tiny_patch16_f8_224', num_frames=num_frames, img_size=size)


def step(name: str, num_frames: int, args: argparse.Namespace) -> Tuple[float, float, float]:
    """Seconds (of all processors, on CPUs) and MiB of a training step, and the model's parameters in millions."""
    device = torch.device(args.device)
    cuda = device.type == 'cuda'
    model = create_model(name, num_frames, args.size).to(device)
    x = torch.randn(args.batch, 3, num_frames, args.size, args.size, device=device)
    target = torch.zeros(args.batch, dtype=torch.long, device=device)

    def run() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=cuda):
            loss = nn.functional.cross_entropy(model(x).float(), target)
        loss.backward()
        if cuda:
            torch.cuda.synchronize()

    before = 0 if cuda else process_memory('VmRSS')
    run()  # to warm up; its peak is that of every step
    peak = torch.cuda.max_memory_allocated() if cuda else process_memory('VmHWM') - before
    # what others do on the machine has little to do with a processor's time
    clock = time.perf_counter if cuda else time.process_time
    times: List[float] = []
    while len(times) < args.steps:
        start = clock()
        run()
        times.append(clock() - start)
    return min(times), peak / 2 ** 20, sum(p.numel() for p in model.parameters()) / 1e6


def measure(args: argparse.Namespace) -> List[dict]:
    rows = []
    for name in MODELS:
        for frames in args.frames:
            command = [
                sys.executable, __file__, '--step', name, '--frames', frames, '--size', args.size,
                '--batch', args.batch, '--steps', args.steps, '--device', args.device]
            done = subprocess.run([str(c) for c in command], stdout=subprocess.PIPE, text=True, check=True)
            seconds, memory, parameters = map(float, done.stdout.split())
            rows.append(dict(
                model=name, frames=frames, parameters_m=round(parameters, 2), seconds=round(seconds, 4),
                memory_mib=round(memory, 1)))
            print(rows[-1])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--frames', type=int, nargs='+', default=[8, 16, 32, 64])
    parser.add_argument('--size', type=int, default=224)
    parser.add_argument('--batch', type=int, default=1)
    parser.add_argument('--steps', type=int, default=2)
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--step', help=argparse.SUPPRESS)  # print one step's numbers
    args = parser.parse_args()
    if args.step:
        print(*step(args.step, args.frames[0], args))
        return
    rows, env = measure(args), dict(environment(), size=args.size, batch=args.batch, device=args.device)
    RESULTS.mkdir(exist_ok=True)
    with open(RESULTS / 'frames_growth.csv', 'w', newline='') as f:
        f.writelines(f'# {k}: {v}\n' for k, v in env.items())
        writer = csv.DictWriter(f, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    from timm_ssm.plot import plot

    plot([str(RESULTS / 'frames_growth.csv')], str(PICTURE), ['seconds', 'memory_mib'])


if __name__ == '__main__':
    main()
