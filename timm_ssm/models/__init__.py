"""The model families, one file each; importing this package registers them with timm."""
from .videomamba import VideoMamba
from .vim import Vim

__all__ = ['VideoMamba', 'Vim']
