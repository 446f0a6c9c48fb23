"""Batches of clips: datasets of random clips and of views, and the loader.

To timm's parts a clip (C, T, H, W) is an image of C T channels: its prefetcher normalises clips so, its random erasing
cuts one box through all frames, and its mixup cuts along height and width.
"""
import logging
import random
from contextlib import contextmanager
from typing import Any, Callable, Iterator, List, Optional, Sequence, Tuple

import numpy as np
import torch
from timm.data import Mixup
from timm.data.loader import PrefetchLoader
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    RandomSampler,
    Sampler,
    SequentialSampler,
)

from .corruptions import Corrupt
from .decode import ClipError
from .readers import ClipReader
from .sampling import FrameSampler, long_windows, reorder_frames, window_frames
from .transforms import EvalTransform

_logger = logging.getLogger(__name__)

SKIPPED = -1  # in place of a number in a dataset: a blank of the same shape
MAX_TRIES = 10  # videos that may be unreadable one after the other in place of one clip

Failures = List[Tuple[int, str]]  # rows and what was wrong with them


class ClipDataset(Dataset):
    """Videos, or windows of long ones.

    Args:
        reader: The videos.
        sampler: Picks frames.
        transform: Of clips (T, C, H, W).
        windows: Length and stride in seconds, to cut long videos into windows; None for whole videos.
    """

    def __init__(
            self,
            reader: ClipReader,
            sampler: FrameSampler,
            transform: Callable,
            windows: Optional[Sequence[float]] = None,
    ):
        if windows and sampler.method != 'sparse':
            raise ValueError(f"windows: got {windows} with '{sampler.method}' sampling, needs 'sparse'")
        self.reader = reader
        self.sampler = sampler
        self.transform = transform
        self.items: Sequence[Tuple[int, int, Optional[Tuple[float, float]]]] = (
            [(row, 0, None) for row in range(len(reader))] if windows is None else
            [(row, i, window) for row in range(len(reader))
             for i, window in enumerate(long_windows(reader.duration(row), *windows))])

    def __len__(self) -> int:
        return len(self.items)

    def open(self, item: int):
        """The video of an item, and what the sampler needs to know of it."""
        row, _, window = self.items[item]
        video = self.reader.open(row)
        kwargs = {}
        if self.sampler.clip_duration is not None:
            kwargs['times'] = video.times
        if window is not None:
            kwargs['window'] = window_frames(window, video.fps, video.num_frames)
        return video, kwargs


class TrainClips(ClipDataset):
    """Random clips.

    An item is clips (num_sample, T, C, H, W), the label, and what failed to be read. The place of an unreadable video
    is taken by another one. What is drawn depends on seed, epoch and item only.

    Args:
        reader: As of ClipDataset, as the three after it.
        num_sample: Times to transform each clip, into as many samples of a batch (repeated sampling).
        size: Height and width of transformed clips.
        seed: Of the draws.
    """

    def __init__(
            self,
            reader: ClipReader,
            sampler: FrameSampler,
            transform: Callable,
            size: Tuple[int, int],
            windows: Optional[Sequence[float]] = None,
            num_sample: int = 1,
            seed: int = 0,
    ):
        super().__init__(reader, sampler, transform, windows)
        if num_sample < 1:
            raise ValueError(f'num_sample: got {num_sample}, needs 1 or more')
        self.num_sample = num_sample
        self.size = size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __getitem__(self, item: int) -> Tuple[torch.Tensor, int, Failures]:
        if item == SKIPPED:
            return torch.zeros(self.num_sample, self.sampler.num_frames, 3, *self.size, dtype=torch.uint8), 0, []
        with generators_seeded(self.seed, self.epoch, item):
            failures: Failures = []
            while True:
                try:
                    video, kwargs = self.open(item)
                    clip = video.read(self.sampler.train(video.num_frames, **kwargs))
                    break
                except ClipError as e:
                    failures.append((self.items[item][0], str(e)))
                    if len(failures) == MAX_TRIES:
                        raise ClipError(f'{MAX_TRIES} videos in a row cannot be read, the last one: {e}') from e
                    item = random.randrange(len(self))
            clips = torch.stack([self.transform(clip) for _ in range(self.num_sample)])
        return clips, self.reader.label(self.items[item][0]), failures


