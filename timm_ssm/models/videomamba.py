"""VideoMamba: an isotropic bidirectional state-space model for images and clips.

Paper: `VideoMamba: State Space Model for Efficient Video Understanding` - https://arxiv.org/abs/2403.06977

Authors' code and weights: https://github.com/OpenGVLab/VideoMamba (Apache-2.0)

A ViT whose blocks hold a bidirectional Mamba mixer and nothing else: no attention, no MLP. This is an implementation
from the paper; parameter values are those of the authors' checkpoints, names follow timm.
"""
from typing import Any, Dict

from timm.models import generate_default_cfgs, register_model, register_model_deprecations

from ._builder import build_model_with_cfg
from ._datasets import DATASETS
from ._isotropic import IsotropicMamba, checkpoint_filter_fn, clip_cfg, isotropic_cfg

__all__ = ['VideoMamba']


class VideoMamba(IsotropicMamba):
    """VideoMamba, for images and clips: `IsotropicMamba` with bidirectional Mamba mixers and nothing else."""


def _create_videomamba(variant: str, pretrained: bool = False, **kwargs) -> VideoMamba:
    return build_model_with_cfg(VideoMamba, variant, pretrained, checkpoint_filter_fn, ('inflation',), **kwargs)


_RELEASE = dict(
    hf_hub_id='OpenGVLab/VideoMamba',
    license='apache-2.0', origin_url='https://github.com/OpenGVLab/VideoMamba',
    paper_name='VideoMamba: State Space Model for Efficient Video Understanding', paper_ids='arXiv:2403.06977',
)


def _image_cfg(size: str, img_size: int, trained_at: str) -> Dict[str, Any]:
    file = f'videomamba_{size}16_in1k_res{trained_at}.pth'
    return isotropic_cfg(input_size=(3, img_size, img_size), hf_hub_filename=file, **_RELEASE)


def _clip_cfg(size: str, dataset: str, num_frames: int, trained_at: str = '224') -> Dict[str, Any]:
    img_size = int(trained_at.rpartition('to')[2])
    num_classes = DATASETS[dataset.partition('_')[0]].num_classes
    file = f'videomamba_{size}16_{dataset}_f{num_frames}_res{trained_at}.pth'
    return clip_cfg(num_frames, img_size, num_classes, hf_hub_filename=file, **_RELEASE)


