"""The model families, one file each; importing this package registers them with timm."""
from .mambavision import MambaVision
from .videomamba import VideoMamba
from .vim import Vim

__all__ = ['MambaVision', 'VideoMamba', 'Vim']
