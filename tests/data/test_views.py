"""Accuracy from the scores of views, as the released code merges them (fixtures/video_eval.json) and as ours does."""
import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from timm_ssm.data import ClipReader, score_videos, score_views
from timm_ssm.data.views import ViewScores, average_views, base_name, top_hits

MERGE = json.loads((Path(__file__).parent.parent / 'fixtures/video_eval.json').read_text())['merge']


class Named(ClipReader):
    """Videos of which only names and labels are needed."""

    def open(self, row):
        raise NotImplementedError


@pytest.mark.parametrize('case', MERGE)
@pytest.mark.parametrize('by', ('authors', 'per_file'))
def test_merging_as_the_released_code_and_by_file(case, by):
    records = sorted(case['records'], key=lambda r: r['rank'])  # rank 0 is read first; the sort is stable
    keys = [r['name'] if by == 'authors' else r['file'] for r in records]
    views = [3 * r['clip'] + r['crop'] for r in records]
    scores = torch.tensor([r['logits'] for r in records]).softmax(-1).numpy()
    found, means = average_views(keys, views, scores)
    label_of = dict(zip(keys, (r['label'] for r in records)))
    hits = top_hits(means, np.array([label_of[key] for key in found]))
    assert len(found) == case[by]['items']
    assert [100 * h / len(found) for h in hits] == [case[by]['top1'], case[by]['top5']]


def scores_of(classes, *best):
    """Softmax scores (len(best), classes) with 0.5 for one class each."""
    scores = np.full((len(best), classes), .5 / (classes - 1))
    scores[np.arange(len(best)), best] = .5
    return scores


def test_unreadable_videos_count_as_wrong_and_are_reported():
    reader = Named(['a/x.mp4', 'b/x.mp4', 'c/y.mp4'], [0, 1, 6])
    found = ViewScores(np.array([0, 0, 2, 2]), np.array([0, 1, 0, 1]), scores_of(8, 0, 0, 6, 5))
    videos = score_videos(found, reader)
    assert videos.read.tolist() == [True, False, True]
    assert videos.view_hits.tolist() == [[2, 2, 2], [1, 1, 2]]
    m = videos.metrics()
    assert (m['videos'], m['missing']) == (3, 1)
    # the two views of the last video disagree: the first class of the best is the answer, 5
    assert m['top1'] == pytest.approx(100 / 3) and m['top1_read'] == 50.
    assert m['top5'] == pytest.approx(200 / 3) and m['top5_read'] == 100.
    assert m['view_top1'] == [100., 50.] and m['view_top5'] == [100., 50.]
    assert m['loss'] == pytest.approx(-np.log([.5, (.5 + .5 / 7) / 2]).mean())


def test_videos_of_one_name_stay_apart_unless_asked_for():
    reader = Named(['a/x.1.mp4', 'b/x.avi', 'c/y.mp4'], [0, 1, 1])
    found = ViewScores(np.array([0, 1, 2]), np.zeros(3, dtype=int), scores_of(3, 0, 1, 1))
    assert score_videos(found, reader).metrics()['videos'] == 3
    assert score_videos(found, reader).metrics()['top1'] == 100.
    merged = score_videos(found, reader, by_name=True)
    assert merged.names == ['x', 'y'] and merged.labels.tolist() == [1, 1]
    assert merged.metrics()['top1'] == 50.  # x has the view of the first and the label of the last
    assert base_name('some/folder/v_1.part.mp4') == 'v_1'


def test_each_view_counts_once_whatever_process_scored_it():
    reader = Named(['a', 'b'], [0, 1])
    found = ViewScores(np.array([1, 0, 1, 0]), np.array([0, 0, 0, 1]), scores_of(3, 1, 0, 1, 2))
    videos = score_videos(found, reader)
    assert np.allclose(videos.scores[1], scores_of(3, 1)[0])
    assert np.allclose(videos.scores[0], scores_of(3, 0, 2).mean(0))
    assert videos.view_hits.tolist() == [[2, 2, 2], [0, 1, 1]]


def test_model_is_run_on_all_views_in_small_batches():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.sizes = []

        def forward(self, x):
            self.sizes.append(len(x))
            return x.mean((2, 3, 4)).bfloat16()

    clips = torch.randn(7, 3, 2, 4, 4)
    tags = torch.tensor([[i, 0, int(i != 5)] for i in range(7)])
    model = Model().train()
    found = score_views(model, [(clips[:5], tags[:5]), (clips[5:], tags[5:])], torch.device('cpu'), batch_size=2)
    assert model.sizes == [2, 2, 1, 2] and not model.training
    assert found.rows.tolist() == [0, 1, 2, 3, 4, 6] and found.scores.dtype == np.float32
    expected = clips.mean((2, 3, 4)).bfloat16().float().softmax(-1)[found.rows]
    assert np.allclose(found.scores, expected.numpy())


@pytest.mark.parametrize('suffix', ('csv', 'npz'))
def test_scores_can_be_ensembled(tmp_path, suffix):
    reader = Named(['a', 'b', 'c'], [0, 1, 2])
    runs = []
    for best in ((0, 1, 0), (1, 1, 2)):
        found = ViewScores(np.arange(2), np.zeros(2, dtype=int), scores_of(3, *best[:2]))
        path = str(tmp_path / f'{len(runs)}.{suffix}')
        score_videos(found, reader).save(path)
        if suffix == 'npz':
            with np.load(path) as file:
                assert file['names'].tolist() == ['a', 'b', 'c'] and file['read'].tolist() == [True, True, False]
                runs.append((file['scores'], file['labels']))
        else:
            with open(path, newline='') as file:
                rows = list(csv.reader(file))
            assert rows[0] == ['name', 'label', 'read', '0', '1', '2']
            assert [row[:3] for row in rows[1:]] == [['a', '0', '1'], ['b', '1', '1'], ['c', '2', '0']]
            runs.append((np.array(rows[1:])[:, 3:].astype(float), np.array(rows[1:])[:, 1].astype(int)))
    (first, labels), (second, _) = runs
    assert labels.tolist() == [0, 1, 2]
    assert np.allclose((first + second)[:2] / 2, [[.375, .375, .25], [.25, .5, .25]])


def test_nothing_readable_is_an_error():
    found = ViewScores(np.zeros(0, dtype=int), np.zeros(0, dtype=int), np.zeros((0, 4), dtype=np.float32))
    with pytest.raises(ValueError, match='none of 2 videos can be read'):
        score_videos(found, Named(['a', 'b'], [0, 1])).metrics()
