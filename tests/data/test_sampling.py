"""Frames of clips, against those of the released code of the papers (fixtures/video_sampling.json)."""
import json
import random
from pathlib import Path

import numpy as np
import pytest

from timm_ssm.data.sampling import FrameSampler, long_windows, reorder_frames, window_frames

REFERENCE = json.loads((Path(__file__).parent.parent / 'fixtures/video_sampling.json').read_text())
METHODS = dict(
    sparse='sparse', dense='dense', dense_videomae='dense_videomae', ssv2_video='ssv2', ssv2_frames='ssv2_frames',
    long='sparse')


def cases(section, *modes):
    return [r for r in REFERENCE[section] if r['mode'] in modes]


def sampler_of(section, record, **kwargs):
    return FrameSampler(record['frames'], METHODS[section], rate=record.get('rate', 4), **kwargs)


def window_of(record):
    if 'fps' not in record:
        return {}
    return dict(window=window_frames((record['start_s'], record['end_s']), record['fps'], record['n']))


@pytest.mark.parametrize('section', METHODS)
def test_val_and_test_frames_are_those_of_the_released_code(section):
    records = cases(section, 'val', 'test')
    assert len(records) > 5
    for record in records:
        sampler = sampler_of(section, record, released=True)
        if record['mode'] == 'val':
            frames = sampler.val(record['n'], **window_of(record))
        else:
            frames = sampler.test(record['n'], record['clips'], **window_of(record))
        assert frames.tolist() == record['index'], {k: v for k, v in record.items() if k != 'index'}


class Extremes:
    """In place of `random`: always the least, or always the greatest number."""

    def __init__(self, greatest):
        self.greatest = greatest

    def randint(self, a, b):
        assert a <= b
        return b if self.greatest else a

    def uniform(self, a, b):
        return b if self.greatest else a


@pytest.mark.parametrize('section', [s for s in METHODS if s != 'dense_videomae'])
def test_training_frames_span_those_of_the_released_code(section):
    for record in cases(section, 'train'):
        low, high = ('earliest', 'latest') if 'earliest' in record else ('low', 'high')
        sampler = sampler_of(section, record, released=True)
        for bound, greatest in ((low, False), (high, True)):
            frames = sampler.train(record['n'], rng=Extremes(greatest), **window_of(record))
            assert frames.tolist() == record[bound], {k: record[k] for k in ('n', 'frames')}


@pytest.mark.parametrize('section', ('sparse', 'long'))
def test_sparse_training_frames_repeat_the_released_draws(section):
    for record in cases(section, 'train'):
        frames = sampler_of(section, record).train(record['n'], rng=random.Random(0), **window_of(record))
        assert frames.tolist() == record['python_random_seed0']


@pytest.mark.parametrize('section', METHODS)
def test_what_is_no_mistake_is_the_same_by_default(section):
    for record in cases(section, 'test') + ([] if section == 'dense' else cases(section, 'val')):
        sampler = sampler_of(section, record)
        frames = sampler.val(record['n'], **window_of(record)) if record['mode'] == 'val' \
            else sampler.test(record['n'], record['clips'], **window_of(record))
        assert frames.tolist() == record['index']


@pytest.mark.parametrize('method', ('dense', 'dense_videomae'))
def test_dense_windows_are_strided_inside_the_video_and_reach_its_end(method):
    for n in (64, 65, 100, 301):
        sampler = FrameSampler(16, method, rate=4)
        middle = sampler.val(n)
        assert set(np.diff(middle)) == {4} and abs(middle[0] - (n - 1 - middle[-1] - 3)) <= 1
        assert abs(sampler.test(n, 1)[0][0] - middle[0]) < 4  # VideoMAE's tests start on every 4th frame
        first, last = (sampler.train(n, rng=Extremes(greatest)) for greatest in (False, True))
        assert first[0] == 0 and last[-1] == n - 4  # L = F r frames; the window's last r - 1 are between clips
    starts = {FrameSampler(4, 'dense', rate=1).train(10, rng=random.Random(seed))[0] for seed in range(200)}
    assert starts == set(range(7))


