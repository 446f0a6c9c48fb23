"""Logging of a run: lines, progress bars, summary.csv and Weights & Biases."""
import argparse
import csv
import logging
import os
import sys
import time
from typing import Any, Dict, Iterable, Iterator, List, TextIO

from timm import utils
from tqdm import tqdm

from .checkpoints import atomic_write

_logger = logging.getLogger(__name__)


def setup_logging(primary: bool = True) -> None:
    """Plain lines; of several processes only the first one informs, all warn."""
    logging.basicConfig(format='%(message)s')
    logging.root.setLevel(logging.INFO if primary else logging.WARNING)
    logging.getLogger('httpx').setLevel(logging.WARNING)  # the Hub's client


def show_progress(batches: Iterable, num_batches: int, title: str, log_interval: int, unit: str = 'img') -> Iterator:
    """Yield batches, with a progress bar on a terminal and a line every `log_interval` batches elsewhere."""
    if sys.stderr.isatty():
        yield from tqdm(batches, total=num_batches, desc=title, leave=False, unit='batch')
        return
    images, start = 0, time.perf_counter()
    for i, batch in enumerate(batches, 1):
        yield batch
        images += len(batch[1])
        if i % log_interval == 0 or i == num_batches:
            _logger.info(f'{title} [{i:>4d}/{num_batches}]  {images / (time.perf_counter() - start):.1f} {unit}/s')


class EpochLog:
    """Progress within a training epoch: a bar on a terminal, a line now and then elsewhere."""

    def __init__(self, args: argparse.Namespace, epoch: int, num_batches: int, start: int):
        self.epoch = epoch
        self.num_batches = num_batches
        self.bar = tqdm(
            total=num_batches, initial=start, desc=f'Epoch {epoch}', unit='batch', leave=False,
            disable=not (utils.is_primary(args) and sys.stderr.isatty()))
        self.unit = 'img' if args.num_frames in (None, 1) else 'clips'
        self.images = 0
        self.waited = 0.  # seconds that the loop had no batch
        self.start = time.perf_counter()

    def __enter__(self) -> 'EpochLog':
        return self

    def __exit__(self, *error) -> None:
        self.bar.close()

    def wait_for(self, batches: Iterable) -> Iterator:
        """Yield batches, measuring the time spent waiting for them."""
        iterator = iter(batches)
        while True:
            start = time.perf_counter()
            batch = next(iterator, None)
            self.waited += time.perf_counter() - start
            if batch is None:
                return
            yield batch

    def count(self, images: int) -> None:
        self.images += images
        self.bar.update()

    def show(self, done: int, text: str) -> None:
        seconds = time.perf_counter() - self.start
        waiting = f'data {self.waited / seconds:.0%}'  # where this is much, the device waits for data
        self.bar.set_postfix_str(f'{text}  {waiting}')
        if self.bar.disable:
            speed = f'{self.images / seconds:.1f} {self.unit}/s'
            _logger.info(f'Epoch {self.epoch} [{done:>4d}/{self.num_batches}]  {text}  {speed}  {waiting}')


def write_rows(file: TextIO, rows: List[Dict[str, Any]]) -> None:
    """Write a table as CSV, with all the columns that any row has."""
    writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
    writer.writeheader()
    writer.writerows(rows)


class RunLog:
    """The record of a run: args.yaml, classes.txt, a row for each epoch in summary.csv and to Weights & Biases.

    `args_text` are the arguments as the user gave them. Rows from `start_epoch` on, which a resumed run is going to
    repeat, are dropped.
    """

    def __init__(
            self,
            args: argparse.Namespace,
            folder: str,
            start_epoch: int,
            args_text: str,
            class_to_idx: Dict[str, int],
    ):
        os.makedirs(folder, exist_ok=True)
        with atomic_write(os.path.join(folder, 'args.yaml'), 'w') as f:
            f.write(args_text)
        if class_to_idx:
            with atomic_write(os.path.join(folder, 'classes.txt'), 'w') as f:
                f.write('\n'.join(sorted(class_to_idx, key=class_to_idx.get)) + '\n')
        self.summary = os.path.join(folder, 'summary.csv')
        self.rows: List[Dict[str, Any]] = []
        if start_epoch and os.path.exists(self.summary):
            with open(self.summary, newline='') as f:
                self.rows = [row for row in csv.DictReader(f) if int(row['epoch']) < start_epoch]
        self.wandb = None
        if args.log_wandb:
            import wandb
            wandb.init(
                project=args.wandb_project, name=os.path.basename(folder), config=vars(args), tags=args.wandb_tags,
                **(dict(id=args.wandb_resume_id, resume='must') if args.wandb_resume_id else {}))
            self.wandb = wandb

    def add(self, row: Dict[str, Any]) -> None:
        self.rows.append(row)
        with atomic_write(self.summary, 'w', newline='') as f:
            write_rows(f, self.rows)
        if self.wandb is not None:
            self.wandb.log(row)
        _logger.info('  '.join(f'{k} {v:.6g}' for k, v in row.items()))
