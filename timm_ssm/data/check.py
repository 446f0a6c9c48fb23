"""Find unreadable videos before training does."""
import csv
import os
from typing import Iterator, List, Sequence, Tuple

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from .decode import ClipError
from .readers import ClipReader


class _Reasons(Dataset):
    """What is wrong with each video, '' for nothing."""

    def __init__(self, reader: ClipReader):
        self.reader = reader

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, row: int) -> str:
        try:
            video = self.reader.open(row)
            video.read(range(video.num_frames), each=_corner)
        except ClipError as e:
            return str(e)
        return ''


def _corner(frame: torch.Tensor) -> torch.Tensor:
    return frame[:, :1, :1].clone()  # nothing else of the frame is kept


def check_videos(reader: ClipReader, workers: int = 0) -> List[str]:
    """Decode every frame of every video: for each row what is wrong with it, '' for nothing."""
    loader = DataLoader(_Reasons(reader), batch_size=None, num_workers=workers)
    return list(tqdm(loader, unit='video', disable=None, leave=False))


def write_lists(reader: ClipReader, reasons: Sequence[str], good: str, bad: str) -> None:
    """Write the rows that can be read to one list, and the others, with the reasons, to another."""
    for path, lines in ((good, _lines(reader, reasons, False)), (bad, _lines(reader, reasons, True))):
        with open(path, 'w', newline='') as f:
            csv.writer(f, delimiter=reader.separator, lineterminator='\n').writerows(lines)


def _lines(reader: ClipReader, reasons: Sequence[str], bad: bool) -> Iterator[List[str]]:
    for row, reason in enumerate(reasons):
        if bool(reason) == bad:
            yield [*reader.columns(row), *([reason] if bad else [])]


def list_names(source: str) -> Tuple[str, str]:
    """Names for the lists of good and bad videos of a list or folder."""
    stem, suffix = os.path.splitext(source.rstrip('/')) if os.path.isfile(source) else (source.rstrip('/'), '.csv')
    return f'{stem}.good{suffix}', f'{stem}.bad{suffix}'
