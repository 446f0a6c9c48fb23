"""Datasets read from front to back: timm's `wds/` (webdataset shards) and `hfids/` (Hugging Face streaming)."""
import argparse
from typing import Any

from torch.utils.data import IterableDataset

from .arguments import UsageError


def num_readers(args: argparse.Namespace, dataset: Any, training: bool) -> int:
    """Loading processes for a dataset: `--workers`, but in validation no more than a stream has shards.

    Raises:
        UsageError: A process, or one that loads for it, would have no shard, and wait for a sample without end.
    """
    shards = num_shards(getattr(dataset, 'reader', None))
    if shards is None:
        return args.workers
    if args.dataset.startswith('wds') or shards % args.world_size == 0:
        mine = shards // args.world_size
    else:
        mine = shards  # each process reads all of them, and keeps its share of the samples
    if max(1, args.workers if training else 0) > mine:
        raise UsageError(
            f'--workers: got {args.workers} in each of {args.world_size} processes, needs no more than there are '
            f'shards for each, {mine} of the {shards} to {"train" if training else "validate"} on')
    return args.workers if training else min(args.workers, mine)


def num_shards(reader: Any) -> Any:
    """Files that a stream consists of; None if it is no stream, or can be divided in any way."""
    if hasattr(reader, 'split_info'):  # wds
        return len(reader.split_info.filenames)
    if hasattr(reader, 'builder') and hasattr(reader, 'shuffle_size') and not reader.download:  # hfids
        return reader.builder.as_streaming_dataset(split=reader.split).num_shards
    return None


def restart(dataset: Any) -> None:
    """Forget what a stream drew in earlier epochs, where no new loading process does.

    The order of an epoch then depends on the seed and its number alone, so that a resumed run repeats it.
    """
    if isinstance(dataset, IterableDataset) and hasattr(getattr(dataset, 'reader', None), 'ds'):
        dataset.reader.ds = None  # timm's readers make their pipeline when they have none
