"""VideoMambaPro: VideoMamba with a residual scan and a masked diagonal.

Paper: `Snakes and Ladders: Two Steps Up for VideoMamba` - https://arxiv.org/abs/2406.19006

Authors' code: https://github.com/hotfinda/VideoMambaPro

Both directions start from their first token instead of zero (residual SSM), and the reverse one leaves a token's own
contribution out, so that the sum of both does not count it twice (masked backward computation). This is an
implementation from the paper. The mixers of the authors' released code differ from its text and from one another;
`mixer_mode` builds them. The weights are not on the Hub: load a local file with
`create_model(..., pretrained=True, pretrained_cfg_overlay=dict(file=...))`.
"""
from functools import partial
from typing import List, Optional

import torch
from timm.models import generate_default_cfgs, register_model, register_model_deprecations

from ..layers import BiMamba, ScanInputs, state_decay
from ..ops import bidirectional_causal_conv1d
from ._builder import build_model_with_cfg
from ._checkpoints import CheckpointMismatch, StateDict, unwrap_state_dict
from ._isotropic import IsotropicMamba, MambaBlock, clip_cfg, isotropic_cfg
from ._isotropic import checkpoint_filter_fn as isotropic_filter_fn

__all__ = ['VideoMambaPro']


class VideoMambaProMixer(BiMamba):
    """Bidirectional Mamba mixer with residual scans, the diagonal of the reverse one masked."""

    def __init__(
            self,
            dim: int,
            tie_reverse: str = 'x_proj',
            scan_input: bool = False,
            residual: bool = True,
            mask_diagonal: bool = True,
            **kwargs,
    ) -> None:
        """
        Args:
            dim: Width of the tokens.
            tie_reverse: What the reverse branch takes from the forward one: '' for nothing, 'x_proj' for the projection
                alone, 'all' for the convolution's output, B, C, dt and D, so that A alone is its own.
            scan_input: Scan the input projection itself instead of the convolution's output, which then only leads to
                B, C and dt.
            residual: Start both scans from their first token instead of zero.
            mask_diagonal: Leave a token's own contribution out of the reverse scan.
            kwargs: Arguments of `BiMamba`.
        """
        if tie_reverse not in ('', 'x_proj', 'all'):
            raise ValueError(f"tie_reverse: got {tie_reverse!r}, needs '', 'x_proj' or 'all'")
        super().__init__(dim, **kwargs)
        self.scan_input = scan_input
        self.residual = residual
        self.mask_diagonal = mask_diagonal
        if tie_reverse:
            self.x_proj_b = None
        if tie_reverse == 'all':
            self.conv1d_b = self.dt_proj_b = self.D_b = None

    def project(self, x: torch.Tensor) -> List[ScanInputs]:
        """(B, L, dim) -> what the forward and the reverse scan are given."""
        x, z = self.in_proj(x).chunk(2, dim=-1)
        if self.conv1d_b is None:
            c = c_b = self.conv1d(x)
        else:
            c, c_b = bidirectional_causal_conv1d(
                x, (self.conv1d.weight.squeeze(1), self.conv1d_b.weight.squeeze(1)),
                (self.conv1d.bias, self.conv1d_b.bias))
        split = [self.dt_rank, self.d_state, self.d_state]
        dt, B, C = self.x_proj(c).split(split, dim=-1)
        dt = self.dt_proj(dt)
        D_b = self.D_b
        if self.dt_proj_b is not None and D_b is not None:
            x_proj_b = self.x_proj_b(c_b) if self.x_proj_b is not None else self.x_proj(c_b)
            dt_b, B_b, C_b = x_proj_b.split(split, dim=-1)
            dt_b, dt_bias_b = self.dt_proj_b(dt_b), self.dt_proj_b.bias
        else:
            dt_b, B_b, C_b, D_b, dt_bias_b = dt, B, C, self.D, self.dt_proj.bias
        if self.scan_input:
            c = c_b = x
        return [
            ScanInputs(
                c, dt, state_decay(self.A_log), B, C, self.D, z, self.dt_proj.bias, residual=self.residual),
            ScanInputs(
                c_b, dt_b, state_decay(self.A_b_log), B_b, C_b, D_b, z, dt_bias_b, reverse=True,
                residual=self.residual, mask_diagonal=self.mask_diagonal),
        ]


# What a mode means for the mixer; the residual scan is common to all.
MIXER_MODES = {
    'paper': dict(tie_reverse='x_proj', mask_diagonal=True),
    'v1': dict(tie_reverse='all', scan_input=True, mask_diagonal=True),
    'v2': dict(tie_reverse='', scan_input=True, mask_diagonal=False),
}


