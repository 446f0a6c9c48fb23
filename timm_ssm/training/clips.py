"""Training and evaluation on videos: the flags for it, loaders, and metrics."""
import argparse
import logging
import sys
from operator import itemgetter
from typing import Any, Dict, Optional, Tuple

import torch
from torch import nn
from torchvision.transforms import v2

from ..data import (
    ClipLoader,
    ClipReader,
    EvalClips,
    EvalTransform,
    FrameSampler,
    TrainClips,
    create_clip_reader,
    create_train_transform,
)
from ..data.decode import DECODERS, check_decoder
from ..data.loader import ClipDataset
from ..data.readers import plain_name
from ..data.sampling import FRAME_ORDERS, METHODS
from ..data.transforms import RESIZES
from ..zoo.datasets import tag_class_names
from ..zoo.registry import clip_args, num_frames

_logger = logging.getLogger(__name__)

# what images have and clips do not
ONLY_IMAGES = dict(
    model_dtype=None, aug_splits=0, input_img_mode=None, crop_mode=None, crop_border_pixels=None, no_prefetcher=False,
    aug_repeats=0, train_img_sizes=None, train_num_samples=None, val_num_samples=None, num_samples=None,
    epoch_repeats=0., dataset_trust_remote_code=False)


def add_clip_flags(parser: argparse.ArgumentParser, training: bool) -> None:
    """Add the flags for videos."""
    add = parser.add_argument_group(
        'Videos', 'For models that take clips, and --dataset video, video-folder, video-list, video-wds or '
        'video-hfds/NAME.').add_argument
    add('--num-frames', type=int, metavar='N', help="frames of a clip (default: the model's)")
    add('--clip-sampling', choices=METHODS, help="how frames are picked (default: as for the model's weights)")
    add('--sampling-rate', type=int, metavar='N', help='distance of the frames of dense clips (default: 4)')
    add('--clip-duration', type=float, metavar='S', help='seconds of a dense clip, in place of --sampling-rate')
    add('--sampling-compat', choices=('corrected', 'released'),
        help="with the mistakes of the papers' released code in dense sampling (default: corrected)")
    add('--clip-windows', type=float, nargs=2, metavar='S', help='cut long videos into windows: length and stride')
    add('--video-root', metavar='DIR', help='what paths in a list are relative to (default: the folder of the list)')
    add('--frame-name', default='img_{:05}.jpg', metavar='PATTERN', help='files in folders of frames, by number')
    add('--video-decoder', default='pyav', choices=DECODERS, help='library that decodes')
    add('--frame-index', metavar='DIR', help="cache of frame indices (default: the user's cache folder; '' for none)")
    add('--clip-resize', default='opencv', choices=RESIZES,
        help='resizing in evaluation: as the papers did, or quicker and within one grey level of it')
    add('--test-num-segment', type=int, metavar='N', help='clips of a video to evaluate on (default: one, mid-way)')
    add('--test-num-crop', type=int, metavar='N', help='crops of each clip to evaluate on (default: the centre)')
    if training:
        add('--num-sample', type=int, default=1, metavar='N', help='augmentations of each clip in a batch')
        add('--no-hflip', action='store_true', help='no flips, for classes that tell left from right')
        add('--short-side', type=int, nargs=2, default=[256, 320], metavar='N',
            help='range of the short side, for --train-crop-mode jitter')
        add('--max-bad-clips', type=float, default=0.01, metavar='SHARE', help='largest share of unreadable videos')
    else:
        add('--frame-order', default='sequential', metavar='ORDER', help=f'{", ".join(FRAME_ORDERS)}')
        add('--scores-file', default='', metavar='FILE', help='write the scores of each video, as .csv or .npz')
        add('--merge-by', default='row', choices=('row', 'name'),
            help='what views are averaged over: videos, or as the released code, all videos of one base name')


def resolve_clips(args: argparse.Namespace, model: nn.Module) -> bool:
    """Whether the data are videos; if so, set what the arguments leave open, and refuse what makes no sense."""
    frames = num_frames(model)
    is_video = args.dataset.startswith('video')
    if frames == 1 and not is_video:
        return False
    if args.dataset and not is_video:
        sys.exit(f'--dataset {args.dataset}: {args.model} takes clips of {frames} frames, give a dataset of videos')
    given = [f'--{k.replace("_", "-")}' for k, off in ONLY_IMAGES.items() if getattr(args, k, off) not in (off, None)]
    if given:
        sys.exit(f'{", ".join(given)}: for images only, not for videos')
    if args.num_frames not in (None, frames):
        sys.exit(f'--num-frames {args.num_frames}: {args.model} takes {frames}')
    trained = clip_args(model)
    args.num_frames = frames
    args.clip_sampling = args.clip_sampling or trained.get('clip_sampling') or 'sparse'
    if args.clip_sampling.startswith('dense') and args.sampling_rate is None and args.clip_duration is None:
        args.sampling_rate, args.clip_duration = trained.get('sampling_rate'), trained.get('clip_duration')
    args.sampling_rate = args.sampling_rate or 4
    args.sampling_compat = args.sampling_compat or trained.get('sampling_compat') or 'corrected'
    try:
        check_decoder(args.video_decoder)
    except ValueError as e:
        sys.exit(f'--video-decoder: {e}')
    return True


