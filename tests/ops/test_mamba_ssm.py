"""The adapter to mamba-ssm and causal-conv1d, with stand-ins for their compiled functions on the CPU.

The stand-ins have the compiled functions' signatures, check what those check, and compute by the specification.
"""
from types import SimpleNamespace

import pytest
import torch

from timm_ssm.ops import naive
from timm_ssm.ops.backends import BACKENDS, mamba_ssm
from timm_ssm.ops.calls import ConvCall, ScanCall

from .utils import relative_error, scan_inputs

ADAPTER, EAGER = BACKENDS['mamba_ssm'], BACKENDS['eager']


def scan(u, delta, A, B, C, D, delta_bias, delta_softplus):
    tokens_first = (x.movedim(-1, 1) for x in (u, delta, B, C))
    u, delta, B, C = tokens_first
    return naive.selective_scan_naive(
        u, delta, A, B, C, D, None, delta_bias, delta_softplus=delta_softplus).movedim(1, -1)


def checked(u, delta, A, B, C, D, delta_bias):
    batch, dim, seqlen = u.shape
    n_groups, dstate = B.shape[1:3]
    assert delta.shape == u.shape and A.shape == (dim, dstate) and A.dtype == torch.float32
    assert B.shape == C.shape == (batch, n_groups, dstate, seqlen)
    for x in (u, delta, B, C):
        assert x.stride(-1) == 1 or x.shape[-1] == 1
        assert x.dtype == u.dtype
    for x in (D, delta_bias):
        assert x is None or (x.shape == (dim,) and x.dtype == torch.float32)


def selective_scan_fwd(u, delta, A, B, C, D, z, delta_bias, delta_softplus):
    checked(u, delta, A, B, C, D, delta_bias)
    assert z is None
    out = scan(u, delta, A, B, C, D, delta_bias, delta_softplus)
    return [out, u.sum()]  # in place of the chunk states, something that tells calls apart


def selective_scan_bwd(u, delta, A, B, C, D, z, delta_bias, dout, x, out, dz, delta_softplus, recompute_out_z):
    checked(u, delta, A, B, C, D, delta_bias)
    assert torch.equal(x, u.sum()) and dout.shape == u.shape and (dout.stride(-1) == 1 or dout.shape[-1] == 1)
    assert z is None and out is None and dz is None and recompute_out_z is False
    leaves = [None if t is None else t.detach().requires_grad_() for t in (u, delta, A, B, C, D, delta_bias)]
    with torch.enable_grad():
        y = scan(*leaves, delta_softplus)
    grads = iter(torch.autograd.grad(y, [t for t in leaves if t is not None], dout))
    return [None if t is None else next(grads) for t in leaves]


def conv(x, weight, bias, silu):
    return naive.causal_conv1d_naive(x.transpose(1, 2), weight, bias, activation='silu' if silu else None)


def check_conv_input(x, weight, bias):
    assert x.shape[1] == weight.shape[0] and 2 <= weight.shape[1] <= 4
    assert x.stride(2) == 1 or x.stride(1) == 1
    if x.stride(1) == 1 and x.stride(2) > 1:
        assert x.shape[1] % 8 == x.stride(0) % 8 == x.stride(2) % 8 == 0
    assert bias is None or bias.dtype == weight.dtype


def causal_conv1d_fwd_function(x, weight, bias, seq_idx, initial_states, final_states_out, silu_activation):
    check_conv_input(x, weight, bias)
    assert seq_idx is None and initial_states is None and final_states_out is None
    return conv(x, weight, bias, silu_activation).transpose(1, 2)


def causal_conv1d_bwd_function(
        x, weight, bias, dout, seq_idx, initial_states, dfinal_states, dx, return_dinitial_states, silu_activation):
    check_conv_input(x, weight, bias)
    assert dout.shape == x.shape and dx is None and return_dinitial_states is False
    leaves = [None if t is None else t.detach().requires_grad_() for t in (x, weight, bias)]
    with torch.enable_grad():
        y = conv(*leaves, silu_activation).transpose(1, 2)
    grads = iter(torch.autograd.grad(y, [t for t in leaves if t is not None], dout))
    return *(None if t is None else next(grads) for t in leaves), None


@pytest.fixture
def stand_ins(monkeypatch):
    modules = {
        'selective_scan_cuda': SimpleNamespace(fwd=selective_scan_fwd, bwd=selective_scan_bwd),
        'causal_conv1d.cpp_functions': SimpleNamespace(
            causal_conv1d_fwd_function=causal_conv1d_fwd_function,
            causal_conv1d_bwd_function=causal_conv1d_bwd_function),
    }
    monkeypatch.setattr(mamba_ssm, '_import', modules.__getitem__)


