"""Clips of videos: lists and readers, decoding, sampling, transforms, loading, and the accuracy on them."""
from .decode import ClipError, FrameFolder, Video
from .loader import ClipLoader, ClipMixup, EvalClips, TooManyBadClips, TrainClips
from .readers import ClipReader, create_clip_reader
from .sampling import FrameSampler
from .transforms import EvalTransform, create_train_transform
from .views import score_videos, score_views

__all__ = [
    'ClipError', 'ClipLoader', 'ClipMixup', 'ClipReader', 'EvalClips', 'EvalTransform', 'FrameFolder', 'FrameSampler',
    'TooManyBadClips', 'TrainClips', 'Video', 'create_clip_reader', 'create_train_transform', 'score_videos',
    'score_views',
]
