"""Examples to begin with: photographs that come with scikit-image, and a clip that pans over one."""
from pathlib import Path
from typing import Dict, List

import av
import numpy as np
import skimage.data
from PIL import Image

PHOTOGRAPHS = ('chelsea', 'coffee', 'rocket')  # in the public domain, or given to it
FRAMES, STEP = 32, 6  # of the clip, and pixels from one to the next


def write_examples(folder: Path) -> Dict[str, List[str]]:
    """The files written, by what they are, 'image' or 'video'."""
    folder.mkdir()
    images = [folder / f'{name}.jpg' for name in PHOTOGRAPHS]
    for path in images:
        Image.fromarray(getattr(skimage.data, path.stem)()).save(path, quality=90)
    clip = folder / 'pan.mp4'
    write_pan(clip, skimage.data.coffee())
    return dict(image=[str(path) for path in images], video=[str(clip)])


def write_pan(path: Path, photograph: np.ndarray) -> None:
    height = width = min(photograph.shape[0], photograph.shape[1] - (FRAMES - 1) * STEP) // 2 * 2
    with av.open(str(path), 'w') as container:
        stream = container.add_stream('libx264', rate=16, options=dict(crf='23'))
        stream.height, stream.width, stream.pix_fmt = height, width, 'yuv420p'
        for i in range(FRAMES):
            frame = np.ascontiguousarray(photograph[:height, STEP * i:STEP * i + width])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, 'rgb24')))
        container.mux(stream.encode())