class VideoMambaPro(IsotropicMamba):
    """VideoMambaPro, for images and clips."""

    def __init__(
            self,
            *args,
            mixer_mode: str = 'paper',
            residual: bool = True,
            mask_diagonal: Optional[bool] = None,
            **kwargs,
    ) -> None:
        """Take the arguments of `IsotropicMamba` and these.

        Args:
            mixer_mode: 'paper': two sets of convolution, dt_proj, A and D and one x_proj, which is what gives the
                paper's parameter counts. 'v1', 'v2': the mixers of the released code, which scan the input projection
                instead of the convolution's output; in 'v1' only A is there twice and the reverse scan reuses all else,
                'v2' has two full sets and no mask.
            residual: Start both scans from their first token.
            mask_diagonal: Leave a token's own contribution out of the reverse scan; None for what the mode does.
        """
        if mixer_mode not in MIXER_MODES:
            raise ValueError(f"mixer_mode: got {mixer_mode!r}, needs 'paper', 'v1' or 'v2'")
        mixer = dict(MIXER_MODES[mixer_mode], residual=residual)
        if mask_diagonal is not None:
            mixer['mask_diagonal'] = mask_diagonal
        super().__init__(*args, block_fn=partial(MambaBlock, mixer_layer=VideoMambaProMixer, **mixer), **kwargs)
        self.mixer_mode = mixer_mode


def _find_mixer_mode(state_dict: StateDict) -> Optional[str]:
    """The mode whose parameters a checkpoint has."""
    leaves = {k.rpartition('.mixer.')[2] for k in state_dict if '.mixer.' in k}
    if not leaves:
        return None
    if 'x_proj_b.weight' in leaves:
        return 'v2'
    return 'paper' if 'conv1d_b.weight' in leaves else 'v1'


def checkpoint_filter_fn(state_dict: StateDict, model: VideoMambaPro, inflation: str = 'center') -> StateDict:
    """As VideoMamba's; a checkpoint of another mixer mode is refused, and the error says which mode it is."""
    state_dict = unwrap_state_dict(state_dict)
    mode = _find_mixer_mode(state_dict)
    if mode is not None and mode != model.mixer_mode:
        raise CheckpointMismatch(
            f'checkpoint: it has the parameters of mixer_mode {mode!r}, the model those of {model.mixer_mode!r}: '
            f'build the model with mixer_mode={mode!r}')
    return isotropic_filter_fn(state_dict, model, inflation)


def _create_videomambapro(variant: str, pretrained: bool = False, **kwargs) -> VideoMambaPro:
    return build_model_with_cfg(VideoMambaPro, variant, pretrained, checkpoint_filter_fn, ('inflation',), **kwargs)


_PAPER = dict(
    origin_url='https://github.com/hotfinda/VideoMambaPro',
    paper_name='Snakes and Ladders: Two Steps Up for VideoMamba', paper_ids='arXiv:2406.19006',
)

default_cfgs = generate_default_cfgs({
    'videomambapro_tiny_patch16_224.untrained': isotropic_cfg(**_PAPER),
    'videomambapro_small_patch16_224.untrained': isotropic_cfg(**_PAPER),
    'videomambapro_middle_patch16_224.untrained': isotropic_cfg(**_PAPER),
    'videomambapro_tiny_patch16_f8_224.untrained': clip_cfg(8, **_PAPER),
    'videomambapro_tiny_patch16_f16_224.untrained': clip_cfg(16, **_PAPER),
    'videomambapro_tiny_patch16_f32_224.untrained': clip_cfg(32, **_PAPER),
    'videomambapro_small_patch16_f8_224.untrained': clip_cfg(8, **_PAPER),
    'videomambapro_small_patch16_f16_224.untrained': clip_cfg(16, **_PAPER),
    'videomambapro_small_patch16_f32_224.untrained': clip_cfg(32, **_PAPER),
    'videomambapro_middle_patch16_f8_224.untrained': clip_cfg(8, **_PAPER),
    'videomambapro_middle_patch16_f16_224.untrained': clip_cfg(16, **_PAPER),
    'videomambapro_middle_patch16_f32_224.untrained': clip_cfg(32, **_PAPER),
})


@register_model
def videomambapro_tiny_patch16_224(pretrained: bool = False, **kwargs) -> VideoMambaPro:
    """VideoMambaPro-Ti, 6.7 M parameters."""
    model_args = dict(embed_dim=192, depth=24)
    return _create_videomambapro('videomambapro_tiny_patch16_224', pretrained, **dict(model_args, **kwargs))


