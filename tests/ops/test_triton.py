"""What `test_kernels.py` does not reach with small shapes: cuts of long sequences, and the variant of the GPU."""
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from timm_ssm.ops import bidirectional_selective_scan, selective_scan
from timm_ssm.ops.backends import BACKENDS
from timm_ssm.ops.calls import ConvCall
from timm_ssm.ops.naive import selective_scan_naive

from .test_kernels import both_directions
from .utils import grads, pairs, relative_error, scan_inputs, too_old_to_interpret

pytest.importorskip('triton')
if BACKENDS['triton'].why_unavailable():
    pytest.skip(BACKENDS['triton'].why_unavailable(), allow_module_level=True)

from timm_ssm.ops.backends.triton import backward, common, conv, forward

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
def test_segments(monkeypatch, form):
    """A sequence in segments of tokens that meet, as long ones at small batch are cut."""
    def cut(call, directions=1):
        return common.plan(call, directions)._replace(segments=3, segment_size=32)

    for module in (forward, backward):
        monkeypatch.setattr(module, 'plan', cut)
    first, second = (scan_inputs(batch=1, length=2 * 32 + 5, channels=3, d_state=2, device=DEVICE, seed=seed)
                     for seed in (0, 1))
    check(bidirectional_selective_scan, both_directions, pairs(first, second), 2e-5, **form)


@pytest.mark.parametrize('length', [4 * 32 * 2 + 9, 1000])
def test_segments_are_whole_chunks(monkeypatch, length):
    call = call_of(scan_inputs(batch=1, length=length, channels=3))
    monkeypatch.setattr(common, 'processors', lambda device: 1 << 20)
    p = common.plan(call)
    assert p.segments > 1 and p.segment_size % 32 == 0
    assert (p.segments - 1) * p.segment_size < length <= p.segments * p.segment_size
    monkeypatch.setattr(common, 'processors', lambda device: 1)
    assert common.plan(call_of(scan_inputs(batch=16, length=length, channels=3))).segments == 1


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


def tf32(x):
    """float32 rounded to the 11 significant bits of TF32, to the nearest."""
    return ((x.astype(np.float32).view(np.uint32) + 0x1000) & 0xffffe000).view(np.float32)


@pytest.mark.skipif(bool(too_old_to_interpret()), reason=too_old_to_interpret())
@pytest.mark.parametrize('reduce, bound', [('tf32', 2 ** -11), ('tf32x3', 1e-6)])
def test_error_of_tensor_cores(monkeypatch, reduce, bound):
    """dB and dC as sums over channels of terms in TF32: their error is what the docstring and docs/kernels.md say.

    The interpreter's products are exact, hence rounded here as a tensor core rounds.
    """
    monkeypatch.setattr(backward, 'tuning', lambda x, n_pow2: dict(AT_ONCE=1, REDUCE=reduce))
    if DEVICE == 'cpu':
        from triton.runtime.interpreter import InterpreterBuilder, TensorHandle
        exact = InterpreterBuilder.create_dot
        precisions = []

        def rounded(self, a, b, d, input_precision, *args):
            precisions.append(str(input_precision).rpartition('.')[2].lower())
            if precisions[-1] == 'tf32':
                a = TensorHandle(tf32(a.data), a.dtype)
            return exact(self, a, b, d, input_precision, *args)

        monkeypatch.setattr(InterpreterBuilder, 'create_dot', rounded)

    inputs = scan_inputs(batch=1, length=9, channels=32, d_state=2, device=DEVICE)
    _, got = grads(selective_scan, inputs, backend='triton')
    wide = {k: v.double().cpu() for k, v in inputs.items()}
    # one group a channel: the gradients of B and C are the terms themselves
    wide.update({k: wide[k].unsqueeze(2).expand(-1, -1, 32, -1) for k in ('B', 'C')})
    _, terms = grads(selective_scan_naive, wide)
    if DEVICE == 'cpu':
        assert set(precisions) == {reduce}
    errors = []
    for name in ('B', 'C'):
        error = (got[name].cpu().double() - terms[name].sum(2)).abs()
        errors.append((error / terms[name].abs().sum(2)).max().item())
    assert max(errors) <= bound, errors
    assert reduce == 'tf32x3' or max(errors) > 1e-5  # it did round


def test_refuses_many_states():
    with pytest.raises(RuntimeError, match='up to 64 states, the call has 65'):
        selective_scan(**scan_inputs(d_state=65, device=DEVICE), backend='triton')


def test_refuses_long_sequences():
    """Rows of B and C in scan order are addressed in 32 bits."""
    inputs = scan_inputs(batch=1, length=1)
    call = call_of({k: x.expand(-1, 2 ** 26, -1) if x.ndim == 3 else x for k, x in inputs.items()})
    assert 'up to 67108832 tokens of 16 states' in BACKENDS['triton'].why_unsupported(call)
    call = call.with_tensors([x[:, 32:] if x.ndim == 3 else x for x in call.tensors()])
    assert BACKENDS['triton'].why_unsupported(call) is None


