"""Where the tokens of a model's mixers lie in its input."""
from typing import List, Tuple

import torch
import torch.nn.functional as F
from torch import nn

from ..models._hierarchical import HierarchicalModel
from ..zoo.registry import num_frames
from .record import Record


class TokenLayout:
    """Maps of values that a model's mixers have for their tokens.

    Args:
        model: A model of this package, or a vision transformer of timm's.
        x: Its input.

    Raises:
        ValueError: The model is another.
    """

    def __init__(self, model: nn.Module, x: torch.Tensor):
        self.model = model
        self.batch = len(x)
        self.stages: List[torch.Size] = []  # rows and columns of each stage's map, of a hierarchical model
        self.prefix, self.grid = 0, ()  # tokens before those of the patches, and (frames,) rows and columns of these
        if isinstance(model, HierarchicalModel):
            self.stages = [y.shape[-2:] for y in model.forward_intermediates(x, intermediates_only=True)]
        elif hasattr(model, 'num_prefix_tokens') and hasattr(getattr(model, 'patch_embed', None), 'dynamic_feat_size'):
            self.prefix, self.grid = model.num_prefix_tokens, tuple(model.patch_embed.dynamic_feat_size(x.shape[-2:]))
            if num_frames(model) > 1:
                self.grid = (model.patch_embed.num_frames // model.patch_embed.tubelet_size, *self.grid)
        else:
            raise ValueError(f'model: got {type(model).__name__}, needs one of this package, or a vision transformer')

    def stage_of(self, record: Record) -> int:
        """Number of the stage of a hierarchical model that a mixer is in; -1 if it comes after them."""
        kind, number = record.name.split('.')[:2]
        return int(number) if kind == 'stages' else -1

    def window_of(self, stage: int) -> Tuple[int, int]:
        """Rows and columns of the windows that a stage's mixers mix within; of its whole map if there are none."""
        return getattr(self.model.stages[stage], 'window_size', None) or tuple(self.stages[stage])

    def to_map(self, record: Record, values: torch.Tensor) -> torch.Tensor:
        """Values of the tokens of a mixer's input, without their prefix, in their places.

        Args:
            record: The mixer, of a stage if the model is hierarchical.
            values: (B', L) with a B' that counts windows, in the order of the mixer's input.

        Returns:
            (B, h, w), or (B, t, h, w) for clips.
        """
        if not self.stages:
            if hasattr(self.model, '_restore'):  # Vim's class token is in the middle
                values = self.model._restore(values.unsqueeze(2)).squeeze(2)
            return values[:, self.prefix:].unflatten(1, self.grid)
        stage = self.stage_of(record)
        return join_windows(values, self.stages[stage], self.window_of(stage))


def split_windows(maps: torch.Tensor, window: Tuple[int, int]) -> torch.Tensor:
    """Maps (B, H, W), padded with zeros at the right and the bottom, to windows of tokens (B windows, rows columns)."""
    rows, columns = window
    maps = F.pad(maps, (0, -maps.shape[2] % columns, 0, -maps.shape[1] % rows))
    split = maps.unflatten(2, (-1, columns)).unflatten(1, (-1, rows))
    return split.transpose(2, 3).flatten(0, 2).flatten(1)


def join_windows(tokens: torch.Tensor, size: Tuple[int, int], window: Tuple[int, int]) -> torch.Tensor:
    """Undo `split_windows` of maps of a size."""
    rows, columns = window
    down, across = -(-size[0] // rows), -(-size[1] // columns)
    maps = tokens.reshape(-1, down, across, rows, columns).transpose(2, 3)
    return maps.reshape(-1, down * rows, across * columns)[:, :size[0], :size[1]]
