"""Mixers and blocks that several families share."""
from .bimamba import BiMamba
from .mixer import ScanInputs, ScanMixer, scan, scan_mixers
from .norm import LayerNorm, RmsNorm
from .patch_embed import PatchEmbed, resample_patch_kernel
from .ssm import CausalConv1d, DtProj, at_least_float32, init_A_log, init_dt, state_decay

__all__ = [
    'BiMamba', 'CausalConv1d', 'DtProj', 'LayerNorm', 'PatchEmbed', 'RmsNorm', 'ScanInputs', 'ScanMixer',
    'at_least_float32', 'init_A_log', 'init_dt', 'resample_patch_kernel', 'scan', 'scan_mixers', 'state_decay',
]
