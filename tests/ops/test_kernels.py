"""Every backend against the specification in `ops/naive.py`: forward and every gradient, in one file.

A backend that is not available here is skipped with its reason. Of the others each must serve the calls that its row of
the capability table includes, and refuse the rest. Triton runs on the GPU, or on the CPU through its interpreter
(TRITON_INTERPRET=1), there with small shapes only.
"""
import itertools
import os
import re
from pathlib import Path

import pytest
import torch

from timm_ssm.ops import (
    backends,
    bidirectional_causal_conv1d,
    bidirectional_selective_scan,
    causal_conv1d,
    selective_scan,
)
from timm_ssm.ops.backends import BACKENDS
from timm_ssm.ops.naive import causal_conv1d_naive, selective_scan_naive

from .utils import grads, pairs, relative_error, scan_inputs, too_old_to_interpret

ROOT = Path(__file__).parents[2]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
FORMS = [
    dict(),
    dict(reverse=True),
    dict(residual=True),
    dict(residual=True, reverse=True, mask_diagonal=True),
    dict(mask_diagonal=True),
    dict(delta_softplus=False),
]


def device_of(backend: str) -> str:
    reason = BACKENDS[backend].why_unavailable()
    if reason:
        pytest.skip(f'{backend}: {reason}')
    if backend == 'triton' and too_old_to_interpret():
        pytest.skip(too_old_to_interpret())
    return 'cuda' if backend in ('triton', 'mamba_ssm') and torch.cuda.is_available() else 'cpu'


def interpreted(backend: str) -> bool:
    return backend == 'triton' and not torch.cuda.is_available()


def serve(fn, *args, backend, **kwargs):
    """`fn`, an op or `grads` of one, on a backend that must serve the call, or refuse it if its row of the capability
    table does."""
    call = {**kwargs, **next((arg for arg in args if isinstance(arg, dict)), {})}
    reason = excluded(BACKENDS[backend], call)
    if reason is None:
        return fn(*args, **kwargs, backend=backend)
    with pytest.raises(RuntimeError, match='cannot serve this call'):
        fn(*args, **kwargs, backend=backend)
    pytest.skip(f'{backend} does not list {reason}, and refuses it')


def excluded(row, call):
    """What about a call's arguments a backend does not list."""
    first = {k: v[0] if isinstance(v, tuple) else v for k, v in call.items()}
    x = first['u'] if 'u' in first else first['x']
    if x.dtype not in row.dtypes:
        return str(x.dtype)
    if x.numel() == 0 and not row.empty:
        return 'empty inputs'
    if 'A' in first and row.max_d_state and first['A'].shape[1] > row.max_d_state:
        return f'{first["A"].shape[1]} states'
    if 'weight' in first and row.kernel_sizes and first['weight'].shape[1] not in row.kernel_sizes:
        return f'{first["weight"].shape[1]} taps'
    forms = (form for form in ('residual', 'mask_diagonal', 'centered') if call.get(form))
    return next((form for form in forms if form not in row.forms), None)


@pytest.fixture(params=BACKENDS)
def backend(request):
    device_of(request.param)
    return request.param


def check_scan(backend, tolerance=None, bidirectional=False, make=lambda x: x, backward=True, **kwargs):
    """Compare forward and gradients with the specification computed in float64 on the same values."""
    form = {k: kwargs.pop(k) for k in ('reverse', 'residual', 'mask_diagonal', 'delta_softplus') if k in kwargs}
    dtype = kwargs.get('dtype', torch.float32)
    tolerance = tolerance or TOLERANCE[dtype]
    if form.get('delta_softplus') is False:
        kwargs['optional'] = False
    if interpreted(backend):
        kwargs.setdefault('batch', 1)
    device = device_of(backend)
    inputs = {k: make(v) for k, v in scan_inputs(device=device, **kwargs).items()}
    if form.get('delta_softplus') is False:
        inputs['delta'] = inputs['delta'].abs() * .1
    fn, reference = selective_scan, selective_scan_naive
    if bidirectional:
        second = {k: make(v) for k, v in scan_inputs(device=device, seed=7, **kwargs).items()}
        inputs = pairs(inputs, second)
        fn, reference = bidirectional_selective_scan, both_directions
    wide = {k: tuple(x.double().cpu() for x in v) if isinstance(v, tuple) else v.double().cpu()
            for k, v in inputs.items()}
    if not backward:
        with torch.no_grad():
            out = serve(fn, **inputs, **form, backend=backend)
            assert relative_error(out.cpu(), reference(**wide, **form)) <= tolerance
        return
    out, got = serve(grads, fn, inputs, **form, backend=backend)
    want_out, want = grads(reference, wide, [relevant_grad(out)], **form)
    assert out.dtype == dtype and out.is_contiguous()
    assert relative_error(out.cpu(), want_out) <= tolerance
    for name, g in got.items():
        assert relative_error(g.cpu(), want[name]) <= 4 * tolerance, name


