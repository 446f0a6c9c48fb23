"""Training on shards of webdataset and on streams of Hugging Face, from front to back."""
import io
import json
import tarfile

import pytest
from timm.task import ClassificationTask

from .utils import BUSY, assert_same_run, crash_at_step, run

SHARDS = 5  # and loading processes, more than a small machine has cores


@pytest.fixture(scope='module')
def shards(digits, tmp_path_factory):
    """The digits as five shards to train on and one to validate on, of each kind."""
    datasets = pytest.importorskip('datasets')
    pytest.importorskip('webdataset')
    root = tmp_path_factory.mktemp('shards')
    splits = {}
    for split, count in (('train', SHARDS), ('validation', 1)):
        files = sorted((digits / split).glob('*/*.png'), key=lambda path: path.name)
        samples = [(path, int(path.parent.name[-1])) for path in files]
        names = []
        for i in range(count):
            part = samples[i::count]
            names.append(f'{split}-{i:05d}-of-{count:05d}.tar')
            with tarfile.open(root / names[-1], 'w') as tar:
                for n, (path, label) in enumerate(part):
                    for suffix, content in (('png', path.read_bytes()), ('cls', str(label).encode())):
                        info = tarfile.TarInfo(f'{i}{n:04d}.{suffix}')
                        info.size = len(content)
                        tar.addfile(info, io.BytesIO(content))
            table = datasets.Dataset.from_dict(
                dict(image=[str(path) for path, _ in part], label=[label for _, label in part]),
                features=datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(10)))
            table.to_parquet(root / 'hf' / 'data' / f'{split}-{i:05d}-of-{count:05d}.parquet')
        splits[split] = dict(
            name=split, filenames=names, num_samples=len(samples),
            shard_lengths=[len(samples[i::count]) for i in range(count)])
    (root / '_info.json').write_text(json.dumps(dict(splits=splits)))
    return root


def stream(shards, kind):
    flags = ['--dataset', 'wds/digits'] if kind == 'wds' else [
        '--dataset', f'hfids/{shards}/hf', '--train-num-samples', 160, '--val-num-samples', 41]
    return flags


@pytest.mark.parametrize('kind, workers', [
    ('wds', SHARDS), *(pytest.param(*case, marks=pytest.mark.slow) for case in (('wds', 0), ('hfids', 0), ('hfids', 5)))
])
def test_resume(shards, tmp_path, monkeypatch, kind, workers):
    """A run goes on bit for bit, with loading processes, more than two cores serve at once, or without."""
    flags = [*stream(shards, kind), *BUSY, '--workers', workers, '--epochs', 2, '--recovery-interval', 1,
             '--resume', 'auto']
    whole = run(shards, tmp_path / 'a', *flags)
    seen, forward = [], ClassificationTask.forward

    def counting(self, input, target):
        seen.append(len(input))
        return forward(self, input, target)

    monkeypatch.setattr(ClassificationTask, 'forward', counting)
    with monkeypatch.context() as crash:
        crash_at_step(crash, 13)
        with pytest.raises(RuntimeError, match='power cut'):
            run(shards, tmp_path / 'b', *flags)
    done = len(seen)
    assert_same_run(whole, run(shards, tmp_path / 'b', *flags))
    assert len(seen) == 2 * 10 and done == 12  # each batch once


@pytest.mark.parametrize('kind', ['wds', 'hfids'])
def test_more_readers_than_shards(shards, tmp_path, kind):
    with pytest.raises(SystemExit, match='--workers: got 6 in each of 1 processes, .*5 of the 5 to train on'):
        run(shards, tmp_path, *stream(shards, kind), '--workers', SHARDS + 1)
