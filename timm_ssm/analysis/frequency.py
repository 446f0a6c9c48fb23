"""Sensitivity to high frequencies: how far tokens turn when those of the image are amplified."""
from typing import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from ..training.evaluation import evaluating

FACTORS = (1, 2, 5, 10, 15, 20, 25, 30)


def amplify_high_frequencies(x: torch.Tensor, factor: float, share: float = 0.2) -> torch.Tensor:
    """Multiply the coefficients of the highest frequencies of images.

    Args:
        x: Images (..., H, W); of a clip, each frame.
        factor: Of the multiplication.
        share: Of the coefficients that are multiplied.
    """
    height, width = x.shape[-2:]
    radius = torch.hypot(torch.fft.fftfreq(height)[:, None], torch.fft.fftfreq(width)).to(x.device)
    high = radius >= radius.flatten().quantile(1 - share)
    return torch.fft.ifft2(torch.fft.fft2(x.float()) * torch.where(high, factor, 1.)).real.to(x.dtype)


@torch.no_grad()
def frequency_sensitivity(
        model: nn.Module,
        x: torch.Tensor,
        factors: Sequence[float] = FACTORS,
        batch_size: int = 16,
) -> torch.Tensor:
    """Mean cosine similarity of the tokens of images with those of the same images, high frequencies amplified.

    See the introduction of StableMamba (https://arxiv.org/abs/2409.11867). The higher a curve stays, the less a model
    is disturbed.

    Args:
        model: Any model of timm's with forward_intermediates.
        x: Its input: images (B, C, H, W), or clips (B, C, T, H, W).
        factors: Of the amplification.
        batch_size: Inputs to run at once.

    Returns:
        (len(factors), depths), of each of the depths that forward_intermediates knows.
    """
    if not hasattr(model, 'forward_intermediates'):
        raise ValueError(f'model: got {type(model).__name__}, needs one with forward_intermediates')
    totals = []
    with evaluating(model):
        for part in x.split(batch_size):
            original = model.forward_intermediates(part, intermediates_only=True)
            rows = []
            for factor in factors:
                changed = model.forward_intermediates(
                    amplify_high_frequencies(part, factor), intermediates_only=True)
                rows.append(torch.stack([
                    F.cosine_similarity(a.float(), b.float(), dim=1).mean() for a, b in zip(original, changed)]))
            totals.append(torch.stack(rows) * len(part))
    return sum(totals) / len(x)
