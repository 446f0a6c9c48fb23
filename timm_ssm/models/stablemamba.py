"""StableMamba: VideoMamba's bidirectional mixer with attention interleaved, and an MLP in every block.

Paper: `StableMamba: Distillation-free Scaling of Large SSMs for Images and Videos` - https://arxiv.org/abs/2409.11867

No code or weights are public. Equations (4) to (6) of the paper are kept: blocks of seven Mamba layers and one
Transformer layer in the middle, both of the same shape, and VideoMamba's stem and tokens. The paper gives parameter
counts and GMACs but neither depth nor MLP ratio: those of the variants here are a reconstruction, whole StableMamba
blocks of the published widths whose sizes match the published ones within 1.5 %, while their GMACs come out up to 11 %
above the published ones.
"""
from functools import partial
from typing import Optional, Type

import torch
from timm.layers import Attention, DropPath, Mlp
from timm.models import generate_default_cfgs, register_model
from torch import nn

from ..layers import BiMamba, RmsNorm
from ._builder import build_model_with_cfg
from ._isotropic import IsotropicMamba, checkpoint_filter_fn, clip_cfg, isotropic_cfg

__all__ = ['StableMamba']


class StableMambaLayer(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)), the mixer a bidirectional Mamba or, with num_heads, self-attention."""

    def __init__(
            self,
            dim: int,
            num_heads: int = 0,
            mlp_ratio: float = 2.,
            norm_layer: Type[nn.Module] = RmsNorm,
            drop_path: float = 0.,
            device=None,
            dtype=None,
            **mixer_kwargs,
    ) -> None:
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.norm = norm_layer(dim, eps=1e-5, **dd)
        if num_heads:
            self.mixer = Attention(dim, num_heads, **dd)
        else:
            self.mixer = BiMamba(dim, **mixer_kwargs, **dd)
        self.norm2 = norm_layer(dim, eps=1e-5, **dd)
        self.mlp = Mlp(dim, int(mlp_ratio * dim), **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0. else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.drop_path(self.mixer(self.norm(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class StableMamba(IsotropicMamba):
    """StableMamba, for images and clips."""

    def __init__(
            self,
            *args,
            embed_dim: int = 192,
            depth: int = 16,
            mlp_ratio: float = 2.,
            attn_every: int = 8,
            attn_position: str = 'middle',
            num_heads: Optional[int] = None,
            **kwargs,
    ) -> None:
        """Take the arguments of `IsotropicMamba` and these.

        Args:
            mlp_ratio: Hidden width of the MLPs over embed_dim.
            attn_every: Layers of a StableMamba block, of which one is a Transformer's; 1 for attention alone.
            attn_position: Where in its block: 'start', 'middle' (index 3 of 8) or 'end'.
            num_heads: Heads of the attention; embed_dim / 64 if None.
        """
        if attn_every < 1:
            raise ValueError(f'attn_every: got {attn_every}, needs at least 1')
        positions = {'start': 0, 'middle': (attn_every - 1) // 2, 'end': attn_every - 1}
        if attn_position not in positions:
            raise ValueError(f"attn_position: got {attn_position!r}, needs 'start', 'middle' or 'end'")
        num_heads = num_heads or max(1, embed_dim // 64)
        if embed_dim % num_heads:
            raise ValueError(f'num_heads: got {num_heads}, needs a divisor of embed_dim {embed_dim}')
        mamba = partial(StableMambaLayer, mlp_ratio=mlp_ratio)
        attention = partial(mamba, num_heads=num_heads)
        super().__init__(
            *args,
            embed_dim=embed_dim,
            depth=depth,
            block_fn=[attention if i % attn_every == positions[attn_position] else mamba for i in range(depth)],
            **kwargs,
        )


def _create_stablemamba(variant: str, pretrained: bool = False, **kwargs) -> StableMamba:
    return build_model_with_cfg(StableMamba, variant, pretrained, checkpoint_filter_fn, ('inflation',), **kwargs)


_PAPER = dict(
    paper_name='StableMamba: Distillation-free Scaling of Large SSMs for Images and Videos',
    paper_ids='arXiv:2409.11867',
)

default_cfgs = generate_default_cfgs({
    'stablemamba_tiny_patch16_224.untrained': isotropic_cfg(**_PAPER),
    'stablemamba_small_patch16_224.untrained': isotropic_cfg(**_PAPER),
    'stablemamba_middle_patch16_224.untrained': isotropic_cfg(**_PAPER),
    'stablemamba_base_patch16_224.untrained': isotropic_cfg(**_PAPER),
    'stablemamba_large_patch16_224.untrained': isotropic_cfg(**_PAPER),
    'stablemamba_tiny_patch16_f16_224.untrained': clip_cfg(16, **_PAPER),
    'stablemamba_small_patch16_f16_224.untrained': clip_cfg(16, **_PAPER),
    'stablemamba_middle_patch16_f16_224.untrained': clip_cfg(16, **_PAPER),
    'stablemamba_base_patch16_f16_224.untrained': clip_cfg(16, **_PAPER),
})


@register_model
def stablemamba_tiny_patch16_224(pretrained: bool = False, **kwargs) -> StableMamba:
    """StableMamba-Ti, 7 M parameters."""
    model_args = dict(embed_dim=192, depth=16, mlp_ratio=2.0)
    return _create_stablemamba('stablemamba_tiny_patch16_224', pretrained, **dict(model_args, **kwargs))


@register_model
def stablemamba_tiny_patch16_f16_224(pretrained: bool = False, **kwargs) -> StableMamba:
    """StableMamba-Ti for clips of 16 frames."""
    model_args = dict(num_frames=16, embed_dim=192, depth=16, mlp_ratio=2.0)
    return _create_stablemamba('stablemamba_tiny_patch16_f16_224', pretrained, **dict(model_args, **kwargs))


@register_model
def stablemamba_small_patch16_224(pretrained: bool = False, **kwargs) -> StableMamba:
    """StableMamba-S, 27 M parameters."""
    model_args = dict(embed_dim=384, depth=16, mlp_ratio=2.25)
    return _create_stablemamba('stablemamba_small_patch16_224', pretrained, **dict(model_args, **kwargs))


@register_model
def stablemamba_small_patch16_f16_224(pretrained: bool = False, **kwargs) -> StableMamba:
    """StableMamba-S for clips of 16 frames."""
    model_args = dict(num_frames=16, embed_dim=384, depth=16, mlp_ratio=2.25)
    return _create_stablemamba('stablemamba_small_patch16_f16_224', pretrained, **dict(model_args, **kwargs))


@register_model
def stablemamba_middle_patch16_224(pretrained: bool = False, **kwargs) -> StableMamba:
    """StableMamba-M, 77 M parameters."""
    model_args = dict(embed_dim=576, depth=24, mlp_ratio=1.5)
    return _create_stablemamba('stablemamba_middle_patch16_224', pretrained, **dict(model_args, **kwargs))


@register_model
def stablemamba_middle_patch16_f16_224(pretrained: bool = False, **kwargs) -> StableMamba:
    """StableMamba-M for clips of 16 frames."""
    model_args = dict(num_frames=16, embed_dim=576, depth=24, mlp_ratio=1.5)
    return _create_stablemamba('stablemamba_middle_patch16_f16_224', pretrained, **dict(model_args, **kwargs))


@register_model
def stablemamba_base_patch16_224(pretrained: bool = False, **kwargs) -> StableMamba:
    """StableMamba-B, 100 M parameters."""
    model_args = dict(embed_dim=768, depth=16, mlp_ratio=2.0)
    return _create_stablemamba('stablemamba_base_patch16_224', pretrained, **dict(model_args, **kwargs))


@register_model
def stablemamba_base_patch16_f16_224(pretrained: bool = False, **kwargs) -> StableMamba:
    """StableMamba-B for clips of 16 frames."""
    model_args = dict(num_frames=16, embed_dim=768, depth=16, mlp_ratio=2.0)
    return _create_stablemamba('stablemamba_base_patch16_f16_224', pretrained, **dict(model_args, **kwargs))


@register_model
def stablemamba_large_patch16_224(pretrained: bool = False, **kwargs) -> StableMamba:
    """StableMamba-L, 185 M parameters."""
    model_args = dict(embed_dim=1024, depth=16, mlp_ratio=2.25)
    return _create_stablemamba('stablemamba_large_patch16_224', pretrained, **dict(model_args, **kwargs))
