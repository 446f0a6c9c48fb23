"""What the papers say about the models: the one table to extend for a new family.

Model cards, `timm-ssm list` and docs/models.md are made from it.
"""
from typing import Dict, NamedTuple, Optional

__all__ = ['CITATIONS', 'PARAMS', 'PUBLISHED', 'REMARKS', 'Published', 'UNCOUNTED_OPS']


class Published(NamedTuple):
    """Published numbers of one pretrained tag, or of a model without weights; None where its authors give none."""
    top1: Optional[float]  # per cent
    gmacs: Optional[float]  # of one forward pass on one image or clip of the tag's input size, in the authors' count
    by: str  # who published them
    note: str = ''


_STABLEMAMBA = 'Suleman et al., 2024'
_VIDEOMAMBAPRO = 'Lu et al., CVPR 2025'
_STVIDEOMAMBA = 'Park et al., ECCV 2024'
_VIDEOMAMBA_ZOO = "Li et al., the released code's model zoo"
_MASKED = 'after masked pretraining'
_VIDEOMAMBA = 'Li et al., ECCV 2024'
_VIM = 'Zhu et al., ICML 2024'
_MAMBAVISION = 'Hatamizadeh and Kautz, CVPR 2025'
_GROUPMAMBA = 'Shaker et al., CVPR 2025'
_VMAMBA = 'Liu et al., NeurIPS 2024'
_SPATIALMAMBA = 'Xiao et al., ICLR 2025'
_DISTILLED = 'trained with self-distillation'

# Parameters in millions as published, by the names' beginnings.
PARAMS = {
    'videomamba_tiny': 7, 'videomamba_small': 26, 'videomamba_middle': 74, 'videomamba_base': 98,
    'videomamba_middle_patch16_448': 75, 'videomamba_middle_patch16_576': 75,
    'stablemamba_tiny': 7, 'stablemamba_small': 27, 'stablemamba_middle': 76, 'stablemamba_base': 101,
    'stablemamba_large': 187,
    'videomambapro_tiny': 7, 'videomambapro_small': 25, 'videomambapro_middle': 72,
    'stvideomamba_small': 26.3,
    'vim_tiny': 7, 'vim_small': 26, 'vim_base': 98,
    'mambavision_tiny': 31.8, 'mambavision_tiny2': 35.1, 'mambavision_small': 50.1, 'mambavision_base': 97.7,
    'mambavision_large': 227.9, 'mambavision_large2': 241.5, 'mambavision_large3': 739.6,
    'groupmamba_tiny': 23, 'groupmamba_small': 34, 'groupmamba_base': 57, 'stable_groupmamba_small': 39.3,
    'vmamba_tiny': 30, 'vmamba_small': 50, 'vmamba_base': 89, 'vmamba_tiny_s2l5': 31, 'vmamba_small_s1l20': 49,
    'vmamba_base_s1l20': 87,
    'spatialmamba_tiny': 27, 'spatialmamba_small': 43, 'spatialmamba_base': 96,
}

# Operations that a family's published GMACs do not count, found by counting: its authors' counters do not see them.
UNCOUNTED_OPS = {
    'videomamba': ('scan', 'x_proj', 'dt_proj'),
    'stablemamba': ('scan', 'x_proj', 'dt_proj'),
    'stvideomamba': ('scan', 'x_proj', 'dt_proj'),
    'mambavision': ('scan', 'attention'),
}

# Paragraphs of docs/models.md.
REMARKS = {
    'counts': '''\
StableMamba's depths and MLP ratios are not published: those here match its parameters, and its multiply-accumulates,
counted alike, come out up to 11 % above the published ones. Wherever else there is a published figure, the difference
is below 5 %.''',
    'licences': '''\
MambaVision's weights are under the NVIDIA Source Code License-NC: for non-commercial use only. GroupMamba's are MIT by
their repositories' metadata and non-commercial by their model cards' text. VideoMamba's and Vim's are Apache-2.0,
VMamba's MIT.''',
}

