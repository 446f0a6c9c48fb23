"""Frames of videos by number, the same from either decoder.

Numbers go by what an index of the file says, the times and key frames of all its packets; a decoder then seeks to the
key frame before the first frame wanted. Indices are kept in a cache folder, so that a file is scanned once.
"""
import functools
import hashlib
import io
import json
import os
import tempfile
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from importlib import resources
from typing import Callable, Deque, Dict, Optional, Sequence, Tuple, Union

import numpy as np
import torch

Source = Union[str, os.PathLike, bytes]
Each = Callable[[torch.Tensor], torch.Tensor]

DECODERS = ('pyav', 'torchcodec')

SEEK_OVER = 8  # frames; to decode fewer than these costs less than to seek past them


class ClipError(RuntimeError):
    """A video, or the frames of it that were asked for, cannot be read."""


@dataclass(frozen=True)
class VideoIndex:
    """Where the frames of a video are.

    Args:
        pts: Time of each frame in units of `time_base`, ascending; empty where the file does not tell times, and
            frames have to be counted.
        keys: Numbers of the key frames, ascending.
        seeks: What to seek to for each of them, in units of `time_base`.
        num_frames: Number of frames.
        time_base: Seconds of a unit, as numerator and denominator.
        fps: Mean frames per second.
        stream: Number of the stream in the file.
    """
    pts: np.ndarray
    keys: np.ndarray
    seeks: np.ndarray
    num_frames: int
    time_base: Tuple[int, int]
    fps: float
    stream: int

    @property
    def times(self) -> np.ndarray:
        """When each frame is shown, in seconds from the first."""
        if not len(self.pts):
            return np.arange(self.num_frames) / self.fps
        return (self.pts - self.pts[0]) * (self.time_base[0] / self.time_base[1])


def _open(source: Source):
    """A PyAV container of a file's path or bytes."""
    import av

    return av.open(io.BytesIO(source) if isinstance(source, bytes) else os.fspath(source))


def _error(source: Source, what: object) -> ClipError:
    name = f'{len(source):,} bytes of video' if isinstance(source, bytes) else os.fspath(source)
    return ClipError(f'{name}: {str(what) or type(what).__name__}')


def scan(source: Source) -> VideoIndex:
    """Index a video by reading its packets, without decoding them where they tell their times."""
    import av

    try:
        with _open(source) as container:
            stream = container.streams.best('video')
            if stream is None:
                raise _error(source, 'there is no video in it')
            packets = [
                (packet.pts, packet.is_keyframe, packet.dts) for packet in container.demux(stream)
                if packet.size and not packet.is_discard and not packet.is_corrupt]
            time_base, fps, number = stream.time_base, float(stream.average_rate or 0), stream.index
            seeks_by_dts = 'matroska' not in container.format.name
        pts = [t for t, _, _ in packets]
        first = min((t for t, key, _ in packets if key and t is not None), default=None)
        if first is None or None in pts or len(set(pts)) < len(pts):
            with _open(source) as container:
                count = sum(1 for _ in container.decode(container.streams[number]))
            pts, keys, seeks = [], [0], [0]
        else:
            packets = sorted(packet for packet in packets if packet[0] >= first)  # others have nothing to refer to
            pts, count = [t for t, _, _ in packets], len(packets)
            keys = [i for i, packet in enumerate(packets) if packet[1]]
            seeks = [dts if seeks_by_dts and dts is not None else t for t, key, dts in packets if key]
    except (av.FFmpegError, OSError) as e:
        raise _error(source, e) from e
    if not count:
        raise _error(source, 'there is no frame in it')
    if fps <= 0:
        fps = (count - 1) / float((pts[-1] - pts[0]) * time_base) if len(pts) > 1 else 1.
    return VideoIndex(
        *(np.array(x, dtype=np.int64) for x in (pts, keys, seeks)), count, (time_base.numerator, time_base.denominator),
        fps, number)


def default_cache() -> str:
    """The folder of indices where none is given."""
    root = os.environ.get('XDG_CACHE_HOME') or os.path.join(os.path.expanduser('~'), '.cache')
    return os.path.join(root, 'timm_ssm', 'frames')


def load_index(source: Source, cache: Optional[str] = None) -> VideoIndex:
    """The index of a video, from the cache if it is there and the file has its size and time of change.

    Args:
        source: Path of a file, or its content.
        cache: Folder of indices; the default cache if None, none at all if ''. Bytes are not cached.
    """
    if isinstance(source, bytes) or cache == '':
        return scan(source)
    try:
        stat = os.stat(source)
    except OSError as e:
        raise _error(source, e.strerror) from e
    key = hashlib.sha1(os.fsencode(os.path.abspath(source))).hexdigest()
    path = os.path.join(cache or default_cache(), key[:2], f'{key[2:]}.json')
    version = [1, stat.st_size, stat.st_mtime_ns]
    # whatever is wrong with a file of the cache, the video has it all
    with suppress(Exception), open(path, encoding='utf-8') as f:
        found = json.load(f)
        if found.pop('version') == version:
            arrays = {name: np.array(found.pop(name), dtype=np.int64) for name in ('pts', 'keys', 'seeks')}
            return VideoIndex(**arrays, **dict(found, time_base=tuple(found['time_base'])))
    index = scan(source)
    fields = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in vars(index).items()}
    with suppress(OSError):  # no room or no right to write: next time it is scanned again
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with tempfile.NamedTemporaryFile(
                'w', encoding='utf-8', dir=os.path.dirname(path), suffix='.tmp', delete=False) as f:
            try:
                json.dump(dict(fields, version=version), f)
                f.close()
                os.replace(f.name, path)
            except BaseException:
                os.unlink(f.name)
                raise
    return index


