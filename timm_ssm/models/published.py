"""What the papers say about the pretrained tags: data for model cards and `timm-ssm list`."""
from typing import Dict, NamedTuple, Optional

__all__ = ['PUBLISHED', 'Published']


class Published(NamedTuple):
    """Published numbers of one pretrained tag; None where its authors give none."""
    top1: Optional[float]  # per cent
    gmacs: Optional[float]  # of one forward pass at the tag's input size, in the authors' count
    by: str  # who published them
    note: str = ''


_VIDEOMAMBA = 'Li et al., ECCV 2024'
_VIM = 'Zhu et al., ICML 2024'
_MAMBAVISION = 'Hatamizadeh and Kautz, CVPR 2025'
_GROUPMAMBA = 'Shaker et al., CVPR 2025'
_DISTILLED = 'trained with self-distillation'

PUBLISHED: Dict[str, Published] = {
    'videomamba_tiny_patch16_224.in1k': Published(76.9, 1.1, _VIDEOMAMBA),
    'videomamba_tiny_patch16_448.in1k': Published(79.3, None, _VIDEOMAMBA, 'fine-tuned from 224'),
    'videomamba_tiny_patch16_576.in1k': Published(79.6, None, _VIDEOMAMBA, 'fine-tuned from 448'),
    'videomamba_small_patch16_224.in1k': Published(81.2, 4.3, _VIDEOMAMBA),
    'videomamba_small_patch16_448.in1k': Published(83.2, None, _VIDEOMAMBA, 'fine-tuned from 224'),
    'videomamba_small_patch16_576.in1k': Published(83.5, None, _VIDEOMAMBA, 'fine-tuned from 448'),
    'videomamba_middle_patch16_224.in1k': Published(82.8, 12.7, _VIDEOMAMBA, _DISTILLED),
    'videomamba_middle_patch16_448.in1k': Published(83.8, None, _VIDEOMAMBA, f'{_DISTILLED}, fine-tuned from 224'),
    'videomamba_middle_patch16_576.in1k': Published(84.0, None, _VIDEOMAMBA, f'{_DISTILLED}, fine-tuned from 448'),
    'videomamba_base_patch16_224.in1k': Published(82.7, 16.9, _VIDEOMAMBA, _DISTILLED),

    'videomamba_tiny_patch16_f8_224.k400': Published(76.9, None, _VIDEOMAMBA),
    'videomamba_tiny_patch16_f16_224.k400': Published(78.1, None, _VIDEOMAMBA),
    'videomamba_tiny_patch16_f32_224.k400': Published(78.8, None, _VIDEOMAMBA),
    'videomamba_tiny_patch16_f64_224.k400': Published(79.6, None, _VIDEOMAMBA),
    'videomamba_small_patch16_f8_224.k400': Published(79.3, None, _VIDEOMAMBA),
    'videomamba_small_patch16_f16_224.k400': Published(80.8, None, _VIDEOMAMBA),
    'videomamba_small_patch16_f32_224.k400': Published(81.5, None, _VIDEOMAMBA),
    'videomamba_small_patch16_f64_224.k400': Published(81.8, None, _VIDEOMAMBA),
    'videomamba_middle_patch16_f8_224.k400': Published(80.6, None, _VIDEOMAMBA),
    'videomamba_middle_patch16_f16_224.k400': Published(81.9, None, _VIDEOMAMBA),
    'videomamba_middle_patch16_f32_224.k400': Published(82.4, None, _VIDEOMAMBA),
    'videomamba_middle_patch16_f64_224.k400': Published(82.8, None, _VIDEOMAMBA),
    'videomamba_tiny_patch16_f8_224.ssv2': Published(65.1, None, _VIDEOMAMBA),
    'videomamba_small_patch16_f8_224.ssv2': Published(66.6, None, _VIDEOMAMBA),
    'videomamba_middle_patch16_f8_224.ssv2': Published(67.3, None, _VIDEOMAMBA),

    'vim_tiny_patch16_224.in1k': Published(76.1, None, _VIM),
    'vim_small_patch16_224.in1k': Published(80.5, None, _VIM),
    'vim_base_patch16_224.in1k': Published(81.9, None, _VIM),
    'vim_tiny_patch16_stride8_224.in1k': Published(78.3, None, _VIM, 'fine-tuned with overlapping patches'),
    'vim_small_patch16_stride8_224.in1k': Published(81.6, None, _VIM, 'fine-tuned with overlapping patches'),

    'mambavision_tiny.in1k': Published(82.3, 4.4, _MAMBAVISION),
    'mambavision_tiny2.in1k': Published(82.7, 5.1, _MAMBAVISION),
    'mambavision_small.in1k': Published(83.3, 7.5, _MAMBAVISION),
    'mambavision_base.in1k': Published(84.2, 15.0, _MAMBAVISION),
    'mambavision_large.in1k': Published(85.0, 34.9, _MAMBAVISION),
    'mambavision_large2.in1k': Published(85.3, 37.5, _MAMBAVISION),
    'mambavision_base.in21k_ft_in1k': Published(84.9, 15.0, _MAMBAVISION),
    'mambavision_large.in21k_ft_in1k': Published(86.1, 34.9, _MAMBAVISION),
    'mambavision_large3.in21k_ft_in1k_256': Published(87.3, None, _MAMBAVISION),
    'mambavision_large3.in21k_ft_in1k_512': Published(88.1, None, _MAMBAVISION),

    'groupmamba_tiny.in1k': Published(83.3, None, _GROUPMAMBA),
    'groupmamba_small.in1k': Published(83.9, None, _GROUPMAMBA),
    'groupmamba_base.in1k': Published(84.5, None, _GROUPMAMBA),
}
