"""Which checkpoint a run resumes from, and restoring its state."""
import argparse
import logging
import os
import re
import sys
from functools import partial
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Union

import torch
from timm.models import clean_state_dict

from ..models._checkpoints import CheckpointError, read_file
from .arguments import UsageError, errors_of
from .checkpoints import Checkpoints
from .loop import Progress, Trainer
from .monitor import Spiked
from .optim import load_plateau_state
from .processes import decide_once
from .sharding import load_whole_optimizer

_logger = logging.getLogger(__name__)


class ResumePoint(NamedTuple):
    """A checkpoint to resume from."""
    path: str
    state: Dict[str, Any]
    same_run: bool  # it is of the folder that the run writes to


def find_resume_point(args: argparse.Namespace, checkpoints: Checkpoints) -> Optional[ResumePoint]:
    """The checkpoint that `--resume` asks for, None for a new run; exits rather than overwrite another run."""

    def find_path() -> Optional[str]:
        candidates = checkpoints.candidates()
        if args.resume == 'auto':
            return first_intact(candidates)
        if candidates and not (is_of_run(args.resume) and re.match('last|recovery', os.path.basename(args.resume))):
            sys.exit(
                f'{checkpoints.folder} holds the checkpoints of another run or of later epochs: go on from its latest '
                f'with --resume auto, or choose another --experiment')
        return args.resume

    def is_of_run(path: str) -> bool:
        return os.path.abspath(os.path.dirname(path)) == os.path.abspath(checkpoints.folder)

    path = decide_once(args, find_path)
    if not path:
        return None
    with errors_of('--resume', path):
        return ResumePoint(path, read_training_state(path), is_of_run(path))


def first_intact(paths: List[str]) -> Optional[str]:
    """The first of these checkpoints that can be read; warns of those that cannot, and exits if none can."""
    errors = []
    for path in paths:
        try:
            read_training_state(path)
        except CheckpointError as e:
            _logger.warning(f'--resume auto: {e}')
            errors.append(os.path.basename(path))
        else:
            if errors:
                _logger.warning(f'--resume auto: going on from {path} instead')
            return path
    if errors:
        sys.exit(f'--resume auto: {", ".join(errors)} cannot be read; start anew with another --experiment')
    return None


def read_training_state(path: str) -> Dict[str, Any]:
    """A checkpoint of our training, or of timm's train.py; a CheckpointError where it is damaged, or no such one."""
    state = read_file(path)
    if 'state_dict' not in state or 'optimizer' not in state:
        raise CheckpointError(f'{path}: no optimiser state in it; to start from weights use --initial-checkpoint')
    return state


def restore(args: argparse.Namespace, trainer: Trainer, point: Optional[ResumePoint]) -> Progress:
    """Restore model, optimiser, schedule and averaged weights; returns where the run starts."""
    state = point.state if point else {}
    progress = restore_state(args, trainer, point) if point else Progress()
    if args.start_epoch is not None:
        progress = Progress(args.start_epoch)
    num_updates = trainer.num_updates(progress)
    if trainer.scheduler is not None and num_updates:
        if progress.epoch:
            trainer.scheduler.step(progress.epoch)
        trainer.scheduler.step_update(num_updates)
        if args.sched == 'plateau' and 'plateau' in state:
            load_plateau_state(trainer.scheduler, state['plateau'])
    return progress


def restore_state(args: argparse.Namespace, trainer: Trainer, point: ResumePoint) -> Progress:
    """Load model, optimiser and loss scaler; a UsageError if they do not fit, or settings that must stay changed."""
    path, state = point.path, point.state
    changed = changed_settings(state.get('args') or {}, vars(args))
    report_changes(args, point, changed)
    try:
        load_training_state(trainer, state, with_optimizer=not args.no_resume_opt)
    except (RuntimeError, ValueError) as e:
        raise UsageError(f'--resume {path}: the checkpoint does not fit this model and optimiser: {e}') from e
    if trainer.spikes is not None and 'spikes' in state:
        trainer.spikes.load_state_dict(state['spikes'])
    if 'batch' not in state:
        return Progress(state['epoch'] + 1)
    return Progress(state['epoch'], state['batch'], state['loss_sum'])