default_cfgs = generate_default_cfgs({
    'videomamba_tiny_patch16_224.in1k': _image_cfg('t', 224, '224'),
    'videomamba_tiny_patch16_448.in1k': _image_cfg('t', 448, '224to448'),
    'videomamba_tiny_patch16_576.in1k': _image_cfg('t', 576, '224to448to576'),
    'videomamba_small_patch16_224.in1k': _image_cfg('s', 224, '224'),
    'videomamba_small_patch16_448.in1k': _image_cfg('s', 448, '224to448'),
    'videomamba_small_patch16_576.in1k': _image_cfg('s', 576, '224to448to576'),
    'videomamba_middle_patch16_224.in1k': _image_cfg('m', 224, '224'),
    'videomamba_middle_patch16_448.in1k': _image_cfg('m', 448, '224to448'),
    'videomamba_middle_patch16_576.in1k': _image_cfg('m', 576, '224to448to576'),
    'videomamba_base_patch16_224.in1k': _image_cfg('b', 224, '224'),

    'videomamba_tiny_patch16_f8_224.k400': _clip_cfg('t', 'k400', 8),
    'videomamba_tiny_patch16_f8_224.ssv2': _clip_cfg('t', 'ssv2', 8),
    'videomamba_tiny_patch16_f16_224.k400': _clip_cfg('t', 'k400', 16),
    'videomamba_tiny_patch16_f16_224.ssv2': _clip_cfg('t', 'ssv2', 16),
    'videomamba_tiny_patch16_f32_224.k400': _clip_cfg('t', 'k400', 32),
    'videomamba_tiny_patch16_f32_224.breakfast': _clip_cfg('t', 'breakfast', 32),
    'videomamba_tiny_patch16_f64_224.k400': _clip_cfg('t', 'k400', 64),
    'videomamba_tiny_patch16_f64_224.breakfast': _clip_cfg('t', 'breakfast', 64),
    'videomamba_tiny_patch16_f64_384.k400': _clip_cfg('t', 'k400', 64, '224to384'),
    'videomamba_tiny_patch16_f16_288.ssv2': _clip_cfg('t', 'ssv2', 16, '224to288'),

    'videomamba_small_patch16_f8_224.k400': _clip_cfg('s', 'k400', 8),
    'videomamba_small_patch16_f8_224.ssv2': _clip_cfg('s', 'ssv2', 8),
    'videomamba_small_patch16_f16_224.k400': _clip_cfg('s', 'k400', 16),
    'videomamba_small_patch16_f16_224.ssv2': _clip_cfg('s', 'ssv2', 16),
    'videomamba_small_patch16_f32_224.k400': _clip_cfg('s', 'k400', 32),
    'videomamba_small_patch16_f32_224.breakfast': _clip_cfg('s', 'breakfast', 32),
    'videomamba_small_patch16_f64_224.k400': _clip_cfg('s', 'k400', 64),
    'videomamba_small_patch16_f64_224.breakfast': _clip_cfg('s', 'breakfast', 64),
    'videomamba_small_patch16_f64_384.k400': _clip_cfg('s', 'k400', 64, '224to384'),
    'videomamba_small_patch16_f16_288.ssv2': _clip_cfg('s', 'ssv2', 16, '224to288'),

    'videomamba_middle_patch16_f8_224.k400': _clip_cfg('m', 'k400', 8),
    'videomamba_middle_patch16_f8_224.k400_mask_ft': _clip_cfg('m', 'k400_mask_ft', 8),
    'videomamba_middle_patch16_f8_224.ssv2': _clip_cfg('m', 'ssv2', 8),
    'videomamba_middle_patch16_f8_224.ssv2_mask_ft': _clip_cfg('m', 'ssv2_mask_ft', 8),
    'videomamba_middle_patch16_f16_224.k400': _clip_cfg('m', 'k400', 16),
    'videomamba_middle_patch16_f16_224.k400_mask_ft': _clip_cfg('m', 'k400_mask_ft', 16),
    'videomamba_middle_patch16_f16_224.ssv2': _clip_cfg('m', 'ssv2', 16),
    'videomamba_middle_patch16_f16_224.ssv2_mask_ft': _clip_cfg('m', 'ssv2_mask_ft', 16),
    'videomamba_middle_patch16_f32_224.k400': _clip_cfg('m', 'k400', 32),
    'videomamba_middle_patch16_f32_224.k400_mask_ft': _clip_cfg('m', 'k400_mask_ft', 32),
    'videomamba_middle_patch16_f32_224.breakfast': _clip_cfg('m', 'breakfast', 32),
    'videomamba_middle_patch16_f32_224.breakfast_mask_ft': _clip_cfg('m', 'breakfast_mask_ft', 32),
    'videomamba_middle_patch16_f64_224.k400': _clip_cfg('m', 'k400', 64),
    'videomamba_middle_patch16_f64_224.k400_mask_ft': _clip_cfg('m', 'k400_mask_ft', 64),
    'videomamba_middle_patch16_f64_224.breakfast': _clip_cfg('m', 'breakfast', 64),
    'videomamba_middle_patch16_f64_224.breakfast_mask_ft': _clip_cfg('m', 'breakfast_mask_ft', 64),
    'videomamba_middle_patch16_f64_384.k400': _clip_cfg('m', 'k400', 64, '224to384'),
    'videomamba_middle_patch16_f64_384.k400_mask_ft': _clip_cfg('m', 'k400_mask_ft', 64, '224to384'),
    'videomamba_middle_patch16_f16_288.ssv2': _clip_cfg('m', 'ssv2', 16, '224to288'),
    'videomamba_middle_patch16_f16_288.ssv2_mask_ft': _clip_cfg('m', 'ssv2_mask_ft', 16, '224to288'),
})


@register_model
def videomamba_tiny_patch16_224(pretrained: bool = False, **kwargs) -> VideoMamba:
    """VideoMamba-Ti, 7 M parameters."""
    model_args = dict(embed_dim=192, depth=24)
    return _create_videomamba('videomamba_tiny_patch16_224', pretrained, **dict(model_args, **kwargs))


@register_model
def videomamba_tiny_patch16_448(pretrained: bool = False, **kwargs) -> VideoMamba:
    """VideoMamba-Ti fine-tuned at 448."""
    model_args = dict(img_size=448, embed_dim=192, depth=24)
    return _create_videomamba('videomamba_tiny_patch16_448', pretrained, **dict(model_args, **kwargs))


@register_model
def videomamba_tiny_patch16_576(pretrained: bool = False, **kwargs) -> VideoMamba:
    """VideoMamba-Ti fine-tuned at 448, then 576."""
    model_args = dict(img_size=576, embed_dim=192, depth=24)
    return _create_videomamba('videomamba_tiny_patch16_576', pretrained, **dict(model_args, **kwargs))


@register_model
def videomamba_small_patch16_224(pretrained: bool = False, **kwargs) -> VideoMamba:
    """VideoMamba-S, 26 M parameters."""
    model_args = dict(embed_dim=384, depth=24)
    return _create_videomamba('videomamba_small_patch16_224', pretrained, **dict(model_args, **kwargs))


