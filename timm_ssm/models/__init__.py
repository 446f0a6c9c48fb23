"""The model families, one file each; importing this package registers them with timm."""
from .groupmamba import GroupMamba
from .mambavision import MambaVision
from .spatialmamba import SpatialMamba
from .stablemamba import StableMamba
from .stvideomamba import STVideoMamba
from .videomamba import VideoMamba
from .videomambapro import VideoMambaPro
from .vim import Vim
from .vmamba import VMamba

__all__ = [
    'GroupMamba', 'MambaVision', 'STVideoMamba', 'SpatialMamba', 'StableMamba', 'VMamba', 'VideoMamba', 'VideoMambaPro',
    'Vim',
]
