"""The effective receptive field: the pixels that a position of the last map depends on."""
from typing import List

import torch
from torch import nn

from ..training.evaluation import evaluating


def receptive_field(model: nn.Module, x: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """How much the central position of a model's last map depends on each pixel.

    The mean over inputs of the magnitude of the gradient (Luo et al. 2016, https://arxiv.org/abs/1701.04128) of that
    position's features in a random direction, another one for each input: a sum of channels could cancel.

    Args:
        model: Any model of timm's with forward_intermediates.
        x: Its input: images (B, C, H, W), or clips (B, C, T, H, W), of any size that it takes.
        seed: Of the directions.

    Returns:
        (H, W), or (T, H, W) for clips, with a sum of 1.
    """
    if not hasattr(model, 'forward_intermediates'):
        raise ValueError(f'model: got {type(model).__name__}, needs one with forward_intermediates')
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(x.shape[2:], device=x.device)
    with evaluating(model), torch.enable_grad():
        for sample in x.split(1):
            sample = sample.detach().requires_grad_()
            features = model.forward_intermediates(sample, indices=1, intermediates_only=True)[0]
            centre = features[(0, slice(None), *(n // 2 for n in features.shape[2:]))]
            direction = torch.randn(centre.shape, generator=generator).to(centre)
            gradient, = torch.autograd.grad(centre @ direction, sample)
            total += gradient[0].abs().sum(0)
    return total / total.sum()


def field_sizes(field: torch.Tensor, shares: List[float]) -> List[int]:
    """Sides in pixels of the smallest squares around the middle of a square map that hold such shares of it."""
    rows, columns = (torch.arange(n, device=field.device) + .5 - n / 2 for n in field.shape)
    ring = torch.maximum(rows.abs()[:, None], columns.abs()).ceil().long()  # half of the side that reaches a pixel
    held = torch.zeros(int(ring.max()) + 1, device=field.device)
    held = held.index_add_(0, ring.flatten(), field.flatten()).cumsum(0)
    return [2 * int((held < share * held[-1] - 1e-6).sum()) + field.shape[0] % 2 for share in shares]
