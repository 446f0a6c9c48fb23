"""Spatial-Mamba: a hierarchical backbone that mixes the states of one scan over the map before it reads them out.

Paper: `Spatial-Mamba: Effective Visual State Space Models via Structure-aware State Fusion`
    - https://arxiv.org/abs/2410.15091

Authors' code: https://github.com/EdwardChasel/Spatial-Mamba (Apache-2.0)

This is an implementation from the paper and the authors' documentation; parameter values are those of the authors'
checkpoints, names follow timm. The weights are not on the Hub: load a local file with
`create_model(..., pretrained=True, pretrained_cfg_overlay=dict(file=...))`; detection and segmentation checkpoints load
too, the final norm and the head are then new.
"""
import math
import re
from typing import Any, Dict, List, Sequence

import torch
from timm.layers import DropPath, LayerNorm2d, Mlp, calculate_drop_path_rates
from timm.models import generate_default_cfgs, register_model
from torch import nn
from torch.nn import functional as F

from ..layers import DtProj, LayerNorm, ScanInputs, ScanMixer, scan, state_decay
from ._builder import image_cfg
from ._checkpoints import StateDict, refuse_mismatch, unwrap_state_dict
from ._hierarchical import HierarchicalModel, Stage, backbone_of_detector, build_hierarchical

__all__ = ['SpatialMamba']


class StateFusion(nn.Module):
    """Structure-aware state fusion: a weighted sum of depthwise 3 x 3 convolutions of dilation 1, 3 and 5.

    Neighbours beyond the border are those on it.
    """

    def __init__(self, dim: int, device=None, dtype=None) -> None:
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.weight = nn.Parameter(torch.empty(3, dim, 1, 3, 3, **dd))
        self.alpha = nn.Parameter(torch.empty(3, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Make it the plain sum of 27 neighbours, which is how the authors' code starts."""
        nn.init.ones_(self.weight)
        nn.init.ones_(self.alpha)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """(B, dim, H, W) -> (B, dim, H, W)"""
        # merged on the fly, never kept: the authors' evaluation keeps a merged kernel when the weights change
        weight = (self.weight * self.alpha[:, None, None, None, None]).to(h.dtype)
        h1, h3, h5 = [F.pad(h, (d, d, d, d), mode='replicate') for d in (1, 3, 5)]
        f = F.conv2d(h1, weight[0], groups=h.shape[1])
        f = f + F.conv2d(h3, weight[1], groups=h.shape[1], dilation=3)
        return f + F.conv2d(h5, weight[2], groups=h.shape[1], dilation=5)


class SpatialMambaMixer(ScanMixer):
    """One scan over the rows of a map whose states are fused with their neighbours' before C, D, norm and gate.

    The scan has one state a channel and is float32 under autocast too, as in the authors' code.
    """

    def __init__(self, dim: int, expand: int = 2, device=None, dtype=None) -> None:
        """
        Args:
            dim: Channels.
            expand: Scanned channels over dim.
        """
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        inner = int(expand * dim)
        self.dt_rank = math.ceil(dim / 16)

        self.in_proj = nn.Linear(dim, 2 * inner, bias=False, **dd)
        self.conv2d = nn.Conv2d(inner, inner, 3, padding=1, groups=inner, **dd)
        self.x_proj = nn.Linear(inner, self.dt_rank + 2, bias=False, **dd)
        self.dt_proj = DtProj(self.dt_rank, inner, **dd)
        self.A_log = nn.Parameter(torch.empty(inner, 1, **dd))
        self.D = nn.Parameter(torch.empty(inner, **dd))
        self.fusion = StateFusion(inner, **dd)
        self.norm = LayerNorm(inner, **dd)
        self.out_proj = nn.Linear(inner, dim, bias=False, **dd)
        self.reset_parameters()

    def project(self, x: torch.Tensor) -> List[ScanInputs]:
        """(B, H, W, dim) -> the scan's inputs, with the gate (B, H, W, inner) as bypass.

        C and D are applied to the fused states: the scan itself runs with C = 1 and no D, which gives the states.
        """
        x, z = self.in_proj(x).chunk(2, dim=-1)
        x = F.silu(self.conv2d(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1).flatten(1, 2)
        dt, B, C = self.x_proj(x).split([self.dt_rank, 1, 1], dim=-1)
        return [ScanInputs(
            x, self.dt_proj(dt), state_decay(self.A_log), B, C, self.D, None, self.dt_proj.bias, bypass=z)]

    def restore(self, y: torch.Tensor, direction: int, shape: List[int]) -> torch.Tensor:
        """As `ScanMixer.restore`."""
        return y.unflatten(1, [shape[1], shape[2]])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, H, W, dim) -> (B, H, W, dim)"""
        s = self.project(x)[0]
        z = s.bypass
        assert z is not None
        states = ScanInputs(s.u, s.delta, s.A, s.B, torch.ones_like(s.B), None, None, s.delta_bias)
        h = self.restore(scan([states], float32=True), 0, x.shape)
        f = self.fusion(h.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        y = self.restore(s.C, 0, x.shape) * f + self.D * self.restore(s.u, 0, x.shape)
        return self.out_proj(self.norm(y) * F.silu(z))


class SpatialMambaBlock(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)), a depthwise convolution added before each."""

    def __init__(
            self,
            dim: int,
            expand: int = 2,
            mlp_ratio: float = 4.,
            drop_path: float = 0.,
            device=None,
            dtype=None,
    ) -> None:
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.cpe1 = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd)
        self.norm1 = nn.LayerNorm(dim, **dd)
        self.mixer = SpatialMambaMixer(dim, expand=expand, **dd)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0. else nn.Identity()
        self.cpe2 = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd)
        self.norm2 = nn.LayerNorm(dim, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0. else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, H, W, dim) -> (B, H, W, dim)"""
        x = x + self.cpe1(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        x = x + self.drop_path1(self.mixer(self.norm1(x)))
        x = x + self.cpe2(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        x = x + self.drop_path2(self.mlp(self.norm2(x)))
        return x


class StemBlock(nn.Module):
    """x + norm(conv(relu(norm(conv(x)))))."""

    def __init__(self, dim: int, device=None, dtype=None) -> None:
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.conv1 = nn.Conv2d(dim, dim, 3, padding=1, bias=False, **dd)
        self.norm1 = nn.BatchNorm2d(dim, **dd)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1, bias=False, **dd)
        self.norm2 = nn.BatchNorm2d(dim, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))


class Downsample(nn.Module):
    """Convolutions of which one has stride 2, and a norm: (B, in_dim, H, W) -> (B, H / 2, W / 2, out_dim)."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x).permute(0, 2, 3, 1)