def relevant_grad(out):
    """The incoming gradient that `grads` draws for an output of this dtype, in float64."""
    g = torch.Generator().manual_seed(1)
    return torch.randn(out.shape, generator=g, dtype=torch.float64).to(out.dtype).double()


def both_directions(residual=False, mask_diagonal=False, delta_softplus=True, **inputs):
    first, second = ({k: v if k == 'z' else v[i] for k, v in inputs.items()} for i in (0, 1))
    kwargs = dict(residual=residual, delta_softplus=delta_softplus)
    return selective_scan_naive(**first, **kwargs) + selective_scan_naive(
        **second, **kwargs, reverse=True, mask_diagonal=mask_diagonal)


@pytest.mark.parametrize('form', FORMS, ids=str)
@pytest.mark.parametrize('d_state', [1, 8, 16])
def test_scan_forms(backend, d_state, form):
    check_scan(backend, d_state=d_state, **form)


@pytest.mark.parametrize('length', [1, 2, 31, 49, 196, 197, 257])
def test_scan_lengths(backend, length):
    if interpreted(backend) and length > 49:
        pytest.skip('too slow in the interpreter')
    check_scan(backend, length=length, batch=1, channels=5)
    check_scan(backend, length=length, batch=1, channels=5, bidirectional=True)


@pytest.mark.parametrize('length, backward', [(1569, True), (12545, False)])
def test_scan_long(backend, length, backward):
    if interpreted(backend):
        pytest.skip('too slow in the interpreter')
    check_scan(backend, length=length, batch=1, channels=4, bidirectional=True, backward=backward, tolerance=1e-4)


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize('bidirectional', [False, True])
def test_scan_dtypes(backend, dtype, bidirectional):
    check_scan(backend, dtype=dtype, bidirectional=bidirectional)


@pytest.mark.parametrize('residual, mask_diagonal', list(itertools.product([False, True], repeat=2)))
def test_scan_bidirectional_forms(backend, residual, mask_diagonal):
    check_scan(backend, bidirectional=True, residual=residual, mask_diagonal=mask_diagonal, d_state=8)


@pytest.mark.parametrize('channels', [1, 3, 17, 33, 67, 130])
def test_scan_channels(backend, channels):
    check_scan(backend, channels=channels, length=5, batch=1)
    check_scan(backend, channels=channels, length=5, batch=1, bidirectional=True, optional=False)


@pytest.mark.parametrize('groups', [1, 3])
def test_scan_groups(backend, groups):
    check_scan(backend, groups=groups, bidirectional=True)
    check_scan(backend, groups=groups, d_state=5, channels=21)


@pytest.mark.parametrize('optional', ['D', 'z', 'delta_bias'])
def test_scan_optional_arguments(backend, optional):
    device = device_of(backend)
    inputs = scan_inputs(optional=False, device=device)
    inputs[optional] = scan_inputs(device=device)[optional]
    out, got = serve(grads, selective_scan, inputs, backend=backend)
    want_out, want = grads(selective_scan_naive, {k: v.cpu() for k, v in inputs.items()})
    assert relative_error(out.cpu(), want_out) <= 2e-5
    for name, g in got.items():
        assert relative_error(g.cpu(), want[name]) <= 1e-4, name


def strided(x: torch.Tensor) -> torch.Tensor:
    """x's values as a view into a larger tensor: a slice of the last axis (parameters: transposed)."""
    if x.ndim == 1:
        return torch.stack((x, x), 1)[:, 0]
    if x.ndim == 2:
        return x.t().contiguous().t()
    return torch.cat((x, x, x), -1)[..., x.shape[-1]:2 * x.shape[-1]]


def transposed(x: torch.Tensor) -> torch.Tensor:
    """x's values with channels-first memory."""
    return x.transpose(1, -1).contiguous().transpose(1, -1) if x.ndim > 2 else x


