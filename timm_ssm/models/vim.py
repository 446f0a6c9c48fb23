"""Vision Mamba (Vim): an isotropic bidirectional state-space model with its class token in the middle.

Paper: `Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model`
    - https://arxiv.org/abs/2401.09417

Authors' code and weights: https://github.com/hustvl/Vim (Apache-2.0)

VideoMamba's image model, with four differences: the class token stands in the middle of the sequence, the two
directions of the mixer are averaged, patches may overlap, and the projections of the mixers, the step sizes of the
forward direction among them, keep the initialisation that Mamba gives them. This is an implementation from the paper;
parameter values are those of the authors' checkpoints, names follow timm.
"""
from functools import partial
from typing import Any, Dict

import torch
from timm.layers import lecun_normal_, trunc_normal_
from timm.models import generate_default_cfgs, register_model, register_model_deprecations
from torch import nn

from ..layers import BiMamba, init_dt, scan, scan_mixers
from ._builder import build_model_with_cfg
from ._checkpoints import StateDict, unwrap_state_dict
from ._isotropic import IsotropicMamba, MambaBlock, class_token_first, isotropic_cfg
from ._isotropic import checkpoint_filter_fn as isotropic_filter_fn

__all__ = ['Vim']


class VimMixer(BiMamba):
    """Bidirectional Mamba mixer that averages its two directions."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, L, dim) -> (B, L, dim)"""
        return self.out_proj(scan(self.project(x)) / 2)


class Vim(IsotropicMamba):
    """Vision Mamba.

    The class token is first in all that goes in and out of the model, position embedding included; only the blocks
    see it between the patches M // 2 - 1 and M // 2 of M.
    """

    def __init__(self, *args, **kwargs) -> None:
        """Take the arguments of `IsotropicMamba`."""
        super().__init__(*args, block_fn=partial(MambaBlock, mixer_layer=VimMixer), **kwargs)

    @torch.jit.ignore
    def init_weights(self, mode: str = '', needs_reset: bool = True) -> None:
        """Initialise all parameters.

        Args:
            mode: As the constructor's weight_init; '' to take that. The authors' code gives Mamba's step sizes to the
                forward direction, and zero biases to the reverse one.
            needs_reset: As of `IsotropicMamba`.
        """
        super().init_weights(mode, needs_reset)
        trunc_normal_(self.cls_token, std=.02)
        lecun_normal_(self.patch_embed.proj.weight)
        nn.init.zeros_(self.patch_embed.proj.bias)
        for mixer in scan_mixers(self).values():
            for proj in (mixer.in_proj, mixer.x_proj, mixer.x_proj_b, mixer.dt_proj, mixer.dt_proj_b):
                proj.reset_parameters()  # PyTorch's, as Mamba's
            init_dt(mixer.dt_proj)
            if (mode or self.weight_init_mode) == 'mamba':
                init_dt(mixer.dt_proj_b)
            else:
                nn.init.zeros_(mixer.dt_proj_b.bias)

    def _arrange(self, x: torch.Tensor) -> torch.Tensor:
        middle = (x.shape[1] - 1) // 2
        return torch.cat((x[:, 1:1 + middle], x[:, :1], x[:, 1 + middle:]), dim=1)

    def _restore(self, x: torch.Tensor) -> torch.Tensor:
        return class_token_first(x)


def checkpoint_filter_fn(state_dict: StateDict, model: Vim) -> StateDict:
    """The authors' or our own checkpoint to this model's names, resampled to its patch and input size."""
    state_dict = unwrap_state_dict(state_dict)
    if 'norm_f.weight' in state_dict and 'pos_embed' in state_dict:  # the authors' keep the class row in the middle
        state_dict['pos_embed'] = class_token_first(state_dict['pos_embed'])
    return isotropic_filter_fn(state_dict, model)


def _create_vim(variant: str, pretrained: bool = False, **kwargs) -> Vim:
    return build_model_with_cfg(Vim, variant, pretrained, checkpoint_filter_fn, **kwargs)


def _cfg(**kwargs) -> Dict[str, Any]:
    return isotropic_cfg(
        license='apache-2.0', origin_url='https://github.com/hustvl/Vim',
        paper_name='Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model',
        paper_ids='arXiv:2401.09417', **kwargs)


default_cfgs = generate_default_cfgs({
    'vim_tiny_patch16_224.in1k': _cfg(
        hf_hub_id='hustvl/Vim-tiny-midclstok', hf_hub_filename='vim_t_midclstok_76p1acc.pth'),
    'vim_small_patch16_224.in1k': _cfg(
        hf_hub_id='hustvl/Vim-small-midclstok', hf_hub_filename='vim_s_midclstok_80p5acc.pth'),
    'vim_base_patch16_224.in1k': _cfg(
        hf_hub_id='hustvl/Vim-base-midclstok', hf_hub_filename='vim_b_midclstok_81p9acc.pth'),
    'vim_tiny_patch16_stride8_224.in1k': _cfg(
        hf_hub_id='hustvl/Vim-tiny-midclstok', hf_hub_filename='vim_t_midclstok_ft_78p3acc.pth'),
    'vim_small_patch16_stride8_224.in1k': _cfg(
        hf_hub_id='hustvl/Vim-small-midclstok', hf_hub_filename='vim_s_midclstok_ft_81p6acc.pth'),
})


@register_model
def vim_tiny_patch16_224(pretrained: bool = False, **kwargs) -> Vim:
    """Vim-Ti, 7 M parameters."""
    model_args = dict(embed_dim=192, depth=24)
    return _create_vim('vim_tiny_patch16_224', pretrained, **dict(model_args, **kwargs))


@register_model
def vim_small_patch16_224(pretrained: bool = False, **kwargs) -> Vim:
    """Vim-S, 26 M parameters."""
    model_args = dict(embed_dim=384, depth=24)
    return _create_vim('vim_small_patch16_224', pretrained, **dict(model_args, **kwargs))


@register_model
def vim_base_patch16_224(pretrained: bool = False, **kwargs) -> Vim:
    """Vim-B, 98 M parameters."""
    model_args = dict(embed_dim=768, depth=24)
    return _create_vim('vim_base_patch16_224', pretrained, **dict(model_args, **kwargs))


@register_model
def vim_tiny_patch16_stride8_224(pretrained: bool = False, **kwargs) -> Vim:
    """Vim-Ti fine-tuned with overlapping patches."""
    model_args = dict(stride=8, embed_dim=192, depth=24)
    return _create_vim('vim_tiny_patch16_stride8_224', pretrained, **dict(model_args, **kwargs))


@register_model
def vim_small_patch16_stride8_224(pretrained: bool = False, **kwargs) -> Vim:
    """Vim-S fine-tuned with overlapping patches."""
    model_args = dict(stride=8, embed_dim=384, depth=24)
    return _create_vim('vim_small_patch16_stride8_224', pretrained, **dict(model_args, **kwargs))


_DIV2 = '_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2'
register_model_deprecations(__name__, {
    f'vim_tiny_patch16_224{_DIV2}': 'vim_tiny_patch16_224',
    f'vim_tiny_patch16_stride8_224{_DIV2}': 'vim_tiny_patch16_stride8_224',
    f'vim_small_patch16_224{_DIV2}': 'vim_small_patch16_224',
    f'vim_small_patch16_stride8_224{_DIV2}': 'vim_small_patch16_stride8_224',
    'vim_base_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_middle_cls_token_div2': 'vim_base_patch16_224',
})
