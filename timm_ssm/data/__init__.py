"""Clips of videos: lists and readers, decoding, sampling, transforms, loading."""
from .decode import ClipError, FrameFolder, Video
from .sampling import FrameSampler

__all__ = ['ClipError', 'FrameFolder', 'FrameSampler', 'Video']