class SpatialMamba(HierarchicalModel):
    """Spatial-Mamba. Takes images (B, C, H, W) of any size."""

    def __init__(
            self,
            in_chans: int = 3,
            num_classes: int = 1000,
            global_pool: str = 'avg',
            embed_dim: int = 64,
            depths: Sequence[int] = (2, 4, 8, 4),
            expand: int = 2,
            mlp_ratio: float = 4.,
            drop_rate: float = 0.,
            drop_path_rate: float = 0.,
            device=None,
            dtype=None,
    ) -> None:
        """
        Args:
            in_chans: Input channels.
            num_classes: Classes of the head; 0 for no head.
            global_pool: Pooling: 'avg', 'max', 'avgmax', 'catavgmax', or '' (with num_classes 0) for none.
            embed_dim: Channels of stage 1; they double from stage to stage.
            depths: Blocks of each stage.
            expand: Scanned channels over those of the stage.
            mlp_ratio: Hidden width of the MLPs over the channels.
            drop_rate: Dropout before the head.
            drop_path_rate: Stochastic depth of the last block, growing linearly from 0 at the first.
        """
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.in_chans = in_chans

        stem_dim = embed_dim // 2
        self.stem = nn.Sequential(
            nn.Conv2d(in_chans, stem_dim, 3, stride=2, padding=1, bias=False, **dd),
            nn.BatchNorm2d(stem_dim, **dd),
            nn.ReLU(),
            StemBlock(stem_dim, **dd),
        )
        dpr = calculate_drop_path_rates(drop_path_rate, depths, stagewise=True)
        stages = []
        self.feature_info = []
        for i in range(len(depths)):
            dim = embed_dim * 2 ** i
            if i == 0:
                downsample = Downsample(
                    nn.Conv2d(stem_dim, 4 * dim, 3, stride=2, padding=1, bias=False, **dd),
                    nn.BatchNorm2d(4 * dim, **dd),
                    nn.ReLU(),
                    nn.Conv2d(4 * dim, dim, 1, bias=False, **dd),
                    nn.BatchNorm2d(dim, **dd),
                )
            else:
                downsample = Downsample(
                    nn.Conv2d(dim // 2, 4 * dim, 1, **dd),
                    nn.ReLU(),
                    nn.Conv2d(4 * dim, 4 * dim, 3, stride=2, padding=1, groups=4 * dim, **dd),
                    nn.ReLU(),
                    nn.Conv2d(4 * dim, dim, 1, **dd),
                    nn.BatchNorm2d(dim, **dd),
                )
            blocks = [
                SpatialMambaBlock(dim, expand=expand, mlp_ratio=mlp_ratio, drop_path=rate, **dd) for rate in dpr[i]]
            stages.append(Stage(downsample, blocks))
            self.feature_info.append(dict(module=f'stages.{i}', num_chs=dim, reduction=4 * 2 ** i))
        self.stages = nn.Sequential(*stages)
        self.num_features = dim
        self.norm = LayerNorm2d(dim, eps=1e-5, **dd)
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, global_pool)
        self.init_weights(needs_reset=False)

    def init_module(self, module: nn.Module, name: str) -> None:
        """As `HierarchicalModel.init_module`."""
        if isinstance(module, SpatialMambaMixer):
            module.init_dt()
        elif not name.endswith('x_proj'):
            super().init_module(module, name)


