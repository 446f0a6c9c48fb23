"""Statistics of a run, spikes, and the page of curves."""
import csv
import math
import re
import time
from contextlib import nullcontext

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.task import ClassificationTask

from timm_ssm import cli
from timm_ssm.layers.mixer import scan_mixers
from timm_ssm.training.monitor import Monitor, SpikeDetector, scan_statistics

from .utils import BUSY, SGD, VIDEOMAMBA, assert_same_run, load, run, summary

SMALL = dict(embed_dim=16, depth=2, patch_size=4, img_size=8, in_chans=1, num_classes=10)


def rows(folder):
    with open(folder / 'monitor.csv', newline='') as f:
        return list(csv.DictReader(f))


def states_by_hand(s):
    """h_t = exp(dt A) h_{t-1} + dt B u, token by token."""
    dt = F.softplus(s.delta + s.delta_bias)
    length = dt.shape[1]
    h, found = 0, []
    for t in reversed(range(length)) if s.reverse else range(length):
        h = h * (dt[:, t, :, None] * s.A).exp() + (dt * s.u)[:, t, :, None] * s.B[:, t, None]
        found.append(h)
    return torch.stack(found)


@torch.no_grad()
def test_statistics_of_scans():
    torch.manual_seed(0)
    model = timm.create_model('videomamba_tiny_patch16_224', **SMALL)
    mixer = next(iter(scan_mixers(model).values()))
    mixer.dt_proj.bias.uniform_(-3, 1)
    for s in mixer.project(torch.randn(1, 6, 16)):
        found = scan_statistics(s)
        dt = F.softplus(s.delta + s.delta_bias)
        decay = (dt[..., None] * s.A).exp()
        expected = dict(dt_min=dt.min(), dt_max=dt.max(), decay_min=decay.min(), decay_max=decay.max(),
                        state_max=states_by_hand(s).abs().max())
        for key, value in expected.items():
            assert torch.allclose(found[key], value, rtol=1e-5), key


@pytest.mark.parametrize('name', ['groupmamba_tiny', 'mambavision_tiny', 'stablemamba_tiny_patch16_224', 'resnet18'])
def test_families(name, tmp_path):
    kwargs = dict(
        groupmamba_tiny=dict(embed_dims=(16, 16, 16, 16), depths=(1, 1, 1, 1)),
        mambavision_tiny=dict(embed_dim=16, stem_dim=8),
        stablemamba_tiny_patch16_224=dict(img_size=32, depth=2)).get(name, {})
    model = timm.create_model(name, num_classes=4, **kwargs).train()
    monitor = Monitor(model, str(tmp_path / 'monitor.csv'), 0)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    monitor.record(0, 1, 1., .1, torch.randn(2, 3, 32, 32), nullcontext)
    (row,) = rows(tmp_path)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and model.training
    seen = {key.rpartition('.')[2] for key, value in row.items() if '.' in key and value}
    assert name == 'resnet18' or {'activation', 'dt_min', 'dt_max', 'decay_min', 'decay_max', 'state_max'} <= seen


def test_rows_of_a_run(digits, tmp_path):
    """By hand: without momentum and decay a step is the learning rate times the gradient, clipped."""
    flags = [*VIDEOMAMBA, *SGD, '--lr', '0.5', '--epochs', 2]
    plain = run(digits, tmp_path / 'a', *flags, '--clip-grad', '0.01')
    folder = run(digits, tmp_path / 'b', *flags, '--clip-grad', '0.01', '--monitor', '--monitor-interval', 4)
    assert_same_run(plain, folder)
    found = rows(folder)
    assert [row['update'] for row in found] == ['4', '8', '12', '16', '20']
    weights = load(folder / 'last.pth.tar')['state_dict']
    row = {key: float(value) for key, value in found[-1].items()}
    norms = [row[f'blocks.{i}.grad_norm'] for i in range(2)]
    assert row['grad_norm'] > math.hypot(*norms) > 0.01 and row['lr'] == 0.5
    for i in range(2):
        size = torch.cat([v.flatten() for k, v in weights.items() if k.startswith(f'blocks.{i}.')]).norm()
        step = 0.5 * norms[i] * 0.01 / (row['grad_norm'] + 1e-6)
        assert row[f'blocks.{i}.update_ratio'] == pytest.approx(step / float(size), rel=1e-2)
        assert row[f'blocks.{i}.activation'] > 0 and row[f'blocks.{i}.mixer.state_max'] > 0


def test_rows_go_on_where_a_run_does(digits, tmp_path):
    flags = [*BUSY, *VIDEOMAMBA, '--epochs', 2, '--monitor', '--monitor-interval', 5, '--resume', 'auto']
    run(digits, tmp_path, *flags, '--stop-epoch', 1)
    before = (tmp_path / 'run' / 'monitor.csv').read_text()
    with open(tmp_path / 'run' / 'monitor.csv', 'a') as f:
        f.write('1,15' + ',' * (before.splitlines()[0].count(',') - 1) + '\n')  # of steps that are taken again
    folder = run(digits, tmp_path, *flags)
    assert [row['update'] for row in rows(folder)] == ['5', '10', '15', '20']
    assert (folder / 'monitor.csv').read_text().startswith(before)


