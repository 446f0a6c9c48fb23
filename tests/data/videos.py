"""Small videos for tests, in which every frame tells its number."""
from fractions import Fraction
from typing import Dict, Optional, Sequence

import av
import numpy as np
import torch

CELL = 8  # pixels of a square of the number


def numbered_frame(number: int, height: int = 64, width: int = 96, seed: int = 0) -> np.ndarray:
    """A moving pattern (height, width, 3) uint8 with `number` in its upper rows, a square black or white per bit."""
    pattern = np.random.default_rng(seed).integers(40, 216, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    frame = np.roll(pattern.repeat(8, 0).repeat(8, 1), (number, 2 * number), (0, 1))[:height, :width].copy()
    for bit in range(8):
        frame[:CELL, bit * CELL:(bit + 1) * CELL] = 255 * (number >> bit & 1)
    return frame


def read_numbers(frames: torch.Tensor) -> list:
    """The numbers in frames (T, 3, H, W)."""
    cells = frames[:, :, :CELL, :8 * CELL].float().mean(1).unflatten(-1, (8, CELL))
    bits = cells[:, 2:-2, :, 2:-2].mean((1, 3)) > 127
    return (bits * 2 ** torch.arange(8)).sum(1).tolist()


def write_video(
        path,
        num_frames: int = 40,
        height: int = 64,
        width: int = 96,
        fps: int = 25,
        codec: str = 'libx264',
        options: Optional[Dict[str, str]] = None,
        pix_fmt: str = 'yuv420p',
        milliseconds: Optional[Sequence[int]] = None,
        rotation: int = 0,
        audio_first: bool = False,
        muxer_options: Optional[Dict[str, str]] = None,
        frames: Optional[Sequence[np.ndarray]] = None,
        seed: int = 0,
) -> str:
    """Encode `numbered_frame`s, or the frames given, and return the path.

    Args:
        milliseconds: When each frame is shown, for a variable frame rate.
        rotation: Degrees counter-clockwise that a player is to turn the frames by.
        audio_first: Silence in the first stream.
    """
    with av.open(str(path), 'w', options=muxer_options or {}) as container:
        audio = container.add_stream('aac', rate=16000) if audio_first else None
        stream = container.add_stream(codec, rate=fps, options=options or {})
        if frames is not None:
            height, width = frames[0].shape[:2]
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        if milliseconds is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        if rotation:
            stream.set_display_rotation(rotation)
        if audio is not None:
            for i in range(num_frames * 16000 // fps // 1024):
                silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), 'fltp', 'mono')
                silence.rate, silence.pts = 16000, i * 1024
                container.mux(audio.encode(silence))
            container.mux(audio.encode())
        for i in range(num_frames if frames is None else len(frames)):
            image = numbered_frame(i, height, width, seed) if frames is None else frames[i]
            frame = av.VideoFrame.from_ndarray(image, 'rgb24')
            if milliseconds is not None:
                frame.pts, frame.time_base = milliseconds[i], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return str(path)


def packets(path) -> list:
    """Position and size in the file of each video packet, in the file's order."""
    with av.open(str(path)) as container:
        return [(p.pos, p.size) for p in container.demux(video=0) if p.size]


def write_dataset(root, classes: Sequence[str] = ('a', 'b'), videos: int = 4, num_frames: int = 12, **kwargs) -> str:
    """Videos in folders by class, `videos` of each; frame t of video i of a class shows the number 16 i + t."""
    for number, name in enumerate(classes):
        folder = root / name
        folder.mkdir(parents=True)
        for i in range(videos):
            frames = [numbered_frame((16 * i + t) % 256, seed=number) for t in range(num_frames)]
            write_video(folder / f'{i}.mp4', frames=frames, options=dict(bf='2', g='6', preset='ultrafast'), **kwargs)
    return str(root)
