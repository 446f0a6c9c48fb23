#!/usr/bin/env python3
"""Train an image classifier.

    python train.py DATA --model videomamba_tiny_patch16_224 --num-classes 10 --opt adamw --lr 5e-4
    python train.py --config recipes/FILE.yaml --data-dir DATA                # flags from a file, in timm's names
    python train.py ... --experiment run --resume auto                        # start, or go on where it was stopped
    torchrun --nproc-per-node 8 train.py DATA --model ...                     # one process for each GPU

DATA holds the folders `train` and `validation` with a folder of images for each class; `--dataset` names any other timm
reader. Flags, their defaults and the files written are those of timm's train.py, and so is what the script is made of:
datasets, augmentation, optimisers, schedules and tasks come from timm. Where it differs:

- All randomness is a function of the seed, process, epoch and batch. A run that was stopped or killed and then resumed
  ends with bitwise the weights of one that was not, as far as the device's arithmetic repeats itself.
- A file appears under its name only when it is complete, and a run does not overwrite another one's.
- A loss that is not finite ends the run.
"""
import argparse
import logging
import math
import os
import re
import sys
import time
from contextlib import nullcontext
from datetime import datetime
from functools import partial
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Tuple

import numpy as np
import timm
import torch
import torch.nn as nn
import yaml
from timm import utils
from timm.data import FastCollateMixup, Mixup, create_dataset, create_loader
from timm.layers import convert_sync_batchnorm, set_fast_norm
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.models import clean_state_dict, create_model, safe_model_name
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.task import ClassificationTask, FeatureDistillationTask, LogitDistillationTask, TokenDistillationTask
from tqdm import tqdm

import timm_ssm  # noqa: F401  registers the models
from train_args import parse_args
from train_files import Checkpoints, Summary, atomic_write
from validate import evaluate, resolve_data, resolve_input, show_progress

_logger = logging.getLogger('train')


def seed_all(*key: int) -> None:
    """Seed every random generator from a tuple of integers."""
    utils.random_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))


def batches(loader: Iterable, key: Tuple[int, ...], start: int) -> Iterator[Tuple[int, Tuple[torch.Tensor, ...]]]:
    """Number and yield the batches of an epoch from `start` on, with the generators in a state of their own for each.

    What is drawn for the images of a batch, by the step on it and by loading processes, depends on `key` and its number
    only. So there is no state to save: resuming within an epoch means to load, and drop, the batches before.
    """
    seed_all(*key, 0)
    iterator = iter(loader)
    for i in range(len(loader)):
        seed_all(*key, 2 * i + 1)
        batch = next(iterator)
        if i >= start:
            seed_all(*key, 2 * i + 2)
            yield i, batch


def load_training_state(path: str) -> Dict[str, Any]:
    """A checkpoint of this script, or of timm's train.py."""
    if not os.path.isfile(path):
        sys.exit(f'--resume {path}: no such file')
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as e:
        sys.exit(f'--resume {path}: not a whole checkpoint ({type(e).__name__}: {str(e).splitlines()[0]})')
    if not isinstance(state, dict) or 'state_dict' not in state or 'optimizer' not in state:
        sys.exit(f'--resume {path}: no optimiser state in it; to start from weights use --initial-checkpoint')
    return state


def restore(
        state: Dict[str, Any],
        path: str,
        args: argparse.Namespace,
        task: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss_scaler: Optional[utils.NativeScaler],
) -> Tuple[int, Dict[str, Any]]:
    """Put a checkpoint's state in place; returns the epoch to go on with and the progress in it."""
    try:
        task.load_checkpoint_state(clean_state_dict(state['state_dict']), state.get('task_state'))
        if not args.no_resume_opt:
            optimizer.load_state_dict(state['optimizer'])
    except (RuntimeError, ValueError) as e:
        sys.exit(f'--resume {path}: the checkpoint does not fit this model and optimiser: {e}')
    if loss_scaler is not None and loss_scaler.state_dict_key in state and not args.no_resume_opt:
        loss_scaler.load_state_dict(state[loss_scaler.state_dict_key])

    before, now = state.get('args') or {}, vars(args)
    before = vars(before) if isinstance(before, argparse.Namespace) else before
    changed = {key: f'{key} {before[key]} -> {now[key]}' for key in before if key in now and before[key] != now[key]}
    for key in ('resume', 'output', 'experiment', 'config', 'rank', 'local_rank', 'device', 'stop_epoch', 'data_dir'):
        changed.pop(key, None)
    if changed:
        _logger.info(f'Going on with other settings than before: {", ".join(changed.values())}')
    if 'batch' not in state:
        return state['epoch'] + 1, dict(batch=0, loss_sum=0.)
    fixed = ('seed', 'batch_size', 'world_size', 'workers', 'grad_accum_steps')
    moved = [changed[key] for key in fixed if key in changed]
    if moved:
        sys.exit(
            f'--resume {path}: in the middle of an epoch these must stay as they were: {", ".join(moved)}; '
            f'last.pth.tar, between epochs, can go on with others')
    return state['epoch'], dict(batch=state['batch'], loss_sum=state['loss_sum'])