@register_model
def videomamba_small_patch16_448(pretrained: bool = False, **kwargs) -> VideoMamba:
    """VideoMamba-S fine-tuned at 448."""
    model_args = dict(img_size=448, embed_dim=384, depth=24)
    return _create_videomamba('videomamba_small_patch16_448', pretrained, **dict(model_args, **kwargs))


@register_model
def videomamba_small_patch16_576(pretrained: bool = False, **kwargs) -> VideoMamba:
    """VideoMamba-S fine-tuned at 448, then 576."""
    model_args = dict(img_size=576, embed_dim=384, depth=24)
    return _create_videomamba('videomamba_small_patch16_576', pretrained, **dict(model_args, **kwargs))


@register_model
def videomamba_middle_patch16_224(pretrained: bool = False, **kwargs) -> VideoMamba:
    """VideoMamba-M, 74 M parameters; trained with self-distillation."""
    model_args = dict(embed_dim=576, depth=32)
    return _create_videomamba('videomamba_middle_patch16_224', pretrained, **dict(model_args, **kwargs))


@register_model
def videomamba_middle_patch16_448(pretrained: bool = False, **kwargs) -> VideoMamba:
    """VideoMamba-M fine-tuned at 448."""
    model_args = dict(img_size=448, embed_dim=576, depth=32)
    return _create_videomamba('videomamba_middle_patch16_448', pretrained, **dict(model_args, **kwargs))


@register_model
def videomamba_middle_patch16_576(pretrained: bool = False, **kwargs) -> VideoMamba:
    """VideoMamba-M fine-tuned at 448, then 576."""
    model_args = dict(img_size=576, embed_dim=576, depth=32)
    return _create_videomamba('videomamba_middle_patch16_576', pretrained, **dict(model_args, **kwargs))


@register_model
def videomamba_base_patch16_224(pretrained: bool = False, **kwargs) -> VideoMamba:
    """VideoMamba-B, 98 M parameters; trained with self-distillation."""
    model_args = dict(embed_dim=768, depth=24)
    return _create_videomamba('videomamba_base_patch16_224', pretrained, **dict(model_args, **kwargs))


@register_model
def videomamba_tiny_patch16_f8_224(pretrained: bool = False, **kwargs) -> VideoMamba:
    """VideoMamba-Ti for clips of 8 frames."""
    model_args = dict(num_frames=8, embed_dim=192, depth=24)
    return _create_videomamba('videomamba_tiny_patch16_f8_224', pretrained, **dict(model_args, **kwargs))


@register_model
def videomamba_tiny_patch16_f16_224(pretrained: bool = False, **kwargs) -> VideoMamba:
    """VideoMamba-Ti for clips of 16 frames."""
    model_args = dict(num_frames=16, embed_dim=192, depth=24)
    return _create_videomamba('videomamba_tiny_patch16_f16_224', pretrained, **dict(model_args, **kwargs))


@register_model
def videomamba_tiny_patch16_f16_288(pretrained: bool = False, **kwargs) -> VideoMamba:
    """VideoMamba-Ti for clips of 16 frames at 288."""
    model_args = dict(img_size=288, num_frames=16, embed_dim=192, depth=24)
    return _create_videomamba('videomamba_tiny_patch16_f16_288', pretrained, **dict(model_args, **kwargs))


@register_model
def videomamba_tiny_patch16_f32_224(pretrained: bool = False, **kwargs) -> VideoMamba:
    """VideoMamba-Ti for clips of 32 frames."""
    model_args = dict(num_frames=32, embed_dim=192, depth=24)
    return _create_videomamba('videomamba_tiny_patch16_f32_224', pretrained, **dict(model_args, **kwargs))


@register_model
def videomamba_tiny_patch16_f64_224(pretrained: bool = False, **kwargs) -> VideoMamba:
    """VideoMamba-Ti for clips of 64 frames."""
    model_args = dict(num_frames=64, embed_dim=192, depth=24)
    return _create_videomamba('videomamba_tiny_patch16_f64_224', pretrained, **dict(model_args, **kwargs))


@register_model
def videomamba_tiny_patch16_f64_384(pretrained: bool = False, **kwargs) -> VideoMamba:
    """VideoMamba-Ti for clips of 64 frames at 384."""
    model_args = dict(img_size=384, num_frames=64, embed_dim=192, depth=24)
    return _create_videomamba('videomamba_tiny_patch16_f64_384', pretrained, **dict(model_args, **kwargs))