@pytest.fixture
def ends(monkeypatch):
    """Of a launch the first and the last programs alone run, and tensors are not copied back to where they are."""
    if DEVICE == 'cuda' or too_old_to_interpret():
        pytest.skip("needs Triton's interpreter")
    from triton.runtime.interpreter import GridExecutor, InterpretedFunction, InterpreterBuilder
    run, now = InterpretedFunction.run, {}

    def run_ends(self, *args, grid, **kwargs):
        now['dim'] = *grid, 1, 1
        for program in sorted({*range(grid[0])[:4], *range(grid[0])[-4:]}):
            now['idx'] = program, 0, 0
            run(self, *args, grid=(1,), **kwargs)

    monkeypatch.setattr(InterpretedFunction, 'run', run_ends)
    monkeypatch.setattr(InterpreterBuilder, 'set_grid_dim', lambda self, *_: setattr(self, 'grid_dim', now['dim']))
    monkeypatch.setattr(InterpreterBuilder, 'set_grid_idx', lambda self, *_: setattr(self, 'grid_idx', now['idx']))
    monkeypatch.setattr(GridExecutor, '_restore_args_dev', lambda *_: None)


def scan_both(call):
    """The call's output, and the gradients of its tensors that have a batch; its gate serves as the gradient, too."""
    out, y, states = forward.scan_forward(call, True)
    (grads, *_), dz = backward.scan_backward(call, call.z, y, states)
    return [out, *(g for g in (*grads, dz) if g.ndim == 3)]


REVERSED = dict(reverse=[True], residual=True, mask_diagonal=[True])


@pytest.mark.slow
def test_strides_beyond_32_bits(ends):
    """Tokens so far apart that the last one's offset needs 64 bits; memory that nothing touches costs nothing."""
    def far(x):
        if x.ndim < 3:
            return x
        gap = 2 ** 31 // (x.shape[1] - 2)
        return torch.empty(gap * x.shape[1], dtype=x.dtype).as_strided(x.shape, (1, gap, 1)).copy_(x)

    near = call_of(scan_inputs(batch=1, length=40, channels=5, d_state=2, dtype=torch.bfloat16))._replace(**REVERSED)
    for got, want in zip(scan_both(near.with_tensors(list(map(far, near.tensors())))), scan_both(near)):
        assert torch.equal(got, want)


@pytest.mark.slow
def test_scan_of_more_than_2_31_elements(ends):
    length, channels = 33, 64
    ends_alone = call_of(scan_inputs(2, length, channels, 1, dtype=torch.bfloat16))._replace(**REVERSED)
    batch = 2 ** 31 // (length * channels) + 1

    def many(x):
        if x.ndim < 3:
            return x
        out = torch.empty(batch, *x.shape[1:], dtype=x.dtype)
        out[[0, -1]] = x
        return out

    whole = ends_alone.with_tensors(list(map(many, ends_alone.tensors())))
    for got, want in zip(scan_both(whole), scan_both(ends_alone)):
        assert relative_error(got[[0, -1]], want) <= 1e-2


@pytest.mark.slow
def test_convolution_of_more_than_2_31_elements(ends):
    channels, near = 64, 64
    length = 2 ** 31 // channels + 9
    x = torch.empty(1, length, channels, dtype=torch.bfloat16)
    x[:, -near:] = torch.randn(1, near, channels)
    weights = [torch.randn(channels, 4) for _ in range(2)]

    def both(x):
        call = ConvCall(x, weights, [], True, [False, True], False)
        grad = torch.empty_like(x, memory_format=torch.contiguous_format)
        grad[:, -near:] = 1.
        return [*conv.conv_forward(call), conv.conv_backward(call, [grad, grad])[0]]

    for got, want in zip(both(x), both(x[:, -near:])):
        assert torch.equal(got[:, -near // 2:], want[:, -near // 2:])


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


BENCHMARKS = Path(__file__).resolve().parents[2] / 'benchmarks'


def compile_triton(*args):
    env = {**os.environ, 'PYTHONPATH': str(BENCHMARKS.parent)}
    return subprocess.run(
        [sys.executable, BENCHMARKS / 'compile_triton.py', *args], check=True, capture_output=True, text=True, env=env)


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.parametrize('target', ['cuda:80', 'cuda:90', 'cuda:100', 'hip:gfx942', 'hip:gfx1100'])
def test_every_variant_compiles(target):
    compile_triton('--targets', target)


def test_changed_kernels_compile():
    """The kernels are those that were last compiled for all kinds of GPU, or compile."""
    if not runpy.run_path(str(BENCHMARKS / 'triton_sources.py'))['compiled']():
        compile_triton('--quick')
