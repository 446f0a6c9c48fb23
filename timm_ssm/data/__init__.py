"""Clips of videos: lists and readers, decoding, sampling, transforms, loading."""
from .decode import ClipError, FrameFolder, Video
from .readers import ClipReader, create_clip_reader
from .sampling import FrameSampler

__all__ = ['ClipError', 'ClipReader', 'FrameFolder', 'FrameSampler', 'Video', 'create_clip_reader']