class TestSpikes:

    def test_detector(self):
        detector = SpikeDetector(8.)
        assert not any(detector.is_spike(x) for x in [1000., *[2. - .01 * i for i in range(30)], 1.9, 1.5])
        assert detector.is_spike(4.) and detector.is_spike(float('nan')) and not detector.is_spike(1.6)
        assert detector.count == 2
        other = SpikeDetector(8.)
        other.load_state_dict(detector.state_dict())
        assert other.score(3.) == detector.score(3.) > 8

    def bad_batch(self, monkeypatch, *numbers, factor=1000.):
        """Training steps, counted from 1, whose loss and gradient are far too large."""
        forward, calls = ClassificationTask.forward, []

        def spiking(task, input, target):
            calls.append(1)
            result = forward(task, input, target)
            return dict(result, loss=result['loss'] * factor) if len(calls) in numbers else result

        monkeypatch.setattr(ClassificationTask, 'forward', spiking)

    FLAGS = [*SGD, '--momentum', '0.5', '--lr', '0.02', '--epochs', 4]

    @pytest.mark.parametrize('factor', [1000., float('nan')])
    def test_skip(self, digits, tmp_path, monkeypatch, factor):
        """The step is left out, and the run goes on: as without the batch."""
        plain = summary(run(digits, tmp_path / 'a', *self.FLAGS))
        self.bad_batch(monkeypatch, 25, factor=factor)
        folder = run(digits, tmp_path / 'b', *self.FLAGS, '--on-spike', 'skip')
        losses = [float(row['train_loss']) for row in summary(folder)]
        assert losses == pytest.approx([float(row['train_loss']) for row in plain], abs=0.1)
        assert load(folder / 'last.pth.tar')['spikes']['count'] == 1

    def test_rollback(self, digits, tmp_path, monkeypatch, caplog):
        before = load(run(digits, tmp_path / 'a', *self.FLAGS, '--stop-epoch', 2) / 'last.pth.tar')
        self.bad_batch(monkeypatch, 30)  # the last of the third epoch
        folder = run(digits, tmp_path / 'b', *self.FLAGS, '--on-spike', 'rollback', '--stop-epoch', 3)
        after = load(folder / 'last.pth.tar')
        assert all(torch.equal(v, before['state_dict'][k]) for k, v in after['state_dict'].items())
        momenta = [[s['momentum_buffer'] for s in state['optimizer']['state'].values()] for state in (before, after)]
        assert momenta[0] and all(torch.equal(a, b) for a, b in zip(*momenta))
        assert 'Back to' in caplog.text and after['epoch'] == 2

    def test_resumes_bit_for_bit(self, digits, tmp_path, monkeypatch):
        flags = [*BUSY, '--epochs', 4, '--on-spike', 'skip', '--spike-threshold', 3, '--resume', 'auto']
        whole = run(digits, tmp_path / 'a', *flags)
        run(digits, tmp_path / 'b', *flags, '--stop-epoch', 3)
        assert_same_run(whole, run(digits, tmp_path / 'b', *flags))

    def test_stop(self, digits, tmp_path, monkeypatch):
        self.bad_batch(monkeypatch, 25)
        with pytest.raises(SystemExit, match=r'Training stopped: the loss of .* is spike 1\. The last good .*last.pth'):
            run(digits, tmp_path, *self.FLAGS, '--on-spike', 'stop')

    def test_bound(self, digits, tmp_path, monkeypatch):
        self.bad_batch(monkeypatch, 25, 27)
        with pytest.raises(SystemExit, match='is spike 2 of the 1 that --max-spikes allows'):
            run(digits, tmp_path, *self.FLAGS, '--on-spike', 'skip', '--max-spikes', 1)

    def test_nothing_to_roll_back_to(self, digits, tmp_path, monkeypatch):
        self.bad_batch(monkeypatch, 25)
        with pytest.raises(SystemExit, match='before there is a checkpoint'):
            run(digits, tmp_path, *self.FLAGS, '--batch-size', 4, '--on-spike', 'rollback')


def test_plot(digits, tmp_path, capsys):
    folders = [
        run(digits, tmp_path / name, *VIDEOMAMBA, '--epochs', 2, '--monitor', '--monitor-interval', 4) for name in 'ab']
    assert cli.main(['plot', *map(str, folders), '--output', str(tmp_path / 'plot.html')]) == 0
    page = (tmp_path / 'plot.html').read_text()
    titles = re.findall(r'>([^<]*, by (?:epoch|update))</text>', page)
    assert {'train_loss, by epoch', 'largest state of each mixer, by update'} <= set(titles)
    assert len(titles) == len(set(titles)) == page.count('id="axes_')
    curves = [len(axes.split('stroke-opacity')) for axes in page.split('id="axes_')]
    assert all(f'>{folder}</text>' in page for folder in folders) and max(curves) > 2  # several blocks in a chart
    assert cli.main(['plot', str(tmp_path)]) == 1 and 'has no summary.csv' in capsys.readouterr().err


@pytest.mark.slow
def test_cost(tmp_path):
    """Of a step at an interval of 50, in turns."""
    torch.manual_seed(0)
    model = timm.create_model('videomamba_tiny_patch16_224', img_size=112, depth=6).train()
    optimizer = torch.optim.AdamW(model.parameters())
    monitor = Monitor(model, str(tmp_path / 'monitor.csv'), 0)
    x = torch.randn(8, 3, 112, 112)

    def step(watching):
        start = time.perf_counter()
        model(x).square().mean().backward()
        if watching:
            monitor.before_step()
        optimizer.step()
        if watching:
            monitor.after_step()
            monitor.record(0, 1, 1., .1, x, nullcontext)
        optimizer.zero_grad()
        return time.perf_counter() - start

    step(True), step(False)
    plain, watched = (sorted(times)[5] for times in zip(*((step(False), step(True)) for _ in range(11))))
    print(f'a step takes {plain:.3f} s, a watched one {watched:.3f} s')
    assert (watched - plain) / 50 < 0.03 * plain