@register_model
def videomambapro_tiny_patch16_f8_224(pretrained: bool = False, **kwargs) -> VideoMambaPro:
    """VideoMambaPro-Ti for clips of 8 frames."""
    model_args = dict(num_frames=8, embed_dim=192, depth=24)
    return _create_videomambapro('videomambapro_tiny_patch16_f8_224', pretrained, **dict(model_args, **kwargs))


@register_model
def videomambapro_tiny_patch16_f16_224(pretrained: bool = False, **kwargs) -> VideoMambaPro:
    """VideoMambaPro-Ti for clips of 16 frames."""
    model_args = dict(num_frames=16, embed_dim=192, depth=24)
    return _create_videomambapro('videomambapro_tiny_patch16_f16_224', pretrained, **dict(model_args, **kwargs))


@register_model
def videomambapro_tiny_patch16_f32_224(pretrained: bool = False, **kwargs) -> VideoMambaPro:
    """VideoMambaPro-Ti for clips of 32 frames."""
    model_args = dict(num_frames=32, embed_dim=192, depth=24)
    return _create_videomambapro('videomambapro_tiny_patch16_f32_224', pretrained, **dict(model_args, **kwargs))


@register_model
def videomambapro_small_patch16_224(pretrained: bool = False, **kwargs) -> VideoMambaPro:
    """VideoMambaPro-S, 25 M parameters."""
    model_args = dict(embed_dim=384, depth=24)
    return _create_videomambapro('videomambapro_small_patch16_224', pretrained, **dict(model_args, **kwargs))


@register_model
def videomambapro_small_patch16_f8_224(pretrained: bool = False, **kwargs) -> VideoMambaPro:
    """VideoMambaPro-S for clips of 8 frames."""
    model_args = dict(num_frames=8, embed_dim=384, depth=24)
    return _create_videomambapro('videomambapro_small_patch16_f8_224', pretrained, **dict(model_args, **kwargs))


@register_model
def videomambapro_small_patch16_f16_224(pretrained: bool = False, **kwargs) -> VideoMambaPro:
    """VideoMambaPro-S for clips of 16 frames."""
    model_args = dict(num_frames=16, embed_dim=384, depth=24)
    return _create_videomambapro('videomambapro_small_patch16_f16_224', pretrained, **dict(model_args, **kwargs))


@register_model
def videomambapro_small_patch16_f32_224(pretrained: bool = False, **kwargs) -> VideoMambaPro:
    """VideoMambaPro-S for clips of 32 frames."""
    model_args = dict(num_frames=32, embed_dim=384, depth=24)
    return _create_videomambapro('videomambapro_small_patch16_f32_224', pretrained, **dict(model_args, **kwargs))


@register_model
def videomambapro_middle_patch16_224(pretrained: bool = False, **kwargs) -> VideoMambaPro:
    """VideoMambaPro-M, 72 M parameters."""
    model_args = dict(embed_dim=576, depth=32)
    return _create_videomambapro('videomambapro_middle_patch16_224', pretrained, **dict(model_args, **kwargs))


@register_model
def videomambapro_middle_patch16_f8_224(pretrained: bool = False, **kwargs) -> VideoMambaPro:
    """VideoMambaPro-M for clips of 8 frames."""
    model_args = dict(num_frames=8, embed_dim=576, depth=32)
    return _create_videomambapro('videomambapro_middle_patch16_f8_224', pretrained, **dict(model_args, **kwargs))


@register_model
def videomambapro_middle_patch16_f16_224(pretrained: bool = False, **kwargs) -> VideoMambaPro:
    """VideoMambaPro-M for clips of 16 frames."""
    model_args = dict(num_frames=16, embed_dim=576, depth=32)
    return _create_videomambapro('videomambapro_middle_patch16_f16_224', pretrained, **dict(model_args, **kwargs))


@register_model
def videomambapro_middle_patch16_f32_224(pretrained: bool = False, **kwargs) -> VideoMambaPro:
    """VideoMambaPro-M for clips of 32 frames."""
    model_args = dict(num_frames=32, embed_dim=576, depth=32)
    return _create_videomambapro('videomambapro_middle_patch16_f32_224', pretrained, **dict(model_args, **kwargs))


register_model_deprecations(__name__, {
    'videomambapro_t16_in1k': 'videomambapro_tiny_patch16_224',
    'videomambapro_s16_in1k': 'videomambapro_small_patch16_224',
    'videomambapro_m16_in1k': 'videomambapro_middle_patch16_224',
})
