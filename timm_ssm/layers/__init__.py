"""Mixers and blocks that several families share."""
from .bimamba import BiMamba
from .norm import LayerNorm, RmsNorm
from .patch_embed import PatchEmbed, resample_patch_kernel
from .ssm import CausalConv1d, DtProj, at_least_float32, float32_scan, init_dt, log_decay_init, state_decay

__all__ = [
    'BiMamba',
    'CausalConv1d',
    'DtProj',
    'LayerNorm',
    'PatchEmbed',
    'RmsNorm',
    'at_least_float32',
    'float32_scan',
    'init_dt',
    'log_decay_init',
    'resample_patch_kernel',
    'state_decay',
]
