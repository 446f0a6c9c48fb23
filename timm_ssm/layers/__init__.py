"""Mixers and blocks that several families share."""
from .bimamba import BiMamba
from .patch_embed import PatchEmbed
from .ssm import DtProj, at_least_float32, init_dt, log_decay_init, state_decay

__all__ = ['BiMamba', 'DtProj', 'PatchEmbed', 'at_least_float32', 'init_dt', 'log_decay_init', 'state_decay']