def create_datasets(args: argparse.Namespace, in_chans: int) -> Tuple[Any, Any]:
    """The training dataset and, with a validation split, the one to validate on."""
    kwargs = dict(
        root=args.data_dir,
        class_map=args.class_map,
        download=args.dataset_download,
        batch_size=args.batch_size,
        input_img_mode=args.input_img_mode or ('RGB' if in_chans == 3 else 'L'),
        input_key=args.input_key,
        target_key=args.target_key,
        trust_remote_code=args.dataset_trust_remote_code,
    )
    train = create_dataset(
        args.dataset, split=args.train_split, is_training=True, seed=args.seed, repeats=args.epoch_repeats,
        num_samples=args.train_num_samples, **kwargs)
    val = create_dataset(
        args.dataset, split=args.val_split, num_samples=args.val_num_samples, **kwargs) if args.val_split else None

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


def create_loss(args: argparse.Namespace, soft_targets: bool) -> nn.Module:
    """The loss on logits, in float32 whatever the model runs in.

    Mixup and cutmix make soft targets, with the label smoothing in them already.
    """
    if args.bce_loss or args.loss == 'bce':
        loss = BinaryCrossEntropy(
            smoothing=0. if soft_targets else args.smoothing,
            target_threshold=args.bce_target_thresh,
            sum_classes=args.bce_sum,
            pos_weight=args.bce_pos_weight,
        )
    elif soft_targets:
        loss = SoftTargetCrossEntropy()
    else:
        loss = LabelSmoothingCrossEntropy(smoothing=args.smoothing) if args.smoothing else nn.CrossEntropyLoss()
    # on the CPU, unlike on CUDA, autocast does not see to this
    loss.register_forward_pre_hook(lambda module, inputs: (inputs[0].float(), *inputs[1:]))
    return loss


def create_task(args: argparse.Namespace, model: nn.Module, criterion: nn.Module, device: torch.device):
    """timm's task for what to learn: the labels, or also the outputs, features or tokens of a teacher."""
    kwargs = dict(criterion=criterion.to(device), device=device, verbose=utils.is_primary(args))
    if args.kd_model_name is None:
        return ClassificationTask(model, **kwargs)
    kwargs.update(distill_loss_weight=args.distill_loss_weight, task_loss_weight=args.task_loss_weight)
    if args.kd_distill_type == 'feature':
        dims = dict(student_feature_dim=args.kd_student_feature_dim, teacher_feature_dim=args.kd_teacher_feature_dim)
        return FeatureDistillationTask(model, args.kd_model_name, **dims, **kwargs)
    kwargs.update(temperature=args.kd_temperature)
    if args.kd_distill_type == 'token':
        return TokenDistillationTask(model, args.kd_model_name, distill_type=args.kd_token_distill_type, **kwargs)
    return LogitDistillationTask(model, args.kd_model_name, loss_type=args.kd_loss_type, **kwargs)


