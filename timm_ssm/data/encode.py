"""Writing clips."""
from itertools import chain
from pathlib import Path
from typing import BinaryIO, Iterable, Union

import av
import numpy as np


def write_clip(file: Union[str, Path, BinaryIO], frames: Iterable[np.ndarray], rate: int, **options: str) -> None:
    """Encode frames as H.264 in MP4.

    Args:
        file: Path, or a binary file to write to.
        frames: RGB (H, W, 3) uint8 of even sides, one or more.
        rate: Frames of a second.
        options: Of the encoder x264, `crf='18'` for example.
    """
    frames = iter(frames)
    first = next(frames)
    with av.open(file, 'w', format='mp4') as container:
        stream = container.add_stream('libx264', rate=rate, options=options)
        stream.height, stream.width = first.shape[:2]
        stream.pix_fmt = 'yuv420p'
        for frame in chain([first], frames):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), 'rgb24')))
        container.mux(stream.encode())