PUBLISHED: Dict[str, Published] = {
    'stablemamba_tiny_patch16_224.untrained': Published(77.4, 1.2, _STABLEMAMBA),
    'stablemamba_small_patch16_224.untrained': Published(81.5, 4.4, _STABLEMAMBA),
    'stablemamba_middle_patch16_224.untrained': Published(83.1, 12.9, _STABLEMAMBA),
    'stablemamba_base_patch16_224.untrained': Published(83.9, 17.1, _STABLEMAMBA),
    'stablemamba_large_patch16_224.untrained': Published(84.6, 33.7, _STABLEMAMBA),
    'stablemamba_tiny_patch16_f16_224.untrained': Published(78.6, None, _STABLEMAMBA, '65.7 on SSv2'),
    'stablemamba_small_patch16_f16_224.untrained': Published(81.2, None, _STABLEMAMBA, '67.3 on SSv2'),
    'stablemamba_middle_patch16_f16_224.untrained': Published(82.2, None, _STABLEMAMBA, '67.8 on SSv2'),
    'stablemamba_base_patch16_f16_224.untrained': Published(82.8, None, _STABLEMAMBA),

    'videomambapro_tiny_patch16_224.untrained': Published(78.9, None, _VIDEOMAMBAPRO),
    'videomambapro_small_patch16_224.untrained': Published(82.4, None, _VIDEOMAMBAPRO),
    'videomambapro_middle_patch16_224.untrained': Published(83.8, None, _VIDEOMAMBAPRO),
    'videomambapro_tiny_patch16_f16_224.untrained': Published(81.6, None, _VIDEOMAMBAPRO, '67.9 on SSv2'),
    'videomambapro_small_patch16_f16_224.untrained': Published(83.3, None, _VIDEOMAMBAPRO, '68.8 on SSv2'),
    'videomambapro_middle_patch16_f16_224.untrained': Published(
        84.0, None, _VIDEOMAMBAPRO, '69.4 on SSv2, 91.6 on UCF-101, 63.2 on HMDB51'),

    'stvideomamba_small_patch16_f16_224.untrained': Published(
        76.1, 34, _STVIDEOMAMBA, '63.7 on SSv2, 68.6 on HMDB51, 77.7 on K400 with 32 frames'),

    'videomamba_tiny_patch16_224.in1k': Published(76.9, 1.1, _VIDEOMAMBA),
    'videomamba_tiny_patch16_448.in1k': Published(79.3, 4.3, _VIDEOMAMBA, 'fine-tuned from 224'),
    'videomamba_tiny_patch16_576.in1k': Published(79.6, 7.1, _VIDEOMAMBA, 'fine-tuned from 448'),
    'videomamba_small_patch16_224.in1k': Published(81.2, 4.3, _VIDEOMAMBA),
    'videomamba_small_patch16_448.in1k': Published(83.2, 16.9, _VIDEOMAMBA, 'fine-tuned from 224'),
    'videomamba_small_patch16_576.in1k': Published(83.5, 28.0, _VIDEOMAMBA, 'fine-tuned from 448'),
    'videomamba_middle_patch16_224.in1k': Published(82.8, 12.7, _VIDEOMAMBA, _DISTILLED),
    'videomamba_middle_patch16_448.in1k': Published(83.8, 50.4, _VIDEOMAMBA, f'{_DISTILLED}, fine-tuned from 224'),
    'videomamba_middle_patch16_576.in1k': Published(84.0, 83.1, _VIDEOMAMBA, f'{_DISTILLED}, fine-tuned from 448'),
    'videomamba_base_patch16_224.in1k': Published(82.7, 16.9, _VIDEOMAMBA, _DISTILLED),

    'videomamba_tiny_patch16_f8_224.k400': Published(76.9, None, _VIDEOMAMBA),
    'videomamba_tiny_patch16_f16_224.k400': Published(78.1, 17, _VIDEOMAMBA),
    'videomamba_tiny_patch16_f32_224.k400': Published(78.8, 34, _VIDEOMAMBA),
    'videomamba_tiny_patch16_f64_224.k400': Published(79.6, None, _VIDEOMAMBA),
    'videomamba_small_patch16_f8_224.k400': Published(79.3, None, _VIDEOMAMBA),
    'videomamba_small_patch16_f16_224.k400': Published(80.8, 68, _VIDEOMAMBA),
    'videomamba_small_patch16_f32_224.k400': Published(81.5, 135, _VIDEOMAMBA),
    'videomamba_small_patch16_f64_224.k400': Published(81.8, None, _VIDEOMAMBA),
    'videomamba_middle_patch16_f8_224.k400': Published(80.6, None, _VIDEOMAMBA),
    'videomamba_middle_patch16_f16_224.k400': Published(81.9, 202, _VIDEOMAMBA),
    'videomamba_middle_patch16_f32_224.k400': Published(82.4, 403, _VIDEOMAMBA),
    'videomamba_middle_patch16_f64_224.k400': Published(82.8, None, _VIDEOMAMBA),
    'videomamba_tiny_patch16_f8_224.ssv2': Published(65.1, 9, _VIDEOMAMBA),
    'videomamba_small_patch16_f8_224.ssv2': Published(66.6, 34, _VIDEOMAMBA),
    'videomamba_middle_patch16_f8_224.ssv2': Published(67.3, 101, _VIDEOMAMBA),
    'videomamba_tiny_patch16_f64_384.k400': Published(80.3, 202, _VIDEOMAMBA, 'fine-tuned from 224'),
    'videomamba_tiny_patch16_f16_224.ssv2': Published(66.0, 17, _VIDEOMAMBA),
    'videomamba_tiny_patch16_f16_288.ssv2': Published(66.2, 28, _VIDEOMAMBA, 'fine-tuned from 224'),
    # the paper's 395 GMACs are half of what its other figures, and the count, come to
    'videomamba_small_patch16_f64_384.k400': Published(82.7, None, _VIDEOMAMBA, 'fine-tuned from 224'),
    'videomamba_small_patch16_f16_224.ssv2': Published(67.7, 68, _VIDEOMAMBA_ZOO),
    'videomamba_small_patch16_f16_288.ssv2': Published(68.1, 112, _VIDEOMAMBA, 'fine-tuned from 224'),
    'videomamba_middle_patch16_f64_384.k400': Published(83.3, 2368, _VIDEOMAMBA, 'fine-tuned from 224'),
    'videomamba_middle_patch16_f16_224.ssv2': Published(68.3, 202, _VIDEOMAMBA),
    'videomamba_middle_patch16_f16_288.ssv2': Published(68.4, 333, _VIDEOMAMBA, 'fine-tuned from 224'),
    'videomamba_tiny_patch16_f32_224.breakfast': Published(94.3, None, _VIDEOMAMBA, 'after K400'),
    'videomamba_tiny_patch16_f64_224.breakfast': Published(94.3, None, _VIDEOMAMBA, 'after K400'),
    'videomamba_small_patch16_f32_224.breakfast': Published(95.3, None, _VIDEOMAMBA, 'after K400'),
    'videomamba_small_patch16_f64_224.breakfast': Published(97.4, None, _VIDEOMAMBA, 'after K400'),
    'videomamba_middle_patch16_f32_224.breakfast': Published(94.8, None, _VIDEOMAMBA, 'after K400'),
    'videomamba_middle_patch16_f64_224.breakfast': Published(95.8, None, _VIDEOMAMBA, 'after K400'),
    'videomamba_middle_patch16_f8_224.k400_mask_ft': Published(82.0, 101, _VIDEOMAMBA, _MASKED),
    'videomamba_middle_patch16_f16_224.k400_mask_ft': Published(83.4, 202, _VIDEOMAMBA, _MASKED),
    'videomamba_middle_patch16_f32_224.k400_mask_ft': Published(83.9, 403, _VIDEOMAMBA, _MASKED),
    'videomamba_middle_patch16_f64_224.k400_mask_ft': Published(84.3, None, _VIDEOMAMBA_ZOO, _MASKED),
    'videomamba_middle_patch16_f64_384.k400_mask_ft': Published(85.0, 2368, _VIDEOMAMBA, _MASKED),
    'videomamba_middle_patch16_f8_224.ssv2_mask_ft': Published(70.2, 101, _VIDEOMAMBA, _MASKED),
    'videomamba_middle_patch16_f16_224.ssv2_mask_ft': Published(71.0, 202, _VIDEOMAMBA, _MASKED),
    'videomamba_middle_patch16_f16_288.ssv2_mask_ft': Published(71.4, 333, _VIDEOMAMBA, _MASKED),
    'videomamba_middle_patch16_f32_224.breakfast_mask_ft': Published(97.9, None, _VIDEOMAMBA, _MASKED),
    'videomamba_middle_patch16_f64_224.breakfast_mask_ft': Published(96.9, None, _VIDEOMAMBA, _MASKED),

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
    'mambavision_large2.in21k_ft_in1k_512': Published(
        87.3, 196.3, "Hatamizadeh and Kautz, the released code's README"),
    'mambavision_large3.in21k_ft_in1k_256': Published(87.3, 122.3, _MAMBAVISION),
    'mambavision_large3.in21k_ft_in1k_512': Published(88.1, 489.1, _MAMBAVISION),

    'groupmamba_tiny.in1k': Published(83.3, 4.5, _GROUPMAMBA),
    'groupmamba_small.in1k': Published(83.9, 7.0, _GROUPMAMBA),
    'groupmamba_base.in1k': Published(84.5, 14, _GROUPMAMBA),
    'stable_groupmamba_small.untrained': Published(83.8, 8.3, _STABLEMAMBA, '84.2 with distillation'),

    'vmamba_tiny.in1k': Published(82.6, 4.9, _VMAMBA),
    'vmamba_small.in1k': Published(83.6, 8.7, _VMAMBA),
    'vmamba_base.in1k': Published(83.9, 15.4, _VMAMBA),
    'vmamba_tiny_s2l5.in1k': Published(82.5, 4.9, _VMAMBA),
    'vmamba_small_s1l20.in1k': Published(83.3, 8.6, _VMAMBA),
    'vmamba_base_s1l20.in1k': Published(83.8, 15.2, _VMAMBA),

    'spatialmamba_tiny.untrained': Published(83.5, 4.5, _SPATIALMAMBA),
    'spatialmamba_small.untrained': Published(84.6, 7.1, _SPATIALMAMBA),
    'spatialmamba_base.untrained': Published(85.3, 15.8, _SPATIALMAMBA),
}

