"""Vision state-space models for timm: `import timm_ssm` registers every model with timm."""
from . import models, ops
from ._compat import mend_posterize
from .version import __version__

__all__ = ['__version__', 'models', 'ops']

mend_posterize()