def checkpoint_filter_fn(state_dict: StateDict, model: SpatialMamba) -> StateDict:
    """The authors' checkpoint, of classification, detection or segmentation, or our own, to this model's names."""
    names = {
        r'^patch_embed\.conv1\.conv\.': 'stem.0.',
        r'^patch_embed\.conv1\.norm\.': 'stem.1.',
        r'^patch_embed\.conv2\.(\d)\.(conv|norm)\.': lambda m: f'stem.3.{m[2]}{int(m[1]) + 1}.',
        r'^patch_embed\.conv3\.(\d)\.(conv|norm)\.': lambda m:
            f'stages.0.downsample.layers.{3 * int(m[1]) + (m[2] == "norm")}.',
        # theirs ends a stage, ours begins the next
        r'^layers\.(\d+)\.downsample\.conv\.(\d)\.(conv|norm)\.': lambda m:
            f'stages.{int(m[1]) + 1}.downsample.layers.{2 * int(m[2]) + (m[3] == "norm")}.',
        r'^layers\.': 'stages.',
        r'\.ln_(\d)\.': r'.norm\1.',
        r'\.self_attention\.': '.mixer.',
        r'\.x_proj_weight$': '.x_proj.weight',
        r'\.dt_projs_': '.dt_proj.',
        r'\.A_logs$': '.A_log',
        r'\.Ds$': '.D',
        r'\.out_norm\.': '.norm.',
        r'\.state_fusion\.': '.fusion.',
    }
    state_dict = backbone_of_detector(unwrap_state_dict(state_dict))
    out = {}
    for k, v in state_dict.items():
        for pattern, name in names.items():
            k = re.sub(pattern, name, k)
        out[k] = v
    for k in [k for k in out if k.endswith('.fusion.kernel_3')]:  # of dilation 1, 3 and 5
        kernels = [out.pop(k + suffix, None) for suffix in ('', '_1', '_2')]
        if None not in kernels:
            out[k.replace('kernel_3', 'weight')] = torch.stack(kernels)
    return refuse_mismatch(out, model, adaptable=('head.', 'stem.0.'))


def _create_spatialmamba(variant: str, pretrained: bool = False, **kwargs) -> SpatialMamba:
    return build_hierarchical(SpatialMamba, variant, pretrained, checkpoint_filter_fn, **kwargs)


def _cfg() -> Dict[str, Any]:
    return image_cfg(
        origin_url='https://github.com/EdwardChasel/Spatial-Mamba',
        paper_name='Spatial-Mamba: Effective Visual State Space Models via Structure-aware State Fusion',
        paper_ids='arXiv:2410.15091')


default_cfgs = generate_default_cfgs({
    'spatialmamba_tiny.untrained': _cfg(),
    'spatialmamba_small.untrained': _cfg(),
    'spatialmamba_base.untrained': _cfg(),
})


@register_model
def spatialmamba_tiny(pretrained: bool = False, **kwargs) -> SpatialMamba:
    """Spatial-Mamba-T, 27 M parameters."""
    model_args = dict(embed_dim=64, depths=(2, 4, 8, 4), drop_path_rate=0.2)
    return _create_spatialmamba('spatialmamba_tiny', pretrained, **dict(model_args, **kwargs))


@register_model
def spatialmamba_small(pretrained: bool = False, **kwargs) -> SpatialMamba:
    """Spatial-Mamba-S, 43 M parameters."""
    model_args = dict(embed_dim=64, depths=(2, 4, 21, 5), drop_path_rate=0.3)
    return _create_spatialmamba('spatialmamba_small', pretrained, **dict(model_args, **kwargs))


@register_model
def spatialmamba_base(pretrained: bool = False, **kwargs) -> SpatialMamba:
    """Spatial-Mamba-B, 96 M parameters."""
    model_args = dict(embed_dim=96, depths=(2, 4, 21, 5), drop_path_rate=0.5)
    return _create_spatialmamba('spatialmamba_base', pretrained, **dict(model_args, **kwargs))
