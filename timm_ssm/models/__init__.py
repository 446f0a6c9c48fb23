"""The model families, one file each; importing this package registers them with timm."""
from .stablemamba import StableMamba
from .stvideomamba import STVideoMamba
from .videomamba import VideoMamba
from .videomambapro import VideoMambaPro
from .vim import Vim

__all__ = ['STVideoMamba', 'StableMamba', 'VideoMamba', 'VideoMambaPro', 'Vim']
