"""The loop over training batches."""
import argparse
import logging
import math
import os
import statistics
from contextlib import nullcontext
from functools import partial
from typing import Any, Callable, Dict, List, NamedTuple, Optional

import torch
from timm import utils
from timm.task import TrainingTask
from torchvision.utils import save_image

from .data import TrainBatches
from .log import EpochLog
from .monitor import Monitor, Spiked, SpikeDetector
from .optim import create_autocast, create_loss_scaler, plateau_state
from .processes import Stopped, StopSignal
from .sharding import load_whole_model, local, whole_state
from .sizes import create_loss_scale

_logger = logging.getLogger(__name__)


class Progress(NamedTuple):
    """Position in an epoch: batches done, and the sum of their losses."""
    epoch: int = 0
    batch: int = 0
    loss_sum: float = 0.


class NotFinite(Exception):
    """Training met a loss or a weight that is infinite or not a number."""


class Trainer:
    """The training loop, and all the state that it changes; the scheduler may be None."""

    def __init__(
            self,
            args: argparse.Namespace,
            task: TrainingTask,
            optimizer: torch.optim.Optimizer,
            scheduler: Any,
            batches: TrainBatches,
    ):
        self.args = args
        self.task = task
        self.model = task.get_trainable_module()  # not wrapped for compilation or several processes
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.batches = batches
        self.autocast = create_autocast(args)
        self.loss_scaler = create_loss_scaler(args)
        self.loss_scale = create_loss_scale(args)
        self.monitor: Optional[Monitor] = None  # of the first process
        self.picture_folder: Optional[str] = None  # of the first process, for --save-images
        self.watching = False  # the monitor is to see the next step
        self.spikes = SpikeDetector(args.spike_threshold) if args.on_spike else None
        self.spiked = False  # in the batches of the next step
        self.roll_back: Callable[[], None] = lambda: None
        self.clip_parameters = partial(task.get_clip_parameters, exclude_head=args.clip_mode == 'agc')

    def num_updates(self, progress: Progress) -> int:
        return progress.epoch * self.batches.num_updates + math.ceil(progress.batch / self.args.grad_accum_steps)

    def train_epoch(self, start: Progress, stop: StopSignal, save_recovery: Callable[[Progress], None]) -> Progress:
        """Train from a position to the end of its epoch, which is returned.

        A recovery is saved every `--recovery-interval` updates, and before ending where `stop` asks for that.

        Raises:
            NotFinite: A loss is infinite or not a number.
            Spiked: A loss is a spike, and the run is to end then, or had too many.
            Stopped: Ended before, and saved a recovery.
        """
        args, task, optimizer = self.args, self.task, self.optimizer
        accum, num_batches, loss_sum = args.grad_accum_steps, len(self.batches), start.loss_sum
        num_updates = self.num_updates(start)
        losses: List[torch.Tensor] = []  # not yet read from the device
        task.train()
        optimizer.zero_grad()
        with EpochLog(args, start.epoch, num_batches, start.batch) as log:
            for i, input, target in log.wait_for(self.batches.epoch(start.epoch, start.batch)):
                done = i + 1
                update = done % accum == 0 or done == num_batches
                # the last update of an epoch may have fewer batches
                self.watching = args.monitor and update and (num_updates + 1) % args.monitor_interval == 0
                with nullcontext() if update else task.no_sync():
                    losses.append(self.backward(input, target, min(accum, num_batches - i // accum * accum)))
                if update:
                    self.step()
                    num_updates += 1
                    optimizer.zero_grad()
                    task.update_ema(step=num_updates)
                    if self.scheduler is not None:
                        self.scheduler.step_update(num_updates=num_updates)
                log.count(len(input) * args.world_size)

                within = update and done < num_batches
                stopped = within and stop.agreed()
                recover = stopped or (within and args.recovery_interval and num_updates % args.recovery_interval == 0)
                logged = done % args.log_interval == 0 or done == num_batches
                if logged or recover or self.watching:
                    # only here does the loop wait for the device
                    values = self.read_losses(losses, start.epoch, done)
                    losses.clear()
                    for value in values:
                        loss_sum += value
                    lr = optimizer.param_groups[-1]['lr']
                    if logged or recover:
                        log.show(done, f'loss {values[-1]:.4f} ({loss_sum / done:.4f})  lr {lr:.3e}')
                    if logged and self.picture_folder is not None:
                        save_picture(input, os.path.join(self.picture_folder, f'train-batch-{i}.jpg'))
                    if self.monitor is not None:
                        self.monitor.see_losses(values)
                        if self.watching:
                            self.monitor.record(start.epoch, num_updates, values[-1], lr, input, self.autocast)
                if recover:
                    save_recovery(Progress(start.epoch, done, loss_sum))
                if stopped:
                    raise Stopped(stopped)
        if hasattr(optimizer, 'sync_lookahead'):
            optimizer.sync_lookahead()
        return Progress(start.epoch, num_batches, loss_sum)

    def backward(self, input: torch.Tensor, target: torch.Tensor, accumulated: int) -> torch.Tensor:
        """The loss of a batch and its gradient, one of `accumulated` for an optimiser step."""
        with self.autocast():
            loss = self.task(input, target)['loss']
        if self.spikes is not None and self.is_spike(loss):
            # the step is not taken, see `step`; for the mean of the epoch it is as if the batch had a usual loss
            return loss.detach().new_tensor(statistics.median(self.spikes.losses))
        create_graph = getattr(self.optimizer, 'is_second_order', False)
        accumulated /= self.loss_scale(len(input))
        self.loss_scaler.scale(loss / accumulated).backward(create_graph=create_graph)
        return loss.detach()

    def is_spike(self, loss: torch.Tensor) -> bool:
        """Whether the loss, averaged over processes, is a spike."""
        loss = loss.detach()
        value = float(utils.reduce_tensor(loss, self.args.world_size) if self.args.distributed else loss)
        if not self.spikes.is_spike(value):
            return False
        self.spiked = True
        _logger.warning(f'Spike {self.spikes.count}: a loss of {value:.4g} after {self.spikes.losses[-1]:.4g}')
        if self.args.on_spike == 'stop' or self.spikes.count > self.args.max_spikes:
            raise Spiked(
                f'loss of {value:.4g} is spike {self.spikes.count}'
                + ('' if self.args.on_spike == 'stop' else f' of the {self.args.max_spikes} that --max-spikes allows'))
        return True

    def step(self) -> None:
        """Take an optimiser step, unless a batch of it was a spike."""
        if self.spiked:
            self.spiked = False
            if self.args.on_spike == 'rollback':
                self.roll_back()
            return
        args = self.args
        self.loss_scaler.unscale_(self.optimizer)
        watching = self.watching and self.monitor is not None
        if watching:
            self.monitor.before_step()
        if args.clip_grad is not None:
            utils.dispatch_clip_grad(self.clip_parameters(), args.clip_grad, mode=args.clip_mode)
        self.loss_scaler.step(self.optimizer)
        self.loss_scaler.update()
        if watching:
            self.monitor.after_step()

    def read_losses(self, losses: List[torch.Tensor], epoch: int, done: int) -> List[float]:
        """The values of the latest losses, averaged over processes."""
        values = torch.stack(losses)
        if self.args.distributed:
            values = utils.reduce_tensor(values, self.args.world_size)
        for batch, value in enumerate(values.tolist(), done - len(losses)):
            if not math.isfinite(value):
                raise NotFinite(
                    f'loss is {value} at epoch {epoch}, batch {batch} of {len(self.batches)} '
                    f'(update {epoch * self.batches.num_updates + batch // self.args.grad_accum_steps})')
        return values.tolist()

    def check_weights(self, when: str) -> None:
        finite = torch.stack([local(p).isfinite().all() for p in self.model.parameters()]).all()
        if self.args.fsdp:
            finite = utils.reduce_tensor(finite.float(), self.args.world_size) == 1
        if not finite:
            raise NotFinite(f'weights are not finite after {when}')

    def state(self, epoch: int) -> Dict[str, Any]:
        """What a checkpoint holds, under timm's names. Of a sharded model the first process gets it; all must ask."""
        args = self.args
        state = dict(
            epoch=epoch, arch=args.model, args=vars(args), version=2,
            **(dict(amp_scaler=self.loss_scaler.state_dict()) if self.loss_scaler.is_enabled() else {}),
            **(dict(plateau=plateau_state(self.scheduler)) if args.sched == 'plateau' else {}),
            **({} if self.spikes is None else dict(spikes=self.spikes.state_dict())))
        if args.fsdp:
            state.update(whole_state(self.task, self.optimizer))
        else:
            state.update(
                optimizer=self.optimizer.state_dict(),
                **self.task.get_checkpoint_state(), **self.task.get_checkpoint_state(ema=True))
        for key in ('state_dict', 'state_dict_ema'):  # safetensors takes no channels-last tensors
            if key in state:
                state[key] = {name: t.contiguous() for name, t in state[key].items()}
        return state

    def load_weights(self, state_dict: Dict[str, Any], task_state: Optional[Dict[str, Any]], ema: bool = False) -> None:
        """Load the model, or the average of its weights."""
        if self.args.fsdp:
            load_whole_model(self.task, state_dict, ema)
        else:
            self.task.load_checkpoint_state(state_dict, task_state, ema=ema)


def save_picture(input: torch.Tensor, path: str) -> None:
    """Save a batch of images side by side, or of clips (B, C, T, H, W) as rows of frames."""
    if input.ndim == 5:
        save_image(input.transpose(1, 2).flatten(0, 1).float(), path, nrow=input.shape[2], padding=0, normalize=True)
    else:
        save_image(input.float(), path, padding=0, normalize=True)
