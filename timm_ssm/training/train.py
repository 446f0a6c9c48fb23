"""Training, from the arguments to the last checkpoint: `main`, in the order in which things happen."""
import argparse
import logging
import os
import sys
import time
from functools import partial
from typing import Dict, List, Optional

import torch
import yaml
from timm import utils
from timm.task import TrainingTask
from torch import nn

import timm_ssm  # noqa: F401  registers the models

from ..data import ClipError, ClipLoader, TooManyBadClips, score_videos, score_views
from .arguments import UsageError, errors_of, parse_args
from .checkpoints import Checkpoints
from .clips import resolve_clips
from .data import Data, create_data, resolve_data, seed_all
from .evaluation import evaluate
from .log import RunLog, show_progress
from .loop import NotFinite, Progress, Trainer
from .model import build_model
from .monitor import Monitor, Spiked
from .optim import create_optimizer, create_scheduler
from .plan import describe_plan, sample_shape
from .processes import Stopped, StopSignal, leave_signals_to_parent, run_folder, setup_process
from .recompute import recompute_blocks
from .resume import find_resume_point, restore, roll_back
from .sharding import gathered, shard
from .tasks import create_task, wrap_task

_logger = logging.getLogger(__name__)


def main(argv: Optional[List[str]] = None, prog: Optional[str] = None) -> Optional[TrainingTask]:
    """Train a model as the command line says; returns the task with the trained model, nothing for a dry run."""
    args = parse_args(argv, prog)
    if args.dry_run is not None:
        try:
            print(describe_plan(args))
        except ValueError as e:
            sys.exit(str(e))
        return None
    args_text = yaml.safe_dump(vars(args), default_flow_style=False)
    device = setup_process(args)
    primary = utils.is_primary(args)
    with run_folder(args) as folder:
        checkpoints = Checkpoints(folder, args.checkpoint_hist, args.eval_metric == 'loss')
        try:
            task = train(args, args_text, device, checkpoints)
        except UsageError as e:
            sys.exit(str(e) if primary else 1)
        except (ClipError, TooManyBadClips) as e:
            sys.exit(f'Training stopped: {e}')
        except (NotFinite, Spiked) as e:
            sys.exit(1 if not primary else (
                f'Training stopped: the {e}. {checkpoints.describe_latest()} A lower --lr, a longer warm-up, '
                f'--clip-grad, or float32 or bfloat16 instead of float16 may help.'))
        except (Stopped, KeyboardInterrupt) as e:
            if primary:
                print(
                    f'Stopped by {e if isinstance(e, Stopped) else "Ctrl-C"}. {checkpoints.describe_latest()} '
                    f'To go on, add --experiment {os.path.basename(folder)} --resume auto.', file=sys.stderr)
            sys.exit(e.exit_code if isinstance(e, Stopped) else 130)
    if args.distributed:
        torch.distributed.destroy_process_group()
    return task


