"""Clips/s of reading, sampling and augmenting videos, against the bare decoding of the same frames.

    python benchmarks/video_decode.py 340x256 [--videos 16] [--rounds 5]
    python benchmarks/video_decode.py 1920x1080 [--videos 4] [--rounds 3]

Every row is a loader's pass over the same videos (10 s of a photograph that moves, H.264) for clips of 8 sparse frames,
the passes taken in turns. Bare decoding is what a script would do with the library
alone, in one process of one thread: open, decode, keep the wanted frames as RGB. The machine should be idle.
"""
import argparse
import os
import statistics
import tempfile
import time
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Callable, Dict, Iterator, List

import av
import numpy as np
import torch
from harness import Row, report, time_in_turns
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from timm_ssm.data import FrameSampler, Video, create_train_transform
from timm_ssm.data.decode import load_index, scan, why_unavailable
from timm_ssm.data.encode import write_clip

FRAMES, FPS = 300, 30


def write_videos(folder: Path, width: int, height: int, count: int) -> List[str]:
    """Videos of a photograph that moves under a window of the size."""
    from sklearn.datasets import load_sample_images

    images = load_sample_images().images
    paths = []
    for i in range(count):
        photo = Image.fromarray(images[i % 2]).resize((width * 5 // 4, height * 5 // 4), Image.BICUBIC)
        if i % 4 > 1:
            photo = photo.transpose(Image.FLIP_LEFT_RIGHT)
        pixels = np.asarray(photo)
        path = str(folder / f'{width}_{i}.mp4')
        corners = (
            [int(length * (1 + np.sin(t / 40 + i + k)) / 8) for k, length in enumerate((width, height))]
            for t in range(FRAMES))
        write_clip(path, (pixels[y:y + height, x:x + width] for x, y in corners), rate=FPS, preset='fast')
        paths.append(path)
    return paths


class Clips(Dataset):
    """What `read` gives for each path."""

    def __init__(self, paths: List[str], read: Callable[[str, np.ndarray], torch.Tensor]):
        self.paths = paths
        self.read = read
        self.frames = FrameSampler(8).val(FRAMES)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> torch.Tensor:
        return self.read(self.paths[i], self.frames)


def bare_pyav(path: str, frames: np.ndarray) -> torch.Tensor:
    wanted, found = set(frames.tolist()), []
    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.thread_type, stream.codec_context.thread_count = 'NONE', 1
        for i, frame in enumerate(container.decode(stream)):
            if i in wanted:
                found.append(frame.to_ndarray(format='rgb24'))
            if len(found) == len(wanted):
                break
    return torch.from_numpy(np.stack(found))


def bare_torchcodec(path: str, frames: np.ndarray) -> torch.Tensor:
    from torchcodec.decoders import VideoDecoder
    return VideoDecoder(path, num_ffmpeg_threads=1).get_frames_at(frames.tolist()).data


def bare_decord(path: str, frames: np.ndarray) -> torch.Tensor:
    import decord
    return torch.from_numpy(decord.VideoReader(path, num_threads=1).get_batch(frames.tolist()).asnumpy())


class Ours:
    """A reader of clips: the sampler's frames, from an index of the file that is cached, or scanned each time."""

    def __init__(self, decoder: str, cache: str, transform: bool = False):
        self.decoder = decoder
        self.cache = cache
        # as the released recipes train
        self.transform = create_train_transform(
            (224, 224), auto_augment_config='rand-m7-n4-mstd0.5-inc1') if transform else None

    def __call__(self, path: str, frames: np.ndarray) -> torch.Tensor:
        clip = Video(path, self.decoder, self.cache).read(frames)
        return clip if self.transform is None else self.transform(clip)


def measure(paths: List[str], readers: Dict[str, tuple], rounds: int) -> Dict[str, float]:
    """Median clips/s of each reader, (function, workers), the readers in turns."""
    times: Dict[str, List[float]] = {name: [] for name in readers}
    for i in range(rounds + 1):
        for name, (read, workers) in readers.items():
            loader = iter(DataLoader(Clips(paths, read), batch_size=None, num_workers=workers, prefetch_factor=1))
            next(loader)  # the processes have started
            start = time.perf_counter()
            count = sum(1 for _ in loader)
            if i:  # the first round warms the caches
                times[name].append(count / (time.perf_counter() - start))
    return {name: statistics.median(speeds) for name, speeds in times.items()}


def find_readers(cache: str) -> Dict[str, tuple]:
    """What to measure: names, functions and numbers of workers."""
    bare = dict(pyav=bare_pyav)
    if not why_unavailable('torchcodec'):
        bare['torchcodec'] = bare_torchcodec
    readers = {f'bare {name}': (read, 1) for name, read in bare.items()}
    try:
        import decord  # noqa: F401
        readers['bare decord'] = (bare_decord, 1)
    except ImportError:
        print('decord is not installed')
    for name in bare:
        readers[f'{name}, no transforms'] = (Ours(name, cache), 1)
        readers[f'{name}, no transforms, 2 workers'] = (Ours(name, cache), 2)
        readers[f'{name}, no transforms, scan in place of an index'] = (Ours(name, ''), 1)
        for workers in (1, 2):
            readers[f'{name}, RandAugment and crop, {workers} worker{"s"[:workers - 1]}'] = (
                Ours(name, cache, True), workers)
    return readers


def rows(paths: List[str], cache: str, rounds: int) -> Iterator[Row]:
    for path in paths:
        Video(path, cache=cache)
    speeds = measure(paths, find_readers(cache), rounds)
    for name, speed in speeds.items():
        detail = f'{speed:.1f} clips/s'
        if name.startswith('bare'):
            yield Row(f'{name} / bare pyav', speed / speeds['bare pyav'], detail=detail)
            continue
        library = name.partition(',')[0]
        goal = None if name.endswith(('index', '2 workers')) else .8 if 'no transforms' in name else .5
        yield Row(f'{name} / bare {library}', speed / speeds[f'bare {library}'], goal, detail=detail)


def scan_row(paths: List[str], cache: str) -> Row:
    """What the cached index of a file saves."""
    times = time_in_turns({
        name: lambda index=index: [index(path) for path in paths]
        for name, index in (('cached', lambda path: load_index(path, cache)), ('scan', scan))}, seconds=1.)
    scanned, cached = (times[name] / len(paths) * 1e3 for name in ('scan', 'cached'))
    return Row('scan of a file / its cached index, time', scanned / cached, detail=f'{scanned:.2f} / {cached:.2f} ms')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('size', help='WIDTHxHEIGHT')
    parser.add_argument('--videos', type=int, default=16)
    parser.add_argument('--rounds', type=int, default=5)
    args = parser.parse_args()
    width, height = map(int, args.size.split('x'))
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        paths, cache = write_videos(Path(folder), width, height, args.videos), f'{folder}/index'
        found = [*rows(paths, cache, args.rounds), scan_row(paths, cache)]
    versions = {name: version(name) for name in ('av', 'torchcodec', 'decord') if find_spec(name)}
    report(f'video_decode_{args.size}', found, videos=str(args.videos), rounds=str(args.rounds),
           load=f'{os.getloadavg()[0]:.1f}', **versions)


if __name__ == '__main__':
    main()
