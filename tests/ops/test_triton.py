"""What `test_kernels.py` does not reach with small shapes: cuts of long sequences, and the variant of the GPU."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from timm_ssm.ops import bidirectional_selective_scan, selective_scan
from timm_ssm.ops.backends import BACKENDS
from timm_ssm.ops.naive import selective_scan_naive

from .test_kernels import both_directions
from .utils import grads, pairs, relative_error, scan_inputs, too_old_to_interpret

pytest.importorskip('triton')
if BACKENDS['triton'].why_unavailable():
    pytest.skip(BACKENDS['triton'].why_unavailable(), allow_module_level=True)

from timm_ssm.ops.backends.triton import backward, common, forward

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'


def check(fn, reference, inputs, tolerance, **form):
    out, got = grads(fn, inputs, backend='triton', **form)
    inputs = {k: tuple(x.double().cpu() for x in v) if isinstance(v, tuple) else v.double().cpu()
              for k, v in inputs.items()}
    want_out, want = grads(reference, inputs, **form)
    assert relative_error(out.cpu(), want_out) <= tolerance
    for name, g in got.items():
        assert relative_error(g.cpu(), want[name]) <= 4 * tolerance, name


@pytest.mark.skipif(bool(too_old_to_interpret()), reason=too_old_to_interpret())
@pytest.mark.parametrize('form', [dict(), dict(residual=True, mask_diagonal=True)], ids=str)
def test_split(monkeypatch, form):
    """A sequence in stretches of tokens that meet, as long ones at small batch are cut."""
    def cut(call, directions=1):
        return common.plan(call, directions)._replace(splits=3, span=32)

    for module in (forward, backward):
        monkeypatch.setattr(module, 'plan', cut)
    first, second = (scan_inputs(batch=1, length=2 * 32 + 5, channels=3, d_state=2, device=DEVICE, seed=seed)
                     for seed in (0, 1))
    check(bidirectional_selective_scan, both_directions, pairs(first, second), 2e-5, **form)


@pytest.mark.parametrize('length', [4 * 32 * 2 + 9, 1000])
def test_stretches_are_whole_chunks(monkeypatch, length):
    call = call_of(scan_inputs(batch=1, length=length, channels=3))
    monkeypatch.setattr(common, 'processors', lambda device: 1 << 20)
    p = common.plan(call)
    assert p.splits > 1 and p.span % 32 == 0 and (p.splits - 1) * p.span < length <= p.splits * p.span
    monkeypatch.setattr(common, 'processors', lambda device: 1)
    assert common.plan(call_of(scan_inputs(batch=16, length=length, channels=3))).splits == 1


def call_of(inputs):
    from timm_ssm.ops.calls import ScanCall
    one = {k: [v] for k, v in inputs.items() if k != 'z'}
    return ScanCall(**one, z=inputs['z'], delta_softplus=True, reverse=[False], residual=False, mask_diagonal=[False])


@pytest.mark.skipif(bool(too_old_to_interpret()), reason=too_old_to_interpret())
@pytest.mark.skipif(DEVICE == 'cuda', reason='the GPU runs this variant everywhere')
@pytest.mark.parametrize('reduce', ['sum', 'tf32'])
@pytest.mark.parametrize('channels', [5, 70])
def test_gpu_variant(monkeypatch, reduce, channels):
    """One state at a time, channels summed as a product with ones."""
    monkeypatch.setattr(backward, 'tuning', lambda x, n_pow2: dict(AT_ONCE=1, REDUCE=reduce))
    if channels > 64:  # blocks of 64 channels
        monkeypatch.setattr(common, 'processors', lambda device: 0)
    inputs = scan_inputs(batch=1, length=11, channels=channels, d_state=3)
    check(selective_scan, selective_scan_naive, inputs, 2e-5, residual=True, mask_diagonal=True)


def test_refuses_many_states():
    with pytest.raises(RuntimeError, match='up to 64 states, the call has 65'):
        selective_scan(**scan_inputs(d_state=65, device=DEVICE), backend='triton')


def test_triton_is_imported_late():
    """Neither triton nor CUDA is touched by the import of the package or by a call that something else serves."""
    code = (
        'import sys, torch, timm_ssm.ops as o\n'
        'x = torch.ones(1, 2, 3)\n'
        'o.selective_scan(x, x, -torch.ones(3, 1), x[..., :1], x[..., :1], backend="naive")\n'
        'assert "timm_ssm.ops.backends.triton.forward" not in sys.modules and not torch.cuda.is_initialized()\n')
    subprocess.run([sys.executable, '-c', code], check=True)


@pytest.mark.slow
@pytest.mark.parametrize('target', ['cuda:90', 'hip:gfx942'])
@pytest.mark.parametrize('dtype', ['bfloat16', 'float32', 'float64'])
def test_compiles_without_a_gpu(target, dtype):
    """The interpreter takes programs that the compiler does not."""
    script = Path(__file__).resolve().parents[2] / 'benchmarks' / 'inspect_triton.py'
    env = {**os.environ, 'PYTHONPATH': str(script.parents[1])}
    out = subprocess.run(
        [sys.executable, script, '--target', target, '--dtype', dtype], check=True, capture_output=True, text=True,
        env=env)
    assert 'backward, both directions: _scan_backward' in out.stdout