def scan_call(directions, gate=True, optional=True, residual=False, mask=False, softplus=True, **kwargs):
    inputs = [scan_inputs(seed=i, optional=optional, **kwargs) for i in range(directions)]
    lists = {k: [x[k] for x in inputs] if k in inputs[0] else []
             for k in ('u', 'delta', 'A', 'B', 'C', 'D', 'delta_bias')}
    if not softplus:
        lists['delta'] = [x.abs() * .1 for x in lists['delta']]
    return ScanCall(
        **lists, z=scan_inputs(seed=9, **kwargs)['z'] if gate else None, delta_softplus=softplus,
        reverse=[False, True][2 - directions:] if directions == 1 else [False, True], residual=residual,
        mask_diagonal=[mask] * directions)


@pytest.mark.parametrize('case', [
    dict(directions=1), dict(directions=2), dict(directions=2, gate=False), dict(directions=1, optional=False),
    dict(directions=2, groups=3), dict(directions=2, softplus=False, optional=False),
    dict(directions=2, dtype=torch.bfloat16),
    dict(directions=1, length=1)], ids=str)
def test_scan(stand_ins, case):
    call = scan_call(**case)
    out, y, states = ADAPTER.scan_forward(call, True)
    want_out, want_y, want_states = EAGER.scan_forward(call, True)
    tolerance = 2e-2 if case.get('dtype') else 1e-5
    assert out.dtype == want_out.dtype and out.is_contiguous() and relative_error(out, want_out) <= tolerance
    assert (y is None) == (want_y is None) and states.shape == want_states.shape
    grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out.dtype)
    grads, dz = ADAPTER.scan_backward(call, grad_out, y, states)
    want, want_dz = EAGER.scan_backward(call, grad_out, want_y, want_states)
    assert (dz is None) == (want_dz is None)
    pairs = [(a, b) for one, other in zip(grads, want) for a, b in zip(one, other, strict=True)]
    for a, b in pairs + ([(dz, want_dz)] if dz is not None else []):
        assert a.shape == b.shape and a.dtype == b.dtype and a.is_contiguous()
        assert relative_error(a, b) <= tolerance


@pytest.mark.parametrize('channels', [8, 12])  # 8: taken as a view; 12: copied
@pytest.mark.parametrize('reverse', [[False], [True], [False, True]], ids=str)
@pytest.mark.parametrize('bias', [False, True])
def test_conv(stand_ins, channels, reverse, bias):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 9, 2 * channels, generator=g)[..., :channels]
    weight = [torch.randn(channels, 4, generator=g) for _ in reverse]
    biases = [torch.randn(channels, generator=g) for _ in reverse] if bias else []
    call = ConvCall(x, weight, biases, True, reverse, False)
    outs, want = ADAPTER.conv_forward(call), EAGER.conv_forward(call)
    assert all(o.is_contiguous() and relative_error(o, w) <= 1e-6 for o, w in zip(outs, want, strict=True))
    grad_outs = [torch.randn(o.shape, generator=g) for o in outs]
    got, want = ADAPTER.conv_backward(call, grad_outs), EAGER.conv_backward(call, grad_outs)
    assert relative_error(got[0], want[0]) <= 1e-6
    for a, b in zip(got[1] + got[2], want[1] + want[2], strict=True):
        assert relative_error(a, b) <= 1e-6


@pytest.mark.parametrize('case, reason', [
    (dict(residual=True), 'residual'), (dict(mask=True), 'mask_diagonal'), (dict(d_state=257), 'up to 256 states'),
    (dict(), 'runs on a GPU')], ids=str)
def test_refuses_scan(stand_ins, case, reason):
    assert reason in ADAPTER.why_unsupported(scan_call(1, **case))


@pytest.mark.parametrize('kernel_size, centered, reason', [
    (5, False, '2, 3, 4 taps'), (3, True, 'centered'), (4, False, 'runs on a GPU')])
def test_refuses_conv(stand_ins, kernel_size, centered, reason):
    call = ConvCall(torch.zeros(1, 2, 8), [torch.zeros(8, kernel_size)], [], True, [False], centered)
    assert reason in ADAPTER.why_unsupported(call)


def test_reports_why_it_does_not_import(monkeypatch, tmp_path):
    (tmp_path / 'selective_scan_cuda.py').write_text('raise ImportError("undefined symbol: _ZN3c10")')
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    mamba_ssm._import.cache_clear()
    try:
        assert ADAPTER.why_unavailable() == (
            'selective_scan_cuda does not import: ImportError: undefined symbol: _ZN3c10')
    finally:
        mamba_ssm._import.cache_clear()
