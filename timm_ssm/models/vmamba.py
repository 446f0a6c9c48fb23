"""VMamba: a hierarchical backbone that scans its maps in four directions.

Paper: `VMamba: Visual State Space Model` - https://arxiv.org/abs/2401.10166

Authors' code and weights: https://github.com/MzeroMiko/VMamba (MIT)

The final models of the paper: no gate, one state a channel, an MLP in every block. This is an implementation from the
paper and the authors' documentation; parameter values are those of the authors' checkpoints, names follow timm.
Detection and segmentation checkpoints load too: the backbone's weights, with a final norm and a head that are new.
"""
import math
import re
from typing import Any, Dict, List, Sequence

import torch
from timm.layers import LayerNorm2d, calculate_drop_path_rates
from timm.models import generate_default_cfgs, register_model, register_model_deprecations
from torch import nn
from torch.nn import functional as F

from ..layers import DtProj, LayerNorm, ScanInputs, ScanMixer, scan, state_decay
from ._builder import image_cfg
from ._checkpoints import StateDict, UnsupportedModel, refuse_mismatch, unwrap_state_dict
from ._hierarchical import (
    Downsample,
    HierarchicalModel,
    MixerMlpBlock,
    Stage,
    backbone_of_detector,
    build_hierarchical,
)

__all__ = ['VMamba']


