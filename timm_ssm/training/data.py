"""What a run trains and validates on: datasets, loaders, mixup, and the order and randomness of batches."""
import argparse
import logging
import math
import sys
from typing import Any, Dict, Iterable, Iterator, NamedTuple, Optional, Tuple

import numpy as np
import torch
from PIL import Image
from timm import utils
from timm.data import (
    AugMixDataset,
    FastCollateMixup,
    ImageDataset,
    Mixup,
    create_dataset,
    create_loader,
    resolve_data_config,
)
from torch import nn
from torch.utils.data import Dataset, IterableDataset

from ..data import ClipMixup
from ..hub.classify import to_mode
from .arguments import UsageError, errors_of, uses_soft_targets
from .clips import create_clip_loaders
from .model import model_dtype
from .processes import leave_signals_to_parent
from .sizes import size_choices
from .streams import num_readers, restart

_logger = logging.getLogger(__name__)


def seed_all(*key: int) -> None:
    """Seed every random generator from a tuple of integers."""
    utils.random_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))


def resolve_data(args: argparse.Namespace, model: nn.Module, **kwargs) -> Dict[str, Any]:
    """How to prepare images: timm's data config, with a mean and a deviation for each channel that there is."""
    config = resolve_data_config(vars(args), model=model, **kwargs)
    in_chans, *_, height, width = config['input_size']  # the test size of a clip model has its frames in it
    config['input_size'] = (in_chans, height, width)
    for key in ('mean', 'std'):
        values = config[key]
        config[key] = tuple(values) if len(values) == in_chans else (sum(values) / len(values),) * in_chans
    _logger.info('Images: ' + ', '.join(f'{k} {v}' for k, v in config.items()))
    return config


class Images(ImageDataset):
    """timm's dataset of images, but errors name the file.

    Training skips what cannot be read, with a warning, up to `MAX_SKIPPED` in a row; evaluation never does.
    """

    MAX_SKIPPED = 10

    def __init__(self, dataset: ImageDataset, is_training: bool):
        super().__init__(root=None, reader=dataset.reader, input_img_mode=dataset.input_img_mode)
        self.is_training = is_training

    def __getitem__(self, index: int) -> Tuple[Any, int]:
        for _ in range(self.MAX_SKIPPED):
            try:
                file, target = self.reader[index]
                with Image.open(file) as image:
                    image = to_mode(image, self.input_img_mode)
                break
            except Exception as e:  # Pillow's readers raise anything on damaged files
                error = f'{self.filename(index, absolute=True)}: cannot be read ({type(e).__name__}: {e})'
                if not self.is_training:
                    raise UsageError(error) from None
                _logger.warning(f'Skipped {error}')
                index = (index + 1) % len(self)
        else:
            raise UsageError(f'{self.MAX_SKIPPED} images in a row cannot be read, the last of them {error}')
        return image if self.transform is None else self.transform(image), target


def open_dataset(args: argparse.Namespace, split: str, in_chans: int, is_training: bool = False, **kwargs) -> Dataset:
    """timm's dataset of a split; a UsageError where there is none, or nothing in it."""
    with errors_of('--dataset', args.dataset) if args.dataset else errors_of('DATA', args.data_dir):
        dataset = create_dataset(
            args.dataset,
            root=args.data_dir,
            split=split,
            is_training=is_training,
            class_map=args.class_map,
            download=args.dataset_download,
            input_img_mode=args.input_img_mode or ('RGB' if in_chans == 3 else 'L'),
            input_key=args.input_key,
            target_key=args.target_key,
            trust_remote_code=args.dataset_trust_remote_code,
            **kwargs,
        )
    return Images(dataset, is_training) if type(dataset) is ImageDataset else dataset


def create_datasets(args: argparse.Namespace, in_chans: int) -> Tuple[Dataset, Optional[Dataset]]:
    """The training dataset and, with a validation split, the one to validate on."""
    train = open_dataset(
        args, args.train_split, in_chans, is_training=True, batch_size=args.batch_size, seed=args.seed,
        repeats=args.epoch_repeats, num_samples=args.train_num_samples)
    val = open_dataset(
        args, args.val_split, in_chans, batch_size=args.batch_size,
        num_samples=args.val_num_samples) if args.val_split else None

    # timm takes the whole of DATA where it finds no folder of a split, and numbers classes by the folders it finds
    readers = [getattr(dataset, 'reader', None) for dataset in (train, val) if dataset is not None]
    classes = [getattr(reader, 'class_to_idx', None) or {} for reader in readers]
    if len(classes[0]) > args.num_classes:
        sys.exit(f'--num-classes {args.num_classes}: the dataset has {len(classes[0])} classes')
    if val is not None and not args.dataset:
        for reader, split in zip(readers, (args.train_split, args.val_split)):
            if reader.root == args.data_dir:
                sys.exit(f'there is no folder {split!r} in {args.data_dir}; without validation, give --val-split ""')
        if classes[0] != classes[1]:
            sys.exit(f'the splits have different classes: {sorted(set(classes[0]) ^ set(classes[1]))[:10]}')
    return train, val