# BibTeX, by arXiv number; papers without an entry are cited as arXiv preprints.
CITATIONS = {
    '2403.06977': '''@inproceedings{li2024videomamba,
  title={VideoMamba: State Space Model for Efficient Video Understanding},
  author={Li, Kunchang and Li, Xinhao and Wang, Yi and He, Yinan and Wang, Yali and Wang, Limin and Qiao, Yu},
  booktitle={European Conference on Computer Vision},
  year={2024}
}''',
    '2401.09417': '''@inproceedings{zhu2024vision,
  title={Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model},
  author={Zhu, Lianghui and Liao, Bencheng and Zhang, Qian and Wang, Xinlong and Liu, Wenyu and Wang, Xinggang},
  booktitle={International Conference on Machine Learning},
  year={2024}
}''',
    '2407.08083': '''@inproceedings{hatamizadeh2025mambavision,
  title={MambaVision: A Hybrid Mamba-Transformer Vision Backbone},
  author={Hatamizadeh, Ali and Kautz, Jan},
  booktitle={IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year={2025}
}''',
    '2407.13772': '''@inproceedings{shaker2025groupmamba,
  title={GroupMamba: Efficient Group-Based Visual State Space Model},
  author={Shaker, Abdelrahman and Wasim, Syed Talal and Khan, Salman and Gall, Juergen and Khan, Fahad Shahbaz},
  booktitle={IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year={2025}
}''',
    '2401.10166': '''@inproceedings{liu2024vmamba,
  title={VMamba: Visual State Space Model},
  author={Liu, Yue and Tian, Yunjie and Zhao, Yuzhong and Yu, Hongtian and Xie, Lingxi and Wang, Yaowei and Ye, Qixiang
    and Jiao, Jianbin and Liu, Yunfan},
  booktitle={Advances in Neural Information Processing Systems},
  year={2024}
}''',
    '2410.15091': '''@inproceedings{xiao2025spatialmamba,
  title={Spatial-Mamba: Effective Visual State Space Models via Structure-aware State Fusion},
  author={Xiao, Chaodong and Li, Minghan and Zhang, Zhengqiang and Meng, Deyu and Zhang, Lei},
  booktitle={International Conference on Learning Representations},
  year={2025}
}''',
}