def _read_pyav(source: Source, index: VideoIndex, wanted: np.ndarray, threads: int, each: Each) -> torch.Tensor:
    """Frames (T, C, H, W) by ascending, distinct numbers."""
    import av
    from av.video.reformatter import Interpolation, VideoReformatter

    todo, images = deque(wanted.tolist()), []
    reformatter = VideoReformatter()
    # before PyAV 17 it has no threads; with them it costs ten times as much on small frames
    kwargs = dict(threads=threads) if int(av.__version__.split('.')[0]) >= 17 else {}

    def add(frame) -> None:
        # bicubic: what it does to the chroma of odd sizes is what torchcodec does
        image = reformatter.reformat(
            frame, format='rgb24', interpolation=Interpolation.BICUBIC, **kwargs).to_ndarray()
        image = torch.from_numpy(np.rot90(image, round(frame.rotation / 90)).copy()).permute(2, 0, 1)
        images.append(each(image))
        todo.popleft()

    try:
        back = 0
        while todo:
            key, before = max(_key_before(index, todo[0]) - back, 0), len(todo)
            with _open(source) as container:
                stream = container.streams[index.stream]
                stream.thread_type = 'NONE' if threads == 1 else 'AUTO'
                stream.codec_context.thread_count = threads
                if len(index.pts):
                    _seek_and_add(container, stream, index, todo, key, threads, add)
                else:
                    for i, frame in enumerate(container.decode(stream)):
                        if todo and i == todo[0]:
                            add(frame)
            if todo and key == 0 and len(todo) == before:
                raise _error(source, f'frame {todo[0]} of {index.num_frames} cannot be decoded')
            # some demuxers seek to a later key frame than they are asked to: once more, from further back
            back = 2 * back + 1 if len(todo) == before else 0
    except (av.FFmpegError, OSError) as e:
        raise _error(source, e) from e
    return _stack(images, source)


def _stack(frames: Sequence[torch.Tensor], source: Source) -> torch.Tensor:
    if len({frame.shape for frame in frames}) > 1:
        raise _error(source, 'frames are not of one size')
    if frames[0].is_contiguous():
        return torch.stack(frames)
    return torch.stack([frame.permute(1, 2, 0) for frame in frames]).permute(0, 3, 1, 2)  # they stay channels-last


def _key_before(index: VideoIndex, frame: int) -> int:
    return np.searchsorted(index.keys, frame, side='right').item() - 1


def _seek_and_add(container, stream, index: VideoIndex, todo: Deque[int], key: int, threads: int, add) -> None:
    """Decode from key frame number `key` on, seeking ahead where that saves frames, until a frame was missed."""
    pts, keys = index.pts, index.keys
    wanted, context = {pts[i].item() for i in todo}, stream.codec_context
    while True:
        if key > 0:
            container.seek(index.seeks[key].item(), stream=stream)
        key = None
        for packet in container.demux(stream):
            if packet.is_corrupt:
                continue
            if threads == 1:
                # frames that no other frame refers to need no decoding, unless they are wanted themselves
                skip = packet.pts is not None and packet.pts not in wanted
                context.skip_frame = 'NONREF' if skip else 'DEFAULT'
            for frame in packet.decode():
                if frame.pts is None or frame.pts < pts[todo[0]]:
                    continue
                if frame.pts > pts[todo[0]]:
                    return
                number = todo[0]
                add(frame)
                if not todo:
                    return
                ahead = _key_before(index, todo[0])
                key = ahead if keys[ahead] - number > SEEK_OVER else None
            if key is not None:
                break
        if key is None:
            return


def _read_torchcodec(source: Source, index: VideoIndex, wanted: np.ndarray, threads: int, each: Each) -> torch.Tensor:
    """As `_read_pyav`, which takes over the files that torchcodec fails on."""
    from torchcodec.decoders import VideoDecoder

    if not len(index.pts):
        return _read_pyav(source, index, wanted, threads, each)
    pts, keys = index.pts.tolist(), set(index.keys.tolist())
    lengths = [*np.diff(index.pts).tolist(), 1]
    mappings = json.dumps(dict(frames=[
        dict(pts=t, duration=d, key_frame=int(i in keys)) for i, (t, d) in enumerate(zip(pts, lengths))]))
    try:
        decoder = VideoDecoder(
            source if isinstance(source, bytes) else os.fspath(source), stream_index=index.stream,
            num_ffmpeg_threads=threads, custom_frame_mappings=mappings)
        batch = decoder.get_frames_at(wanted.tolist())
    except (RuntimeError, ValueError):
        return _read_pyav(source, index, wanted, threads, each)
    unit = index.time_base[0] / index.time_base[1]
    if not np.allclose(batch.pts_seconds.numpy(), index.pts[wanted] * unit, rtol=0, atol=unit / 2):
        return _read_pyav(source, index, wanted, threads, each)
    return _stack([each(frame) for frame in batch.data], source)


