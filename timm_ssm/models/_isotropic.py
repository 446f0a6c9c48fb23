"""What the isotropic families share: a model of one width over tokens of images or clips, and its checkpoints.

VideoMamba is that model as it stands; the other families change its mixer, its blocks or its position embedding.
"""
import math
from functools import partial
from typing import Any, Callable, Dict, List, Optional, Sequence, Set, Tuple, Type, Union

import torch
from timm.layers import (
    DropPath,
    calculate_drop_path_rates,
    global_pool_nlc,
    resample_abs_pos_embed,
    to_2tuple,
    to_ntuple,
    trunc_normal_,
)
from timm.models import adapt_input_conv, checkpoint, checkpoint_seq, named_apply
from torch import nn
from torch.nn import functional as F

from .._compat import update_model_input_size
from ..layers import BiMamba, PatchEmbed, RmsNorm, ScanMixer, at_least_float32, resample_patch_kernel
from ._builder import image_cfg
from ._checkpoints import CheckpointMismatch, StateDict, refuse_mismatch, unwrap_state_dict
from ._features import take_indices

torch.fx.wrap('at_least_float32')


class MambaBlock(nn.Module):
    """x + DropPath(mixer(norm(x))), the residual stream in float32."""

    def __init__(
            self,
            dim: int,
            mixer_layer: Type[nn.Module] = BiMamba,
            norm_layer: Type[nn.Module] = RmsNorm,
            drop_path: float = 0.,
            device=None,
            dtype=None,
            **mixer_kwargs,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.norm = norm_layer(dim, eps=1e-5, **dd)
        self.mixer = mixer_layer(dim, **mixer_kwargs, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0. else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.drop_path(self.mixer(self.norm(x)))


class IsotropicMamba(nn.Module):
    """Patch embedding, class token and position embeddings, blocks of one width, a final norm and a linear head.

    Takes images (B, C, H, W), or clips (B, C, T, H, W) where num_frames > 1. Tokens are row-major within a frame and
    frames follow one another, behind one class token.
    """

    def __init__(
            self,
            img_size: Union[int, Tuple[int, int]] = 224,
            patch_size: Union[int, Tuple[int, int]] = 16,
            stride: Optional[Union[int, Tuple[int, int]]] = None,
            num_frames: int = 1,
            tubelet_size: int = 1,
            in_chans: int = 3,
            num_classes: int = 1000,
            global_pool: str = 'token',
            embed_dim: int = 192,
            depth: int = 24,
            d_state: int = 16,
            d_conv: int = 4,
            expand: int = 2,
            block_fn: Union[Callable[..., nn.Module], Sequence[Callable[..., nn.Module]]] = MambaBlock,
            norm_layer: Type[nn.Module] = RmsNorm,
            drop_rate: float = 0.,
            pos_drop_rate: float = 0.,
            drop_path_rate: float = 0.,
            dynamic_img_size: bool = False,
            weight_init: str = '',
            device=None,
            dtype=None,
    ) -> None:
        """
        Args:
            img_size: Input height and width in pixels.
            patch_size: Patch height and width in pixels.
            stride: Distance between patches in pixels; the patch size if None.
            num_frames: Frames of a clip; 1 for images.
            tubelet_size: Frames in one token of a clip.
            in_chans: Input channels.
            num_classes: Classes of the head; 0 for no head.
            global_pool: 'token' (class token), 'avg', 'max', 'avgmax' over the others, or '' for all tokens.
            embed_dim: Width of the tokens.
            depth: Blocks.
            d_state: States of a scanned channel.
            d_conv: Taps of the mixer's convolution.
            expand: Scanned channels over embed_dim.
            block_fn: Constructor of the blocks, or one for each.
            norm_layer: Normalisation, before every mixer and after the last block.
            drop_rate: Dropout before the head.
            pos_drop_rate: Dropout after the position embedding.
            drop_path_rate: Stochastic depth of the last block, growing linearly from 0 at the first.
            dynamic_img_size: Take any input size, resampling the position embedding on the fly.
            weight_init: '' as the authors' code initialises, 'mamba' for the same with Mamba's initialisation of the
                step sizes (which the authors' code overwrites with zero biases), 'skip' for none.
        """
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        check_weight_init(weight_init)
        self.in_chans = in_chans
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.num_prefix_tokens = 1
        self.has_class_token = True
        self.dynamic_img_size = dynamic_img_size
        self.weight_init_mode = weight_init
        self.grad_checkpointing = False

        self.patch_embed = PatchEmbed(
            img_size=img_size,
            patch_size=patch_size,
            stride=stride,
            num_frames=num_frames,
            tubelet_size=tubelet_size,
            in_chans=in_chans,
            embed_dim=embed_dim,
            strict_img_size=not dynamic_img_size,
            **dd,
        )
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim, **dd))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + self.patch_embed.num_patches, embed_dim, **dd))
        if num_frames > 1:
            self.temporal_pos_embed = nn.Parameter(torch.empty(1, num_frames // tubelet_size, embed_dim, **dd))
        else:
            self.temporal_pos_embed = None
        self.pos_drop = nn.Dropout(pos_drop_rate)

        dpr = calculate_drop_path_rates(drop_path_rate, depth)
        self.blocks = nn.Sequential(*[
            fn(
                embed_dim,
                norm_layer=norm_layer,
                drop_path=dpr[i],
                d_state=d_state,
                d_conv=d_conv,
                expand=expand,
                **dd,
            )
            for i, fn in enumerate(to_ntuple(depth)(block_fn))])
        reduction = self.patch_embed.feat_ratio()
        self.feature_info = [
            dict(module=f'blocks.{i}', num_chs=embed_dim, reduction=reduction) for i in range(depth)]
        self.norm = norm_layer(embed_dim, eps=1e-5, **dd)
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, global_pool)

        if weight_init != 'skip' and not self.cls_token.is_meta:  # there it would do nothing, and take most of the time
            self.init_weights(needs_reset=False)

    @torch.jit.ignore
    def init_weights(self, mode: str = '', needs_reset: bool = True) -> None:
        """Initialise all parameters.

        Args:
            mode: As the constructor's weight_init; '' to take that.
            needs_reset: Also reset the modules that PyTorch initialises at construction (after `to_empty`, say).
        """
        mode = mode or self.weight_init_mode
        if self.pos_embed is not None:
            trunc_normal_(self.pos_embed, std=.02)
        nn.init.zeros_(self.cls_token)
        if self.temporal_pos_embed is not None:
            nn.init.zeros_(self.temporal_pos_embed)
        named_apply(
            partial(_init_weights, depth=len(self.blocks), mamba_dt=mode == 'mamba', needs_reset=needs_reset), self)

    @torch.jit.ignore
    def no_weight_decay(self) -> Set[str]:
        """Names of the parameters that take no weight decay: embeddings, A and D."""
        state_space = ('A_log', 'A_b_log', 'D', 'D_b')
        names = {n for n, _ in self.named_parameters() if n.rpartition('.')[2] in state_space}
        return names | {'pos_embed', 'cls_token', 'temporal_pos_embed'}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Dict[str, Any]:
        """Patterns that put the stem in the first group and every block in its own (layer-wise learning rates)."""
        return dict(
            stem=r'^cls_token|pos_embed|temporal_pos_embed|patch_embed',
            blocks=[(r'^blocks\.(\d+)', None), (r'^norm', (99999,))],
        )

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks' activations in the backward pass instead of keeping them."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The classifier head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """Replace the head by a new one.

        Args:
            num_classes: Classes; 0 for no head.
            global_pool: Pooling as in the constructor; None to keep the current one.
        """
        if global_pool is not None:
            if global_pool not in ('', 'token', 'avg', 'max', 'avgmax'):
                raise ValueError(f"global_pool: got {global_pool!r}, needs '', 'token', 'avg', 'max' or 'avgmax'")
            self.global_pool = global_pool
        self.num_classes = num_classes
        dd = {'device': self.cls_token.device, 'dtype': self.cls_token.dtype}
        self.head = nn.Linear(self.embed_dim, num_classes, **dd) if num_classes > 0 else nn.Identity()
        self.head.train(self.training)

    def set_input_size(
            self,
            img_size: Optional[Union[int, Tuple[int, int]]] = None,
            patch_size: Optional[Union[int, Tuple[int, int]]] = None,
            dynamic_img_size: Optional[bool] = None,
    ) -> None:
        """Change the input size, resampling the position embedding (and the patch kernel).

        Args:
            img_size: New height and width in pixels; None to keep them.
            patch_size: New patch height and width in pixels; None to keep them.
            dynamic_img_size: As in the constructor; None to keep it.
        """
        if dynamic_img_size is not None:
            self.dynamic_img_size = dynamic_img_size
            self.patch_embed.strict_img_size = not dynamic_img_size
        old_size = self.patch_embed.grid_size
        self.patch_embed.set_input_size(img_size, patch_size)
        if self.patch_embed.grid_size != old_size and self.pos_embed is not None:
            with torch.no_grad():
                pos_embed = self._resample_pos_embed(
                    self.pos_embed, list(self.patch_embed.grid_size), list(old_size))
            self.pos_embed = nn.Parameter(pos_embed, requires_grad=self.pos_embed.requires_grad)
        update_model_input_size(self, self.patch_embed.img_size, patch_size=patch_size)

    def _resample_pos_embed(self, pos_embed: torch.Tensor, new_size: List[int], old_size: List[int]) -> torch.Tensor:
        """The position embedding for another grid of patches."""
        return resample_abs_pos_embed(pos_embed, new_size, old_size, num_prefix_tokens=1)

    def _pos_embed(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens (B, T, H, W, C) to the sequence (B, 1 + T H W, C), embeddings added."""
        pos_embed = self.pos_embed
        if self.dynamic_img_size:
            pos_embed = self._resample_pos_embed(
                pos_embed,
                [x.shape[2], x.shape[3]],
                [self.patch_embed.grid_size[0], self.patch_embed.grid_size[1]],
            )
        x = x.flatten(2, 3) + pos_embed[:, None, 1:]
        if self.temporal_pos_embed is not None:
            x = x + self.temporal_pos_embed.unsqueeze(2)
        cls_token = self.cls_token + pos_embed[:, :1]
        return torch.cat((cls_token.expand(x.shape[0], -1, -1), x.flatten(1, 2)), dim=1)

    def _arrange(self, x: torch.Tensor) -> torch.Tensor:
        """Class token and patches (B, 1 + T H W, C) to the order in which the blocks see them."""
        return x

    def _restore(self, x: torch.Tensor) -> torch.Tensor:
        """Undo `_arrange`."""
        return x

    def _embed(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens (B, T, H, W, C) to the input of the blocks."""
        x = self._pos_embed(x)
        return self._arrange(self.pos_drop(at_least_float32(x)))

    def forward_intermediates(
            self,
            x: torch.Tensor,
            indices: Optional[Union[int, List[int]]] = None,
            return_prefix_tokens: bool = False,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'NCHW',
            intermediates_only: bool = False,
    ) -> Union[List[torch.Tensor], Tuple[torch.Tensor, List[torch.Tensor]]]:
        """Forward features that returns intermediates.

        Args:
            x: Images (B, C, H, W), or clips (B, C, T, H, W).
            indices: Take last n blocks if int, all if None, select matching indices if sequence.
            return_prefix_tokens: Return pairs of the spatial tokens and the class token (B, 1, C).
            norm: Apply the final norm to all intermediates.
            stop_early: Stop iterating over blocks when last desired intermediate hit.
            output_fmt: 'NCHW' for maps, (B, C, T, H, W) from clips; 'NLC' for tokens.
            intermediates_only: Only return intermediate features.

        Returns:
            The final features (B, 1 + T H W, C) and a list of intermediates, or that list alone.
        """
        assert output_fmt in ('NCHW', 'NLC'), 'Output format must be one of NCHW or NLC.'
        intermediates = []
        wanted, max_index = take_indices(len(self.blocks), indices)

        x = self.patch_embed(x)
        B, T, H, W, _ = x.shape
        x = self._embed(x)
        if torch.jit.is_scripting() or not stop_early:  # can't slice blocks in torchscript
            blocks = self.blocks
        else:
            blocks = self.blocks[:max_index + 1]
        for i, blk in enumerate(blocks):
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(blk, x)
            else:
                x = blk(x)
            if i in wanted:
                y = self._restore(x)
                intermediates.append((self.norm(y) if norm else y).to(self.cls_token.dtype))

        prefix_tokens = [y[:, :1] for y in intermediates]
        intermediates = [y[:, 1:] for y in intermediates]
        if output_fmt == 'NCHW':
            intermediates = [y.reshape(B, T, H, W, -1).permute(0, 4, 1, 2, 3) for y in intermediates]
            if not self.patch_embed.is_clip:
                intermediates = [y.squeeze(2) for y in intermediates]
            intermediates = [y.contiguous() for y in intermediates]
        if not torch.jit.is_scripting() and return_prefix_tokens:
            # return_prefix not support in torchscript due to poor type handling
            intermediates = list(zip(intermediates, prefix_tokens))
        if intermediates_only:
            return intermediates
        return self.norm(self._restore(x)).to(self.cls_token.dtype), intermediates

    def prune_intermediate_layers(
            self,
            indices: Union[int, List[int]] = 1,
            prune_norm: bool = False,
            prune_head: bool = True,
    ) -> List[int]:
        """Prune layers not required for specified intermediates."""
        wanted, max_index = take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[:max_index + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, '')
        return wanted

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Images or clips to normed tokens (B, 1 + T H W, C), the class token first."""
        x = self.patch_embed(x)
        x = self._embed(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.blocks, x)
        else:
            x = self.blocks(x)
        return self.norm(self._restore(x)).to(self.cls_token.dtype)

    def pool(self, x: torch.Tensor, pool_type: Optional[str] = None) -> torch.Tensor:
        """Pool tokens (B, L, C) to (B, C), unless the pooling is ''."""
        return global_pool_nlc(
            x,
            pool_type=self.global_pool if pool_type is None else pool_type,
            num_prefix_tokens=self.num_prefix_tokens,
        )

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Tokens to logits (B, num_classes), or to what the classifier would get."""
        x = self.pool(x)
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.forward_features(x)
        x = self.forward_head(x)
        return x


def check_weight_init(weight_init: str) -> None:
    """Refuse an unknown initialisation."""
    if weight_init not in ('', 'mamba', 'skip'):
        raise ValueError(f"weight_init: got {weight_init!r}, needs '', 'mamba' or 'skip'")


def _init_weights(module: nn.Module, name: str, depth: int, mamba_dt: bool, needs_reset: bool) -> None:
    """The authors' initialisation; children come before their parents."""
    if needs_reset and hasattr(module, 'reset_parameters'):
        module.reset_parameters()
    if isinstance(module, nn.Linear):
        if name.endswith('out_proj'):
            nn.init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            with torch.no_grad():
                module.weight.div_(math.sqrt(depth))
        else:
            trunc_normal_(module.weight, std=.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif mamba_dt and isinstance(module, ScanMixer):
        module.init_dt()


def isotropic_cfg(**kwargs) -> Dict[str, Any]:
    """`image_cfg` of a model that is built for one image size."""
    return image_cfg(**{
        'pool_size': None, 'fixed_input_size': True, 'first_conv': 'patch_embed.proj', **kwargs})


def clip_cfg(num_frames: int, img_size: int = 224, num_classes: int = 400, **kwargs) -> Dict[str, Any]:
    """`isotropic_cfg` of a model for clips."""
    return isotropic_cfg(
        num_classes=num_classes,
        input_size=(3, img_size, img_size),
        test_input_size=(3, num_frames, img_size, img_size),  # which timm's benchmark.py makes its inputs of
        crop_pct=1.0, interpolation='bilinear',
        first_conv=None,  # a Conv3d, which timm does not adapt to other input channels: the checkpoint filter does
        **kwargs,
    )


def class_token_first(x: torch.Tensor) -> torch.Tensor:
    """Move the class token of (B, 1 + M, C), which stands behind M // 2 patches in Vim, to the front."""
    middle = (x.shape[1] - 1) // 2
    return torch.cat((x[:, middle:middle + 1], x[:, :middle], x[:, middle + 1:]), dim=1)


def rename_authors(state_dict: StateDict) -> StateDict:
    """The authors' checkpoint or our own under our names."""
    names = {'layers.': 'blocks.', 'norm_f.': 'norm.', 'temporal_pos_embedding': 'temporal_pos_embed'}
    out = {}
    for k, v in unwrap_state_dict(state_dict).items():
        for old, new in names.items():
            if k.startswith(old):
                k = k.replace(old, new, 1)
        out[k] = v
    return out


def adapt_patch_embed(state_dict: StateDict, model: IsotropicMamba, inflation: str) -> bool:
    """Fit a checkpoint's patch kernel to the model's patch size and tubelet, in place.

    Args:
        state_dict: Checkpoint under our names.
        model: Model to load it into.
        inflation: How the kernel of an image model becomes a tubelet's: 'center' puts it on the middle frame, 'mean'
            on all frames, divided by their number.

    Returns:
        Whether an image checkpoint has become one of a clip model, whose head is then the model's own: the classes
        of clips are other ones.
    """
    if inflation not in ('center', 'mean'):
        raise ValueError(f"inflation: got {inflation!r}, needs 'center' or 'mean'")
    kernel = state_dict.get('patch_embed.proj.weight')
    embed = model.patch_embed
    if kernel is None or kernel.ndim not in (4, 5):
        return False  # another model's checkpoint, which `refuse_mismatch` refuses
    if kernel.ndim == 5 and not embed.is_clip:
        raise CheckpointMismatch(
            'checkpoint: it is of a clip model; build the model with num_frames above 1', state_dict)
    kernel = resample_patch_kernel(kernel, embed.patch_size)
    from_image = kernel.ndim == 4 and embed.is_clip
    if from_image:
        kernel = kernel.unsqueeze(2)
    if embed.is_clip:
        tubelet = embed.tubelet_size
        if kernel.shape[2] not in (1, tubelet):
            raise CheckpointMismatch(
                f'checkpoint: its tubelets have {kernel.shape[2]} frames, the model\'s {tubelet}; '
                f'build the model with tubelet_size={kernel.shape[2]}', state_dict)
        if kernel.shape[2] == 1 and tubelet > 1:
            weights = kernel.new_full((tubelet,), 1. / tubelet)
            if inflation == 'center':
                weights = F.one_hot(torch.tensor(tubelet // 2), tubelet).to(kernel)
            kernel = kernel * weights[:, None, None]
        if kernel.shape[1] != model.in_chans:  # timm itself adapts kernels of images only
            kernel = adapt_input_conv(model.in_chans, kernel.flatten(3)).reshape(
                kernel.shape[0], model.in_chans, *kernel.shape[2:])
    state_dict['patch_embed.proj.weight'] = kernel
    if from_image:
        for k in [k for k in state_dict if k.startswith('head.')]:
            del state_dict[k]
        state_dict.update({f'head.{k}': v for k, v in model.head.state_dict().items()})
    return from_image


def _adapt_pos_embed(state_dict: StateDict, model: IsotropicMamba, released: bool) -> None:
    """Fit a checkpoint's position embedding to the model's grid of patches, in place.

    The checkpoint's own grid is that of the img_size published with it (in the model_args of its config.json). Without
    one it is a square, unless a checkpoint of ours has as many patches as the model: then it is the model's.

    `released` files, the authors', are all of square images.
    """
    pos_embed = state_dict['pos_embed']
    patches = pos_embed.shape[1] - 1
    grid = model.patch_embed.grid_size
    img_size = getattr(model, 'pretrained_model_args', {}).get('img_size')  # timm < 1.0.31 does not keep them
    old = model.patch_embed.dynamic_feat_size(to_2tuple(img_size)) if img_size else (0, 0)
    if old[0] * old[1] != patches:
        if patches == grid[0] * grid[1] and not released:
            return
        old = math.isqrt(patches), math.isqrt(patches)
        if old[0] * old[1] != patches:
            raise CheckpointMismatch(
                f'checkpoint: pos_embed has {patches} patches, needs {grid[0]} x {grid[1]} or those of a square image',
                state_dict)
    state_dict['pos_embed'] = resample_abs_pos_embed(pos_embed, list(grid), list(old), num_prefix_tokens=1)


def checkpoint_filter_fn(state_dict: StateDict, model: IsotropicMamba, inflation: str = 'center') -> StateDict:
    """The authors' or our own checkpoint to this model's names, patch size, input size and frame count.

    A clip model takes the weights of an image model too: its temporal embedding is then zero and its head new.
    `inflation` is that of `adapt_patch_embed`.
    """
    state_dict = unwrap_state_dict(state_dict)
    out = rename_authors(state_dict)
    adapt_patch_embed(out, model, inflation)
    if 'pos_embed' in out:
        _adapt_pos_embed(out, model, released='norm_f.weight' in state_dict)
    if model.temporal_pos_embed is not None:
        temporal = out.get('temporal_pos_embed', torch.zeros_like(model.temporal_pos_embed))
        if temporal.shape[1] != model.temporal_pos_embed.shape[1]:
            temporal = F.interpolate(
                temporal.mT.float(), size=model.temporal_pos_embed.shape[1], mode='linear').mT.to(temporal)
        out['temporal_pos_embed'] = temporal
    return refuse_mismatch(out, model, adaptable=('head.', 'patch_embed.proj.'))