class EvalClips(ClipDataset):
    """All views of each video that a model is evaluated on.

    An item is views (V, T, C, H, W), their tags (V, 3): row, number of the view, and whether it is there; and what
    failed to be read. What stands in for an unreadable video is blank, and not there.

    Args:
        reader: As of ClipDataset, as the four after it.
        clips: Clips of a video to test on, `clip` crops each; None for the one to validate on.
        frame_order: Order to bring the frames of clips into, as of `reorder_frames`.

    Attributes:
        corrupt: What corrupts each view, if anything does.
    """
    corrupt: Optional[Corrupt] = None

    def __init__(
            self,
            reader: ClipReader,
            sampler: FrameSampler,
            transform: EvalTransform,
            windows: Optional[Sequence[float]] = None,
            clips: Optional[int] = None,
            frame_order: str = 'sequential',
    ):
        super().__init__(reader, sampler, transform, windows)
        if clips is not None and clips < 1:
            raise ValueError(f'clips: got {clips}, needs 1 or more')
        reorder_frames(sampler.num_frames, frame_order)  # or its error
        self.clips = clips
        self.frame_order = frame_order

    @property
    def num_views(self) -> int:
        """Views of each item."""
        return (self.clips or 1) * (self.transform.crops or 1)

    def __getitem__(self, item: int) -> Tuple[torch.Tensor, torch.Tensor, Failures]:
        row, window, _ = self.items[item]
        T, V = self.sampler.num_frames, self.num_views
        tags = torch.tensor([(row, window * V + view, 1) for view in range(V)])
        try:
            video, kwargs = self.open(item)
            if self.clips is None:
                frames = self.sampler.val(video.num_frames, **kwargs)[None]
            else:
                frames = self.sampler.test(video.num_frames, self.clips, **kwargs)
            frames = frames[:, reorder_frames(T, self.frame_order, seed=row)]
            pixels = video.read(frames.reshape(-1), self.transform.resize)
        except ClipError as e:
            tags[:, 2] = 0
            size = self.transform.size
            return torch.zeros(V, T, 3, size, size, dtype=torch.uint8), tags, [(row, str(e))]
        views = self.transform.crop(pixels)  # (crops, clips T, C, H, W)
        views = views.unflatten(1, (-1, T)).transpose(0, 1).flatten(0, 1)
        if self.corrupt is not None:
            views = torch.stack([self.corrupt.frames(view) for view in views])
        return views, tags, []