def create_reader(args: argparse.Namespace, split: str, class_map: Any = None) -> ClipReader:
    """The videos of a split; `--class-map` wins over the class map that is known otherwise."""
    return create_clip_reader(
        args.dataset, args.data_dir, split, args.class_map or class_map or None, args.video_root, args.frame_name,
        args.input_key, args.target_key, args.video_decoder, args.frame_index)


def known_classes(args: argparse.Namespace, model: nn.Module) -> Optional[Dict[str, int]]:
    """A class map that goes with the head of a model to evaluate, None if nothing is known of it."""
    cfg, tag = model.pretrained_cfg, '' if args.checkpoint else model.pretrained_cfg.get('tag') or ''
    names = cfg.get('label_names') or tag_class_names(tag) or ()
    return {name: i for i, name in enumerate(names)} if len(names) == model.num_classes else None


def create_loader(
        args: argparse.Namespace,
        dataset: ClipDataset,
        batch_size: int,
        data_config: Dict[str, Any],
        device: torch.device,
        **kwargs,
) -> ClipLoader:
    """The loader of a dataset of clips."""
    return ClipLoader(
        dataset, batch_size, data_config['mean'], data_config['std'], device, args.workers,
        getattr(args, 'distributed', False), args.pin_mem, **kwargs)


def create_eval_loader(
        args: argparse.Namespace,
        reader: ClipReader,
        data_config: Dict[str, Any],
        device: torch.device,
        batch_size: int,
) -> ClipLoader:
    """The loader of views, about `batch_size` of them in a batch, but all of a video.

    They are the views of a test if their number is given, else one of each video.
    """
    channels, height, width = data_config['input_size']
    if channels != 3 or height != width:
        raise ValueError(f'input_size: got {data_config["input_size"]}, videos need three channels and a square')
    clips, crops = args.test_num_segment, args.test_num_crop
    if clips or crops:
        clips, crops = clips or 1, crops or 1
    transform = EvalTransform(height, crops, data_config['crop_pct'], args.clip_resize)
    order = getattr(args, 'frame_order', 'sequential')
    dataset = EvalClips(reader, FrameSampler.from_args(vars(args)), transform, args.clip_windows, clips, order)
    return create_loader(args, dataset, max(1, batch_size // dataset.num_views), data_config, device)


def names_a_direction(reader: ClipReader) -> bool:
    """Whether classes are told apart by a direction that a flip turns round."""
    words = {word for name in reader.class_to_idx for word in plain_name(name).split()}
    return bool(words & {'left', 'right', 'leftward', 'rightward', 'leftwards', 'rightwards', 'clockwise',
                         'anticlockwise', 'counterclockwise'})


def create_train_clips(args: argparse.Namespace, reader: ClipReader, data_config: Dict[str, Any]) -> TrainClips:
    """The training clips, augmented as the arguments ask."""
    size = tuple(data_config['input_size'][1:])
    hflip = args.hflip
    if hflip and (args.no_hflip or args.clip_sampling.startswith('ssv2') or names_a_direction(reader)):
        hflip = 0.
        _logger.info('No horizontal flips: ' + (
            '--no-hflip' if args.no_hflip else 'classes tell left from right (--hflip 0 says so too)'))
    if args.no_aug:
        transform = v2.Compose([
            EvalTransform(size[0], None, data_config['crop_pct'], args.clip_resize), itemgetter(0)])  # the one view
    else:
        transform = create_train_transform(
            size,
            crop_mode=args.train_crop_mode or 'rrc',
            scale=args.scale,
            ratio=args.ratio,
            short_side=tuple(args.short_side),
            interpolation=args.train_interpolation,
            auto_augment_config=args.aa,
            color_jitter=args.color_jitter,
            color_jitter_prob=args.color_jitter_prob,
            grayscale_prob=args.grayscale_prob or 0.,
            gaussian_blur_prob=args.gaussian_blur_prob or 0.,
            hflip=hflip,
            vflip=args.vflip,
        )
    return TrainClips(
        reader, FrameSampler.from_args(vars(args)), transform, size, args.clip_windows, args.num_sample, args.seed)


def create_clip_loaders(
        args: argparse.Namespace,
        data_config: Dict[str, Any],
        device: torch.device,
) -> Tuple[ClipLoader, Optional[ClipLoader]]:
    """Loaders to train and, with a validation split, to validate."""
    try:
        train_reader = create_reader(args, args.train_split)
        eval_reader = create_reader(args, args.val_split, train_reader.class_to_idx) if args.val_split else None
        for reader in filter(None, (train_reader, eval_reader)):
            check_classes(reader, args.num_classes)
        loader = create_loader(
            args, create_train_clips(args, train_reader, data_config), args.batch_size, data_config, device,
            max_bad_clips=args.max_bad_clips, re_prob=0. if args.no_aug else args.reprob, re_mode=args.remode,
            re_count=args.recount, re_num_splits=2 if args.resplit else 0)
        eval_loader = eval_reader and create_eval_loader(
            args, eval_reader, data_config, device, args.validation_batch_size or args.batch_size)
    except (ValueError, OSError) as e:
        sys.exit(str(e))
    if not len(loader):
        sys.exit(f'--batch-size {args.batch_size}: the {len(loader.sampler)} training videos do not fill one batch')
    return loader, eval_loader


def check_classes(reader: ClipReader, num_classes: int) -> None:
    label = max(max(reader.labels), max(reader.class_to_idx.values(), default=0))
    if label >= num_classes:
        sys.exit(f'--num-classes {num_classes}: {reader} has {label + 1} classes')
