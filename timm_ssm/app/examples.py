"""Examples to begin with: photographs that come with scikit-image, and a clip that pans over one."""
from pathlib import Path
from typing import Dict, List

import numpy as np
import skimage.data
from PIL import Image

from ..data.encode import write_clip

PHOTOGRAPHS = ('chelsea', 'coffee', 'rocket')  # in the public domain, or given to it
FRAMES, STEP = 32, 6  # of the clip, and pixels from one to the next


def write_examples(folder: Path) -> Dict[str, List[str]]:
    """The files written, by what they are, 'image' or 'video'."""
    folder.mkdir()
    images = [folder / f'{name}.jpg' for name in PHOTOGRAPHS]
    for path in images:
        Image.fromarray(getattr(skimage.data, path.stem)()).save(path, quality=90)
    clip = folder / 'pan.mp4'
    write_clip(clip, pan(skimage.data.coffee()), rate=16, crf='23')
    return dict(image=[str(path) for path in images], video=[str(clip)])


def pan(photograph: np.ndarray) -> List[np.ndarray]:
    """Square frames, each further to the right."""
    side = min(photograph.shape[0], photograph.shape[1] - (FRAMES - 1) * STEP) // 2 * 2
    return [photograph[:side, STEP * i:STEP * i + side] for i in range(FRAMES)]
