"""Rollout: how much of each patch reaches what a model classifies by, going back through all its mixers.

Attention rollout (Abnar & Zuidema 2020, https://arxiv.org/abs/2005.00928) follows the attention of Transformers from
layer to layer; Mamba rollout (Ali, Zimerman & Wolf 2025, https://arxiv.org/abs/2403.01590) does so with the hidden
attention of scans. In hybrids each layer contributes the one that it has.
"""
from itertools import groupby
from typing import List

import torch
import torch.nn.functional as F
from torch import nn

from ..training.evaluation import evaluating
from .attention import hidden_attention
from .record import Record, attention_of, is_scan, mixes_tokens, record
from .tokens import TokenLayout, join_windows, split_windows


@torch.no_grad()
def rollout(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The share that each patch has in the features that the head of a model gets.

    Half of a layer's output comes through its residual connection, the other half as its matrix says: attention,
    or the magnitude of the mean hidden attention over channels, each row scaled to sum to 1. Where groups of channels
    have mixers of their own (GroupMamba), their matrices are averaged. Convolutions and MLPs are taken to keep tokens
    where they are; between stages of a hierarchical model, a position's share goes evenly to those that it was made of.
    There is no class to choose: the map tells what is seen, whatever it is seen as.

    Args:
        model: A model of this package, but Spatial-Mamba; or a vision transformer of timm's. Its head reads the class
            token or the mean of the others.
        x: Its input: images (B, C, H, W), or clips (B, C, T, H, W).

    Returns:
        Shares (B, h, w), or (B, t, h, w) for clips, of the tokens, or for hierarchical models of the positions in the
        first stage with mixers. They sum to 1, less what is the class token's own.

    Raises:
        ValueError: The model mixes tokens in other ways.
    """
    records = record(model, x, mixes_tokens)
    if not records:
        raise ValueError(f"model: got {type(model).__name__}, needs scans, or attention of timm's kind")
    with evaluating(model):
        layout = TokenLayout(model, x)
        return _roll_stages(layout, x, records) if layout.stages else _roll_tokens(layout, x, records)


def _roll_tokens(layout: TokenLayout, x: torch.Tensor, records: List[Record]) -> torch.Tensor:
    """Rollout of a model of one sequence of tokens, from what its head reads."""
    model, prefix = layout.model, layout.prefix
    length = prefix + torch.Size(layout.grid).numel()
    for r in records:
        if r.args[0].shape[:-1] != (len(x), length):
            raise ValueError(
                f'model: got {type(model).__name__}, whose {r.name} takes {tuple(r.args[0].shape)}, '
                f'needs mixers of all {length} tokens')
    share = torch.zeros(len(x), length, device=x.device)
    if model.global_pool == 'token':
        share[:, 0] = 1
    elif model.global_pool == 'avg':
        share[:, prefix:] = 1 / (length - prefix)
    else:
        raise ValueError(f"global_pool: got {model.global_pool!r}, needs 'token' or 'avg'")
    if hasattr(model, '_arrange'):  # Vim's class token is in the middle
        share = model._arrange(share.unsqueeze(2)).squeeze(2)
    return layout.to_map(records[0], _roll(share, records))


def _roll_stages(layout: TokenLayout, x: torch.Tensor, records: List[Record]) -> torch.Tensor:
    """Rollout of a model of stages, from the mean over the last one's map."""
    size = layout.stages[-1]
    share = torch.full((len(x), *size), 1 / size.numel(), device=x.device)
    first = min(layout.stage_of(r) for r in records if layout.stage_of(r) >= 0)
    for stage in range(len(layout.stages) - 1, first - 1, -1):
        size = layout.stages[stage]
        if share.shape[1:] != size:
            share = F.interpolate(share[:, None], size)[:, 0]
            share = share / share.sum((1, 2), keepdim=True)
        window = layout.window_of(stage)
        of_stage = [r for r in records if layout.stage_of(r) == stage]
        share = join_windows(_roll(split_windows(share, window), of_stage), size, window)
    return share


def _roll(share: torch.Tensor, records: List[Record]) -> torch.Tensor:
    """Shares (B, L) in the output of layers to those in their input, from the last layer to the first."""
    layers = [list(group) for _, group in groupby(records, lambda r: r.name.partition('.mixers.')[0])]
    for layer in reversed(layers):
        mixed = sum(_mix(share, r) for r in layer) / len(layer)
        share = (share + mixed) / 2
    return share


def _mix(share: torch.Tensor, record: Record) -> torch.Tensor:
    """Shares (B, L) times the matrix of one module, of magnitudes in rows that sum to 1."""
    if is_scan(record.module):
        matrix = hidden_attention(record.module, record.args[0]).abs_()
    else:
        matrix = attention_of(record)
    rows = matrix.sum(-1)
    kept = torch.where(rows > 0, 0., share)  # what nothing reaches, not even itself, stays as it is
    rows = rows.clamp_min(torch.finfo(rows.dtype).tiny)
    return ((share / rows).to(matrix.dtype).unsqueeze(1) @ matrix).squeeze(1).to(share.dtype) + kept
