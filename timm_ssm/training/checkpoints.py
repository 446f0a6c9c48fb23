"""The checkpoint files of a run, each of them whole at any moment."""
import glob
import os
import shutil
from contextlib import contextmanager, suppress
from typing import Any, Dict, List, Optional, Tuple

import torch
from timm import utils


@contextmanager
def atomic_write(path: str, mode: str = 'wb', **kwargs):
    """Open a file that takes the place of `path` when, and only when, all of it is on the disk."""
    with open(f'{path}.tmp', mode, **kwargs) as f:
        yield f
        f.flush()
        os.fsync(f.fileno())
    os.replace(f'{path}.tmp', path)


class Checkpoints:
    """The checkpoints of a run, under timm's names: last, model_best, the best few epochs, milestones, one recovery.

    timm's CheckpointSaver deletes a file before it moves the next one there. Here each file appears with one atomic
    rename: a kill or a full disk at any moment leaves whole files, and at least what there was before.

    Args:
        folder: Folder of the run.
        max_history: Number of epochs to keep.
        decreasing: A lower metric is better.
    """

    def __init__(self, folder: str, max_history: int, decreasing: bool):
        self.folder = folder
        self.max_history = max(1, max_history)
        self.decreasing = decreasing
        self.history: List[Tuple[int, float]] = []  # epoch and metric, best first

    def path(self, name: str) -> str:
        return os.path.join(self.folder, f'{name}.pth.tar')

    def latest(self) -> Optional[str]:
        """The file to go on from. A recovery is newer than last: it goes when its epoch is complete."""
        recoveries = sorted(glob.glob(self.path('recovery-*')), key=utils.natural_key)
        return next((path for path in [*recoveries[::-1], self.path('last')] if os.path.exists(path)), None)

    def continue_from(self, path: str, state: Dict[str, Any]) -> None:
        """Go on with the run that wrote this checkpoint."""
        self.history = [tuple(entry) for entry in state.get('history', [])]
        if os.path.basename(path) == 'last.pth.tar':
            self.finish_save(state['epoch'])

    def write(self, name: str, state: Dict[str, Any]) -> None:
        with atomic_write(self.path(name)) as f:
            torch.save(dict(state, history=self.history), f)

    def save(self, state: Dict[str, Any], metric: Optional[float]) -> None:
        """Save the end of an epoch; `metric` ranks it, None leaves it out of the ranking."""
        worse = []
        if metric is not None:
            ranked = [*self.history, (state['epoch'], metric)]
            ranked.sort(key=lambda entry: entry[1], reverse=not self.decreasing)  # stable: of equals, the first
            self.history, worse = ranked[:self.max_history], ranked[self.max_history:]
        self.write('last', dict(state, metric=metric))
        self.finish_save(state['epoch'])
        for epoch, _ in worse:
            with suppress(FileNotFoundError):
                os.remove(self.path(f'checkpoint-{epoch}'))

    def finish_save(self, epoch: int) -> None:
        """Copy `last` to the other names due to its epoch and delete older recoveries; on resuming, after a kill."""
        if epoch in dict(self.history):
            self.copy_last(f'checkpoint-{epoch}')
        if self.history and self.history[0][0] == epoch:
            self.copy_last('model_best')
        for path in glob.glob(self.path('recovery-*')):
            if int(os.path.basename(path).split('-')[1]) <= epoch:
                os.remove(path)

    def copy_last(self, name: str) -> None:
        source, path = self.path('last'), self.path(name)
        if os.path.exists(path) and os.path.samefile(source, path):
            return
        with suppress(FileNotFoundError):
            os.remove(f'{path}.tmp')
        try:
            os.link(source, f'{path}.tmp')
        except OSError:  # no hard links on this file system
            shutil.copyfile(source, f'{path}.tmp')
        os.replace(f'{path}.tmp', path)

    def save_recovery(self, state: Dict[str, Any]) -> None:
        """Save a state within an epoch, after `state['batch']` batches."""
        name = f'recovery-{state["epoch"]}-{state["batch"]}'
        self.write(name, state)
        for path in set(glob.glob(self.path('recovery-*'))) - {self.path(name)}:
            os.remove(path)
