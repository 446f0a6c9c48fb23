"""`--train-img-sizes`: images whose size changes from batch to batch, with timm's flags, meanings and schedules."""
import argparse
import inspect
from typing import Any, Callable, Dict, Tuple

from timm.data import create_loader
from timm.layers import to_2tuple
from torch import nn


def add_size_flags(add: Callable) -> None:
    """Add the flags."""
    add('--train-img-sizes', type=int, nargs='+', metavar='N', help='image sizes to draw from, one for each batch')
    add('--train-batch-sizes', type=int, nargs='+', metavar='N', help='batch size for each (default: --batch-size)')
    add('--train-size-probs', type=float, nargs='+', metavar='P', help='weight of each (default: the same for all)')
    add('--train-size-schedule', default='constant', choices=('constant', 'progressive'),
        help='progressive: from the first size to the last over --epochs')
    add('--train-size-schedule-spread', type=float, default=0.65, metavar='STD',
        help='how many sizes off the progressive schedule draws, as a standard deviation')
    add('--train-size-random-mix', type=float, default=0.1, metavar='SHARE', help='share of it drawn from all alike')
    add('--train-batches-per-epoch', '--train-steps-per-epoch', type=int, metavar='N',
        help='batches of an epoch with --train-img-sizes (default: what the images fill)')
    add('--variable-batch-loss-scale', default='none', choices=('none', 'sqrt', 'linear'),
        help='how the gradient of a batch grows with its size over the mean of them')


def check_sizes(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse sizes that cannot be had."""
    sizes = args.train_img_sizes
    if not sizes:
        for name in ('train_batch_sizes', 'train_size_probs', 'train_batches_per_epoch'):
            if getattr(args, name) is not None:
                parser.error(f'--{name.replace("_", "-")}: needs --train-img-sizes')
        return
    if 'input_size_choices' not in inspect.signature(create_loader).parameters:
        parser.error('--train-img-sizes: needs a newer timm, 1.0.31 for instance')
    for name in ('train_batch_sizes', 'train_size_probs'):
        values = getattr(args, name)
        if values is not None and len(values) != len(sizes):
            parser.error(f'--{name.replace("_", "-")}: got {len(values)} values, needs one for each size')
    for name in ('train_img_sizes', 'train_batch_sizes'):
        if min(getattr(args, name) or [1]) < 1:
            parser.error(f'--{name.replace("_", "-")}: got {min(getattr(args, name))}, needs 1 or more')
    probs = args.train_size_probs or [1.]
    if not (min(probs) >= 0 < sum(probs)):
        parser.error(f'--train-size-probs: got {probs}, needs numbers from 0 on, and not all of them 0')
    if args.train_size_schedule == 'progressive' and len(sizes) < 2:
        parser.error('--train-size-schedule progressive: needs two --train-img-sizes or more')
    if args.aug_splits:
        parser.error('--train-img-sizes: does not go with --aug-splits')
    odd = [n for n in args.train_batch_sizes or [] if n % 2]
    if odd and (args.mixup or args.cutmix or args.cutmix_minmax):
        parser.error(f'--train-batch-sizes: got {odd[0]}, mixup and cutmix need even batches')


def check_model(args: argparse.Namespace, model: nn.Module) -> None:
    """Refuse a model that takes images of one size alone.

    Raises:
        ValueError: It does, or not of one of these.
    """
    if not getattr(model, 'dynamic_img_size', True):
        raise ValueError(f'{args.model} takes images of one size, and of any with --model-kwargs dynamic_img_size=True')
    patch = max(to_2tuple(getattr(getattr(model, 'patch_embed', None), 'patch_size', 1)))
    if any(size % patch for size in args.train_img_sizes):
        raise ValueError(f'{args.model} needs multiples of {patch}')


def size_choices(args: argparse.Namespace) -> Dict[str, Any]:
    """Arguments of timm's `create_loader`."""
    if not args.train_img_sizes:
        return {}
    return dict(
        input_size_choices=args.train_img_sizes,
        batch_size_choices=args.train_batch_sizes,
        batch_choice_weights=args.train_size_probs,
        batch_choice_seed=args.seed,
        batch_choice_schedule=args.train_size_schedule,
        batch_schedule_epochs=args.epochs if args.train_size_schedule == 'progressive' else None,
        batch_schedule_spread=args.train_size_schedule_spread,
        batch_schedule_random_mix=args.train_size_random_mix,
        num_batches=args.train_batches_per_epoch,
    )


def mean_batch_size(args: argparse.Namespace) -> float:
    """Images in a batch of one process, on average over the schedule of sizes."""
    if not args.train_img_sizes or not args.train_batch_sizes:
        return args.batch_size
    from timm.data.scheduled_sampler import ScheduledBatchSampler  # not in the oldest versions that do for the rest

    return ScheduledBatchSampler(
        range(max(args.train_batch_sizes)),
        args.train_batch_sizes,
        args.train_size_probs,
        choice_schedule=args.train_size_schedule,
        schedule_epochs=args.epochs,
        schedule_spread=args.train_size_schedule_spread,
        schedule_random_mix=args.train_size_random_mix,
    ).average_batch_size


def largest_batch(args: argparse.Namespace, shape: Tuple[int, ...]) -> Tuple[int, Tuple[int, ...]]:
    """Samples and shape of one of them of the batch with most pixels."""
    if not args.train_img_sizes:
        return args.batch_size * args.num_sample, shape
    batch_sizes = args.train_batch_sizes or [args.batch_size] * len(args.train_img_sizes)
    samples, size = max(zip(batch_sizes, args.train_img_sizes), key=lambda pair: pair[0] * pair[1] ** 2)
    return samples, (shape[0], size, size)


def create_loss_scale(args: argparse.Namespace) -> Callable[[int], float]:
    """The factor of the gradient of a batch, by the number of its samples."""
    power = dict(none=0., sqrt=0.5, linear=1.)[args.variable_batch_loss_scale]
    if not power or not args.train_img_sizes:
        return lambda batch_size: 1.
    mean = mean_batch_size(args)
    return lambda batch_size: (batch_size / mean) ** power