@pytest.mark.parametrize('make', [strided, transposed])
def test_scan_non_contiguous(backend, make):
    check_scan(backend, make=make)
    check_scan(backend, make=make, bidirectional=True, groups=2)


def test_scan_expanded_input(backend):
    """Stride zero: one token repeated along batch and length."""
    check_scan(backend, make=lambda x: x[:1, :1].expand_as(x) if x.ndim > 2 else x)


@pytest.mark.parametrize('shape', [dict(batch=0), dict(length=0)], ids=str)
@pytest.mark.parametrize('bidirectional', [False, True])
def test_scan_empty(backend, shape, bidirectional):
    check_scan(backend, **shape, bidirectional=bidirectional, residual=True)


def test_scan_large_delta(backend):
    """softplus is the identity above 20, and a state that decays at once does not overflow."""
    device = device_of(backend)
    inputs = scan_inputs(device=device)
    inputs['delta'] = inputs['delta'] * 60
    out, got = serve(grads, selective_scan, inputs, backend=backend)
    want_out, want = grads(selective_scan_naive, {k: v.double().cpu() for k, v in inputs.items()},
                           [relevant_grad(out)])
    assert relative_error(out.cpu(), want_out) <= 2e-5
    for name, g in got.items():
        assert g.isfinite().all() and relative_error(g.cpu(), want[name]) <= 2e-4, name


def test_scan_deterministic(backend):
    if not BACKENDS[backend].deterministic:
        pytest.skip('it does not promise to be')
    device = device_of(backend)
    length, times = (34, 1) if interpreted(backend) else (70, 3)
    inputs = scan_inputs(length=length, channels=40, device=device)
    first_out, first = serve(grads, selective_scan, inputs, backend=backend)
    for _ in range(times):
        out, got = grads(selective_scan, inputs, backend=backend)
        assert torch.equal(out, first_out)
        assert all(torch.equal(got[k], first[k]) for k in got)


