"""Small checkpoints under the authors' names."""
import io
from typing import Dict

import torch

from ..fixtures.synthesize import synthesize
from ..models.utils import released_shapes


def released(depth: int = 24, **shapes) -> Dict[str, torch.Tensor]:
    """The authors' VideoMamba-Ti: their names and shapes, the first layers of it; `shapes` replaces some."""
    wanted = {**released_shapes()['videomamba_tiny_224'], **{k.replace('__', '.'): s for k, s in shapes.items()}}
    absent = tuple(f'layers.{i}.' for i in range(depth, 24))
    return {k: synthesize(k, tuple(s)) for k, s in wanted.items() if not k.startswith(absent)}


def small() -> Dict[str, torch.Tensor]:
    """One fine-tuned on images of 32 pixels and 7 classes, which is quick to run."""
    return released(pos_embed=(1, 1 + 4, 192), head__weight=(7, 192), head__bias=(7,))


def small_clips() -> Dict[str, torch.Tensor]:
    """As `small`, for clips of 8 frames."""
    return released(
        pos_embed=(1, 1 + 4, 192), temporal_pos_embedding=(1, 8, 192), patch_embed__proj__weight=(192, 3, 1, 16, 16),
        head__weight=(7, 192), head__bias=(7,))


def to_bytes(checkpoint) -> bytes:
    """As torch.save writes it."""
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    return buffer.getvalue()


class Terminal(io.StringIO):
    """Text for a terminal."""

    def isatty(self) -> bool:
        return True
