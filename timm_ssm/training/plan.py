"""The plan of a run, without running it: `--dry-run`."""
import argparse
import math
import os
from typing import Any, Iterator, List, Sequence, Tuple

import timm
import torch
from torch import nn

from ..zoo.registry import num_frames
from .arguments import errors_of
from .clips import create_reader, resolve_clips
from .data import create_datasets, resolve_data
from .model import build_model
from .optim import create_optimizer, create_scheduler, global_batch
from .recompute import plan_recomputation
from .sizes import largest_batch, mean_batch_size

BLOCKS = '▁▂▃▄▅▆▇█'


def describe_plan(args: argparse.Namespace) -> str:
    """What the arguments come to: data, model, optimiser, learning rates, steps and memory; sets `args` as a run does.

    Models are built without storage, teachers and weights not loaded.
    """
    args.world_size, args.rank, args.distributed = args.dry_run or int(os.environ.get('WORLD_SIZE', 1)), 0, False
    with torch.device('meta'):
        model = build_model(args, torch.device('meta'), load_weights=False).train()
    data_config = resolve_data(args, model)
    num_train, num_eval = count_samples(args, model, data_config['input_size'][0])
    batches = args.train_batches_per_epoch or int(math.ceil(num_train / args.world_size) / mean_batch_size(args))
    if not batches:
        raise ValueError(f'--batch-size: got {args.batch_size}, {num_train} samples do not fill one batch')
    updates = math.ceil(batches / args.grad_accum_steps)
    with errors_of('--opt', args.opt):
        optimizer = create_optimizer(args, model)
    scheduler, num_epochs = create_scheduler(args, optimizer, updates)
    shape = sample_shape(model, data_config['input_size'])
    start = args.initial_checkpoint or args.pretrained_path or ('its released weights' if args.pretrained else '')

    lines = [
        f'data           {num_train:,} to train on, {num_eval or "none"} to validate on, {args.num_classes} classes',
        f'input          {" × ".join(map(str, shape))}, augmented by {args.aa or "crops and flips"}',
        f'model          {args.model}, {sum(p.numel() for p in model.parameters()):,} parameters'
        + (f', from {start}' if start else ', from scratch')
        + (f', taught by {args.kd_model_name} ({args.kd_distill_type})' if args.kd_model_name else ''),
        f'global batch   {round(global_batch(args))}: {args.world_size} processes of {round(mean_batch_size(args), 2)}'
        + (f', each augmented {args.num_sample} times' if args.num_sample > 1 else '')
        + (f', {args.grad_accum_steps} accumulated' if args.grad_accum_steps > 1 else ''),
        f'steps          {updates:,} an epoch, {updates * num_epochs:,} in {num_epochs} epochs',
        f'optimiser      {args.opt}, learning rate {args.lr:.4g}, clipping gradients at {args.clip_grad or "nothing"}']
    for group in optimizer.param_groups:
        params = group['params']
        lines.append(
            f'  group        {len(params)} tensors, {sum(p.numel() for p in params):,} parameters: learning rate × '
            f'{group.get("lr_scale", 1.):.4g}, weight decay {group["weight_decay"]:g}')
    rates = list(learning_rates(optimizer, scheduler, updates, num_epochs))
    low, high = min(rates), max(rates)
    columns = [rates[i * len(rates) // 60] for i in range(60)] if len(rates) > 60 else rates
    curve = ''.join(BLOCKS[int(7.999 * (r - low) / (high - low))] if high > low else BLOCKS[-1] for r in columns)
    lines += [
        f'learning rate  {curve}',
        f'               {rates[0]:.3g} at first, {high:.3g} in epoch {rates.index(high)}, {rates[-1]:.3g} in the last',
        *describe_memory(args, model, optimizer, shape)]
    return '\n'.join(lines)


def count_samples(args: argparse.Namespace, model: nn.Module, channels: int) -> Tuple[int, int]:
    """Images or videos to train and to validate on."""
    if args.data_dir is None and not args.dataset:
        return args.train_num_samples, args.val_num_samples or 0
    if resolve_clips(args, model):
        return len(create_reader(args, args.train_split)), (
            len(create_reader(args, args.val_split)) if args.val_split else 0)
    train, val = create_datasets(args, channels)
    return len(train), 0 if val is None else len(val)


def learning_rates(
        optimizer: torch.optim.Optimizer, scheduler: Any, updates: int, num_epochs: int) -> Iterator[float]:
    """The highest learning rate of any group, at the beginning of each epoch."""
    for epoch in range(num_epochs):
        if scheduler is not None and epoch:
            scheduler.step(epoch)
            scheduler.step_update(epoch * updates)
        yield max(group['lr'] for group in optimizer.param_groups)


def sample_shape(model: nn.Module, input_size: Sequence[int]) -> Tuple[int, ...]:
    """(channels, height, width), or (channels, frames, height, width) of clips."""
    channels, *size = input_size
    frames = num_frames(model)
    return (channels, frames, *size) if frames > 1 else (channels, *size)


def describe_memory(
        args: argparse.Namespace,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        shape: Tuple[int, ...],
) -> List[str]:
    """Estimates for one process: what it holds all the time, and what a forward pass keeps."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    for p in model.parameters():
        p.grad = torch.empty_like(p)
    optimizer.step()
    state = sum(
        t.numel() * t.element_size()
        for s in optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor))
    teacher = 0
    if args.kd_model_name:
        with torch.device('meta'):
            teacher = 4 * sum(p.numel() for p in timm.create_model(args.kd_model_name).parameters())
    held = 2 * weights + state + teacher + (weights if args.model_ema and not args.model_ema_force_cpu else 0)
    partly, wholly, kept = plan_recomputation(args, model, shape)
    gib = 1 << 30
    if args.fsdp:
        held = teacher + (held - teacher) / args.world_size
    return [
        f'memory         {held / gib:.2f} GiB for weights, gradients, optimiser state'
        + (', teacher' if teacher else '') + (', average' if args.model_ema else ''),
        f'               {kept / gib:.2f} GiB for the activations of {largest_batch(args, shape)[0]} samples'
        + (f', {len(partly)} blocks recomputed partly, {len(wholly)} wholly' if partly or wholly else '')]
