"""Which frames of a video make a clip: the samplers of the papers.

n is the number of frames of a video, F that of a clip, r the sampling rate and K the number of clips at test.
"""
import random
from dataclasses import dataclass
from typing import Any, Dict, List, Optional, Tuple

import numpy as np

METHODS = ('sparse', 'dense', 'dense_videomae', 'ssv2', 'ssv2_frames')
# the arguments of train.py and validate.py that a sampler is made of
SAMPLING_ARGS = ('num_frames', 'clip_sampling', 'sampling_rate', 'clip_duration', 'sampling_compat')
FRAME_ORDERS = ('sequential', 'reversed', 'shuffled', 'interleaved', 'block-N')


@dataclass(frozen=True)
class FrameSampler:
    """Picks the frames of clips for training, validation (one clip, no chance) and testing (several clips).

    The methods, after the released code of the papers (what uses them is in docs/video.md):

    - 'sparse': F equal segments of the whole video, a frame of each. A clip at test is a shift within the segments.
    - 'dense': F frames, r apart, from a window; the windows of a test are spread over the video.
    - 'dense_videomae': the same, but where a video is too short for K windows they overlap as VideoMAE's do.
    - 'ssv2', 'ssv2_frames': F segments as TSN takes them, from videos and from extracted frames. They differ where
      n / F is no integer and for videos shorter than F.

    Videos that are too short repeat frames, as in the released code.

    Args:
        num_frames: Frames of a clip, F.
        method: One of METHODS.
        rate: Distance of frames in 'dense' clips, r; the others have no use for it.
        clip_duration: Seconds that a 'dense' clip spans, in place of `rate`; for videos of various or variable
            frame rates. Needs the times of the frames.
        released: Reproduce the mistakes of the released 'dense' code: windows of training and validation with frames
            L / (F - 1) instead of r apart (L = F r), the last frame of a video never seen, and a validation window
            that ends at (n - L) // 2 instead of beginning there: its frames may be negative, and count from the end.
    """
    num_frames: int
    method: str = 'sparse'
    rate: int = 4
    clip_duration: Optional[float] = None
    released: bool = False

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f'method: got {self.method!r}, needs one of {", ".join(METHODS)}')
        for name in ('num_frames', 'rate'):
            if getattr(self, name) < 1:
                raise ValueError(f'{name}: got {getattr(self, name)}, needs 1 or more')
        if self.clip_duration is not None:
            if not self.method.startswith('dense'):
                raise ValueError(f"clip_duration: got {self.clip_duration} with '{self.method}', needs 'dense' clips")
            if self.clip_duration <= 0:
                raise ValueError(f'clip_duration: got {self.clip_duration}, needs more than 0 seconds')

    @classmethod
    def from_args(cls, args: Dict[str, Any]) -> 'FrameSampler':
        """The sampler that SAMPLING_ARGS ask for."""
        frames, method, rate, seconds, compat = (args.get(key) for key in SAMPLING_ARGS)
        return cls(frames, method or 'sparse', rate or 4, seconds, compat == 'released')

    def train(
            self,
            n: int,
            times: Optional[np.ndarray] = None,
            window: Optional[Tuple[int, int]] = None,
            rng: Any = random,
    ) -> np.ndarray:
        """A random clip.

        Args:
            n: Frames of the video.
            times: When each of them is shown, in seconds, ascending; only clip_duration needs them.
            window: First and last frame to sample 'sparse' clips from; the whole video if None.
            rng: Has `randint` and `uniform` of Python's random module.

        Returns:
            Frame numbers (num_frames,).
        """
        F = self.num_frames
        if self.method == 'sparse':
            first, last, _, borders = self._segments(n, window)
            return np.minimum([rng.randint(a, b) for a, b in zip(borders[:-1], borders[1:])], last)
        if self.clip_duration is not None:
            return self._seconds(times, rng.uniform(0., self._spare_seconds(times)))
        if self.method.startswith('dense'):
            L = F * self.rate
            if self.released:
                return self._released_window(n, rng.randint(L, n - 1) if n > L else 0)
            return self._strided(n, rng.randint(0, max(n - L, 0)))
        a = n // F
        if not a:
            zeros = np.zeros(F, dtype=np.int64)
            return zeros if self.method == 'ssv2' else np.concatenate([zeros[:F - n], np.arange(n)])
        return np.array([a * i + rng.randint(0, a - 1) for i in range(F)])

    def val(self, n: int, times: Optional[np.ndarray] = None, window: Optional[Tuple[int, int]] = None) -> np.ndarray:
        """The clip to validate on: arguments and result as of `train`."""
        F = self.num_frames
        if self.method == 'sparse':
            return self.test(n, 1, times, window)[0]
        if self.clip_duration is not None:
            return self._seconds(times, self._spare_seconds(times) / 2)
        if self.method.startswith('dense'):
            L = F * self.rate
            if self.released:
                return self._released_window(n, (n - L) // 2)
            return self._strided(n, max(n - L, 0) // 2)
        if self.method == 'ssv2':
            return (n / F / 2 + n / F * np.arange(F)).astype(np.int64)
        if n < F:
            return np.concatenate([np.zeros(F - n, dtype=np.int64), np.arange(n)])
        return n // F * np.arange(F) + n // F // 2

    def test(
            self,
            n: int,
            clips: int,
            times: Optional[np.ndarray] = None,
            window: Optional[Tuple[int, int]] = None,
    ) -> np.ndarray:
        """The clips to test on: arguments as of `train`; returns frame numbers (clips, num_frames)."""
        F = self.num_frames
        if self.method == 'sparse':
            first, last, length, borders = self._segments(n, window)
            shifts = [int(length / (clips + 1) * (c + 1)) for c in range(clips)]
            return np.minimum(borders[None, :-1] + np.array(shifts)[:, None], last)
        if self.method.startswith('ssv2'):
            return np.stack([(c * (n / F) / clips + n / F * np.arange(F)).astype(np.int64) for c in range(clips)])
        if self.clip_duration is not None:
            return np.stack([self._seconds(times, start) for start in _spread(self._spare_seconds(times), clips)])
        if self.method == 'dense_videomae':
            frames = np.arange(0, n, self.rate)
            starts = _spread(len(frames) - F, clips)
            return np.stack([frames[np.minimum(int(s) + np.arange(F), len(frames) - 1)] for s in starts])
        return np.stack([self._strided(n, int(start)) for start in _spread(n - F * self.rate, clips)])

    def _segments(self, n: int, window: Optional[Tuple[int, int]]) -> Tuple[int, int, float, np.ndarray]:
        """First and last frame, the length of a segment in frames, and the borders (num_frames + 1,) of segments."""
        first, last = window or (0, n - 1)
        length = (last - first) / self.num_frames
        return first, last, length, first + np.round(length * np.arange(self.num_frames + 1)).astype(np.int64)

    def _strided(self, n: int, start: int) -> np.ndarray:
        """Frames r apart, the last one of these before the end of the video repeated where it is too short."""
        stop = min(start + self.num_frames * self.rate, n)
        frames = np.arange(start, stop, self.rate)
        return frames[np.minimum(np.arange(self.num_frames), len(frames) - 1)]

    def _released_window(self, n: int, end: int) -> np.ndarray:
        F, L = self.num_frames, self.num_frames * self.rate
        if n <= L:
            k = n // self.rate
            frames = np.linspace(0, n, num=k)
            frames = np.concatenate([frames, np.full(F - k, n)])
            return np.clip(frames, 0, n - 1).astype(np.int64)
        return np.clip(np.linspace(end - L, end, num=F), end - L, end - 1).astype(np.int64)

    def _spare_seconds(self, times: Optional[np.ndarray]) -> float:
        """Seconds by which the video is longer than a clip."""
        if times is None:
            raise ValueError('times: got None, clip_duration needs the times of the frames')
        frame = (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else 0.  # the last is shown for a while too
        return max(float(times[-1] - times[0] + frame) - self.clip_duration, 0.)

    def _seconds(self, times: np.ndarray, start: float) -> np.ndarray:
        """What is shown `start` seconds after the first frame, and then F times in clip_duration."""
        wanted = times[0] + start + self.clip_duration / self.num_frames * np.arange(self.num_frames)
        return np.maximum(np.searchsorted(times, wanted + 1e-6, side='right') - 1, 0)


def _spread(spare: float, clips: int) -> List[float]:
    """Where clips begin that are spread over what a video is longer than one; a single one is in the middle."""
    spare = max(spare, 0)
    return [c * (spare / (clips - 1)) for c in range(clips)] if clips > 1 else [spare / 2]


def long_windows(duration: float, length: float = 60., stride: float = 16.) -> List[Tuple[float, float]]:
    """Windows of a long video, as (start, end) in seconds; one of less than half the length is dropped."""
    if duration < length:
        return [(0., duration)]
    ends = [(start, min(start + length, duration)) for start in np.arange(0., max(int(duration), 1), stride).tolist()]
    return [(start, end) for start, end in ends if end == start + length or end - start >= length / 2]


def window_frames(window: Tuple[float, float], fps: float, n: int) -> Tuple[int, int]:
    """First and last frame of a window in seconds."""
    first = min(int(window[0] * fps), n - 1)
    return first, max(min(int(window[1] * fps), n - 1), first)


def reorder_frames(num_frames: int, order: str, seed: int = 0) -> np.ndarray:
    """Positions that bring the frames of a clip into another order, to see whether a model uses their order.

    Args:
        num_frames: Frames of a clip.
        order: 'sequential' (as they are); 'reversed'; 'shuffled', by chance; 'interleaved', frames 0, 2, 4, ... before
            1, 3, 5, ...; or 'block-N': blocks of N frames, last block first, the frames of each in order.
        seed: What 'shuffled' depends on.
    """
    positions = np.arange(num_frames)
    if order == 'sequential':
        return positions
    if order == 'reversed':
        return positions[::-1].copy()
    if order == 'shuffled':
        return np.random.default_rng(seed).permutation(num_frames)
    if order == 'interleaved':
        return np.concatenate([positions[::2], positions[1::2]])
    kind, _, size = order.partition('-')
    if kind != 'block' or not size.isdigit() or int(size) < 1:
        raise ValueError(f'order: got {order!r}, needs one of {", ".join(FRAME_ORDERS)}')
    starts = range(0, num_frames, int(size))
    return np.concatenate([positions[start:start + int(size)] for start in reversed(starts)])
