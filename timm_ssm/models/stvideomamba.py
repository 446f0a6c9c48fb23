"""VideoMamba of Park et al. (ST-VideoMamba here): spatio-temporal selective scans over clips.

Paper: `VideoMamba: Spatio-Temporal Selective State Space Model` - https://arxiv.org/abs/2407.08476

Not to be confused with the VideoMamba of Li et al. in videomamba.py, whose mixer and stem it shares. Differences:
tubelets of two frames, LayerNorm, one position embedding over the whole sequence instead of a spatial and a temporal
one, and a choice of orders for the reverse scan. This is an implementation from the paper: no weights are public.
"""
import math
from functools import partial
from typing import List, Optional, Tuple

import torch
from timm.layers import resample_abs_pos_embed, to_2tuple
from timm.models import generate_default_cfgs, register_model
from torch import nn
from torch.nn import functional as F

from ..layers import BiMamba, LayerNorm, ScanInputs, scan
from ..ops import causal_conv1d
from ._builder import build_model_with_cfg
from ._checkpoints import CheckpointMismatch, StateDict, refuse_mismatch, unwrap_state_dict
from ._isotropic import (
    IsotropicMamba,
    MambaBlock,
    adapt_patch_embed,
    check_weight_init,
    class_token_first,
    clip_cfg,
    rename_authors,
)

__all__ = ['STVideoMamba']


class STMixer(BiMamba):
    """Bidirectional Mamba mixer whose reverse branch visits the patches spatially or temporally reversed.

    The class token, first in the sequence, is the last that the reverse branch visits, whatever the order: as the first
    in both directions it would see nothing.
    """

    def __init__(self, dim: int, frames: int, order: str, **kwargs) -> None:
        """
        Args:
            dim: Width of the tokens.
            frames: Frames (tubelets) in the sequence.
            order: 'spatial' visits the frames in order and each frame's patches in reverse, 'temporal' the frames in
                reverse and each frame's patches in order.
            kwargs: Arguments of `BiMamba`.
        """
        super().__init__(dim, **kwargs)
        self.frames = frames
        self.spatial = order == 'spatial'

    def _reorder(self, x: torch.Tensor) -> torch.Tensor:
        """Arrange tokens (B, L, C) such that walking them from the last to the first is the order; its own inverse."""
        patches = x[:, 1:].unflatten(1, [self.frames, -1])
        patches = patches.flip(1) if self.spatial else patches.flip(2)
        return torch.cat((x[:, :1], patches.flatten(1, 2)), dim=1)

    def project(self, x: torch.Tensor) -> List[ScanInputs]:
        """(B, L, dim) -> what the forward scan and the reverse one, over reordered tokens, are given."""
        xz = self.in_proj(x)
        x, z = xz.chunk(2, dim=-1)
        x_b, z_b = self._reorder(xz).chunk(2, dim=-1)
        x_b = causal_conv1d(x_b, self.conv1d_b.weight.squeeze(1), self.conv1d_b.bias, reverse=True)
        return [self.forward_inputs(self.conv1d(x), z), self.reverse_inputs(x_b, z_b)]

    def restore(self, y: torch.Tensor, direction: int, shape: List[int]) -> torch.Tensor:
        """As `ScanMixer.restore`."""
        return self._reorder(y) if direction == 1 else y

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, L, dim) -> (B, L, dim)"""
        inputs = self.project(x)
        return self.out_proj(scan(inputs[:1]) + self._reorder(scan(inputs[1:])))


def sinusoidal_pos_embed(length: int, dim: int, device: Optional[torch.device] = None) -> torch.Tensor:
    """Sines in the even channels, cosines in the odd ones (1, length, dim), in float32 (Vaswani et al. 2017)."""
    position = torch.arange(length, device=device, dtype=torch.float32)
    frequency = torch.exp(
        torch.arange(0, dim, 2, device=device, dtype=torch.float32) * (-math.log(10000.) / dim))
    angle = position.unsqueeze(1) * frequency
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1)[:, :dim].unsqueeze(0)


class STVideoMamba(IsotropicMamba):
    """ST-VideoMamba, for clips."""

    def __init__(
            self,
            *args,
            num_frames: int = 16,
            tubelet_size: int = 2,
            reverse_order: str = 'spatiotemporal',
            pos_embed_type: str = 'learnable',
            weight_init: str = '',
            device=None,
            dtype=None,
            **kwargs,
    ) -> None:
        """Take the arguments of `IsotropicMamba` and these.

        Args:
            reverse_order: What the reverse scan reverses: 'spatiotemporal' all tokens, 'spatial' the patches within
                each frame, 'temporal' the frames.
            pos_embed_type: 'learnable' or 'sinusoidal', over the whole sequence, or 'none'.
        """
        if num_frames < 2:
            raise ValueError(f'num_frames: got {num_frames}, needs at least 2')
        if reverse_order not in ('spatiotemporal', 'spatial', 'temporal'):
            raise ValueError(
                f"reverse_order: got {reverse_order!r}, needs 'spatiotemporal', 'spatial' or 'temporal'")
        if pos_embed_type not in ('learnable', 'sinusoidal', 'none'):
            raise ValueError(f"pos_embed_type: got {pos_embed_type!r}, needs 'learnable', 'sinusoidal' or 'none'")
        check_weight_init(weight_init)
        frames = num_frames // tubelet_size
        mixer = BiMamba
        if reverse_order != 'spatiotemporal':
            mixer = partial(STMixer, frames=frames, order=reverse_order)
        super().__init__(
            *args,
            num_frames=num_frames,
            tubelet_size=tubelet_size,
            block_fn=partial(MambaBlock, mixer_layer=mixer),
            norm_layer=LayerNorm,
            weight_init='skip',
            device=device,
            dtype=dtype,
            **kwargs,
        )
        self.frames = frames
        self.sinusoidal = pos_embed_type == 'sinusoidal'
        self.temporal_pos_embed = None
        self.pos_embed = None
        if pos_embed_type == 'learnable':
            self.pos_embed = nn.Parameter(torch.empty(
                1, 1 + frames * self.patch_embed.num_patches, self.embed_dim, device=device, dtype=dtype))

        self.weight_init_mode = weight_init
        if weight_init != 'skip' and not self.cls_token.is_meta:
            self.init_weights(needs_reset=False)

    def _resample_pos_embed(self, pos_embed: torch.Tensor, new_size: List[int], old_size: List[int]) -> torch.Tensor:
        # frames become channels: each is resampled by itself
        C = pos_embed.shape[2]
        patches = pos_embed[:, 1:].reshape(1, self.frames, -1, C).transpose(1, 2).flatten(2)
        patches = resample_abs_pos_embed(patches, new_size, old_size, num_prefix_tokens=0)
        patches = patches.reshape(1, -1, self.frames, C).transpose(1, 2).flatten(1, 2)
        return torch.cat((pos_embed[:, :1], patches), dim=1)

    def _pos_embed(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens (B, T, H, W, C) to the sequence (B, 1 + T H W, C), embeddings added."""
        H, W = x.shape[2], x.shape[3]
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x.flatten(1, 3)), dim=1)
        pos_embed = self.pos_embed
        if pos_embed is not None:
            if self.dynamic_img_size:
                pos_embed = self._resample_pos_embed(
                    pos_embed, [H, W], [self.patch_embed.grid_size[0], self.patch_embed.grid_size[1]])
            x = x + pos_embed
        elif self.sinusoidal:
            x = x + sinusoidal_pos_embed(x.shape[1], x.shape[2], x.device).to(x.dtype)
        return x


