"""Vision state-space models for timm: `import timm_ssm` registers every model with timm."""
from . import models
from .version import __version__

__all__ = ['__version__', 'models']
