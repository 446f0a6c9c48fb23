"""timm's own scripts with the models of this package, where TIMM_SOURCE is a checkout of timm.

    TIMM_SOURCE=/path/to/pytorch-image-models pytest -m slow tests/training/test_stock_timm.py
"""
import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from timm.task import ClassificationTask

from timm_ssm import __main__ as launcher
from timm_ssm._compat import mend_device_ids

from .utils import ROOT, torchrun

TIMM = Path(os.environ.get('TIMM_SOURCE', 'nowhere'))
ISOTROPIC = ['img_size=32', 'embed_dim=16', 'depth=2']
FAMILIES = {
    'videomamba_tiny_patch16_224': ISOTROPIC,
    'videomambapro_tiny_patch16_224': ISOTROPIC,
    'stablemamba_tiny_patch16_224': ISOTROPIC,
    'vim_tiny_patch16_224': ISOTROPIC,
    'mambavision_tiny': ['embed_dim=16', 'stem_dim=8', 'depths=(1,1,2,2)'],
    'groupmamba_tiny': ['embed_dims=(16,16,16,16)', 'depths=(1,1,1,1)'],
    'stable_groupmamba_small': ['embed_dims=(16,16,16,16)', 'depths=(1,1,1,1)'],
    'vmamba_tiny': ['embed_dims=(16,16,16,16)', 'depths=(1,1,1,1)'],
    'spatialmamba_tiny': ['embed_dim=16', 'depths=(1,1,1,1)'],
}
# timm's benchmark.py makes its inputs as large as the model's own, frames included; its datasets are of images alone
CLIPS = {
    'videomamba_tiny_patch16_f8_224': ['embed_dim=16', 'depth=1'],
    'videomambapro_tiny_patch16_f16_224': ['embed_dim=16', 'depth=1'],
    'stablemamba_tiny_patch16_f16_224': ['embed_dim=16', 'depth=1'],
    'stvideomamba_small_patch16_f16_224': ['embed_dim=16', 'depth=1'],
}
stock = [
    pytest.mark.slow,
    pytest.mark.skipif(not (TIMM / 'train.py').exists(), reason='TIMM_SOURCE: a checkout of timm')]


def of_timm(*names):
    def marked(function):
        for mark in (*stock, pytest.mark.parametrize('name', names)):
            function = mark(function)
        return function
    return marked


def flags(name):
    return ['--model', name, '--model-kwargs', *{**FAMILIES, **CLIPS}[name], '--device', 'cpu']


def small(name):
    size = ['--input-size', '3', '32', '32', '--num-classes', '10']
    return [*flags(name), *size, '--batch-size', '16', '--workers', '0']


def launch(monkeypatch, *line):
    """`python -m timm_ssm` in this process."""
    monkeypatch.setattr(sys, 'argv', ['timm_ssm', *map(str, line)])
    monkeypatch.setattr(sys, 'path', [str(TIMM), *sys.path])
    launcher.main()


@of_timm(*FAMILIES)
def test_train_and_validate(digits, tmp_path, monkeypatch, name):
    launch(monkeypatch, TIMM / 'train.py', digits, *small(name), '--epochs', 1, '--output', tmp_path,
           '--experiment', 'run', '--opt', 'adamw', '--lr', '1e-3', '--warmup-epochs', 0, '--no-prefetcher')
    launch(monkeypatch, TIMM / 'validate.py', digits, *small(name), '--split', 'validation', '--no-prefetcher',
           '--checkpoint', tmp_path / 'run' / 'last.pth.tar', '--results-file', tmp_path / 'results.csv')
    with open(tmp_path / 'results.csv', newline='') as f:
        result = float(next(csv.DictReader(f))['top1'])
    with open(tmp_path / 'run' / 'summary.csv', newline='') as f:
        assert float(next(csv.DictReader(f))['eval_top1']) == pytest.approx(result, abs=2.5)  # an image


@of_timm(*FAMILIES, *CLIPS)
def test_benchmark(tmp_path, monkeypatch, name):
    size = [] if name in CLIPS else ['--input-size', 3, 32, 32]
    launch(monkeypatch, TIMM / 'benchmark.py', *flags(name), *size, '--bench', 'both', '--batch-size', 2,
           '--num-bench-iter', 10, '--num-warm-iter', 1, '--results-file', tmp_path / 'results.csv')
    with open(tmp_path / 'results.csv', newline='') as f:
        row = next(csv.DictReader(f))
    assert float(row['infer_samples_per_sec']) > 0 and float(row['train_samples_per_sec']) > 0


@of_timm(*FAMILIES)
def test_two_processes(digits, tmp_path, name):
    """They train together; validate.py and benchmark.py do all of their work in each."""
    def output_of(script, *line):
        return subprocess.run(
            [*torchrun(), '-m', 'timm_ssm', str(TIMM / script), *map(str, line)],
            env={**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}, check=True, timeout=500,
            stdout=subprocess.PIPE, text=True).stdout

    output_of('train.py', digits, *small(name), '--epochs', 1, '--output', tmp_path, '--experiment', 'run',
              '--no-prefetcher')
    checkpoint = tmp_path / 'run' / 'last.pth.tar'
    assert torch.load(checkpoint, weights_only=False)['arch'] == name
    out = output_of('validate.py', digits, *small(name), '--split', 'validation', '--no-prefetcher',
                    '--checkpoint', checkpoint)
    one, other = re.findall(r'"top1": ([\d.]+)', out)
    assert one == other
    out = output_of('benchmark.py', *flags(name), '--input-size', 3, 32, 32, '--bench', 'both', '--batch-size', 2,
                    '--num-bench-iter', 10, '--num-warm-iter', 1)
    rates = re.findall(r'"(?:infer|train)_samples_per_sec": ([\d.]+)', out)
    assert len(rates) == 4 and all(float(rate) > 0 for rate in rates)


@pytest.mark.parametrize('devices', [None, [torch.device('cpu')]])
def test_several_processes_on_cpus(devices, monkeypatch):
    """timm's train.py names the CPU to DDP, which takes GPUs only."""
    for kind in vars(timm.task).values():  # undone after the test
        if isinstance(kind, type) and 'prepare_distributed' in vars(kind):
            monkeypatch.setattr(kind, 'prepare_distributed', kind.prepare_distributed)
    mend_device_ids()
    torch.distributed.init_process_group('gloo', store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        task = ClassificationTask(torch.nn.Linear(2, 2), criterion=torch.nn.CrossEntropyLoss(), verbose=False)
        task.prepare_distributed(device_ids=devices)
        assert isinstance(task.get_trainable_module(), torch.nn.parallel.DistributedDataParallel)
    finally:
        torch.distributed.destroy_process_group()
