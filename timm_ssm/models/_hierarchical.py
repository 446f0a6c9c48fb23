"""What the hierarchical families share: stages of blocks, and timm's model interface over a stem, stages and a head."""
import inspect
from typing import Any, Callable, Dict, List, Optional, Set, Tuple, Type, Union

import torch
from timm.layers import DropPath, LayerScale, Mlp, create_classifier, trunc_normal_
from timm.models import checkpoint_seq, named_apply
from torch import _assert, nn

from ._builder import build_model_with_cfg
from ._checkpoints import StateDict
from ._features import take_indices


class Downsample(nn.Module):
    """Convolution of stride 2 and norm, (B, in_dim, H, W) -> (B, H / 2, W / 2, out_dim)."""

    def __init__(self, in_dim: int, out_dim: int, device=None, dtype=None) -> None:
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.proj = nn.Conv2d(in_dim, out_dim, 3, stride=2, padding=1, **dd)
        self.norm = nn.LayerNorm(out_dim, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class Stage(nn.Module):
    """Downsampling, blocks and a norm, all but the first with channels last: (B, C, H, W) -> (B, C', H', W')."""

    def __init__(self, downsample: nn.Module, blocks: List[nn.Module], norm: Optional[nn.Module] = None) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.Identity() if norm is None else norm
        self.grad_checkpointing = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.downsample(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.blocks, x)
        else:
            x = self.blocks(x)
        return self.norm(x).permute(0, 3, 1, 2)


class MixerMlpBlock(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)), on maps (B, H, W, dim) or tokens (B, L, dim).

    Both branches have a layer scale, unless its initial value is None, and stochastic depth.
    """

    def __init__(
            self,
            dim: int,
            mixer: nn.Module,
            mlp_ratio: float = 4.,
            ls_init_value: Optional[float] = None,
            drop_path: float = 0.,
            device=None,
            dtype=None,
    ) -> None:
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.norm1 = nn.LayerNorm(dim, **dd)
        self.mixer = mixer
        self.ls1 = nn.Identity() if ls_init_value is None else LayerScale(dim, ls_init_value, **dd)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0. else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), **dd)
        self.ls2 = nn.Identity() if ls_init_value is None else LayerScale(dim, ls_init_value, **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0. else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.drop_path1(self.ls1(self.mixer(self.norm1(x))))
        x = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return x


class HierarchicalModel(nn.Module):
    """Base of models made of a stem, stages that take and return maps (B, C, H, W), a final norm, pooling and a head.

    A subclass sets in_chans, num_features, feature_info, stem, stages, norm and head_drop, and calls `reset_classifier`
    and `init_weights`. A stage has downsample, blocks and grad_checkpointing.
    """

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Initialise all parameters as the authors' code does.

        Args:
            needs_reset: Also reset the modules that PyTorch initialises at construction (after `to_empty`, say).
        """
        def init(module: nn.Module, name: str) -> None:
            if needs_reset and hasattr(module, 'reset_parameters'):
                module.reset_parameters()
            self.init_module(module, name)

        if not next(self.parameters()).is_meta:  # there it would do nothing, and take most of the time
            named_apply(init, self)

    def init_module(self, module: nn.Module, name: str) -> None:
        """Initialise one module where the family differs from PyTorch; children come before their parents."""
        if isinstance(module, nn.Linear):
            trunc_normal_(module.weight, std=.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    @torch.jit.ignore
    def no_weight_decay(self) -> Set[str]:
        """Names of the parameters that take no weight decay: A and D."""
        return {n for n, _ in self.named_parameters() if n.rpartition('.')[2] in ('A_log', 'D')}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Dict[str, Any]:
        """Patterns that put the stem in the first group and every block (or stage) in its own."""
        return dict(
            stem=r'^stem',
            blocks=r'^stages\.(\d+)' if coarse else [
                (r'^stages\.(\d+)\.downsample', (0,)),
                (r'^stages\.(\d+)\.blocks\.(\d+)', None),
                (r'^stages\.(\d+)\.norm', (99999,)),
                (r'^norm', (99999,)),
            ],
        )

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks' activations in the backward pass instead of keeping them.

        Batch norms in blocks then see a batch twice a step and update their running statistics twice, as in timm.
        """
        for stage in self.stages:
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> Union[nn.Module, Tuple[nn.Module, ...]]:
        """The classifier head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """Replace the head by a new one.

        Args:
            num_classes: Classes; 0 for no head.
            global_pool: Pooling as in the constructor; None to keep the current one, even if it is '': timm sets a head
                before a pooling.
        """
        if global_pool is None:
            global_pool = self.global_pool.pool_type
        else:
            check_head(num_classes, global_pool)
        like = next(self.parameters())
        self.num_classes = num_classes
        self.global_pool, self.head = create_classifier(
            self.num_features, num_classes, pool_type=global_pool, device=like.device, dtype=like.dtype)
        self.global_pool.train(self.training)
        self.head.train(self.training)
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()

    def forward_intermediates(
            self,
            x: torch.Tensor,
            indices: Optional[Union[int, List[int]]] = None,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'NCHW',
            intermediates_only: bool = False,
    ) -> Union[List[torch.Tensor], Tuple[torch.Tensor, List[torch.Tensor]]]:
        """Forward features that returns intermediates.

        Args:
            x: Images (B, C, H, W).
            indices: Take last n stages if int, all if None, select matching indices if sequence.
            norm: Apply the final norm to the last stage's map.
            stop_early: Stop iterating over stages when last desired intermediate hit.
            output_fmt: 'NCHW' or 'NHWC', the layout of the intermediates.
            intermediates_only: Only return intermediate features.

        Returns:
            The final features (B, C, H, W) and a list of intermediates, or that list alone.
        """
        assert output_fmt in ('NCHW', 'NHWC'), 'Output format must be one of NCHW or NHWC.'
        intermediates = []
        wanted, max_index = take_indices(len(self.stages), indices)
        last_index = len(self.stages) - 1

        x = self.forward_stem(x)
        if torch.jit.is_scripting() or not stop_early:  # can't slice blocks in torchscript
            stages = self.stages
        else:
            stages = self.stages[:max_index + 1]
        i = 0
        for i, stage in enumerate(stages):
            x = stage(x)
            if i in wanted:
                intermediates.append(self.norm(x) if norm and i == last_index else x)

        if output_fmt == 'NHWC':
            intermediates = [y.permute(0, 2, 3, 1) for y in intermediates]
        intermediates = [y.contiguous() for y in intermediates]
        if intermediates_only:
            return intermediates
        if i == last_index:
            x = self.forward_final(x)
        return x, intermediates

    def prune_intermediate_layers(
            self,
            indices: Union[int, List[int]] = 1,
            prune_norm: bool = False,
            prune_head: bool = True,
    ) -> List[int]:
        """Prune layers not required for specified intermediates."""
        wanted, max_index = take_indices(len(self.stages), indices)
        prune_end = max_index < len(self.stages) - 1
        if prune_norm or prune_end:
            self.norm = nn.Identity()
        self.stages = self.stages[:max_index + 1]
        self.num_features = self.feature_info[max_index]['num_chs']
        if prune_head or prune_end:
            self.reset_classifier(0, '')
        return wanted

    def forward_stem(self, x: torch.Tensor) -> torch.Tensor:
        """Images to the first stage's input."""
        _assert(x.ndim == 4, f'x: got {x.ndim} dimensions, needs images (batch, channels, height, width)')
        chans = x.shape[1]
        _assert(chans == self.in_chans, f'x: got {chans} channels, needs in_chans {self.in_chans}')
        return self.stem(x)

    def forward_final(self, x: torch.Tensor) -> torch.Tensor:
        """The last stage's map (B, C, H, W) to the final features."""
        return self.norm(x)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Images to the final features (B, C, H, W)."""
        x = self.forward_stem(x)
        x = self.stages(x)
        return self.forward_final(x)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Features (B, C, H, W) to logits (B, num_classes), or to what the classifier would get."""
        x = self.global_pool(x)
        x = self.head_drop(x)
        if pre_logits:
            return x
        self.refuse_unpooled(x)
        return self.head(x)

    def refuse_unpooled(self, x: torch.Tensor) -> None:
        """Raise an AssertionError for a head's input that is a map."""
        _assert(
            self.num_classes == 0 or x.ndim == 2,
            "global_pool: got '' with a head, needs a pooling, as of reset_classifier(num_classes, 'avg')")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.forward_features(x)
        x = self.forward_head(x)
        return x


def check_head(num_classes: int, global_pool: str) -> None:
    """Refuse a classifier of features that are not pooled."""
    if num_classes > 0 and not global_pool:
        raise ValueError(f"global_pool: got '' with num_classes {num_classes}, needs a pooling, or num_classes 0")


def backbone_of_detector(state_dict: StateDict) -> StateDict:
    """A detector's or segmenter's checkpoint of mmdetection's kind to that of its backbone; others unchanged.

    The norms of the stages' maps, which it adds to the backbone, are left out; it has neither a final norm nor a head.
    """
    backbone = {k.removeprefix('backbone.'): v for k, v in state_dict.items() if k.startswith('backbone.')}
    return {k: v for k, v in backbone.items() if not k.startswith('outnorm')} or state_dict


def build_hierarchical(
        model_cls: Type[HierarchicalModel],
        variant: str,
        pretrained: bool,
        filter_fn: Callable[[StateDict, nn.Module], StateDict],
        **kwargs,
) -> nn.Module:
    """`build_model_with_cfg` with the features of all stages by default.

    The final norm and the head, which a detector's checkpoint has not, stay the model's own.
    """
    def fit(state_dict: StateDict, model: nn.Module) -> StateDict:
        fitted = filter_fn(state_dict, model)
        if any(k.startswith('backbone.') for k in state_dict):
            fitted = {**{k: v for k, v in model.state_dict().items() if k.startswith(('norm.', 'head.'))}, **fitted}
        return fitted

    if 'img_size' in kwargs and 'img_size' not in inspect.signature(model_cls).parameters:
        raise TypeError(
            f'img_size: got {kwargs["img_size"]}, but {model_cls.__name__} takes images of any size: leave it out')
    kwargs.setdefault('out_indices', (0, 1, 2, 3))
    return build_model_with_cfg(model_cls, variant, pretrained, fit, **kwargs)