def _expand_pos_embed(pos_embed: torch.Tensor, model: STVideoMamba, method: str) -> torch.Tensor:
    """A clip's position embedding (1, 1 + T H W, C) from an image's (1, 1 + H W, C) of any square size."""
    T, HW, C = model.frames, model.patch_embed.num_patches, pos_embed.shape[2]
    if method == 'random':
        return model.pos_embed.detach()
    if method == 'interpolate_tokens':  # a row of H W tokens becomes one of T H W
        patches = F.interpolate(pos_embed[:, 1:].mT, size=T * HW, mode='linear').mT
    else:
        pos_embed = resample_abs_pos_embed(pos_embed, list(model.patch_embed.grid_size), num_prefix_tokens=1)
        if method == 'expand':
            patches = pos_embed[:, 1:].repeat(1, T, 1)
        else:  # interpolate_channels: the C channels of a patch become T C, which are C for each frame
            patches = F.interpolate(pos_embed[:, 1:], size=T * C, mode='linear')
            patches = patches.reshape(1, HW, T, C).transpose(1, 2).flatten(1, 2)
    return torch.cat((pos_embed[:, :1], patches), dim=1)


def _source_grid(tokens: int, model: STVideoMamba) -> Tuple[int, int]:
    """Rows and columns of patches in each frame of a checkpoint's position embedding over `tokens` patches.

    They are those of the img_size published with it (in the model_args of its config.json), or else those of the model
    or of as many square frames as the model has; if that leaves a choice, those of the pretrained cfg's input_size.

    Raises:
        CheckpointMismatch: There is none of these, or more than one.
    """
    embed = model.patch_embed
    img_size = getattr(model, 'pretrained_model_args', {}).get('img_size')  # timm < 1.0.31 does not keep them
    if img_size:
        return embed.dynamic_feat_size(to_2tuple(img_size))
    side = math.isqrt(tokens // model.frames)
    grids = []
    if tokens % embed.num_patches == 0:
        grids.append(embed.grid_size)
    if tokens == model.frames * side * side:
        grids.append((side, side))
    cfg_grid = embed.dynamic_feat_size(getattr(model, 'pretrained_cfg', {}).get('input_size', (3, 0, 0))[1:])
    if cfg_grid in grids:
        return cfg_grid
    if len(grids) != 1:
        raise CheckpointMismatch(
            f'checkpoint: pos_embed has {tokens} patches, needs {model.frames} frames of a square image or frames of '
            f'{embed.grid_size[0]} x {embed.grid_size[1]} patches' + (
                ' and could be both: give its image size in pretrained_cfg_overlay=dict(input_size=...)'
                if grids else ''))
    return grids[0]


def _fit_pos_embed(pos_embed: torch.Tensor, model: STVideoMamba) -> torch.Tensor:
    """A clip's position embedding for another frame count and image size."""
    T, tokens, C = model.frames, pos_embed.shape[1] - 1, pos_embed.shape[2]
    if tokens == T * model.patch_embed.num_patches:
        return pos_embed
    grid = _source_grid(tokens, model)
    patches = grid[0] * grid[1]
    if tokens != T * patches:
        by_frame = pos_embed[:, 1:].reshape(1, -1, patches * C).mT
        by_frame = F.interpolate(by_frame, size=T, mode='linear').mT.reshape(1, T * patches, C)
        pos_embed = torch.cat((pos_embed[:, :1], by_frame), dim=1)
    return model._resample_pos_embed(pos_embed, list(model.patch_embed.grid_size), list(grid))


def checkpoint_filter_fn(
        state_dict: StateDict,
        model: STVideoMamba,
        pos_embed_init: str = 'expand',
        image_source: str = 'videomamba',
) -> StateDict:
    """A checkpoint of this family, or of an image model, to this model's names, sizes and frame count.

    Image weights are those of VideoMamba or Vim: the patch kernel is spread over the tubelet and averaged, the
    normalisations get zero biases, the head is new.

    Args:
        state_dict: Checkpoint.
        model: Model to load it into.
        pos_embed_init: What becomes of the position embedding of an image model: 'expand' repeats it over time,
            'interpolate_tokens' and 'interpolate_channels' stretch it along that axis, 'random' leaves the model's.
        image_source: The family of an image checkpoint, which its names do not tell: 'videomamba', or 'vim', which
            averages the directions that are added here and, in its authors' files, has the class token's row of the
            position embedding in the middle.
    """
    methods = ('expand', 'interpolate_tokens', 'interpolate_channels', 'random')
    if pos_embed_init not in methods:
        raise ValueError(f'pos_embed_init: got {pos_embed_init!r}, needs one of {", ".join(map(repr, methods))}')
    if image_source not in ('videomamba', 'vim'):
        raise ValueError(f"image_source: got {image_source!r}, needs 'videomamba' or 'vim'")
    state_dict = unwrap_state_dict(state_dict)
    out = rename_authors(state_dict)
    if 'temporal_pos_embed' in out:
        raise CheckpointMismatch(
            'checkpoint: it is of a VideoMamba for clips; needs one for images, or of an ST-VideoMamba')
    from_image = adapt_patch_embed(out, model, inflation='mean')
    pos_embed = out.pop('pos_embed', None)
    if from_image:
        for k in [k for k in out if k.endswith('norm.weight')]:
            out.setdefault(k.replace('weight', 'bias'), torch.zeros_like(out[k]))
        if image_source == 'vim':
            for k in [k for k in out if k.endswith('out_proj.weight')]:
                out[k] = out[k] / 2
            if 'norm_f.weight' in state_dict and pos_embed is not None:
                pos_embed = class_token_first(pos_embed)
    if pos_embed is not None and model.pos_embed is not None:
        if from_image:
            out['pos_embed'] = _expand_pos_embed(pos_embed, model, pos_embed_init)
        else:
            out['pos_embed'] = _fit_pos_embed(pos_embed, model)
    return refuse_mismatch(out, model, adaptable=('head.', 'patch_embed.proj.'))


def _create_stvideomamba(variant: str, pretrained: bool = False, **kwargs) -> STVideoMamba:
    return build_model_with_cfg(
        STVideoMamba, variant, pretrained, checkpoint_filter_fn, ('pos_embed_init', 'image_source'), **kwargs)


_CFG = clip_cfg(
    16, paper_name='VideoMamba: Spatio-Temporal Selective State Space Model', paper_ids='arXiv:2407.08476')


default_cfgs = generate_default_cfgs({
    'stvideomamba_tiny_patch16_f16_224.untrained': _CFG,
    'stvideomamba_small_patch16_f16_224.untrained': _CFG,
})


@register_model
def stvideomamba_tiny_patch16_f16_224(pretrained: bool = False, **kwargs) -> STVideoMamba:
    """ST-VideoMamba of width 192, 7 M parameters."""
    model_args = dict(num_frames=16, embed_dim=192, depth=24)
    return _create_stvideomamba('stvideomamba_tiny_patch16_f16_224', pretrained, **dict(model_args, **kwargs))


@register_model
def stvideomamba_small_patch16_f16_224(pretrained: bool = False, **kwargs) -> STVideoMamba:
    """ST-VideoMamba of width 384, 26 M parameters."""
    model_args = dict(num_frames=16, embed_dim=384, depth=24)
    return _create_stvideomamba('stvideomamba_small_patch16_f16_224', pretrained, **dict(model_args, **kwargs))