@contextmanager
def generators_seeded(*key: int) -> Iterator[None]:
    """The generators of Python, NumPy and PyTorch seeded from a tuple of integers, and after it as they were."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)  # the CPU's alone
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def collate_clips(items: Sequence[Tuple[torch.Tensor, Any, Failures]]) -> Tuple[torch.Tensor, torch.Tensor, Failures]:
    """Batch of items: clips (B, C T, H, W) uint8, targets, and what failed.

    Clips (n, T, C, H, W) of an item follow one another, with its label for each, or with a tag of their own.
    """
    clips = torch.cat([clips for clips, _, _ in items]).transpose(1, 2).contiguous().flatten(1, 2)
    targets = [
        target if isinstance(target, torch.Tensor) else torch.full((len(clips),), target)
        for clips, target, _ in items]
    return clips, torch.cat(targets), [failure for _, _, failures in items for failure in failures]


class SkippingBatches(BatchSampler):
    """Batches of numbers, the first few of an epoch SKIPPED."""
    skip = 0

    def __iter__(self) -> Iterator[List[int]]:
        for i, batch in enumerate(super().__iter__()):
            yield [SKIPPED] * len(batch) if i < self.skip else batch


class TooManyBadClips(RuntimeError):
    """More unreadable videos than `max_bad_clips` allows."""


class ClipLoader:
    """Batches of normalised clips (B, C, T, H, W) on the device, images (B, C, H, W) if T is 1, and targets.

    Args:
        dataset: TrainClips or EvalClips.
        batch_size: Videos in a batch.
        mean: Of each channel, to normalise with.
        std: Standard deviation of each channel.
        device: Where batches go.
        num_workers: Loading processes.
        distributed: Each process of the default group gets its share.
        pin_memory: Pin memory for faster transfer to the GPU.
        max_bad_clips: Share of a process's videos of an epoch that may be unreadable in training.
        re_prob: Probability of random erasing.
        re_mode: Fill of it, as timm's.
        re_count: Boxes of it.
        re_num_splits: As timm's: with 2, the first half of a batch is spared.
    """

    def __init__(
            self,
            dataset: ClipDataset,
            batch_size: int,
            mean: Sequence[float],
            std: Sequence[float],
            device: torch.device,
            num_workers: int = 0,
            distributed: bool = False,
            pin_memory: bool = False,
            max_bad_clips: float = 0.01,
            re_prob: float = 0.,
            re_mode: str = 'const',
            re_count: int = 1,
            re_num_splits: int = 0,
    ):
        self.dataset = dataset
        self.training = isinstance(dataset, TrainClips)
        self.num_frames = dataset.sampler.num_frames
        self.max_bad_clips = max_bad_clips
        self.sampler: Sampler
        if distributed:
            self.sampler = DistributedSampler(dataset, shuffle=self.training)
        else:
            self.sampler = RandomSampler(dataset) if self.training else SequentialSampler(dataset)
        self.batches = SkippingBatches(self.sampler, batch_size, drop_last=self.training)
        self.loader = DataLoader(
            dataset,
            batch_sampler=self.batches,
            num_workers=num_workers,
            collate_fn=collate_clips,
            pin_memory=pin_memory,
        )
        self.prefetcher = PrefetchLoader(
            _Targets(self),
            mean=tuple(np.repeat(mean, self.num_frames).tolist()),
            std=tuple(np.repeat(std, self.num_frames).tolist()),
            channels=len(mean) * self.num_frames,
            device=device,
            re_prob=re_prob,
            re_mode=re_mode,
            re_count=re_count,
            re_num_splits=re_num_splits,
        )

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Tuple[torch.Tensor, torch.Tensor]]:
        for clips, targets in self.prefetcher:
            yield (clips.unflatten(1, (-1, self.num_frames)) if self.num_frames > 1 else clips), targets

    def skip_to(self, batch: int) -> None:
        """Begin every epoch with blanks in place of the batches before this one, which are then not read."""
        self.batches.skip = batch


class _Targets:
    """What a loader yields but the failures, which are counted and told."""

    def __init__(self, loader: ClipLoader):
        self.loader = loader

    def __iter__(self) -> Iterator[Tuple[torch.Tensor, torch.Tensor]]:
        loader, bad, videos = self.loader, set(), len(self.loader.sampler)
        for clips, targets, failures in loader.loader:
            for row, reason in failures:
                if row not in bad and len(bad) < 10:
                    _logger.warning(f'Unreadable: {loader.dataset.reader.name(row)} ({reason})')
                bad.add(row)
            if loader.training and len(bad) > loader.max_bad_clips * videos:
                raise TooManyBadClips(
                    f'{len(bad)} of {videos} videos cannot be read, more than --max-bad-clips '
                    f'{loader.max_bad_clips:g} of them; `timm-ssm check-videos` finds all of them')
            yield clips, targets
        if loader.training and bad:
            _logger.warning(f'{len(bad)} of {videos} videos could not be read and were left out')


class ClipMixup(Mixup):
    """timm's mixup and cutmix for clips: what is cut is a box through all frames."""

    def __call__(self, x: torch.Tensor, target: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        mixed, target = super().__call__(x.flatten(1, -3), target)
        return mixed.view(x.shape), target
