"""GroupMamba: a hierarchical backbone whose channel groups scan the map in four directions; and StableGroupMamba.

Papers:
* `GroupMamba: Efficient Group-Based Visual State Space Model` - https://arxiv.org/abs/2407.13772
* `StableMamba: Distillation-free Scaling of Large SSMs for Images and Videos` - https://arxiv.org/abs/2409.11867

GroupMamba authors' code and weights: https://github.com/Amshaker/GroupMamba

This is an implementation from the papers; parameter values are those of the GroupMamba authors' checkpoints, names
follow timm. StableGroupMamba has no public code or weights.
"""
import math
import re
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

import torch
from timm.layers import Attention, DropPath, LayerNorm2d, Mlp, calculate_drop_path_rates
from timm.models import generate_default_cfgs, register_model
from torch import nn
from torch.nn import functional as F

from ..layers import DtProj, ScanInputs, ScanMixer, scan, state_decay
from ._builder import image_cfg
from ._checkpoints import refuse_mismatch, unwrap_state_dict
from ._hierarchical import Downsample, HierarchicalModel, Stage, build_hierarchical, check_head

__all__ = ['GroupMamba']


class GroupScan(ScanMixer):
    """Visual single selective scan (VSSS): a depthwise convolution and a gated scan of the map in one direction.

    The scan has one state a channel and is float32 under autocast too, as in the authors' code.
    """

    def __init__(self, dim: int, column_major: bool = False, reverse: bool = False, device=None, dtype=None) -> None:
        """
        Args:
            dim: Channels.
            column_major: Scan column after column instead of row after row.
            reverse: Scan from the last position to the first.
        """
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.column_major = column_major
        self.reverse = reverse
        self.dt_rank = math.ceil(dim / 16)

        self.in_proj = nn.Linear(dim, 2 * dim, bias=False, **dd)
        self.conv2d = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd)
        self.x_proj = nn.Linear(dim, self.dt_rank + 2, bias=False, **dd)
        self.dt_proj = DtProj(self.dt_rank, dim, **dd)
        self.A_log = nn.Parameter(torch.empty(dim, 1, **dd))
        self.D = nn.Parameter(torch.empty(dim, **dd))
        self.norm = nn.LayerNorm(dim, **dd)
        self.out_proj = nn.Linear(dim, dim, bias=False, **dd)
        self.reset_parameters()

    def project(self, x: torch.Tensor) -> List[ScanInputs]:
        """(B, H, W, dim) -> what the scan is given, and the gate (B, H, W, dim) as bypass."""
        x, z = self.in_proj(x).chunk(2, dim=-1)
        x = F.silu(self.conv2d(x.permute(0, 3, 1, 2)))
        # The tokens are laid out in the order of the scan. Whatever follows concerns single tokens, and the gate reads
        # the columns through a view, so that nothing is copied on the way back.
        x = x.permute(0, 3, 2, 1) if self.column_major else x.permute(0, 2, 3, 1)
        x = x.flatten(1, 2).contiguous()
        dt, B, C = self.x_proj(x).split([self.dt_rank, 1, 1], dim=-1)
        return [ScanInputs(
            x, self.dt_proj(dt), state_decay(self.A_log), B, C, self.D, None, self.dt_proj.bias,
            reverse=self.reverse, bypass=z)]

    def restore(self, y: torch.Tensor, direction: int, shape: List[int]) -> torch.Tensor:
        """As `ScanMixer.restore`."""
        if self.column_major:
            return y.unflatten(1, [shape[2], shape[1]]).transpose(1, 2)
        return y.unflatten(1, [shape[1], shape[2]])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, H, W, dim) -> (B, H, W, dim)"""
        inputs = self.project(x)
        z = inputs[0].bypass
        assert z is not None
        y = self.norm(scan(inputs, float32=True).to(self.norm.weight.dtype))
        return self.out_proj(F.silu(z) * self.restore(y, 0, x.shape))


class MapAttention(nn.Module):
    """Self-attention over all positions of a map, in heads of 32 channels, without position embedding."""

    def __init__(self, dim: int, device=None, dtype=None) -> None:
        super().__init__()
        self.attn = Attention(dim, max(1, dim // 32), qkv_bias=True, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, H, W, dim) -> (B, H, W, dim)"""
        return self.attn(x.flatten(1, 2)).reshape(x.shape)


