"""MambaVision: a hierarchical backbone of convolutions, state-space mixers and, last in a stage, attention.

Paper: `MambaVision: A Hybrid Mamba-Transformer Vision Backbone` - https://arxiv.org/abs/2407.08083

Authors' code and weights: https://github.com/NVlabs/MambaVision (NVIDIA Source Code License-NC: the weights are for
non-commercial use only)

This is an implementation from the paper; parameter values are those of the authors' checkpoints, names follow timm.
"""
import math
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

import torch
from timm.layers import Attention, DropPath, calculate_drop_path_rates, to_2tuple, to_ntuple
from timm.models import (
    checkpoint_seq,
    generate_default_cfgs,
    register_model,
    register_model_deprecations,
    resolve_pretrained_cfg,
)
from torch import nn
from torch.nn import functional as F

from .._compat import update_model_input_size
from ..layers import DtProj, ScanInputs, ScanMixer, scan, state_decay
from ..ops import causal_conv1d
from ._builder import image_cfg
from ._checkpoints import refuse_mismatch, unwrap_state_dict
from ._hierarchical import HierarchicalModel, MixerMlpBlock, build_hierarchical

__all__ = ['MambaVision']

Size2 = Union[int, Tuple[int, int]]


class MambaVisionMixer(ScanMixer):
    """Scan one half of the channels, only convolve the other, and mix both."""

    def __init__(self, dim: int, d_state: int = 8, d_conv: int = 3, device=None, dtype=None) -> None:
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        inner = dim // 2
        self.d_state = d_state
        self.dt_rank = math.ceil(dim / 16)

        self.in_proj = nn.Linear(dim, 2 * inner, bias=False, **dd)
        self.conv1d_x = nn.Conv1d(inner, inner, d_conv, padding='same', groups=inner, bias=False, **dd)
        self.conv1d_z = nn.Conv1d(inner, inner, d_conv, padding='same', groups=inner, bias=False, **dd)
        self.x_proj = nn.Linear(inner, self.dt_rank + 2 * d_state, bias=False, **dd)
        self.dt_proj = DtProj(self.dt_rank, inner, **dd)
        self.A_log = nn.Parameter(torch.empty(inner, d_state, **dd))
        self.D = nn.Parameter(torch.empty(inner, **dd))
        self.out_proj = nn.Linear(2 * inner, dim, bias=False, **dd)
        self.reset_parameters()

    def project(self, x: torch.Tensor) -> List[ScanInputs]:
        """(B, L, dim) -> what the scan is given, and the other half of the channels as bypass."""
        x, z = self.in_proj(x).chunk(2, dim=-1)
        x = causal_conv1d(x, self.conv1d_x.weight.squeeze(1), centered=True)
        z = causal_conv1d(z, self.conv1d_z.weight.squeeze(1), centered=True)
        dt, B, C = self.x_proj(x).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        # The authors' code adds dt_proj's bias in the projection and again in the scan; the weights were trained so.
        dt_bias = 2 * self.dt_proj.bias
        return [ScanInputs(x, self.dt_proj(dt), state_decay(self.A_log), B, C, self.D, None, dt_bias, bypass=z)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, L, dim) -> (B, L, dim)"""
        inputs = self.project(x)
        z = inputs[0].bypass
        assert z is not None
        return self.out_proj(torch.cat([scan(inputs), z], dim=-1))


class ConvBlock(nn.Module):
    """x + norm(conv(act(norm(conv(x)))))."""

    def __init__(self, dim: int, drop_path: float = 0., device=None, dtype=None) -> None:
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.conv1 = nn.Conv2d(dim, dim, 3, padding=1, **dd)
        self.norm1 = nn.BatchNorm2d(dim, **dd)
        self.act = nn.GELU(approximate='tanh')
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1, **dd)
        self.norm2 = nn.BatchNorm2d(dim, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0. else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x
        x = self.act(self.norm1(self.conv1(x)))
        x = self.norm2(self.conv2(x))
        return shortcut + self.drop_path(x)


class MambaVisionStage(nn.Module):
    """A downsampling convolution, but in the first stage, and blocks: on maps, or on the tokens of windows."""

    def __init__(
            self,
            blocks: List[nn.Module],
            in_dim: Optional[int] = None,
            out_dim: Optional[int] = None,
            window_size: Optional[Tuple[int, int]] = None,
            device=None,
            dtype=None,
    ) -> None:
        """
        Args:
            blocks: Blocks, all for maps or all for tokens.
            in_dim: Channels of the input if the stage downsamples it, else None.
            out_dim: Channels after downsampling.
            window_size: Rows and columns of the windows whose tokens the blocks take; None if they take maps.
        """
        super().__init__()
        if in_dim is None:
            self.downsample = nn.Identity()
        else:
            self.downsample = nn.Conv2d(
                in_dim, out_dim, 3, stride=2, padding=1, bias=False, device=device, dtype=dtype)
        self.blocks = nn.Sequential(*blocks)
        self.window_size = window_size
        self.grad_checkpointing = False

    def _blocks(self, x: torch.Tensor) -> torch.Tensor:
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self.blocks, x)
        return self.blocks(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, C', H', W')"""
        x = self.downsample(x)
        if self.window_size is None:
            return self._blocks(x)

        wh, ww = self.window_size
        x = x.permute(0, 2, 3, 1)
        B, H, W, C = x.shape
        x = F.pad(x, (0, 0, 0, (ww - W % ww) % ww, 0, (wh - H % wh) % wh))
        rows, cols = x.shape[1] // wh, x.shape[2] // ww
        x = x.reshape(B, rows, wh, cols, ww, C).transpose(2, 3).reshape(-1, wh * ww, C)
        x = self._blocks(x)
        x = x.reshape(B, rows, cols, wh, ww, C).transpose(2, 3).reshape(B, rows * wh, cols * ww, C)
        return x[:, :H, :W].permute(0, 3, 1, 2)


