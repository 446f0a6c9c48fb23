"""Optimiser, schedule and precision."""
import argparse
import logging
import sys
from contextlib import nullcontext
from functools import partial
from typing import Any, Callable, Optional, Tuple

import timm
import torch
from timm import utils
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from torch import nn

_logger = logging.getLogger(__name__)


def create_optimizer(args: argparse.Namespace, module: nn.Module) -> torch.optim.Optimizer:
    """The optimiser of a module's parameters; sets `args.lr` by the global batch size where it is not given."""
    if not args.lr:
        batch_size = args.batch_size * args.num_sample * args.world_size * args.grad_accum_steps
        adaptive = any(name in args.opt.lower() for name in ('ada', 'lamb'))
        power = 0.5 if (args.lr_base_scale or ('sqrt' if adaptive else 'linear')) == 'sqrt' else 1.
        args.lr = args.lr_base * (batch_size / args.lr_base_size) ** power
        _logger.info(f'Learning rate {args.lr:g}, of {args.lr_base:g} at a batch of {args.lr_base_size}')
    return create_optimizer_v2(module, **optimizer_kwargs(args), **args.opt_kwargs)


def create_scheduler(
        args: argparse.Namespace,
        optimizer: torch.optim.Optimizer,
        updates_per_epoch: int,
) -> Tuple[Any, int]:
    """timm's schedule, none for `--sched none`, and the epoch to stop before."""
    scheduler, num_epochs = create_scheduler_v2(
        optimizer,
        **scheduler_kwargs(args, decreasing_metric=args.eval_metric == 'loss'),
        updates_per_epoch=updates_per_epoch,
    )
    if scheduler is None and args.sched != 'none':
        sys.exit(f'--sched {args.sched}: timm {timm.__version__} has no such schedule')
    stop_epoch = num_epochs if args.stop_epoch is None else args.stop_epoch
    if not 0 < stop_epoch <= num_epochs:
        sys.exit(f'--stop-epoch {stop_epoch}: the schedule has {num_epochs} epochs')
    return scheduler, stop_epoch


def create_autocast(args: argparse.Namespace) -> Callable:
    """Makes the context that a model runs in."""
    if not args.amp:
        return nullcontext
    return partial(torch.autocast, device_type=torch.device(args.device).type, dtype=getattr(torch, args.amp_dtype))


def create_loss_scaler(args: argparse.Namespace) -> Optional[utils.NativeScaler]:
    """What keeps gradients in float16's range; the other precisions need none."""
    if not (args.amp and args.amp_dtype == 'float16'):
        return None
    return utils.NativeScaler(device=torch.device(args.device).type)
