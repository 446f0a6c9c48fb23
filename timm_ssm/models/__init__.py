"""The model families, one file each; importing this package registers them with timm."""
from .videomamba import VideoMamba

__all__ = ['VideoMamba']