class TrainBatches:
    """The training batches of any epoch, from any batch on.

    What is drawn for the images of a batch, by the step on it and by loading processes, depends on seed, process, epoch
    and batch only. So there is no state to save: resuming within an epoch means to load, and drop, the batches before.
    With `mix_in_loader` the loader mixes, as its collate function, and here mixup is switched off in time only.
    """

    def __init__(
            self,
            loader: Iterable,
            args: argparse.Namespace,
            device: torch.device,
            mixup_fn: Optional[Mixup] = None,
            mix_in_loader: bool = False,
    ):
        leave_signals_to_parent(loader)
        self.loader = loader
        self.args = args
        self.device = device
        self.dtype = model_dtype(args)
        self.mixup_fn = mixup_fn
        self.mix_in_loader = mix_in_loader

    def __len__(self) -> int:
        return len(self.loader)

    @property
    def num_updates(self) -> int:
        """Optimiser steps in an epoch."""
        return math.ceil(len(self) / self.args.grad_accum_steps)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Tuple[int, torch.Tensor, torch.Tensor]]:
        """Number and yield the batches of an epoch from `start` on, with the generators in a state of their own."""
        for part in (self.loader.dataset, self.loader.sampler, getattr(self.loader, 'batch_sampler', None)):
            if hasattr(part, 'set_epoch'):
                part.set_epoch(epoch)
        if self.mixup_fn is not None and self.args.mixup_off_epoch:
            self.mixup_fn.mixup_enabled = epoch < self.args.mixup_off_epoch

        restart(self.loader.dataset)
        if hasattr(self.loader, 'skip_to'):
            self.loader.skip_to(start)
        key = self.args.seed, self.args.rank, epoch
        seed_all(*key, 0)
        iterator = iter(self.loader)
        for i in range(len(self.loader)):
            seed_all(*key, 2 * i + 1)
            input, target = next(iterator)
            if i < start:
                continue
            seed_all(*key, 2 * i + 2)
            input, target = input.to(self.device, self.dtype), target.to(self.device)
            if self.mixup_fn is not None and not self.mix_in_loader:
                input, target = self.mixup_fn(input, target)
            if self.args.channels_last:
                input = channels_last(input)
            yield i, input, target


def channels_last(x: torch.Tensor) -> torch.Tensor:
    """Images or clips in the channels-last memory layout."""
    return x.contiguous(memory_format=torch.channels_last if x.ndim == 4 else torch.channels_last_3d)


class Data(NamedTuple):
    """What a run trains and validates on."""
    train: TrainBatches
    eval: Optional[Iterable]  # a loader; none without validation
    eval_samples: Optional[int]  # what this process counts of it; the rest is padding. None: everything
    class_to_idx: Dict[str, int]  # empty where the dataset knows no names


def create_mixup(args: argparse.Namespace, clips: bool = False) -> Optional[Mixup]:
    if not uses_soft_targets(args):
        return None
    mixup_class = ClipMixup if clips else Mixup if args.no_prefetcher else FastCollateMixup
    return mixup_class(
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        cutmix_minmax=args.cutmix_minmax,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        mode=args.mixup_mode,
        label_smoothing=args.smoothing,
        num_classes=args.num_classes,
    )


def create_data(
        args: argparse.Namespace,
        data_config: Dict[str, Any],
        device: torch.device,
        clips: bool = False,
) -> Data:
    """Datasets, loaders and mixup, as the arguments ask and the model's data config needs; of images or clips."""
    if clips:
        train, eval = create_clip_loaders(args, data_config, device)
        return Data(
            TrainBatches(train, args, device, create_mixup(args, clips)), eval, None, train.dataset.reader.class_to_idx)
    dataset_train, dataset_eval = create_datasets(args, data_config['input_size'][0])
    mixup_fn = create_mixup(args)
    mix_in_loader = not args.no_prefetcher
    kwargs = dict(
        input_size=data_config['input_size'],
        mean=data_config['mean'],
        std=data_config['std'],
        persistent_workers=False,  # started anew each epoch, from the seed of the epoch
        pin_memory=args.pin_mem,
        use_prefetcher=not args.no_prefetcher,
        distributed=args.distributed,
        device=device,
        img_dtype=model_dtype(args),
    )
    class_to_idx = getattr(getattr(dataset_train, 'reader', None), 'class_to_idx', None) or {}
    if args.aug_splits:
        dataset_train = AugMixDataset(dataset_train, args.aug_splits)
    loader_train = create_loader(
        dataset_train,
        batch_size=args.batch_size,
        is_training=True,
        no_aug=args.no_aug,
        re_prob=args.reprob,
        re_mode=args.remode,
        re_count=args.recount,
        re_split=args.resplit,
        train_crop_mode=args.train_crop_mode,
        scale=args.scale,
        ratio=args.ratio,
        hflip=args.hflip,
        vflip=args.vflip,
        color_jitter=args.color_jitter,
        color_jitter_prob=args.color_jitter_prob,
        grayscale_prob=args.grayscale_prob or 0.,
        gaussian_blur_prob=args.gaussian_blur_prob or 0.,
        auto_augment=args.aa,
        num_aug_repeats=args.aug_repeats,
        num_aug_splits=args.aug_splits,
        interpolation=(not args.no_aug and args.train_interpolation) or data_config['interpolation'],
        collate_fn=mixup_fn if mix_in_loader else None,
        worker_seeding=args.worker_seeding,
        num_workers=num_readers(args, dataset_train, training=True),
        **size_choices(args),
        **kwargs,
    )
    if not len(loader_train):
        sys.exit(f'--batch-size {args.batch_size}: the {len(dataset_train)} training images do not fill one batch')
    loader_eval = eval_samples = None
    if dataset_eval is not None:
        loader_eval = create_loader(
            dataset_eval,
            batch_size=args.validation_batch_size or args.batch_size,
            num_workers=num_readers(args, dataset_eval, training=False),
            interpolation=data_config['interpolation'],
            crop_pct=data_config['crop_pct'],
            **kwargs,
        )
        if args.distributed and not isinstance(dataset_eval, IterableDataset):
            eval_samples = len(range(args.rank, len(dataset_eval), args.world_size))
    return Data(
        TrainBatches(loader_train, args, device, mixup_fn, mix_in_loader),
        loader_eval,
        eval_samples,
        class_to_idx,
    )
