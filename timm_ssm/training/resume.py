"""What a run goes on from, and how its state is put back."""
import argparse
import logging
import os
import re
import sys
from typing import Any, Callable, Dict, NamedTuple, Optional, Union

import torch
from timm import utils
from timm.models import clean_state_dict

from .checkpoints import Checkpoints
from .loop import Progress, Trainer

_logger = logging.getLogger(__name__)


class ResumePoint(NamedTuple):
    """A checkpoint to go on from."""
    path: str
    state: Dict[str, Any]
    same_run: bool  # it is of the folder that the run writes to


def decide_once(args: argparse.Namespace, decide: Callable[[], Any]) -> Any:
    """Let the first process decide for all of them; where it exits, all do, and only it says why."""
    result = error = None
    if utils.is_primary(args):
        try:
            result = decide()
        except SystemExit as e:
            error = e
    if args.distributed:
        shared = [result, error is not None]
        torch.distributed.broadcast_object_list(shared)
        result, failed = shared
        if failed and error is None:
            sys.exit(1)
    if error is not None:
        raise error
    return result


def find_resume_point(args: argparse.Namespace, checkpoints: Checkpoints) -> Optional[ResumePoint]:
    """The checkpoint that `--resume` asks for, None for a new run; exits rather than overwrite another run."""

    def find_path() -> Optional[str]:
        latest = checkpoints.latest()
        path = latest if args.resume == 'auto' else args.resume
        goes_on = path and is_of_run(path) and re.match('last|recovery', os.path.basename(path))
        if latest and not goes_on:
            sys.exit(
                f'{checkpoints.folder} holds the checkpoints of another run or of later epochs: go on from its latest '
                f'with --resume auto, or choose another --experiment')
        return path

    def is_of_run(path: str) -> bool:
        return os.path.abspath(os.path.dirname(path)) == os.path.abspath(checkpoints.folder)

    path = decide_once(args, find_path)
    return ResumePoint(path, load_training_state(path), is_of_run(path)) if path else None


def load_training_state(path: str) -> Dict[str, Any]:
    """A checkpoint of our training, or of timm's train.py."""
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


def restore(args: argparse.Namespace, trainer: Trainer, point: Optional[ResumePoint]) -> Progress:
    """Put model, optimiser, schedule and averaged weights where the run starts; returns where that is."""
    state = point.state if point else {}
    progress = restore_state(args, trainer, point) if point else Progress()
    if args.start_epoch is not None:
        progress = Progress(args.start_epoch)
    num_updates = trainer.num_updates(progress)
    if trainer.scheduler is not None and num_updates:
        if progress.epoch:
            trainer.scheduler.step(progress.epoch)
        trainer.scheduler.step_update(num_updates)
    if args.model_ema:
        trainer.task.setup_ema(
            decay=args.model_ema_decay,
            use_warmup=args.model_ema_warmup,
            device='cpu' if args.model_ema_force_cpu else None,
        )
        if 'state_dict_ema' in state:
            trainer.task.load_checkpoint_state(state['state_dict_ema'], state.get('task_state_ema'), ema=True)
    return progress


def restore_state(args: argparse.Namespace, trainer: Trainer, point: ResumePoint) -> Progress:
    """Load model, optimiser and loss scaler; exits if they do not fit."""
    path, state = point.path, point.state
    try:
        trainer.task.load_checkpoint_state(clean_state_dict(state['state_dict']), state.get('task_state'))
        if not args.no_resume_opt:
            trainer.optimizer.load_state_dict(state['optimizer'])
    except (RuntimeError, ValueError) as e:
        sys.exit(f'--resume {path}: the checkpoint does not fit this model and optimiser: {e}')
    scaler = trainer.loss_scaler
    if scaler is not None and scaler.state_dict_key in state and not args.no_resume_opt:
        scaler.load_state_dict(state[scaler.state_dict_key])

    changed = changed_settings(state.get('args') or {}, vars(args))
    if changed:
        _logger.info(f'Resuming with changed settings: {", ".join(changed.values())}')
    if 'batch' not in state:
        return Progress(state['epoch'] + 1)
    fixed = ('seed', 'batch_size', 'world_size', 'workers', 'grad_accum_steps')
    moved = [changed[key] for key in fixed if key in changed]
    if moved:
        sys.exit(
            f'--resume {path}: in the middle of an epoch these must stay as they were: {", ".join(moved)}; '
            f'last.pth.tar, between epochs, can go on with others')
    return Progress(state['epoch'], state['batch'], state['loss_sum'])


def changed_settings(before: Union[argparse.Namespace, Dict[str, Any]], now: Dict[str, Any]) -> Dict[str, str]:
    """Arguments that differ, each with its two values in words, but those that may differ with no effect."""
    before = vars(before) if isinstance(before, argparse.Namespace) else before
    changed = {key: f'{key} {before[key]} -> {now[key]}' for key in before if key in now and before[key] != now[key]}
    for key in ('resume', 'output', 'experiment', 'config', 'rank', 'local_rank', 'device', 'stop_epoch', 'data_dir'):
        changed.pop(key, None)
    return changed