class SS2D(ScanMixer):
    """2D selective scan: the sum of four scans of a map, by rows and by columns, each forward and in reverse.

    The scans and their sum are float32 under autocast too, as in the authors' code.
    """

    def __init__(self, dim: int, expand: float = 1., d_state: int = 1, device=None, dtype=None) -> None:
        """
        Args:
            dim: Channels.
            expand: Scanned channels over dim.
            d_state: States of a scanned channel.
        """
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        inner = int(expand * dim)
        self.d_state = d_state
        self.dt_rank = math.ceil(dim / 16)

        self.in_proj = nn.Linear(dim, inner, bias=False, **dd)
        self.conv2d = nn.Conv2d(inner, inner, 3, padding=1, groups=inner, bias=False, **dd)
        # of each direction: rows, columns, rows in reverse, columns in reverse
        self.x_proj = nn.Linear(inner, 4 * (self.dt_rank + 2 * d_state), bias=False, **dd)
        self.dt_proj = nn.ModuleList([DtProj(self.dt_rank, inner, **dd) for _ in range(4)])
        self.A_log = nn.Parameter(torch.empty(4, inner, d_state, **dd))
        self.D = nn.Parameter(torch.empty(4, inner, **dd))
        self.norm = LayerNorm(inner, **dd)
        self.out_proj = nn.Linear(inner, dim, bias=False, **dd)
        self.reset_parameters()

    def project(self, x: torch.Tensor) -> List[ScanInputs]:
        """(B, H, W, dim) -> what the scans by rows and columns, and those in reverse, are given."""
        x = F.silu(self.conv2d(self.in_proj(x).permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
        rows, columns = x.flatten(1, 2), x.transpose(1, 2).flatten(1, 2)
        params = self.x_proj(x).chunk(4, dim=-1)
        A = state_decay(self.A_log)
        inputs: List[ScanInputs] = []
        for i, dt_proj in enumerate(self.dt_proj):
            by_columns = i % 2 == 1
            p = params[i].transpose(1, 2) if by_columns else params[i]
            dt, B, C = p.flatten(1, 2).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
            inputs.append(ScanInputs(
                columns if by_columns else rows, dt_proj(dt), A[i], B, C, self.D[i], None, dt_proj.bias,
                reverse=i >= 2))
        return inputs

    def restore(self, y: torch.Tensor, direction: int, shape: List[int]) -> torch.Tensor:
        """As `ScanMixer.restore`."""
        if direction % 2 == 0:
            return y.unflatten(1, [shape[1], shape[2]])
        return y.unflatten(1, [shape[2], shape[1]]).transpose(1, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, H, W, dim) -> (B, H, W, dim)"""
        inputs = self.project(x)
        rows = scan([inputs[0], inputs[2]], float32=True)
        columns = scan([inputs[1], inputs[3]], float32=True)
        y = self.restore(rows, 0, x.shape) + self.restore(columns, 1, x.shape)
        return self.out_proj(self.norm(y))


class VMamba(HierarchicalModel):
    """VMamba. Takes images (B, C, H, W) of any size."""

    def __init__(
            self,
            in_chans: int = 3,
            num_classes: int = 1000,
            global_pool: str = 'avg',
            embed_dims: Sequence[int] = (96, 192, 384, 768),
            depths: Sequence[int] = (2, 2, 8, 2),
            expand: float = 1.,
            d_state: int = 1,
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
            embed_dims: Channels of each stage.
            depths: Blocks of each stage.
            expand: Scanned channels over those of the stage.
            d_state: States of a scanned channel.
            mlp_ratio: Hidden width of the MLPs over the channels.
            drop_rate: Dropout before the head.
            drop_path_rate: Stochastic depth of the last block, growing linearly from 0 at the first.
        """
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.in_chans = in_chans

        stem_dim = embed_dims[0] // 2
        self.stem = nn.Sequential(
            nn.Conv2d(in_chans, stem_dim, 3, stride=2, padding=1, **dd),
            LayerNorm2d(stem_dim, eps=1e-5, **dd),
            nn.GELU(),
        )
        dpr = calculate_drop_path_rates(drop_path_rate, depths, stagewise=True)
        stages = []
        self.feature_info = []
        for i, (in_dim, dim) in enumerate(zip((stem_dim, *embed_dims), embed_dims)):
            blocks = [
                MixerMlpBlock(dim, SS2D(dim, expand, d_state, **dd), mlp_ratio=mlp_ratio, drop_path=rate, **dd)
                for rate in dpr[i]]
            stages.append(Stage(Downsample(in_dim, dim, **dd), blocks))
            self.feature_info.append(dict(module=f'stages.{i}', num_chs=dim, reduction=4 * 2 ** i))
        self.stages = nn.Sequential(*stages)
        self.num_features = dim
        self.norm = LayerNorm2d(dim, eps=1e-5, **dd)
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, global_pool)
        self.init_weights(needs_reset=False)

    def init_module(self, module: nn.Module, name: str) -> None:
        """As `HierarchicalModel.init_module`."""
        if isinstance(module, SS2D):
            module.init_dt()
        elif not name.endswith('x_proj'):
            super().init_module(module, name)


def _rename(k: str) -> str:
    """A parameter's name in the authors' files, or in their conversion for transformers, to ours; ours unchanged."""
    names = {
        r'^patch_embed\.0|^patch_embeddings\.projection\.0': 'stem.0',
        r'^patch_embed\.2|^patch_embeddings\.projection\.1': 'stem.1',
        r'^patch_embed\.5|^patch_embeddings\.projection\.3': 'stages.0.downsample.proj',
        r'^patch_embed\.7|^patch_embeddings\.projection\.4': 'stages.0.downsample.norm',
        r'^layers\.(\d+)\.blocks\.(\d+)\.norm\.': r'stages.\1.blocks.\2.norm1.',
        r'^layers\.(\d+)\.blocks\.(\d+)\.op\.(out_(?=norm))?': r'stages.\1.blocks.\2.mixer.',
        r'^layers\.(\d+)\.blocks\.': r'stages.\1.blocks.',
    }
    for pattern, name in names.items():
        k = re.sub(pattern, name, k)
    # theirs ends a stage, ours begins the next
    return re.sub(
        r'^layers\.(\d+)\.downsample\.(1|3|down|norm)',
        lambda m: f'stages.{int(m[1]) + 1}.downsample.{"proj" if m[2] in ("1", "down") else "norm"}', k)


def checkpoint_filter_fn(state_dict: StateDict, model: VMamba) -> StateDict:
    """The authors' checkpoint, of classification, detection or segmentation, or our own, to this model's names.

    Raises:
        UnsupportedModel: It is of the paper's first version.
        CheckpointMismatch: It is of another model.
    """
    state_dict = backbone_of_detector(unwrap_state_dict(state_dict))
    mixers = [k.removesuffix('conv2d.bias') for k in state_dict if k.endswith('conv2d.bias')]
    gated = any(len(state_dict.get(f'{m}in_proj.weight', ())) == 2 * len(state_dict[f'{m}conv2d.bias']) for m in mixers)
    if gated and not any('.mlp.' in k for k in state_dict):
        raise UnsupportedModel(
            'checkpoint: it is of the first version of VMamba (v0, gated and without MLPs), needs one of the final '
            'models (v2)', state_dict)
    out = {}
    for k, v in state_dict.items():
        k = _rename(k.removeprefix('vmamba.').removeprefix('classifier.'))
        if '.mixer.' in k or '.mlp.' in k:
            if v.ndim == 4 and not k.endswith('conv2d.weight'):  # linear layers as 1 x 1 convolutions
                v = v.flatten(1)
            prefix, _, name = k.rpartition('.mixer.')
            if name in ('dt_projs_weight', 'dt_projs.weight', 'dt_projs_bias'):
                kind = 'bias' if name.endswith('bias') else 'weight'
                parts = v.reshape(4, -1, *([v.shape[-1]] if kind == 'weight' else []))
                out.update({f'{prefix}.mixer.dt_proj.{i}.{kind}': part for i, part in enumerate(parts)})
                continue
            if name == 'x_proj_weight':
                k, v = f'{prefix}.mixer.x_proj.weight', v.flatten(0, 1)
            elif name == 'A_logs':
                k, v = f'{prefix}.mixer.A_log', v.reshape(4, -1, v.shape[-1])
            elif name == 'Ds':
                k, v = f'{prefix}.mixer.D', v.reshape(4, -1)
        out[k] = v
    return refuse_mismatch(out, model, adaptable=('head.', 'stem.0.'))


def _create_vmamba(variant: str, pretrained: bool = False, **kwargs) -> VMamba:
    return build_hierarchical(VMamba, variant, pretrained, checkpoint_filter_fn, **kwargs)


def _cfg(file: str) -> Dict[str, Any]:
    return image_cfg(
        url=f'https://github.com/MzeroMiko/VMamba/releases/download/%23v2cls/{file}',
        license='mit', origin_url='https://github.com/MzeroMiko/VMamba',
        paper_name='VMamba: Visual State Space Model', paper_ids='arXiv:2401.10166')


default_cfgs = generate_default_cfgs({
    'vmamba_tiny.in1k': _cfg('vssm1_tiny_0230s_ckpt_epoch_264.pth'),
    'vmamba_small.in1k': _cfg('vssm_small_0229_ckpt_epoch_222.pth'),
    'vmamba_base.in1k': _cfg('vssm_base_0229_ckpt_epoch_237.pth'),
    'vmamba_tiny_s2l5.in1k': _cfg('vssm_tiny_0230_ckpt_epoch_262.pth'),
    'vmamba_small_s1l20.in1k': _cfg('vssm1_small_0229s_ckpt_epoch_240.pth'),
    'vmamba_base_s1l20.in1k': _cfg('vssm1_base_0229s_ckpt_epoch_225.pth'),
})


@register_model
def vmamba_tiny(pretrained: bool = False, **kwargs) -> VMamba:
    """VMamba-T, 30 M parameters."""
    model_args = dict(embed_dims=(96, 192, 384, 768), depths=(2, 2, 8, 2), expand=1., drop_path_rate=0.2)
    return _create_vmamba('vmamba_tiny', pretrained, **dict(model_args, **kwargs))


@register_model
def vmamba_small(pretrained: bool = False, **kwargs) -> VMamba:
    """VMamba-S, 50 M parameters."""
    model_args = dict(embed_dims=(96, 192, 384, 768), depths=(2, 2, 15, 2), expand=2., drop_path_rate=0.3)
    return _create_vmamba('vmamba_small', pretrained, **dict(model_args, **kwargs))


@register_model
def vmamba_base(pretrained: bool = False, **kwargs) -> VMamba:
    """VMamba-B, 89 M parameters."""
    model_args = dict(embed_dims=(128, 256, 512, 1024), depths=(2, 2, 15, 2), expand=2., drop_path_rate=0.6)
    return _create_vmamba('vmamba_base', pretrained, **dict(model_args, **kwargs))


@register_model
def vmamba_tiny_s2l5(pretrained: bool = False, **kwargs) -> VMamba:
    """VMamba-T, wider in its scans and shallower."""
    model_args = dict(embed_dims=(96, 192, 384, 768), depths=(2, 2, 5, 2), expand=2., drop_path_rate=0.2)
    return _create_vmamba('vmamba_tiny_s2l5', pretrained, **dict(model_args, **kwargs))


@register_model
def vmamba_small_s1l20(pretrained: bool = False, **kwargs) -> VMamba:
    """VMamba-S, narrower in its scans and deeper."""
    model_args = dict(embed_dims=(96, 192, 384, 768), depths=(2, 2, 20, 2), expand=1., drop_path_rate=0.3)
    return _create_vmamba('vmamba_small_s1l20', pretrained, **dict(model_args, **kwargs))


@register_model
def vmamba_base_s1l20(pretrained: bool = False, **kwargs) -> VMamba:
    """VMamba-B, narrower in its scans and deeper."""
    model_args = dict(embed_dims=(128, 256, 512, 1024), depths=(2, 2, 20, 2), expand=1., drop_path_rate=0.5)
    return _create_vmamba('vmamba_base_s1l20', pretrained, **dict(model_args, **kwargs))


register_model_deprecations(__name__, {
    'vmamba_tiny_s1l8': 'vmamba_tiny',
    'vmamba_small_s2l15': 'vmamba_small',
    'vmamba_base_s2l15': 'vmamba_base',
})