_READ = dict(pyav=_read_pyav, torchcodec=_read_torchcodec)


def _as_it_is(frame: torch.Tensor) -> torch.Tensor:
    return frame


class Video:
    """A video file, open to read frames by number. It holds no file open.

    Args:
        source: Path of a file, or its content.
        decoder: One of DECODERS.
        cache: Folder of frame indices; the default cache if None, none if ''.
    """

    def __init__(self, source: Source, decoder: str = 'pyav', cache: Optional[str] = None):
        self.source = source
        self.decoder = decoder
        self.index = load_index(source, cache)
        self.num_frames = self.index.num_frames
        self.fps = self.index.fps

    @property
    def times(self) -> np.ndarray:
        """When each frame is shown, in seconds from the first."""
        return self.index.times

    def read(self, frames: Sequence[int], each: Each = _as_it_is) -> torch.Tensor:
        """Decode frames.

        Args:
            frames: Their numbers, in any order, repeated or not; negative ones count from the end.
            each: What to do to every frame (3, height, width), which may spare the memory to hold all in full size.

        Returns:
            RGB (len(frames), 3, height, width) uint8, turned upright as the file says.

        Raises:
            ClipError: They cannot be decoded.
        """
        frames = resolve_numbers(frames, self.num_frames)
        wanted, places = np.unique(frames, return_inverse=True)
        threads = 0 if torch.utils.data.get_worker_info() is None else 1  # 0: as many as FFmpeg likes
        images = _READ[self.decoder](self.source, self.index, wanted, threads, each)
        return images if np.array_equal(frames, wanted) else images[torch.from_numpy(places)]


class FrameFolder:
    """A video as a folder with an image file for each frame, with the interface of `Video`.

    Args:
        folder: The folder.
        num_frames: Number of frames.
        pattern: Name of a file by its number, which counts from 1, or from 0 if that is there.
    """

    def __init__(self, folder: str, num_frames: int, pattern: str = 'img_{:05}.jpg'):
        self.folder = folder
        self.num_frames = num_frames
        self.pattern = pattern
        self.first = 0 if os.path.exists(os.path.join(folder, pattern.format(0))) else 1

    @property
    def times(self) -> np.ndarray:
        raise ValueError(f'{self.folder}: a folder of frames does not say when each is shown; sample by frames')

    fps = times

    def read(self, frames: Sequence[int], each: Each = _as_it_is) -> torch.Tensor:
        """As `Video.read`."""
        from PIL import Image

        images: Dict[int, torch.Tensor] = {}
        frames = resolve_numbers(frames, self.num_frames).tolist()
        for i in set(frames):
            path = os.path.join(self.folder, self.pattern.format(i + self.first))
            try:
                with Image.open(path) as image:
                    pixels = np.array(image.convert('RGB'))
            except Exception as e:  # Pillow's readers raise anything on damaged files
                raise ClipError(f'{path}: {e}') from e
            images[i] = each(torch.from_numpy(pixels).permute(2, 0, 1))
        return _stack([images[i] for i in frames], self.folder)


def resolve_numbers(frames: Sequence[int], num_frames: int) -> np.ndarray:
    """Frame numbers with negative ones counted from the end."""
    frames = np.asarray(frames)
    if not len(frames) or frames.min() < -num_frames or frames.max() >= num_frames:
        raise ValueError(f'frames: got {frames.tolist()}, needs numbers of a video of {num_frames} frames')
    return np.where(frames < 0, frames + num_frames, frames)


@functools.cache
def why_unavailable(decoder: str) -> Optional[str]:
    """Why a decoder cannot be used here, None if it can: it must decode a small clip rightly, not just import."""
    clip = resources.files(__package__).joinpath('probe.mp4').read_bytes()
    try:
        if decoder == 'torchcodec':
            from torchcodec.decoders import VideoDecoder

            frame = VideoDecoder(clip)[2]
        else:
            frame = Video(clip, decoder).read([2])[0]
    except Exception as e:  # what the loader of a library says is all sorts of errors
        return (str(e) or type(e).__name__).strip().splitlines()[0]
    # frame t of the clip is grey of about 60 t
    return None if abs(frame.float().mean().item() - 120) < 4 else 'its frames are not what was encoded'


def check_decoder(decoder: str) -> None:
    """Raise a clear error if a decoder cannot be used here."""
    if decoder not in DECODERS:
        raise ValueError(f'decoder: got {decoder!r}, needs one of {", ".join(DECODERS)}')
    reason = why_unavailable(decoder)
    if reason:
        install = "pip install 'timm-ssm[video]'" if decoder == 'pyav' else 'pip install torchcodec, and FFmpeg'
        raise ValueError(f'decoder: got {decoder!r}, needs one that decodes here ({reason}); {install}')