class MambaVision(HierarchicalModel):
    """MambaVision.

    Takes images (B, C, H, W) of any size. Stages 1 and 2 are convolutional. Stages 3 and 4 pad their map with zeros to
    whole windows, at the right and the bottom, and mix tokens within a window, first by scans, then by attention.
    """

    def __init__(
            self,
            img_size: Size2 = 224,
            in_chans: int = 3,
            num_classes: int = 1000,
            global_pool: str = 'avg',
            stem_dim: int = 32,
            embed_dim: int = 80,
            depths: Sequence[int] = (1, 3, 8, 4),
            num_heads: Sequence[int] = (2, 4, 8, 16),
            window_size: Optional[Union[int, Sequence[Size2]]] = None,
            mlp_ratio: float = 4.,
            ls_init_value: Optional[float] = None,
            drop_rate: float = 0.,
            drop_path_rate: float = 0.,
            device=None,
            dtype=None,
    ) -> None:
        """
        Args:
            img_size: Height and width in pixels that the windows are made for; the input may have any other.
            in_chans: Input channels.
            num_classes: Classes of the head; 0 for no head.
            global_pool: Pooling: 'avg', 'max', 'avgmax', 'catavgmax', or '' (with num_classes 0) for none.
            stem_dim: Channels inside the stem.
            embed_dim: Channels of stage 1; they double from stage to stage.
            depths: Blocks of each of the four stages.
            num_heads: Attention heads of each stage; the first two have no attention.
            window_size: Rows and columns of a window, one for all stages or one for each (the first two have no
                windows); None for windows as large as the stage's map, which is what the released models have.
            mlp_ratio: Hidden width of the MLPs over the channels.
            ls_init_value: Initial layer scale; None for no layer scale.
            drop_rate: Dropout before the head.
            drop_path_rate: Stochastic depth of the last block, growing linearly from 0 at the first.
        """
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.in_chans = in_chans
        self._set_img_size(img_size)
        window_sizes = self._stage_windows(window_size)
        # what set_input_size scales
        self._ref_img_size = self.img_size
        self._ref_window_sizes = window_sizes

        self.stem = nn.Sequential(
            nn.Conv2d(in_chans, stem_dim, 3, stride=2, padding=1, bias=False, **dd),
            nn.BatchNorm2d(stem_dim, eps=1e-4, **dd),
            nn.ReLU(),
            nn.Conv2d(stem_dim, embed_dim, 3, stride=2, padding=1, bias=False, **dd),
            nn.BatchNorm2d(embed_dim, eps=1e-4, **dd),
            nn.ReLU(),
        )
        dpr = calculate_drop_path_rates(drop_path_rate, depths, stagewise=True)
        stages = []
        self.feature_info = []
        for i, depth in enumerate(depths):
            dim = embed_dim * 2 ** i
            if i < 2:
                blocks = [ConvBlock(dim, dpr[i][j], **dd) for j in range(depth)]
            else:
                first_attention = (depth + 1) // 2
                blocks = [
                    MixerMlpBlock(
                        dim,
                        mixer=(
                            MambaVisionMixer(dim, **dd) if j < first_attention
                            else Attention(dim, num_heads[i], qkv_bias=True, **dd)),
                        mlp_ratio=mlp_ratio,
                        ls_init_value=ls_init_value,
                        drop_path=dpr[i][j],
                        **dd,
                    )
                    for j in range(depth)
                ]
            stages.append(MambaVisionStage(
                blocks,
                in_dim=dim // 2 if i > 0 else None,
                out_dim=dim,
                window_size=window_sizes[i] if i >= 2 else None,
                **dd,
            ))
            self.feature_info.append(dict(module=f'stages.{i}', num_chs=dim, reduction=4 * 2 ** i))
        self.stages = nn.Sequential(*stages)
        self.num_features = dim
        self.norm = nn.BatchNorm2d(dim, **dd)
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, global_pool)
        self.init_weights(needs_reset=False)

    def _stage_windows(self, window_size: Optional[Union[int, Sequence[Size2]]]) -> Tuple[Tuple[int, int], ...]:
        """Rows and columns of a window in each stage; the size of the whole map if window_size is None."""
        if window_size is None:
            return tuple(_grid_size(self.img_size, i) for i in range(4))
        sizes = tuple(to_2tuple(w) for w in to_ntuple(4)(window_size))
        if len(sizes) != 4 or min(min(w) for w in sizes) < 1:
            raise ValueError(f'window_size: got {window_size}, needs a positive size, or one for each of four stages')
        return sizes

    def _set_img_size(self, img_size: Size2) -> None:
        if min(to_2tuple(img_size)) < 1:
            raise ValueError(f'img_size: got {img_size}, needs at least 1')
        self.img_size = to_2tuple(img_size)

    def set_input_size(
            self,
            img_size: Optional[Size2] = None,
            window_size: Optional[Union[int, Sequence[Size2]]] = None,
    ) -> None:
        """Change the size that the windows are made for. No parameter depends on it.

        Args:
            img_size: New height and width in pixels; None to keep them.
            window_size: New windows as in the constructor; None to scale the current ones with the image, so that each
                covers as much of it as before.
        """
        if img_size is not None:
            self._set_img_size(img_size)
        if window_size is not None:
            self._ref_img_size = self.img_size
            self._ref_window_sizes = self._stage_windows(window_size)
        window_sizes = []
        for i, window in enumerate(self._ref_window_sizes):
            grids = zip(window, _grid_size(self.img_size, i), _grid_size(self._ref_img_size, i))
            window_sizes.append(tuple([max(1, round(w * new / old)) for w, new, old in grids]))
        for stage, window in zip(self.stages, window_sizes):
            if stage.window_size is not None:
                stage.window_size = window
        update_model_input_size(self, self.img_size, window_size=tuple(window_sizes))