class GroupMambaLayer(nn.Module):
    """Modulated group Mamba layer: four channel groups, each scanned in its direction, and channel affinities.

    The group `attn_group` has self-attention instead of a scan.
    """

    def __init__(self, dim: int, attn_group: Optional[int] = None, device=None, dtype=None) -> None:
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        if dim % 4:
            raise ValueError(f'embed_dims: got {dim}, needs multiples of 4, for four channel groups')
        self.norm = nn.LayerNorm(dim, **dd)
        self.fc1 = nn.Linear(dim, dim // 16, **dd)
        self.fc2 = nn.Linear(dim // 16, dim, **dd)
        self.mixers = nn.ModuleList([
            MapAttention(dim // 4, **dd) if i == attn_group
            else GroupScan(dim // 4, column_major=i % 2 == 1, reverse=i >= 2, **dd)
            for i in range(4)
        ])
        self.skip_scale = nn.Parameter(torch.empty(1, **dd))
        self.proj = nn.Linear(dim, dim, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the parameter that is this module's own, the scale."""
        nn.init.ones_(self.skip_scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, H, W, dim) -> (B, H, W, dim)"""
        x = self.norm(x)
        affinity = self.fc2(F.relu(self.fc1(x.mean((1, 2), keepdim=True)))).sigmoid()
        groups = x.chunk(4, dim=-1)
        y = torch.cat([mixer(groups[i]) for i, mixer in enumerate(self.mixers)], dim=-1)
        y = y * self.skip_scale * x * affinity
        return self.proj(self.norm(y))  # the norm of the input again, not a second one


class ConvFfn(nn.Module):
    """MLP with a depthwise convolution before its activation."""

    def __init__(self, dim: int, hidden_dim: int, device=None, dtype=None) -> None:
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.fc1 = nn.Linear(dim, hidden_dim, **dd)
        self.dwconv = nn.Conv2d(hidden_dim, hidden_dim, 3, padding=1, groups=hidden_dim, **dd)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, dim, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, H, W, dim) -> (B, H, W, dim)"""
        x = self.fc1(x)
        x = self.dwconv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.fc2(self.act(x))


class GroupMambaBlock(nn.Module):
    """x + mixer(x), then x + mlp(norm(x)); the mixer has its own norm."""

    def __init__(
            self,
            dim: int,
            mlp_ratio: float = 4.,
            attn_group: Optional[int] = None,
            drop_path: float = 0.,
            device=None,
            dtype=None,
    ) -> None:
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.mixer = GroupMambaLayer(dim, attn_group=attn_group, **dd)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0. else nn.Identity()
        self.norm = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.mlp = ConvFfn(dim, int(dim * mlp_ratio), **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0. else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, H, W, dim) -> (B, H, W, dim)"""
        x = x + self.drop_path1(self.mixer(x))
        x = x + self.drop_path2(self.mlp(self.norm(x)))
        return x


class PooledBlock(nn.Module):
    """The block after pooling: x + norm(mixer(x)), then x + mlp(norm(x)), on a map of one position."""

    def __init__(self, dim: int, mlp_ratio: float = 4., device=None, dtype=None) -> None:
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.mixer = GroupMambaLayer(dim, **dd)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, dim, 1, 1) -> (B, dim, 1, 1)"""
        x = x.permute(0, 2, 3, 1)
        x = x + self.norm1(self.mixer(x))
        x = x + self.mlp(self.norm2(x))
        return x.permute(0, 3, 1, 2)


class GroupMamba(HierarchicalModel):
    """GroupMamba, and StableGroupMamba with `attn_every`.

    Takes images (B, C, H, W) of any size. The pooled features pass through a block of their own before the head, or
    heads: with distillation there are two, whose logits are averaged, but returned as a pair while training after
    `set_distilled_training()`.
    """

    def __init__(
            self,
            in_chans: int = 3,
            num_classes: int = 1000,
            global_pool: str = 'avg',
            stem_dim: int = 32,
            embed_dims: Sequence[int] = (64, 128, 348, 448),
            depths: Sequence[int] = (3, 4, 9, 3),
            mlp_ratios: Sequence[float] = (8., 8., 4., 4.),
            attn_every: int = 0,
            distillation: bool = True,
            drop_rate: float = 0.,
            drop_path_rate: float = 0.,
            device=None,
            dtype=None,
    ) -> None:
        """
        Args:
            in_chans: Input channels.
            num_classes: Classes of the heads; 0 for no head.
            global_pool: 'avg', or '' (with num_classes 0) for the last stage's map without what follows pooling.
            stem_dim: Channels inside the stem.
            embed_dims: Channels of each stage, multiples of 4.
            depths: Blocks of each stage.
            mlp_ratios: Hidden width of the MLPs over the channels, of each stage.
            attn_every: Interval, in blocks of a stage other than the first, at which self-attention replaces the scan
                of one channel group, of the next group each time; 0 for no attention.
            distillation: Have a second head, for a teacher's labels.
            drop_rate: Dropout before the heads.
            drop_path_rate: Stochastic depth of the last block, growing linearly from 0 at the first.
        """
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.in_chans = in_chans
        self.distillation = distillation
        self.distilled_training = False

        stem = []
        for i, in_dim in enumerate((in_chans, stem_dim, stem_dim)):
            kernel_size, stride = (7, 2) if i == 0 else (3, 1)
            stem += [
                nn.Conv2d(in_dim, stem_dim, kernel_size, stride=stride, padding=kernel_size // 2, bias=False, **dd),
                nn.BatchNorm2d(stem_dim, **dd),
                nn.ReLU(),
            ]
        self.stem = nn.Sequential(*stem)

        dpr = calculate_drop_path_rates(drop_path_rate, depths, stagewise=True)
        stages = []
        self.feature_info = []
        in_dim = stem_dim
        num_attn = 0
        for i, (dim, depth) in enumerate(zip(embed_dims, depths)):
            blocks = []
            for j in range(depth):
                attn_group = None
                if attn_every and i > 0 and (j + 1) % attn_every == 0:
                    attn_group = num_attn % 4
                    num_attn += 1
                blocks.append(GroupMambaBlock(dim, mlp_ratios[i], attn_group=attn_group, drop_path=dpr[i][j], **dd))
            norm = nn.LayerNorm(dim, eps=1e-6, **dd) if i < len(depths) - 1 else None
            stages.append(Stage(Downsample(in_dim, dim, **dd), blocks, norm))
            self.feature_info.append(dict(module=f'stages.{i}', num_chs=dim, reduction=4 * 2 ** i))
            in_dim = dim
        self.stages = nn.Sequential(*stages)
        self.num_features = dim
        self.pooled_block = PooledBlock(dim, mlp_ratios[-1], **dd)
        self.norm = LayerNorm2d(dim, eps=1e-6, **dd)
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, global_pool)
        self.init_weights(needs_reset=False)

    def init_module(self, module: nn.Module, name: str) -> None:
        """As `HierarchicalModel.init_module`."""
        super().init_module(module, name)
        if isinstance(module, nn.Conv2d):
            fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
            nn.init.normal_(module.weight, std=math.sqrt(2. / fan_out))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, GroupScan):
            module.init_dt()

    @torch.jit.ignore
    def get_classifier(self) -> Union[nn.Module, Tuple[nn.Module, nn.Module]]:
        """The classifier head, or both heads."""
        return self.head if self.head_dist is None else (self.head, self.head_dist)

    @torch.jit.ignore
    def set_distilled_training(self, enable: bool = True) -> None:
        """Return the logits of both heads, in training mode, instead of their mean."""
        if not self.distillation:
            raise ValueError('set_distilled_training: the model has one head; create it with distillation=True')
        self.distilled_training = enable

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """Replace the heads by new ones.

        Args:
            num_classes: Classes; 0 for no head.
            global_pool: Pooling as in the constructor; None to keep the current one.
        """
        if global_pool is not None:
            if global_pool not in ('', 'avg'):
                raise ValueError(f"global_pool: got {global_pool!r}, needs 'avg' or ''")
            check_head(num_classes, global_pool)
            self.global_pool = global_pool
        weight = self.stem[0].weight
        self.num_classes = num_classes
        self.head_hidden_size = self.num_features

        def head() -> nn.Module:
            if num_classes <= 0:
                return nn.Identity()
            head = nn.Linear(self.num_features, num_classes, device=weight.device, dtype=weight.dtype)
            return head.train(self.training)

        self.head = head()
        self.head_dist = head() if self.distillation else None

    def prune_intermediate_layers(
            self,
            indices: Union[int, List[int]] = 1,
            prune_norm: bool = False,
            prune_head: bool = True,
    ) -> List[int]:
        """Prune layers not required for specified intermediates."""
        num_stages = len(self.stages)
        take_indices = super().prune_intermediate_layers(indices, prune_norm=prune_norm, prune_head=prune_head)
        if prune_head or len(self.stages) < num_stages:
            self.pooled_block = nn.Identity()
        return take_indices

    def forward_final(self, x: torch.Tensor) -> torch.Tensor:
        """The last stage's map as it is: the norm belongs to the pooled features."""
        return x

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Features (B, C, H, W) to logits (B, num_classes), or to what the classifier would get."""
        if self.global_pool == 'avg':
            x = self.pooled_block(x.mean((2, 3), keepdim=True))
            x = self.norm(x).flatten(1)
        x = self.head_drop(x)
        if pre_logits:
            return x
        self.refuse_unpooled(x)
        if self.head_dist is None:
            return self.head(x)
        x, x_dist = self.head(x), self.head_dist(x)
        if self.distilled_training and self.training and not torch.jit.is_scripting():
            # only return separate classification predictions when training in distilled mode
            return x, x_dist
        else:
            return (x + x_dist) / 2


def checkpoint_filter_fn(state_dict: Dict[str, torch.Tensor], model: GroupMamba) -> Dict[str, torch.Tensor]:
    """The authors' or our own checkpoint to this model's names.

    Two heads become their mean, which predicts the same, if the model has only one.
    """
    out = {}
    for k, v in unwrap_state_dict(state_dict).items():
        k = k.replace('dist_head.', 'head_dist.')
        if k.startswith('patch_embed1.conv.'):
            k = k.replace('patch_embed1.conv.', 'stem.')
        k = re.sub(r'^patch_embed(\d)\.', lambda m: f'stages.{int(m[1]) - 1}.downsample.', k)
        k = re.sub(r'^norm([1-3])\.', lambda m: f'stages.{int(m[1]) - 1}.norm.', k)
        k = k.replace('norm4.', 'norm.')
        if k.startswith('block'):
            k = re.sub(r'^block(\d)\.(\d+)\.', lambda m: f'stages.{int(m[1]) - 1}.blocks.{m[2]}.', k)
            k = k.replace('.attn.', '.mixer.').replace('.norm2.', '.norm.').replace('.dwconv.dwconv.', '.dwconv.')
        elif k.startswith('post_network.0.'):
            k = k.replace('post_network.0.', 'pooled_block.').replace('.attn.', '.mixer.')
        if '.mamba_g' in k:
            k = re.sub(r'\.mamba_g(\d)\.', lambda m: f'.mixers.{int(m[1]) - 1}.', k)
            if k.endswith(('x_proj_weight', 'dt_projs_weight', 'dt_projs_bias')):
                v = v.squeeze(0)
            k = k.replace('x_proj_weight', 'x_proj.weight').replace('dt_projs_', 'dt_proj.')
            k = k.replace('A_logs', 'A_log').replace('Ds', 'D').replace('out_norm.', 'norm.')
        out[k] = v
    if model.head_dist is None and 'head_dist.weight' in out:
        for k in ('weight', 'bias'):
            out[f'head.{k}'] = (out[f'head.{k}'] + out.pop(f'head_dist.{k}')) / 2
    return refuse_mismatch(out, model, adaptable=('head.', 'head_dist.', 'stem.0.'))


def _create_groupmamba(variant: str, pretrained: bool = False, **kwargs) -> GroupMamba:
    return build_hierarchical(GroupMamba, variant, pretrained, checkpoint_filter_fn, **kwargs)


def _cfg(**kwargs) -> Dict[str, Any]:
    return image_cfg(**{
        'classifier': ('head', 'head_dist'),
        'license': 'mit',
        'notes': ('The weights are MIT by their repositories\' metadata, non-commercial by their model cards\' text.',),
        'origin_url': 'https://github.com/Amshaker/GroupMamba',
        'paper_name': 'GroupMamba: Efficient Group-Based Visual State Space Model',
        'paper_ids': 'arXiv:2407.13772',
        **kwargs,
    })


default_cfgs = generate_default_cfgs({
    'groupmamba_tiny.in1k': _cfg(
        hf_hub_id='Abdelrahman-shaker/GroupMamba-Tiny', hf_hub_filename='groupmamba_tiny_ema.pth'),
    'groupmamba_small.in1k': _cfg(
        hf_hub_id='Abdelrahman-shaker/GroupMamba-Small', hf_hub_filename='groupmamba_small_ema.pth'),
    'groupmamba_base.in1k': _cfg(  # the file's name is inferred from the other two
        hf_hub_id='Abdelrahman-shaker/GroupMamba-Base', hf_hub_filename='groupmamba_base_ema.pth'),
    'stable_groupmamba_small.untrained': _cfg(
        license=None, notes=None, origin_url=None, paper_ids='arXiv:2409.11867',
        paper_name='StableMamba: Distillation-free Scaling of Large SSMs for Images and Videos'),
})


@register_model
def groupmamba_tiny(pretrained: bool = False, **kwargs) -> GroupMamba:
    """GroupMamba-T, 23 M parameters."""
    model_args = dict(stem_dim=32, embed_dims=(64, 128, 348, 448), depths=(3, 4, 9, 3))
    return _create_groupmamba('groupmamba_tiny', pretrained, **dict(model_args, **kwargs))


@register_model
def groupmamba_small(pretrained: bool = False, **kwargs) -> GroupMamba:
    """GroupMamba-S, 35 M parameters."""
    model_args = dict(stem_dim=64, embed_dims=(64, 128, 348, 512), depths=(3, 4, 16, 3))
    return _create_groupmamba('groupmamba_small', pretrained, **dict(model_args, **kwargs))


@register_model
def groupmamba_base(pretrained: bool = False, **kwargs) -> GroupMamba:
    """GroupMamba-B, 57 M parameters."""
    model_args = dict(stem_dim=64, embed_dims=(96, 192, 424, 512), depths=(3, 6, 21, 3))
    return _create_groupmamba('groupmamba_base', pretrained, **dict(model_args, **kwargs))


@register_model
def stable_groupmamba_small(pretrained: bool = False, **kwargs) -> GroupMamba:
    """StableGroupMamba-S, 39 M parameters.

    A reconstruction: the paper says that attention replaces one scan in eight and gives sizes. Here it does in every
    second block of stages 2 to 4, in each of the four groups in turn, with heads of 32 channels, which gives them.
    """
    model_args = dict(stem_dim=64, embed_dims=(64, 128, 384, 512), depths=(3, 4, 16, 3), attn_every=2)
    return _create_groupmamba('stable_groupmamba_small', pretrained, **dict(model_args, **kwargs))