@pytest.mark.parametrize('n', (1, 3, 15, 16, 40, 63))
@pytest.mark.parametrize('method', METHODS.values())
def test_any_length_gives_whole_clips_inside_the_video(method, n):
    sampler = FrameSampler(16, method, rate=4)
    clips = [sampler.train(n, rng=random.Random(seed)) for seed in range(20)]
    for frames in [*clips, sampler.val(n), *sampler.test(n, 1), *sampler.test(n, 3), *sampler.test(n, 10)]:
        assert frames.shape == (16,) and frames.dtype == np.int64
        assert frames.min() >= 0 and frames.max() < n
        assert (np.diff(frames) >= 0).all()


@pytest.mark.parametrize('method', ('dense', 'dense_videomae'))
def test_clip_duration_equals_the_rate_at_a_constant_frame_rate(method):
    times = np.arange(300) / 25
    by_rate, by_time = FrameSampler(16, 'dense', rate=4), FrameSampler(16, method, clip_duration=16 * 4 / 25)
    assert by_time.val(300, times).tolist() == by_rate.val(300).tolist()
    assert by_time.test(300, 3, times).tolist() == by_rate.test(300, 3).tolist()
    assert by_time.train(300, times, rng=Extremes(True)).tolist() == by_rate.train(300, rng=Extremes(True)).tolist()


def test_clip_duration_follows_the_clock_at_a_variable_frame_rate():
    times = np.concatenate([np.arange(0, 2, .01), np.arange(2, 10, .5)])  # 200 frames in 2 s, then 2 a second
    for clip in FrameSampler(8, 'dense', clip_duration=4.).test(len(times), 5, times):
        shown = times[clip]
        wanted = shown[0] + .5 * np.arange(8)
        assert np.abs(shown - wanted).max() < .5  # never earlier than one frame of the slow part
        assert (shown <= wanted + .5).all()
    short = FrameSampler(8, 'dense', clip_duration=20.).val(len(times), times)
    assert short[0] == 0 and short[-1] == len(times) - 1


def test_windows_of_long_videos_are_those_of_the_released_code():
    for record in REFERENCE['long_windows']:
        found = long_windows(record['duration_s'], record['trimmed'], record['stride'])
        assert np.allclose(found, record['windows']), record


def test_orders_of_frames():
    orders = {
        'sequential': [0, 1, 2, 3, 4, 5, 6], 'reversed': [6, 5, 4, 3, 2, 1, 0], 'interleaved': [0, 2, 4, 6, 1, 3, 5],
        'block-2': [6, 4, 5, 2, 3, 0, 1], 'block-10': [0, 1, 2, 3, 4, 5, 6]}
    for order, positions in orders.items():
        assert reorder_frames(7, order).tolist() == positions
    shuffled = [tuple(reorder_frames(7, 'shuffled', seed)) for seed in range(10)]
    assert shuffled[3] == tuple(reorder_frames(7, 'shuffled', 3))
    assert len(set(shuffled)) > 5 and all(sorted(s) == list(range(7)) for s in shuffled)


def test_arguments_of_training_make_the_sampler():
    args = dict(num_frames=8, clip_sampling='dense', sampling_rate=2, clip_duration=None, sampling_compat='released')
    assert FrameSampler.from_args(args) == FrameSampler(8, 'dense', 2, released=True)
    corrected = dict(args, sampling_compat='corrected', clip_duration=3.)
    assert FrameSampler.from_args(corrected) == FrameSampler(8, 'dense', 2, clip_duration=3.)
    assert FrameSampler.from_args(dict(num_frames=8)) == FrameSampler(8, 'sparse')


@pytest.mark.parametrize('kwargs, name', (
    (dict(method='dens'), 'method'),
    (dict(num_frames=0), 'num_frames'),
    (dict(method='dense', rate=0), 'rate'),
    (dict(clip_duration=2.), 'clip_duration'),
    (dict(method='dense', clip_duration=0.), 'clip_duration'),
))
def test_errors_name_the_argument(kwargs, name):
    with pytest.raises(ValueError, match=f'^{name}: got .*, needs '):
        FrameSampler(**{'num_frames': 8, **kwargs})


@pytest.mark.parametrize('order', ('backwards', 'block', 'block-0', 'block-x'))
def test_unknown_orders_are_refused(order):
    with pytest.raises(ValueError, match='^order: got'):
        reorder_frames(8, order)
    with pytest.raises(ValueError, match='^times: got None'):
        FrameSampler(8, 'dense', clip_duration=1.).val(100)