def _grid_size(img_size: Tuple[int, int], stage: int) -> Tuple[int, int]:
    """Rows and columns of a stage's map: every convolution of stride 2 rounds up."""
    stride = 4 * 2 ** stage
    return -(-img_size[0] // stride), -(-img_size[1] // stride)


def checkpoint_filter_fn(state_dict: Dict[str, torch.Tensor], model: MambaVision) -> Dict[str, torch.Tensor]:
    """The authors' or our own checkpoint to this model's names."""
    out = {}
    for k, v in unwrap_state_dict(state_dict).items():
        k = k.replace('patch_embed.conv_down.', 'stem.')
        k = k.replace('.gamma_1', '.ls1.gamma').replace('.gamma_2', '.ls2.gamma')
        if k.startswith('levels.'):
            _, i, rest = k.split('.', 2)
            if rest == 'downsample.reduction.0.weight':  # theirs ends a stage, ours begins the next
                k = f'stages.{int(i) + 1}.downsample.weight'
            else:
                k = f'stages.{i}.{rest}'
        out[k] = v
    return refuse_mismatch(out, model, adaptable=('head.', 'stem.0.'))


def _create_mambavision(variant: str, pretrained: bool = False, **kwargs) -> MambaVision:
    # the windows are those of the checkpoint's image size, although the model takes any
    cfg = resolve_pretrained_cfg(variant, kwargs.get('pretrained_cfg'), kwargs.get('pretrained_cfg_overlay'))
    kwargs.setdefault('img_size', tuple(cfg.input_size[-2:]))
    return build_hierarchical(MambaVision, variant, pretrained, checkpoint_filter_fn, **kwargs)


def _cfg(**kwargs) -> Dict[str, Any]:
    return image_cfg(**{
        'crop_pct': 1.0,
        'license': 'nvidia-source-code-license-nc',
        'notes': ('The weights are for non-commercial use only.',),
        'origin_url': 'https://github.com/NVlabs/MambaVision',
        'paper_name': 'MambaVision: A Hybrid Mamba-Transformer Vision Backbone',
        'paper_ids': 'arXiv:2407.08083',
        **kwargs,
    })


def _cfg_256(**kwargs) -> Dict[str, Any]:
    return _cfg(input_size=(3, 256, 256), pool_size=(8, 8), **kwargs)


def _cfg_512(**kwargs) -> Dict[str, Any]:
    return _cfg(input_size=(3, 512, 512), pool_size=(16, 16), crop_pct=0.93, crop_mode='squash', **kwargs)


default_cfgs = generate_default_cfgs({
    'mambavision_tiny.in1k': _cfg(
        hf_hub_id='nvidia/MambaVision-T-1K', hf_hub_filename='mambavision_tiny_1k.pth.tar'),
    'mambavision_tiny2.in1k': _cfg(
        hf_hub_id='nvidia/MambaVision-T2-1K', hf_hub_filename='mambavision_tiny2_1k.pth.tar', crop_pct=0.98),
    'mambavision_small.in1k': _cfg(
        hf_hub_id='nvidia/MambaVision-S-1K', hf_hub_filename='mambavision_small_1k.pth.tar', crop_pct=0.93),
    'mambavision_base.in1k': _cfg(
        hf_hub_id='nvidia/MambaVision-B-1K', hf_hub_filename='mambavision_base_1k.pth.tar'),
    'mambavision_base.in21k_ft_in1k': _cfg(
        hf_hub_id='nvidia/MambaVision-B-21K', hf_hub_filename='mambavision_base_21k.pth.tar'),
    'mambavision_large.in1k': _cfg(
        hf_hub_id='nvidia/MambaVision-L-1K', hf_hub_filename='mambavision_large_1k.pth.tar'),
    'mambavision_large.in21k_ft_in1k': _cfg(
        hf_hub_id='nvidia/MambaVision-L-21K', hf_hub_filename='mambavision_large_21k.pth.tar'),
    'mambavision_large2.in1k': _cfg(
        hf_hub_id='nvidia/MambaVision-L2-1K', hf_hub_filename='mambavision_large2_1k.pth.tar'),
    'mambavision_large2.in21k_ft_in1k_512': _cfg_512(
        hf_hub_id='nvidia/MambaVision-L2-512-21K', hf_hub_filename='mambavision_L2_21k_240m_512.pth.tar'),
    'mambavision_large3.in21k_ft_in1k_256': _cfg_256(
        hf_hub_id='nvidia/MambaVision-L3-256-21K', hf_hub_filename='mambavision_L3_21k_740m_256.pth.tar'),
    'mambavision_large3.in21k_ft_in1k_512': _cfg_512(
        hf_hub_id='nvidia/MambaVision-L3-512-21K', hf_hub_filename='mambavision_L3_21k_740m_512.pth.tar'),
})


@register_model
def mambavision_tiny(pretrained: bool = False, **kwargs) -> MambaVision:
    """MambaVision-T, 32 M parameters."""
    model_args = dict(stem_dim=32, embed_dim=80, depths=(1, 3, 8, 4), num_heads=(2, 4, 8, 16), drop_path_rate=0.2)
    return _create_mambavision('mambavision_tiny', pretrained, **dict(model_args, **kwargs))


@register_model
def mambavision_tiny2(pretrained: bool = False, **kwargs) -> MambaVision:
    """MambaVision-T2, 35 M parameters."""
    model_args = dict(stem_dim=32, embed_dim=80, depths=(1, 3, 11, 4), num_heads=(2, 4, 8, 16), drop_path_rate=0.2)
    return _create_mambavision('mambavision_tiny2', pretrained, **dict(model_args, **kwargs))


@register_model
def mambavision_small(pretrained: bool = False, **kwargs) -> MambaVision:
    """MambaVision-S, 50 M parameters."""
    model_args = dict(stem_dim=64, embed_dim=96, depths=(3, 3, 7, 5), num_heads=(2, 4, 8, 16), drop_path_rate=0.2)
    return _create_mambavision('mambavision_small', pretrained, **dict(model_args, **kwargs))


@register_model
def mambavision_base(pretrained: bool = False, **kwargs) -> MambaVision:
    """MambaVision-B, 98 M parameters."""
    model_args = dict(
        stem_dim=64, embed_dim=128, depths=(3, 3, 10, 5), num_heads=(2, 4, 8, 16), ls_init_value=1e-5,
        drop_path_rate=0.3)
    return _create_mambavision('mambavision_base', pretrained, **dict(model_args, **kwargs))


@register_model
def mambavision_large(pretrained: bool = False, **kwargs) -> MambaVision:
    """MambaVision-L, 228 M parameters."""
    model_args = dict(
        stem_dim=64, embed_dim=196, depths=(3, 3, 10, 5), num_heads=(4, 8, 16, 32), ls_init_value=1e-5,
        drop_path_rate=0.3)
    return _create_mambavision('mambavision_large', pretrained, **dict(model_args, **kwargs))


@register_model
def mambavision_large2(pretrained: bool = False, **kwargs) -> MambaVision:
    """MambaVision-L2, 242 M parameters."""
    model_args = dict(
        stem_dim=64, embed_dim=196, depths=(3, 3, 12, 5), num_heads=(4, 8, 16, 32), ls_init_value=1e-5,
        drop_path_rate=0.3)
    return _create_mambavision('mambavision_large2', pretrained, **dict(model_args, **kwargs))


@register_model
def mambavision_large3(pretrained: bool = False, **kwargs) -> MambaVision:
    """MambaVision-L3, 740 M parameters."""
    model_args = dict(
        stem_dim=64, embed_dim=256, depths=(3, 3, 20, 10), num_heads=(4, 8, 16, 32), ls_init_value=1e-5,
        drop_path_rate=0.5)
    return _create_mambavision('mambavision_large3', pretrained, **dict(model_args, **kwargs))


register_model_deprecations(__name__, {
    'mamba_vision_T': 'mambavision_tiny.in1k',
    'mamba_vision_T2': 'mambavision_tiny2.in1k',
    'mamba_vision_S': 'mambavision_small.in1k',
    'mamba_vision_B': 'mambavision_base.in1k',
    'mamba_vision_B_21k': 'mambavision_base.in21k_ft_in1k',
    'mamba_vision_L': 'mambavision_large.in1k',
    'mamba_vision_L_21k': 'mambavision_large.in21k_ft_in1k',
    'mamba_vision_L2': 'mambavision_large2.in1k',
    'mamba_vision_L2_512_21k': 'mambavision_large2.in21k_ft_in1k_512',
    'mamba_vision_L3_256_21k': 'mambavision_large3.in21k_ft_in1k_256',
    'mamba_vision_L3_512_21k': 'mambavision_large3.in21k_ft_in1k_512',
})