def train_one_epoch(
        epoch: int,
        progress: Dict[str, Any],
        args: argparse.Namespace,
        task: nn.Module,
        loader: Iterable,
        mixup_fn: Optional[Mixup],
        optimizer: torch.optim.Optimizer,
        lr_scheduler: Any,
        autocast: Callable,
        loss_scaler: Optional[utils.NativeScaler],
        save_recovery: Callable,
        checkpoints: Checkpoints,
) -> float:
    """Train from `progress` on, the batches done and the sum of their losses; returns the mean loss of the epoch."""
    accum, num_batches = args.grad_accum_steps, len(loader)
    updates_per_epoch = math.ceil(num_batches / accum)
    num_updates = epoch * updates_per_epoch + progress['batch'] // accum
    clip_parameters = partial(task.get_clip_parameters, exclude_head=args.clip_mode == 'agc')
    create_graph = getattr(optimizer, 'is_second_order', False)
    loss_sum, losses = progress['loss_sum'], []  # the latter are still on the device
    images, start = 0, time.perf_counter()

    task.train()
    optimizer.zero_grad()
    bar = tqdm(
        total=num_batches, initial=progress['batch'], desc=f'Epoch {epoch}', unit='batch', leave=False,
        disable=not (utils.is_primary(args) and sys.stderr.isatty()))
    for i, (input, target) in batches(loader, (args.seed, args.rank, epoch), progress['batch']):
        input, target = input.to(task.device), target.to(task.device)
        if mixup_fn is not None:
            input, target = mixup_fn(input, target)
        if args.channels_last:
            input = input.contiguous(memory_format=torch.channels_last)

        done = i + 1
        update = done % accum == 0 or done == num_batches
        with nullcontext() if update else task.no_sync():
            with autocast():
                loss = task(input, target)['loss']
            losses.append(loss.detach())
            loss = loss / min(accum, num_batches - i // accum * accum)  # the last update may have fewer batches
            if loss_scaler is not None:
                loss_scaler(
                    loss, optimizer, clip_grad=args.clip_grad, clip_mode=args.clip_mode, parameters=clip_parameters(),
                    create_graph=create_graph, need_update=update)
            else:
                loss.backward(create_graph=create_graph)
                if update:
                    if args.clip_grad is not None:
                        utils.dispatch_clip_grad(clip_parameters(), args.clip_grad, mode=args.clip_mode)
                    optimizer.step()
        if update:
            num_updates += 1
            optimizer.zero_grad()
            task.update_ema(step=num_updates)
            if lr_scheduler is not None:
                lr_scheduler.step_update(num_updates=num_updates)

        images += len(input) * args.world_size
        bar.update()
        recover = update and done < num_batches and args.recovery_interval and num_updates % args.recovery_interval == 0
        if done % args.log_interval == 0 or done == num_batches or recover:
            # only here does the loop wait for the device
            values = torch.stack(losses)
            if args.distributed:
                values = utils.reduce_tensor(values, args.world_size)
            for batch, value in enumerate(values.tolist(), done - len(losses)):
                if not math.isfinite(value):
                    bar.close()
                    stop_not_finite(
                        f'loss is {value} at epoch {epoch}, batch {batch} of {num_batches} '
                        f'(update {epoch * updates_per_epoch + batch // accum})', args, checkpoints)
                loss_sum += value
            lr = optimizer.param_groups[-1]['lr']
            text = f'loss {value:.4f} ({loss_sum / done:.4f})  lr {lr:.3e}'
            bar.set_postfix_str(text)
            if bar.disable:
                speed = images / (time.perf_counter() - start)
                _logger.info(f'Epoch {epoch} [{done:>4d}/{num_batches}]  {text}  {speed:.1f} img/s')
            losses.clear()
        if recover:
            save_recovery(dict(batch=done, loss_sum=loss_sum))
    bar.close()
    if hasattr(optimizer, 'sync_lookahead'):
        optimizer.sync_lookahead()
    return loss_sum / num_batches


def stop_not_finite(what: str, args: argparse.Namespace, checkpoints: Checkpoints) -> None:
    if not utils.is_primary(args):
        sys.exit(1)
    last_good = checkpoints.latest()
    sys.exit(
        f'Training stopped: the {what}. '
        + (f'The last good checkpoint is {last_good}. ' if last_good else 'There is no checkpoint yet. ')
        + 'A lower --lr, a longer warm-up, --clip-grad, or float32 or bfloat16 instead of float16 may help.')


def main(argv: Optional[List[str]] = None) -> nn.Module:
    """Run the script; returns the task with the trained model."""
    args = parse_args(argv)
    args_text = yaml.safe_dump(vars(args), default_flow_style=False)
    device = utils.init_distributed_device(args)
    primary = utils.is_primary(args)
    logging.basicConfig(format='%(message)s')
    logging.root.setLevel(logging.INFO if primary else logging.WARNING)
    logging.getLogger('httpx').setLevel(logging.WARNING)  # the Hub's client
    if device.type == 'cuda':
        torch.set_float32_matmul_precision('high')
        torch.backends.cudnn.benchmark = True
    _logger.info(f'Process {args.rank} of {args.world_size} on {device}.')

    # the folder of the run, and where to go on from
    decreasing = args.eval_metric == 'loss'
    run_name = args.experiment or f'{datetime.now():%Y%m%d-%H%M%S}-{safe_model_name(args.model)}'
    checkpoints = Checkpoints(os.path.join(args.output, run_name), args.checkpoint_hist, decreasing)
    resume = checkpoints.latest() if args.resume == 'auto' else args.resume
    if args.distributed:  # the first process looks for all of them
        found = [resume]
        torch.distributed.broadcast_object_list(found)
        resume = found[0]
    in_place = bool(resume) and os.path.abspath(os.path.dirname(resume)) == os.path.abspath(checkpoints.folder)
    if primary and checkpoints.latest() and not (in_place and re.match('last|recovery', os.path.basename(resume))):
        sys.exit(
            f'{checkpoints.folder} holds the checkpoints of another run or of later epochs: go on from its latest with '
            f'--resume auto, or choose another --experiment')
    state = load_training_state(resume) if resume else None

    # model
    seed_all(args.seed)
    if args.fast_norm:
        set_fast_norm()
    overlay = dict(args.pretrained_cfg_overlay)
    if args.pretrained_path:
        overlay.update(file=args.pretrained_path, num_classes=-1)  # -1: fit the head
    model = create_model(
        args.model,
        pretrained=state is None and bool(args.pretrained or args.pretrained_path),
        pretrained_cfg_overlay=overlay or None,
        checkpoint_path=args.initial_checkpoint if state is None else '',
        num_classes=args.num_classes,
        global_pool=args.gp,
        drop_rate=args.drop,
        drop_path_rate=args.drop_connect if args.drop_path is None else args.drop_path,
        drop_block_rate=args.drop_block,
        bn_momentum=args.bn_momentum,
        bn_eps=args.bn_eps,
        **resolve_input(args),
    )
    args.num_classes = model.num_classes
    with torch.no_grad():
        if args.head_init_scale is not None:
            for p in model.get_classifier().parameters():
                p.mul_(args.head_init_scale)
        if args.head_init_bias is not None:
            model.get_classifier().bias.fill_(args.head_init_bias)
    if args.grad_checkpointing:
        model.set_grad_checkpointing()
    model.to(device)
    if args.channels_last:
        model.to(memory_format=torch.channels_last)
    if args.distributed and args.sync_bn:
        model = convert_sync_batchnorm(model)
    _logger.info(f'{args.model}: {sum(p.numel() for p in model.parameters()):,} parameters')

    # data
    data_config = resolve_data(args, model)
    model.pretrained_cfg.update(mean=data_config['mean'], std=data_config['std'])  # teachers go by these
    dataset_train, dataset_eval = create_datasets(args, data_config['input_size'][0])
    soft_targets = bool(args.mixup or args.cutmix or args.cutmix_minmax)
    mixup_class = Mixup if args.no_prefetcher else FastCollateMixup
    mixup_fn = mixup_class(
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        cutmix_minmax=args.cutmix_minmax,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        mode=args.mixup_mode,
        label_smoothing=args.smoothing,
        num_classes=args.num_classes,
    ) if soft_targets else None
    loader_kwargs = dict(
        input_size=data_config['input_size'],
        mean=data_config['mean'],
        std=data_config['std'],
        num_workers=args.workers,
        persistent_workers=False,  # started anew each epoch, from the seed of the epoch
        pin_memory=args.pin_mem,
        use_prefetcher=not args.no_prefetcher,
        distributed=args.distributed,
        device=device,
    )
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
        interpolation=(not args.no_aug and args.train_interpolation) or data_config['interpolation'],
        collate_fn=None if args.no_prefetcher else mixup_fn,
        worker_seeding=args.worker_seeding,
        **loader_kwargs,
    )
    if not len(loader_train):
        sys.exit(f'--batch-size {args.batch_size}: the {len(dataset_train)} training images do not fill one batch')
    loader_eval = eval_samples = None
    if dataset_eval is not None:
        loader_eval = create_loader(
            dataset_eval,
            batch_size=args.validation_batch_size or args.batch_size,
            interpolation=data_config['interpolation'],
            crop_pct=data_config['crop_pct'],
            **loader_kwargs,
        )
        if args.distributed and not isinstance(dataset_eval, torch.utils.data.IterableDataset):
            eval_samples = len(range(args.rank, len(dataset_eval), args.world_size))

    # task, optimiser, schedule
    task = create_task(args, model, create_loss(args, soft_targets), device)
    if not args.lr:
        batch_size = args.batch_size * args.world_size * args.grad_accum_steps
        adaptive = any(name in args.opt.lower() for name in ('ada', 'lamb'))
        power = 0.5 if (args.lr_base_scale or ('sqrt' if adaptive else 'linear')) == 'sqrt' else 1.
        args.lr = args.lr_base * (batch_size / args.lr_base_size) ** power
        _logger.info(f'Learning rate {args.lr:g}, of {args.lr_base:g} at a batch of {args.lr_base_size}')
    optimizer = create_optimizer_v2(task.get_trainable_module(), **optimizer_kwargs(args), **args.opt_kwargs)
    autocast, loss_scaler = nullcontext, None
    if args.amp:
        autocast = partial(torch.autocast, device_type=device.type, dtype=getattr(torch, args.amp_dtype))
        loss_scaler = utils.NativeScaler(device=device.type) if args.amp_dtype == 'float16' else None
    updates_per_epoch = math.ceil(len(loader_train) / args.grad_accum_steps)
    lr_scheduler, num_epochs = create_scheduler_v2(
        optimizer, **scheduler_kwargs(args, decreasing_metric=decreasing), updates_per_epoch=updates_per_epoch)
    if lr_scheduler is None and args.sched != 'none':
        sys.exit(f'--sched {args.sched}: timm {timm.__version__} has no such schedule')
    stop_epoch = num_epochs if args.stop_epoch is None else args.stop_epoch
    if not 0 < stop_epoch <= num_epochs:
        sys.exit(f'--stop-epoch {stop_epoch}: the schedule has {num_epochs} epochs')

    # go on from a checkpoint
    start_epoch, progress = 0, dict(batch=0, loss_sum=0.)
    if state is not None:
        start_epoch, progress = restore(state, resume, args, task, optimizer, loss_scaler)
        if in_place:
            checkpoints.history = [tuple(entry) for entry in state.get('history', [])]
    if args.start_epoch is not None:
        start_epoch, progress = args.start_epoch, dict(batch=0, loss_sum=0.)
    num_updates = start_epoch * updates_per_epoch + progress['batch'] // args.grad_accum_steps
    if lr_scheduler is not None and num_updates:
        if start_epoch:
            lr_scheduler.step(start_epoch)
        lr_scheduler.step_update(num_updates)
    if args.model_ema:
        task.setup_ema(
            decay=args.model_ema_decay,
            use_warmup=args.model_ema_warmup,
            device='cpu' if args.model_ema_force_cpu else None,
        )
        if state is not None and 'state_dict_ema' in state:
            task.load_checkpoint_state(state['state_dict_ema'], state.get('task_state_ema'), ema=True)

    # after the optimiser and the average have the parameters themselves, wrap what runs them
    if args.torchcompile:
        task.compile(backend=args.torchcompile, mode=args.torchcompile_mode)
        task.compile_ema(backend=args.torchcompile, mode=args.torchcompile_mode)
    eval_model = task.get_eval_model()
    if args.distributed:
        buffers = dict(broadcast_buffers=False) if args.no_ddp_bb else {}
        task.prepare_distributed(device_ids=[device] if device.type == 'cuda' else None, **buffers)

    summary = Summary(os.path.join(checkpoints.folder, 'summary.csv'), start_epoch)
    if primary:
        os.makedirs(checkpoints.folder, exist_ok=True)
        with atomic_write(os.path.join(checkpoints.folder, 'args.yaml'), 'w') as f:
            f.write(args_text)
        if class_names := getattr(getattr(dataset_train, 'reader', None), 'class_to_idx', None):
            with atomic_write(os.path.join(checkpoints.folder, 'classes.txt'), 'w') as f:
                f.write('\n'.join(sorted(class_names, key=class_names.get)) + '\n')
        if args.log_wandb:
            import wandb
            wandb.init(
                project=args.wandb_project, name=run_name, config=vars(args), tags=args.wandb_tags,
                **(dict(id=args.wandb_resume_id, resume='must') if args.wandb_resume_id else {}))
        if in_place and os.path.basename(resume) == 'last.pth.tar':
            checkpoints.settle(start_epoch - 1)
    _logger.info(f'Epochs {start_epoch} to {stop_epoch - 1} of {num_epochs}, {updates_per_epoch} updates each.')

    def current_state(epoch: int) -> Dict[str, Any]:
        scaler = {} if loss_scaler is None else {loss_scaler.state_dict_key: loss_scaler.state_dict()}
        return dict(
            epoch=epoch, arch=args.model, args=vars(args), version=2, optimizer=optimizer.state_dict(), **scaler,
            **task.get_checkpoint_state(), **task.get_checkpoint_state(ema=True))

    def check_weights(when: str) -> None:
        if not torch.stack([p.isfinite().all() for p in model.parameters()]).all():
            stop_not_finite(f'weights are not finite after {when}', args, checkpoints)

    def save_recovery(epoch: int, progress: Dict[str, Any]) -> None:
        check_weights(f'epoch {epoch}, batch {progress["batch"] - 1}')
        if primary:
            checkpoints.save_recovery(dict(current_state(epoch), **progress))

    def validate(model: nn.Module) -> Dict[str, float]:
        batches = show_progress(loader_eval, len(loader_eval), 'Validation', args.log_interval)
        return evaluate(model, batches, device, autocast, args.channels_last, eval_samples, args.distributed)

    def share_batch_norms(model: nn.Module) -> None:
        if args.distributed and args.dist_bn and not args.sync_bn:
            utils.distribute_bn(model, args.world_size, reduce=args.dist_bn == 'reduce')

    start = time.perf_counter()
    for epoch in range(start_epoch, stop_epoch):
        for part in (loader_train.dataset, loader_train.sampler):
            if hasattr(part, 'set_epoch'):
                part.set_epoch(epoch)
        if args.mixup_off_epoch and epoch >= args.mixup_off_epoch and mixup_fn is not None:
            mixup_fn.mixup_enabled = False

        train_loss = train_one_epoch(
            epoch, progress, args, task, loader_train, mixup_fn if args.no_prefetcher else None, optimizer,
            lr_scheduler, autocast, loss_scaler, partial(save_recovery, epoch), checkpoints)
        progress = dict(batch=0, loss_sum=0.)
        check_weights(f'epoch {epoch}')
        share_batch_norms(model)

        completed = epoch + 1
        row, metric = dict(epoch=epoch, train_loss=train_loss), train_loss
        if loader_eval is not None:
            metric = None
            if completed % args.val_interval == 0 or completed == stop_epoch or completed in args.save_epochs:
                metrics = validate(eval_model)
                if args.model_ema and not args.model_ema_force_cpu:
                    share_batch_norms(task.get_trainable_module(ema=True))
                    metrics = validate(task.get_eval_model(ema=True))
                row.update({f'eval_{name}': value for name, value in metrics.items()})
                metric = metrics[args.eval_metric]
        row['lr'] = sum(group['lr'] for group in optimizer.param_groups) / len(optimizer.param_groups)
        if lr_scheduler is not None:
            lr_scheduler.step(completed, metric)

        if primary:
            summary.add(row)  # before the checkpoint: a row without one is dropped on resuming
            checkpoints.save(current_state(epoch), metric)
            if completed in args.save_epochs:
                checkpoints.copy_last(f'milestone-{completed}')
            if args.log_wandb:
                wandb.log(row)
            _logger.info('  '.join(f'{k} {v:.6g}' for k, v in row.items()))

    _logger.info(f'Done in {time.perf_counter() - start:.1f} s.')
    if checkpoints.history:
        epoch, metric = checkpoints.history[0]
        _logger.info(f'Best {args.eval_metric} {metric:.4f}, epoch {epoch}: {checkpoints.path("model_best")}')
    if args.distributed:
        torch.distributed.destroy_process_group()
    return task


if __name__ == '__main__':
    main()