def roll_back(args: argparse.Namespace, trainer: Trainer, checkpoints: Checkpoints) -> None:
    """Put model and optimiser back to the latest checkpoint of the run; its data and schedule go on.

    Raises:
        Spiked: There is none yet.
    """
    path = decide_once(args, checkpoints.latest)
    if path is None:
        raise Spiked('loss has a spike before there is a checkpoint to go back to')
    load_training_state(trainer, read_training_state(path))
    _logger.warning(f'Back to {path}')


def load_training_state(trainer: Trainer, state: Dict[str, Any], with_optimizer: bool = True) -> None:
    """Load model, averaged weights, optimiser and loss scaler. An average that starts now starts with the model."""
    trainer.load_weights(clean_state_dict(state['state_dict']), state.get('task_state'))
    if trainer.task.has_ema() and 'state_dict_ema' in state:
        trainer.load_weights(state['state_dict_ema'], state.get('task_state_ema'), ema=True)
    elif trainer.task.has_ema():
        trainer.task.get_trainable_module(ema=True).set(trainer.model)
    if with_optimizer:
        load = partial(load_whole_optimizer, trainer.model, trainer.optimizer) if trainer.args.fsdp else None
        load_optimizer(trainer.optimizer, state['optimizer'], load)
        if trainer.loss_scaler.is_enabled() and 'amp_scaler' in state:
            trainer.loss_scaler.load_state_dict(state['amp_scaler'])


def load_optimizer(
        optimizer: torch.optim.Optimizer,
        state_dict: Dict[str, Any],
        load: Optional[Callable[[Dict[str, Any]], None]] = None,
) -> None:
    """Load an optimiser's moments; learning rates, decay and other settings stay those it was created with."""
    settings = [
        {k: v for k, v in group.items() if k != 'params' and not k.endswith('step')}  # some count steps in groups
        for group in optimizer.param_groups]
    (load or optimizer.load_state_dict)(state_dict)
    for group, setting in zip(optimizer.param_groups, settings):
        group.update(setting)


def changed_settings(before: Union[argparse.Namespace, Dict[str, Any]], now: Dict[str, Any]) -> Dict[str, str]:
    """Arguments that differ, each with its two values in words."""
    before = vars(before) if isinstance(before, argparse.Namespace) else before
    changed = {key: f'{key} {before[key]} -> {now[key]}' for key in before if key in now and before[key] != now[key]}
    for key in ('resume', 'output', 'experiment', 'config', 'rank', 'local_rank', 'device', 'stop_epoch', 'data_dir'):
        changed.pop(key, None)
    return changed


def report_changes(args: argparse.Namespace, point: ResumePoint, changed: Dict[str, str]) -> None:
    """Log the settings that changed since the checkpoint; a UsageError for those that have to stay."""

    def pick(*keys: str) -> str:
        return ', '.join(changed[key] for key in keys if key in changed)

    if not args.no_resume_opt and (moved := pick('opt', 'opt_kwargs')):
        raise UsageError(
            f"--resume {point.path}: the optimiser's state fits no other one ({moved}); --no-resume-opt starts it anew")
    if 'batch' in point.state and (moved := pick(
            'seed', 'batch_size', 'world_size', 'workers', 'grad_accum_steps', 'train_img_sizes', 'train_batch_sizes',
            'train_size_probs', 'train_size_schedule', 'train_batches_per_epoch')):
        raise UsageError(
            f'--resume {point.path}: in the middle of an epoch these must stay as they were: {moved}; last.pth.tar, '
            f'between epochs, can go on with others')
    start_only = ('pretrained', 'pretrained_path', 'initial_checkpoint', 'head_init_scale', 'head_init_bias')
    if unused := pick(*start_only):
        _logger.warning(f'Without effect on a resumed run: {unused}')
    if used := pick(*(key for key in changed if key not in start_only)):
        _logger.info(f'Resuming with changed settings: {used}')
