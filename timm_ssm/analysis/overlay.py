"""Maps of relevance laid over the images and clips that they belong to."""
import numpy as np
import torch
import torch.nn.functional as F
from timm.data import resolve_data_config
from torch import nn


def to_pixels(model: nn.Module, x: torch.Tensor) -> np.ndarray:
    """A model's input as what it shows: images (B, H, W, 3) or clips (B, T, H, W, 3), uint8.

    Args:
        model: The model, whose pretrained cfg says how its input is normalised.
        x: Its input: images (B, C, H, W), or clips (B, C, T, H, W), of one or three channels.
    """
    config = resolve_data_config(model=model)
    mean, std = (torch.tensor(config[k][:x.shape[1]], device=x.device).view(-1, *(1,) * (x.ndim - 2)) for k in (
        'mean', 'std'))
    pixels = ((x.float() * std + mean) * 255).round().clamp(0, 255).byte()
    if x.shape[1] == 1:
        pixels = pixels.expand(-1, 3, *x.shape[2:])
    return pixels.movedim(1, -1).cpu().numpy()


def to_size(relevance: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Maps (B, h, w) or (B, t, h, w), interpolated to those of pixels (B, ...) in as many dimensions."""
    mode = 'bilinear' if relevance.ndim == 3 else 'trilinear'
    return F.interpolate(relevance[:, None].float(), shape[1:], mode=mode)[:, 0]


def overlay(pixels: np.ndarray, relevance: torch.Tensor, opacity: float = 0.6) -> np.ndarray:
    """Lay maps of relevance over what they belong to, from dark for the least of each map to bright for the most.

    Args:
        pixels: Images (B, H, W, 3) or clips (B, T, H, W, 3), uint8, as of `to_pixels`.
        relevance: Maps (B, h, w), or (B, t, h, w) for clips, as of `rollout`; all frames of a clip share one scale.
        opacity: Of the map.

    Returns:
        As pixels.
    """
    from matplotlib import colormaps

    from ..plot.style import HEAT  # or its error where there is no matplotlib

    size = to_size(relevance.cpu(), torch.Size(pixels.shape[:-1]))
    flat = size.flatten(1)
    low, high = (t.view(-1, *(1,) * (size.ndim - 1)) for t in flat.aminmax(dim=1))
    scaled = (size - low) / (high - low).clamp_min(torch.finfo(size.dtype).tiny)
    heat = colormaps[HEAT](scaled.numpy())[..., :3] * 255
    grey = pixels.mean(-1, keepdims=True)  # the map is the only colour
    return ((1 - opacity) * grey + opacity * heat).round().astype(np.uint8)