@pytest.fixture
def poisoned(monkeypatch):
    """PyTorch fills whatever memory it hands out uninitialised with NaN."""
    monkeypatch.setattr(torch.utils.deterministic, 'fill_uninitialized_memory', True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(1000).isnan().all() and torch.empty_like(torch.ones(1000)).isnan().all()
    assert torch.ones(1).new_empty(1000).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize('bidirectional', [False, True])
def test_all_results_are_written(backend, poisoned, bidirectional):
    """A number that a kernel forgets to write is NaN."""
    check_scan(backend, channels=40, length=37, bidirectional=bidirectional)
    check_scan(backend, channels=40, length=0, bidirectional=bidirectional)
    check_conv(backend, channels=40, bidirectional=bidirectional)
    check_conv(backend, length=0, bidirectional=bidirectional)


# The convolution

def conv_inputs(batch=2, length=19, channels=12, kernel_size=4, dtype=torch.float32, device='cpu', bias=True, seed=0):
    g = torch.Generator().manual_seed(seed)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    inputs = {
        'x': torch.randn(batch, length, channels, generator=g).to(device, dtype),
        'weight': torch.randn(channels, kernel_size, generator=g).to(device, acc),
    }
    if bias:
        inputs['bias'] = torch.randn(channels, generator=g).to(device, acc)
    return inputs


def conv_both_directions(x, weight, bias=None, activation='silu'):
    return tuple(
        causal_conv1d_naive(x, w, b, activation=activation, reverse=r)
        for w, b, r in zip(weight, bias or (None, None), (False, True)))


def check_conv(backend, bidirectional=False, make=lambda x: x, form=None, **kwargs):
    form = form or {}
    dtype = kwargs.get('dtype', torch.float32)
    device = device_of(backend)
    inputs = {k: make(v) for k, v in conv_inputs(device=device, **kwargs).items()}
    fn, reference = causal_conv1d, causal_conv1d_naive
    if bidirectional:
        second = conv_inputs(device=device, seed=7, **kwargs)
        inputs = {k: v if k == 'x' else (v, second[k]) for k, v in inputs.items()}
        fn, reference = bidirectional_causal_conv1d, conv_both_directions
    wide = {k: tuple(x.double().cpu() for x in v) if isinstance(v, tuple) else v.double().cpu()
            for k, v in inputs.items()}
    out, got = serve(grads, fn, inputs, **form, backend=backend)
    outs = out if isinstance(out, tuple) else (out,)
    g = torch.Generator().manual_seed(1)
    grad_out = [torch.randn(o.shape, generator=g, dtype=torch.float64).to(dtype).double() for o in outs]
    want_out, want = grads(reference, wide, grad_out, **form)
    for o, w in zip(outs, want_out if isinstance(want_out, tuple) else (want_out,)):
        assert o.dtype == dtype and o.is_contiguous()
        assert relative_error(o.cpu(), w) <= TOLERANCE[dtype]
    for name, grad in got.items():
        assert relative_error(grad.cpu(), want[name]) <= 4 * TOLERANCE[dtype], name


@pytest.mark.parametrize('kernel_size', [1, 2, 3, 4, 5])
@pytest.mark.parametrize('form', [
    dict(), dict(reverse=True), dict(centered=True), dict(centered=True, reverse=True), dict(activation=None)], ids=str)
def test_conv_forms(backend, kernel_size, form):
    check_conv(backend, kernel_size=kernel_size, form=form)


@pytest.mark.parametrize('length', [0, 1, 2, 3, 4, 31, 49, 197])
def test_conv_lengths(backend, length):
    check_conv(backend, length=length)
    check_conv(backend, length=length, bidirectional=True)


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_conv_dtypes(backend, dtype):
    check_conv(backend, dtype=dtype)
    check_conv(backend, dtype=dtype, bidirectional=True)


@pytest.mark.parametrize('channels', [1, 7, 33, 130])
def test_conv_channels(backend, channels):
    check_conv(backend, channels=channels, bias=False)
    check_conv(backend, channels=channels, bidirectional=True, bias=False)


def test_conv_non_contiguous(backend):
    check_conv(backend, make=strided)
    check_conv(backend, make=transposed)
    check_conv(backend, make=strided, bidirectional=True)
    check_conv(backend, batch=0, bidirectional=True)


def test_conv_deterministic(backend):
    device = device_of(backend)
    inputs = conv_inputs(length=70, channels=40, device=device)
    first_out, first = serve(grads, causal_conv1d, inputs, backend=backend)
    for _ in range(3):
        out, got = grads(causal_conv1d, inputs, backend=backend)
        assert torch.equal(out, first_out) and all(torch.equal(got[k], first[k]) for k in got)


# The capability table

def test_documented_capabilities():
    """docs/kernels.md lists what each backend's row says."""
    text = (ROOT / 'docs' / 'kernels.md').read_text()
    lines = [line.strip('|').split('|') for line in text.splitlines() if line.startswith('| `')]
    rows = [[cell.strip() for cell in line] for line in lines]
    documented = {row[0].strip('`'): row[1:] for row in rows if row[0].strip('`') in BACKENDS}
    wanted = {}
    for name, row in BACKENDS.items():
        devices = {('cuda', 'cpu'): 'cuda', (): 'all'}.get(row.devices, ', '.join(row.devices))  # cpu: the interpreter
        dtypes = ', '.join(str(dtype).removeprefix('torch.') for dtype in row.dtypes)
        wanted[name] = [
            devices,
            'all' if set(row.dtypes) == set(TOLERANCE) else dtypes,
            'all' if row.max_d_state is None else f'up to {row.max_d_state}',
            'all' if row.kernel_sizes is None else ', '.join(map(str, row.kernel_sizes)),
            'all' if set(row.forms) == {'residual', 'mask_diagonal', 'centered'} else ', '.join(row.forms) or 'none',
            'yes' if row.empty else 'no',
            'yes' if row.deterministic else 'no',
        ]
    assert documented == wanted


def test_documented_code(monkeypatch):
    """The snippets of docs/kernels.md, a backend of one's own among them."""
    text = (ROOT / 'docs' / 'kernels.md').read_text()
    monkeypatch.setattr(backends, 'BACKENDS', dict(BACKENDS))
    names = {}
    exec('\n'.join(re.findall(r'```python\n(.*?)```', text, re.DOTALL)), names)
    torch.testing.assert_close(names['same'], names['out'], rtol=1e-4, atol=1e-4)
    for file in re.findall(r'`([a-z_/0-9]+\.(?:py|h))`', text):
        assert any((ROOT / folder / file).exists() for folder in ('.', 'timm_ssm/ops', 'timm_ssm/ops/backends')), file


def test_interpreter_is_on():
    """On a machine without a GPU the suite must test Triton through its interpreter (see conftest.py)."""
    if 'triton' in BACKENDS and not torch.cuda.is_available():
        pytest.importorskip('triton')
        assert os.environ.get('TRITON_INTERPRET') == '1'
