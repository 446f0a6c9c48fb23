"""Every backend on zeros, infinities, NaN and numbers near the ends of their range, against float64."""
import itertools

import pytest
import torch

from timm_ssm.ops import causal_conv1d, selective_scan
from timm_ssm.ops.backends import BACKENDS
from timm_ssm.ops.naive import causal_conv1d_naive, selective_scan_naive

from .test_kernels import device_of, interpreted, serve
from .utils import grads

pytestmark = pytest.mark.parametrize('backend', BACKENDS)

INF, NAN = float('inf'), float('nan')
VALUES = [s * x for x in (0., 1e-30, 1., 20., 88., 104., 128., 1e4, 3e38, INF) for s in (1, -1)] + [NAN]


def positive(*shape: int, seed: int = 0) -> torch.Tensor:
    """Numbers between 0.5 and 1.5: sums of them do not cancel."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + .5


def check(backend, fn, naive, inputs, dtype, ordinary=True, **form):
    """Finite where the specification is finite in the same dtype, and close to it in float64, for outputs and gradients
    (channels last) of the channels that are `ordinary`.

    What the specification itself rounds away, the last factor of 10 before an overflow, and what a number below the
    smallest normal one makes of another (it may count as 0) are left out.
    """
    device = device_of(backend)
    grad_out = positive(*inputs[next(iter(inputs))].shape, seed=1).to(dtype)
    out, got = serve(grads, fn, {k: v.to(device, dtype) for k, v in inputs.items()}, [grad_out.to(device)],
                     backend=backend, **form)
    narrow, wide = ({k: v.to(dtype).to(to) for k, v in inputs.items()} for to in (dtype, torch.float64))
    same_out, same = grads(naive, narrow, [grad_out], **form)
    want_out, want = grads(naive, wide, [grad_out.double()], **form)
    channels = grad_out.shape[-1]
    tolerance, limit = (2e-5, 3e37) if dtype == torch.float32 else (1e-11, 1e307)
    checked = 0
    for name, x, y, z in [('out', out, same_out, want_out), *((k, g, same[k], want[k]) for k, g in got.items())]:
        x, y, z = x.detach().cpu().double(), y.detach().double(), z.detach()
        finite = y.isfinite() & (z.abs() < limit)
        if name in ('A', 'B', 'C', 'weight'):  # a state or tap
            finite, x, y, z = (t.squeeze(-1) for t in (finite, x, y, z))
        if x.shape[-1] == channels:
            finite &= ordinary
        assert x[finite].isfinite().all(), name
        error = (x - z).abs()[finite]
        allowed = (tolerance * z.abs() + 10 * (y - z).abs())[finite] + 1e-33
        assert (error <= allowed).all(), (name, error.max())
        checked += finite.sum().item()
    return checked


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize('delta_softplus', [True, False])
@pytest.mark.parametrize('length', [1, 3])
def test_scan_step_sizes_and_decays(backend, dtype, delta_softplus, length):
    """All combinations of delta, its bias and A, a channel each, every other token an ordinary one."""
    grid = torch.tensor(list(itertools.product(VALUES, VALUES, VALUES)), dtype=torch.float64)
    if interpreted(backend):
        grid = grid[::29]
    delta, bias, A = grid.unbind(1)
    channels = len(grid)
    # channels that are groups of their own have their own dB and dC; the interpreter would take hours
    bc_shape = (1, length, 1) if interpreted(backend) else (1, length, channels, 1)
    inputs = dict(
        u=positive(1, length, channels) * 1e-3,  # so that the largest step does not overflow at once
        delta=torch.stack([delta if t % 2 == 0 else torch.full_like(delta, .5) for t in range(length)])[None],
        A=A[:, None],
        B=positive(*bc_shape, seed=2),
        C=positive(*bc_shape, seed=3),
        delta_bias=bias,
    )
    ordinary = torch.ones(channels, dtype=torch.bool)
    if dtype == torch.float32:
        # Numbers below the smallest normal one may count as 0, and A is used as A log2(e).
        steps = inputs['delta'][0] + bias
        steps = torch.nn.functional.softplus(steps) if delta_softplus else steps
        for x in (steps, torch.exp(steps * A)):
            ordinary &= ~((x != 0) & (x.abs() < 2 ** -126)).any(0)
        ordinary &= ~((A.abs() > 2.3e38) & A.isfinite())
    if backend == 'triton':  # padding behind the last token meets A, too
        ordinary &= ~A.isnan()
    checked = check(backend, selective_scan, selective_scan_naive, inputs, dtype, ordinary,
                    delta_softplus=delta_softplus)
    assert checked > channels


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=str)
def test_scan_gates(backend, dtype):
    inputs = dict(
        u=positive(1, 2, len(VALUES)), delta=positive(1, 2, len(VALUES)), A=-positive(len(VALUES), 1),
        B=positive(1, 2, 1), C=positive(1, 2, 1), z=torch.tensor(VALUES).expand(1, 2, -1))
    ordinary = inputs['z'][0, 0].isfinite()  # infinite gates are NaN
    inputs['B'] = inputs['B'].unsqueeze(2).expand(1, 2, len(VALUES), 1)
    inputs['C'] = inputs['C'].unsqueeze(2).expand(1, 2, len(VALUES), 1)
    assert check(backend, selective_scan, selective_scan_naive, inputs, dtype, ordinary) > 6 * len(VALUES)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=str)
def test_conv_activations(backend, dtype):
    """A kernel of one tap, 1, so that the activation sees every value."""
    x = torch.tensor(VALUES)
    inputs = dict(x=x.expand(1, 3, -1), weight=torch.ones(len(x), 1), bias=torch.zeros(len(x)))
    assert check(backend, causal_conv1d, causal_conv1d_naive, inputs, dtype) > 4 * len(VALUES)


@pytest.mark.parametrize('name', ['u', 'delta', 'A', 'B', 'C', 'D', 'z', 'delta_bias'])
def test_scan_keeps_nan(backend, name):
    inputs = dict(
        u=positive(1, 2, 4), delta=positive(1, 2, 4), A=-positive(4, 2), B=positive(1, 2, 2), C=positive(1, 2, 2),
        D=positive(4), z=positive(1, 2, 4), delta_bias=positive(4))
    if name == 'A':  # meets no state before the second token
        inputs[name][0] = NAN
    else:
        inputs[name].view(-1)[0] = NAN
    out = serve(selective_scan, **{k: v.to(device_of(backend), torch.float32) for k, v in inputs.items()},
                backend=backend)
    assert out[0, -1 if name == 'A' else 0, 0].isnan()
