"""Uses of the scan that models make of it by the shapes of its arguments."""
import pytest
import torch

from timm_ssm.ops import bidirectional_selective_scan, selective_scan
from timm_ssm.ops.backends import BACKENDS
from timm_ssm.ops.naive import selective_scan_naive

from .test_kernels import device_of
from .utils import grads, pairs, relative_error, scan_inputs

pytestmark = pytest.mark.parametrize('backend', BACKENDS)


@pytest.mark.parametrize('reverse', [False, True])
def test_states(backend, reverse):
    """With one state a channel, C of ones and no D, the outputs are the states (Spatial-Mamba)."""
    inputs = scan_inputs(batch=1, length=35, channels=12, d_state=1, device=device_of(backend))
    u, delta, A, B, bias = (inputs[k] for k in ('u', 'delta', 'A', 'B', 'delta_bias'))

    def states(u, delta, A, B, delta_bias):
        dt = torch.nn.functional.softplus(delta + delta_bias)
        h, hs = torch.zeros_like(u[:, 0]), []
        for t in reversed(range(u.shape[1])) if reverse else range(u.shape[1]):
            h = torch.exp(dt[:, t] * A[:, 0]) * h + dt[:, t] * u[:, t] * B[:, t]
            hs.append(h)
        return torch.stack(hs[::-1] if reverse else hs, 1)

    def scan(u, delta, A, B, delta_bias):
        return selective_scan(
            u, delta, A, B, torch.ones_like(B), delta_bias=delta_bias, reverse=reverse, backend=backend)

    arguments = dict(u=u, delta=delta, A=A, B=B, delta_bias=bias)
    out, got = grads(scan, arguments)
    want_out, want = grads(states, arguments)
    assert relative_error(out, want_out) < 2e-5
    for name, gradient in got.items():
        assert relative_error(gradient, want[name]) < 1e-4, name


def test_four_directions(backend):
    """Rows and columns are two groups of channels of one call, both ways: four scans at once (VMamba)."""
    device = device_of(backend)
    height, width, channels = 3, 4, 5
    ways = [scan_inputs(1, height * width, channels, 1, device=device, seed=i) for i in range(4)]
    for way in ways:
        del way['z']

    def columns(x):  # (B, L, ...) from row-major to column-major tokens
        return x.unflatten(1, (height, width)).transpose(1, 2).flatten(1, 2)

    def fused(first, second):
        merged = {k: torch.cat((first[k], second[k])) for k in ('A', 'D', 'delta_bias')}
        for k in ('u', 'delta'):
            merged[k] = torch.cat((first[k], columns(second[k])), -1)
        for k in ('B', 'C'):
            merged[k] = torch.stack((first[k], columns(second[k])), 2)
        return merged

    out = bidirectional_selective_scan(**pairs(fused(*ways[:2]), fused(*ways[2:])), backend=backend)
    for half, (i, j) in zip(out.chunk(2, -1), ((0, 2), (1, 3))):
        tokens = columns if i == 1 else lambda x: x
        first, second = ({k: tokens(v) if v.ndim == 3 else v for k, v in ways[n].items()} for n in (i, j))
        want = selective_scan_naive(**first) + selective_scan_naive(**second, reverse=True)
        assert relative_error(half, want) < 2e-5
