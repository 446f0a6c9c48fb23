"""The checkpoint files of a run, each of them whole at any moment."""
import glob
import os
import shutil
import uuid
from contextlib import contextmanager, suppress
from typing import Any, Dict, Iterator, List, Optional, Tuple

import torch
from timm import utils


@contextmanager
def replacing(path: str) -> Iterator[str]:
    """The name of a temporary file that takes the place of `path` if all goes well, and is deleted if not."""
    temporary = f'{path}.{uuid.uuid4().hex}.tmp'
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.remove(temporary)
        raise


@contextmanager
def atomic_write(path: str, mode: str = 'wb', **kwargs):
    """Open a file that takes the place of `path` when, and only when, all of it is on the disk."""
    with replacing(path) as temporary, open(temporary, mode, **kwargs) as f:
        yield f
        f.flush()
        os.fsync(f.fileno())


class Checkpoints:
    """The checkpoints of a run, under timm's names: last, model_best, the best few epochs, milestones, one recovery.

    timm's CheckpointSaver deletes a file before it moves the next one there. Here each file appears with one atomic
    rename: a kill or a full disk at any moment leaves whole files, and at least what there was before. The metric that
    ranks epochs may be `decreasing`: better where it is lower.
    """

    def __init__(self, folder: str, max_history: int, decreasing: bool):
        self.folder = folder
        self.max_history = max(1, max_history)
        self.decreasing = decreasing
        self.history: List[Tuple[int, float]] = []  # epoch and metric, best first

    def path(self, name: str) -> str:
        return os.path.join(self.folder, f'{name}.pth.tar')

    def find(self, pattern: str) -> List[str]:
        """Checkpoints whose name fits a pattern, latest epoch first."""
        return sorted(glob.glob(f'{glob.escape(self.folder)}/{pattern}.pth.tar'), key=utils.natural_key, reverse=True)

    def candidates(self) -> List[str]:
        """The files to resume from, newest first. A recovery is newer than last: it goes when its epoch is complete."""
        return self.find('recovery-*') + self.find('last') + self.find('checkpoint-*')

    def latest(self) -> Optional[str]:
        return next(iter(self.candidates()), None)

    def describe_latest(self) -> str:
        latest = self.latest()
        return f'The last good checkpoint is {latest}.' if latest else 'There is no checkpoint yet.'

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
        for path in self.find('recovery-*'):
            if int(os.path.basename(path).split('-')[1]) <= epoch:
                os.remove(path)

    def copy_last(self, name: str) -> None:
        source, path = self.path('last'), self.path(name)
        if os.path.exists(path) and os.path.samefile(source, path):
            return
        with replacing(path) as temporary:
            try:
                os.link(source, temporary)
            except OSError:  # no hard links on this file system
                shutil.copyfile(source, temporary)

    def save_recovery(self, state: Dict[str, Any]) -> None:
        """Save a state within an epoch, after `state['batch']` batches."""
        name = f'recovery-{state["epoch"]}-{state["batch"]}'
        self.write(name, state)
        for path in set(self.find('recovery-*')) - {self.path(name)}:
            os.remove(path)
