"""Optimiser, schedule and precision."""
import argparse
import logging
import math
import re
import sys
from contextlib import nullcontext
from functools import partial
from typing import Any, Callable, Dict, List, Tuple

import timm
import torch
from timm.optim import (
    create_optimizer_v2,
    optimizer_kwargs,
    param_groups_layer_decay,
    param_groups_weight_decay,
)
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.scheduler.scheduler import Scheduler
from torch import nn

from .sizes import mean_batch_size

_logger = logging.getLogger(__name__)


def resolve_learning_rate(args: argparse.Namespace) -> None:
    """Set `args.lr` by the global batch where it is not given and, with `--lr-base-all`, the two that go with it."""
    if args.lr:
        return
    adaptive = any(name in args.opt.lower() for name in ('ada', 'lamb'))
    power = 0.5 if (args.lr_base_scale or ('sqrt' if adaptive else 'linear')) == 'sqrt' else 1.
    factor = (global_batch(args) / args.lr_base_size) ** power
    args.lr = args.lr_base * factor
    if args.lr_base_all:
        args.min_lr, args.warmup_lr = args.min_lr * factor, args.warmup_lr * factor
    _logger.info(f'Learning rate {args.lr:g}, of {args.lr_base:g} at a batch of {args.lr_base_size}')


def global_batch(args: argparse.Namespace) -> float:
    """Images or clips in an optimiser step of all processes, on average where their number changes."""
    return mean_batch_size(args) * args.num_sample * args.world_size * args.grad_accum_steps


def create_optimizer(args: argparse.Namespace, module: nn.Module) -> torch.optim.Optimizer:
    """The optimiser of a module's parameters, with the learning rate that the batch asks for."""
    resolve_learning_rate(args)
    kwargs = {**optimizer_kwargs(args), **args.opt_kwargs}
    if args.decay_a_log or args.layer_decay_mode != 'proper':
        kwargs['param_group_fn'] = partial(parameter_groups, args)
    return create_optimizer_v2(module, **kwargs)


def parameter_groups(args: argparse.Namespace, module: nn.Module) -> List[Dict[str, Any]]:
    """timm's parameter groups, or those of VideoMamba's released code where they differ."""
    exempt = getattr(module, 'no_weight_decay', set)()
    if args.decay_a_log:
        exempt = {name for name in exempt if not name.endswith(('A_log', 'A_b_log'))}
    if args.layer_decay is None or args.layer_decay_mode == 'none':
        return param_groups_weight_decay(module, args.weight_decay, no_weight_decay_list=exempt)
    if args.layer_decay_mode == 'proper':
        return param_groups_layer_decay(
            module, args.weight_decay, exempt, layer_decay=args.layer_decay, min_scale=args.layer_decay_min_scale,
            no_opt_scale=args.layer_decay_no_opt_scale)
    # that code looks for its blocks under another name: only what comes before them is slowed
    blocks = {int(match[1]) for name, _ in module.named_parameters() if (match := re.search(r'\bblocks\.(\d+)', name))}
    slow = {
        id(p) for name, p in module.named_parameters()
        if re.search(r'(^|\.)(cls_token$|pos_embed$|patch_embed\.)', name)}
    if not (blocks and slow):
        raise ValueError('--layer-decay-mode released: only models of embeddings and blocks have it, try proper')
    scale = args.layer_decay ** (len(blocks) + 1)
    groups = []
    for group in param_groups_weight_decay(module, args.weight_decay, no_weight_decay_list=exempt):
        for lr_scale, chosen in ((scale, True), (1., False)):
            params = [p for p in group['params'] if (id(p) in slow) == chosen]
            if params:
                groups.append({**group, 'params': params, 'lr_scale': lr_scale})
    return groups


class CosinePerStep(Scheduler):
    """The schedule of BEiT's descendants, VideoMamba's code for clips among them, set before every optimiser step.

    A linear warm-up with both its ends, warm-up rate and peak, then half a cosine that starts with the peak, so that it
    comes twice, and stops one step before the lowest rate.

    Args:
        optimizer: Its learning rates are the peaks.
        num_steps: All steps.
        warmup_steps: Those of the warm-up, of `num_steps`.
        warmup_lr: Learning rate to start at.
        min_lr: Lowest learning rate.
    """

    def __init__(
            self,
            optimizer: torch.optim.Optimizer,
            num_steps: int,
            warmup_steps: int,
            warmup_lr: float,
            min_lr: float,
    ):
        super().__init__(optimizer, 'lr', t_in_epochs=False)
        self.num_steps, self.warmup_steps, self.warmup_lr, self.min_lr = num_steps, warmup_steps, warmup_lr, min_lr
        self.step_update(0)

    def _get_lr(self, t: int) -> List[float]:
        if t < self.warmup_steps:
            done = t / max(1, self.warmup_steps - 1)
            return [self.warmup_lr + (peak - self.warmup_lr) * done for peak in self.base_values]
        done = min(1., (t - self.warmup_steps) / (self.num_steps - self.warmup_steps))
        return [self.min_lr + (peak - self.min_lr) * (1 + math.cos(math.pi * done)) / 2 for peak in self.base_values]


def create_scheduler(
        args: argparse.Namespace,
        optimizer: torch.optim.Optimizer,
        updates_per_epoch: int,
) -> Tuple[Any, int]:
    """The schedule, none for `--sched none`, and the epoch to stop before."""
    if args.sched == 'cosine_per_step':
        num_epochs = args.epochs
        scheduler = CosinePerStep(
            optimizer, args.epochs * updates_per_epoch, args.warmup_epochs * updates_per_epoch, args.warmup_lr,
            args.min_lr)
    else:
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


def plateau_state(scheduler: Any) -> Dict[str, Any]:
    """What `--sched plateau` has seen; timm's state_dict of it lacks the counters and the learning rates."""
    return dict(
        scheduler.lr_scheduler.state_dict(), lrs=[group['lr'] for group in scheduler.optimizer.param_groups],
        restore_lr=scheduler.restore_lr)


def load_plateau_state(scheduler: Any, state: Dict[str, Any]) -> None:
    """Go on from `plateau_state`."""
    state = dict(state)
    for group, lr in zip(scheduler.optimizer.param_groups, state.pop('lrs')):
        group['lr'] = lr
    scheduler.restore_lr = state.pop('restore_lr')
    scheduler.lr_scheduler.load_state_dict(state)


def create_autocast(args: argparse.Namespace) -> Callable:
    """Makes the context that a model runs in."""
    if not args.amp:
        return nullcontext
    return partial(torch.autocast, device_type=torch.device(args.device).type, dtype=getattr(torch, args.amp_dtype))


def create_loss_scaler(args: argparse.Namespace) -> torch.amp.GradScaler:
    """The loss scaler for float16; it does nothing in the other precisions."""
    return torch.amp.GradScaler(torch.device(args.device).type, enabled=args.amp and args.amp_dtype == 'float16')