def train(args: argparse.Namespace, args_text: str, device: torch.device, checkpoints: Checkpoints) -> TrainingTask:
    """The whole of a run in its order, in a folder that is its own."""
    primary = utils.is_primary(args)
    resume = find_resume_point(args, checkpoints)

    # the model goes before the data: image size, normalisation and number of classes are its, unless given
    seed_all(args.seed)
    model = build_model(args, device, load_weights=resume is None)
    data_config = resolve_data(args, model)
    model.pretrained_cfg.update(mean=data_config['mean'], std=data_config['std'])  # teachers go by these
    data = create_data(args, data_config, device, resolve_clips(args, model))
    if data.eval is not None:
        leave_signals_to_parent(data.eval)

    if args.activation_budget:
        recompute_blocks(args, model, sample_shape(model, data_config['input_size']))
    task = create_task(args, model, device)
    if args.fsdp:
        shard(args, task)
    with errors_of('--opt', args.opt):
        optimizer = create_optimizer(args, task.get_trainable_module())
    scheduler, stop_epoch = create_scheduler(args, optimizer, data.train.num_updates)
    trainer = Trainer(args, task, optimizer, scheduler, data.train)

    progress = restore(args, trainer, resume)
    eval_model = wrap_task(args, task, device)
    if primary:
        log = RunLog(args, checkpoints.folder, progress.epoch, args_text, data.class_to_idx)
        if resume and resume.same_run:
            checkpoints.continue_from(resume.path, resume.state)
        if args.save_images:
            trainer.picture_folder = checkpoints.folder
    if args.monitor and (primary or args.fsdp):  # of a sharded model all processes have to look at their shards
        trainer.monitor = Monitor(
            trainer.model, os.path.join(checkpoints.folder, 'monitor.csv') if primary else None,
            trainer.num_updates(progress))
    trainer.roll_back = partial(roll_back, args, trainer, checkpoints)

    def save_recovery(progress: Progress) -> None:
        trainer.check_weights(f'epoch {progress.epoch}, batch {progress.batch - 1}')
        if primary or args.fsdp:
            state = dict(trainer.state(progress.epoch), **progress._asdict())
        if primary:
            checkpoints.save_recovery(state)

    def stop_if_asked() -> None:
        if signal := stop.agreed():
            save_recovery(progress)
            raise Stopped(signal)

    _logger.info(f'Epochs {progress.epoch} to {stop_epoch - 1}, {data.train.num_updates} updates each.')
    start = time.perf_counter()
    with StopSignal(args) as stop:
        for epoch in range(progress.epoch, stop_epoch):
            if progress.batch < len(data.train):  # else the run was stopped while it validated
                progress = trainer.train_epoch(progress, stop, save_recovery)
                trainer.check_weights(f'epoch {epoch}')
                sync_batch_norms(args, eval_model)
            train_loss = progress.loss_sum / len(data.train)
            stop_if_asked()

            row, metric = dict(epoch=epoch, train_loss=train_loss), train_loss
            completed = epoch + 1
            if data.eval is not None:
                metric = None
                if completed % args.val_interval == 0 or completed in (stop_epoch, *args.save_epochs):
                    metrics = validate(args, trainer, eval_model, data, stop)
                    stop_if_asked()
                    row.update({f'eval_{name}': value for name, value in metrics.items()})
                    metric = metrics[args.eval_metric]
            row['lr'] = sum(group['lr'] for group in optimizer.param_groups) / len(optimizer.param_groups)
            if scheduler is not None:
                scheduler.step(completed, metric)

            if primary or args.fsdp:
                state = trainer.state(epoch)
            if primary:
                log.add(row)  # before the checkpoint: a row without one is dropped on resuming
                checkpoints.save(state, metric)
                if completed in args.save_epochs:
                    checkpoints.copy_last(f'milestone-{completed}')
            progress = Progress(completed)

    _logger.info(f'Done in {time.perf_counter() - start:.1f} s.')
    if checkpoints.history:
        epoch, metric = checkpoints.history[0]
        _logger.info(f'Best {args.eval_metric} {metric:.4f}, epoch {epoch}: {checkpoints.path("model_best")}')
    return task


def sync_batch_norms(args: argparse.Namespace, model: nn.Module, reduce: bool = True) -> None:
    """Give all processes the same batch norm statistics."""
    if args.distributed and args.dist_bn and not args.sync_bn:
        utils.distribute_bn(model, args.world_size, reduce=reduce and args.dist_bn == 'reduce')


def validate(
        args: argparse.Namespace,
        trainer: Trainer,
        model: nn.Module,
        data: Data,
        stop: StopSignal,
) -> Dict[str, float]:
    """Validate the model, and then, for the metrics to go by, the average of its weights if there is one."""

    def measure(model: nn.Module) -> Dict[str, float]:
        with gathered(model):  # processes may have different numbers of batches
            return measure_whole(model)

    def measure_whole(model: nn.Module) -> Dict[str, float]:
        clips = isinstance(data.eval, ClipLoader)
        batches = show_progress(
            stop.cut(data.eval), len(data.eval), 'Validation', args.log_interval, 'clips' if clips else 'img')
        if clips:
            views = score_views(
                model, batches, trainer.task.device, trainer.autocast, args.validation_batch_size or args.batch_size,
                args.distributed)
            metrics = score_videos(views, data.eval.dataset.reader).metrics()
            return {name: metrics[name] for name in ('loss', 'top1', 'top5', 'missing')}
        return evaluate(
            model, batches, trainer.task.device, trainer.autocast, args.channels_last, data.eval_samples,
            args.distributed)

    metrics = measure(model)
    if args.model_ema and not args.model_ema_force_cpu:
        # of the first process alone: a checkpoint within an epoch has no others to go on from
        sync_batch_norms(args, trainer.task.get_trainable_module(ema=True), reduce=False)
        metrics = measure(trainer.task.get_eval_model(ema=True))
    return metrics


if __name__ == '__main__':
    main()
