"""The model families, one file each; importing this package registers them with timm."""
from .groupmamba import GroupMamba
from .mambavision import MambaVision
from .videomamba import VideoMamba
from .vim import Vim

__all__ = ['GroupMamba', 'MambaVision', 'VideoMamba', 'Vim']
