"""Accuracy on videos, from the scores of all their views."""
import csv
import os
from contextlib import nullcontext
from typing import Any, Callable, Dict, Iterable, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import torch
from torch import nn

from .readers import ClipReader


class ViewScores(NamedTuple):
    """Softmax scores of the views that could be read."""
    rows: np.ndarray  # (M,)
    views: np.ndarray  # (M,) number of the view within its video
    scores: np.ndarray  # (M, classes)


def score_views(
        model: nn.Module,
        loader: Iterable,
        device: torch.device,
        autocast: Callable = nullcontext,
        batch_size: Optional[int] = None,
        distributed: bool = False,
) -> ViewScores:
    """Run a model on views.

    Args:
        model: Returns logits (batch, num_classes); left in eval mode.
        loader: Yields views and their tags, as a ClipLoader of EvalClips.
        device: Where the model is.
        autocast: Makes the context to run the model in.
        batch_size: Views to run at once; all that the loader gives if None.
        distributed: Gather what all processes of the default group have.
    """
    model.eval()
    tags, scores = [], []
    with torch.inference_mode():
        for input, tag in loader:
            for views in input.to(device).split(batch_size or len(input)):
                with autocast():
                    output = model(views)
                scores.append(output.float().softmax(-1).cpu())
            tags.append(tag.cpu())
    tags, scores = torch.cat(tags).numpy(), torch.cat(scores).numpy()
    there = tags[:, 2] == 1
    found = ViewScores(tags[there, 0], tags[there, 1], scores[there])
    if distributed:
        parts: List[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(parts, found)
        found = ViewScores(*(np.concatenate(arrays) for arrays in zip(*parts)))
    return found


def average_views(keys: Sequence[Any], views: Sequence[int], scores: np.ndarray) -> Tuple[List[Any], np.ndarray]:
    """Keys, in the order in which they come first, and mean scores (keys, classes) of the views that have each.

    Of a view that is there twice under a key, only the first counts.

    Args:
        keys: What each view belongs to.
        views: Number of each within that.
        scores: Of each (M, classes).
    """
    first: Dict[Tuple[Any, int], int] = {}
    for i, view in enumerate(zip(keys, views)):
        first.setdefault(view, i)
    members: Dict[Any, List[int]] = {}
    for (key, _), i in first.items():
        members.setdefault(key, []).append(i)
    means = [scores[i].mean(0, dtype=np.float64) for i in members.values()]
    return list(members), np.array(means).reshape(len(means), scores.shape[-1])


def base_name(name: str) -> str:
    """What the released code takes for the name of a video: no folder, and nothing from the first dot on."""
    return os.path.basename(name).split('.')[0]


class VideoScores(NamedTuple):
    """Scores of videos: means over their views."""
    names: List[str]
    labels: np.ndarray  # (N,)
    scores: np.ndarray  # (N, classes), zeros where a video could not be read
    read: np.ndarray  # (N,) bool
    view_hits: np.ndarray  # (V, 3): of each view the hits of top-1 and top-5, and the videos that have it

    def metrics(self) -> Dict[str, Any]:
        """`top1` and `top5` in percent of all videos, `top1_read` and `top5_read` of those read, the mean `loss` of
        these, the numbers of `videos` and of those `missing`, and lists of the accuracy of each view."""
        N, read = len(self.labels), self.read
        if not read.any():
            raise ValueError(f'none of {N} videos can be read')
        scores, labels = self.scores[read], self.labels[read]
        hits = top_hits(scores, labels)
        share = self.view_hits[:, :2] / np.maximum(self.view_hits[:, 2:], 1)
        return dict(
            loss=float(-np.log(np.maximum(scores[np.arange(len(labels)), labels], 1e-30)).mean()),
            top1=100 * hits[0] / N, top5=100 * hits[1] / N,
            top1_read=100 * hits[0] / len(labels), top5_read=100 * hits[1] / len(labels),
            videos=N, missing=int(N - read.sum()),
            view_top1=(100 * share[:, 0]).tolist(), view_top5=(100 * share[:, 1]).tolist())

    def save(self, path: str) -> None:
        """Write the scores, as arrays to an .npz file, or else as CSV."""
        if path.endswith('.npz'):
            np.savez(path, names=self.names, labels=self.labels, scores=self.scores, read=self.read)
            return
        with open(path, 'w', newline='') as f:
            writer = csv.writer(f)
            writer.writerow(['name', 'label', 'read', *range(self.scores.shape[1])])
            for name, label, read, scores in zip(self.names, self.labels, self.read, self.scores):
                writer.writerow([name, label, int(read), *(f'{s:.7g}' for s in scores)])


def top_hits(scores: np.ndarray, labels: np.ndarray) -> Tuple[int, int]:
    """How many labels are the best, and among the five best, by their scores (N, classes)."""
    best = np.argsort(-scores, axis=1, kind='stable')[:, :5] == labels[:, None]
    return int(best[:, 0].sum()), int(best.sum())


def score_videos(found: ViewScores, reader: ClipReader, by_name: bool = False) -> VideoScores:
    """Average the views of each video.

    Args:
        found: Scores of the views.
        reader: The videos.
        by_name: As the released code does, merge videos of one base name into one, whose label is that of the last, and
            leave out those that cannot be read.
    """
    order = np.lexsort((found.views, found.rows))  # whatever process a row was scored by
    rows, views, scores = (x[order] for x in found)
    labels = np.array([reader.label(row) for row in range(len(reader))])
    distinct = np.unique(np.stack([rows, views]), axis=1, return_index=True)[1]
    hits = []
    for view in np.unique(views):
        at = distinct[views[distinct] == view]
        hits.append((*top_hits(scores[at], labels[rows[at]]), len(at)))

    if by_name:
        names = [base_name(reader.name(row)) for row in rows]
        found_names, means = average_views(names, views, scores)
        label_of = dict(zip(names, labels[rows]))
        return VideoScores(
            found_names, np.array([label_of[name] for name in found_names]), means, np.ones(len(means), dtype=bool),
            np.array(hits).reshape(-1, 3))
    found_rows, means = average_views(rows.tolist(), views, scores)
    all_scores, read = np.zeros((len(reader), scores.shape[1])), np.zeros(len(reader), dtype=bool)
    all_scores[found_rows], read[found_rows] = means, True
    names = [reader.name(row) for row in range(len(reader))]
    return VideoScores(names, labels, all_scores, read, np.array(hits).reshape(-1, 3))