@register_model
def videomamba_small_patch16_f8_224(pretrained: bool = False, **kwargs) -> VideoMamba:
    """VideoMamba-S for clips of 8 frames."""
    model_args = dict(num_frames=8, embed_dim=384, depth=24)
    return _create_videomamba('videomamba_small_patch16_f8_224', pretrained, **dict(model_args, **kwargs))


@register_model
def videomamba_small_patch16_f16_224(pretrained: bool = False, **kwargs) -> VideoMamba:
    """VideoMamba-S for clips of 16 frames."""
    model_args = dict(num_frames=16, embed_dim=384, depth=24)
    return _create_videomamba('videomamba_small_patch16_f16_224', pretrained, **dict(model_args, **kwargs))


@register_model
def videomamba_small_patch16_f16_288(pretrained: bool = False, **kwargs) -> VideoMamba:
    """VideoMamba-S for clips of 16 frames at 288."""
    model_args = dict(img_size=288, num_frames=16, embed_dim=384, depth=24)
    return _create_videomamba('videomamba_small_patch16_f16_288', pretrained, **dict(model_args, **kwargs))


@register_model
def videomamba_small_patch16_f32_224(pretrained: bool = False, **kwargs) -> VideoMamba:
    """VideoMamba-S for clips of 32 frames."""
    model_args = dict(num_frames=32, embed_dim=384, depth=24)
    return _create_videomamba('videomamba_small_patch16_f32_224', pretrained, **dict(model_args, **kwargs))


@register_model
def videomamba_small_patch16_f64_224(pretrained: bool = False, **kwargs) -> VideoMamba:
    """VideoMamba-S for clips of 64 frames."""
    model_args = dict(num_frames=64, embed_dim=384, depth=24)
    return _create_videomamba('videomamba_small_patch16_f64_224', pretrained, **dict(model_args, **kwargs))


@register_model
def videomamba_small_patch16_f64_384(pretrained: bool = False, **kwargs) -> VideoMamba:
    """VideoMamba-S for clips of 64 frames at 384."""
    model_args = dict(img_size=384, num_frames=64, embed_dim=384, depth=24)
    return _create_videomamba('videomamba_small_patch16_f64_384', pretrained, **dict(model_args, **kwargs))


@register_model
def videomamba_middle_patch16_f8_224(pretrained: bool = False, **kwargs) -> VideoMamba:
    """VideoMamba-M for clips of 8 frames."""
    model_args = dict(num_frames=8, embed_dim=576, depth=32)
    return _create_videomamba('videomamba_middle_patch16_f8_224', pretrained, **dict(model_args, **kwargs))


@register_model
def videomamba_middle_patch16_f16_224(pretrained: bool = False, **kwargs) -> VideoMamba:
    """VideoMamba-M for clips of 16 frames."""
    model_args = dict(num_frames=16, embed_dim=576, depth=32)
    return _create_videomamba('videomamba_middle_patch16_f16_224', pretrained, **dict(model_args, **kwargs))


@register_model
def videomamba_middle_patch16_f16_288(pretrained: bool = False, **kwargs) -> VideoMamba:
    """VideoMamba-M for clips of 16 frames at 288."""
    model_args = dict(img_size=288, num_frames=16, embed_dim=576, depth=32)
    return _create_videomamba('videomamba_middle_patch16_f16_288', pretrained, **dict(model_args, **kwargs))


@register_model
def videomamba_middle_patch16_f32_224(pretrained: bool = False, **kwargs) -> VideoMamba:
    """VideoMamba-M for clips of 32 frames."""
    model_args = dict(num_frames=32, embed_dim=576, depth=32)
    return _create_videomamba('videomamba_middle_patch16_f32_224', pretrained, **dict(model_args, **kwargs))


@register_model
def videomamba_middle_patch16_f64_224(pretrained: bool = False, **kwargs) -> VideoMamba:
    """VideoMamba-M for clips of 64 frames."""
    model_args = dict(num_frames=64, embed_dim=576, depth=32)
    return _create_videomamba('videomamba_middle_patch16_f64_224', pretrained, **dict(model_args, **kwargs))


@register_model
def videomamba_middle_patch16_f64_384(pretrained: bool = False, **kwargs) -> VideoMamba:
    """VideoMamba-M for clips of 64 frames at 384."""
    model_args = dict(img_size=384, num_frames=64, embed_dim=576, depth=32)
    return _create_videomamba('videomamba_middle_patch16_f64_384', pretrained, **dict(model_args, **kwargs))


register_model_deprecations(__name__, {
    'videomamba_tiny': 'videomamba_tiny_patch16_224',
    'videomamba_small': 'videomamba_small_patch16_224',
    'videomamba_middle': 'videomamba_middle_patch16_224',
    'videomamba_base': 'videomamba_base_patch16_224',
})
