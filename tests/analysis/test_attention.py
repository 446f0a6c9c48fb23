"""Hidden attention: a brute-force matrix, and that it applied to u is what the scan gives."""
import math

import pytest
import timm
import torch
import torch.nn.functional as F

import timm_ssm  # noqa: F401  registers the models
from timm_ssm.analysis import attention as analysis
from timm_ssm.analysis import channel_attention, hidden_attention, mean_attention
from timm_ssm.layers import BiMamba, ScanInputs
from timm_ssm.layers.mixer import scan
from timm_ssm.models.groupmamba import GroupScan
from timm_ssm.models.mambavision import MambaVisionMixer
from timm_ssm.models.spatialmamba import SpatialMambaMixer
from timm_ssm.models.stvideomamba import STMixer
from timm_ssm.models.videomambapro import VideoMambaProMixer
from timm_ssm.models.vmamba import SS2D

from ..ops.utils import Largest

FORMS = {
    'forward': {},
    'reverse': dict(reverse=True),
    'residual': dict(residual=True),
    'residual_masked': dict(reverse=True, residual=True, mask_diagonal=True),
}


def make_scan(length, channels=6, states=3, batch=2, dtype=torch.float64, **form):
    """Random inputs of a scan, whose decays over its length go from nearly nothing to nearly everything."""
    g = torch.Generator().manual_seed(length)

    def randn(*shape):
        return torch.randn(*shape, generator=g, dtype=dtype)
    return ScanInputs(
        u=randn(batch, length, channels), delta=2 * randn(batch, length, channels), A=-randn(channels, states).exp(),
        B=randn(batch, length, states), C=randn(batch, length, states), D=randn(channels),
        z=randn(batch, length, channels), delta_bias=randn(channels) - 2, **form)


def brute_force(s):
    """(B, L, L, D) by the definition, one product of decays at a time."""
    dt = F.softplus(s.delta + s.delta_bias)
    batch, length, channels = dt.shape
    order = range(length - 1, -1, -1) if s.reverse else range(length)
    out = dt.new_zeros(batch, length, length, channels)
    for a, i in enumerate(order):
        decay = torch.ones(batch, *s.A.shape, dtype=dt.dtype)
        for j in list(order)[a::-1]:
            out[:, i, j] = (s.C[:, i, None] * decay * s.B[:, j, None]).sum(-1) * dt[:, j]
            if j == i and s.mask_diagonal:
                out[:, i, j] = 0
            decay = decay * torch.exp(dt[:, j, :, None] * s.A)
        if s.residual and not (s.mask_diagonal and a == 0):
            out[:, i, order[0]] += (s.C[:, i, None] * decay).sum(-1)
    return out


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('length', [1, 2, 5, 16, 21])
def test_brute_force(form, length):
    s = make_scan(length, **FORMS[form])
    expected = brute_force(s)
    torch.testing.assert_close(channel_attention(s, range(length)), expected)
    torch.testing.assert_close(channel_attention(s, [length - 1, 0]), expected[:, [length - 1, 0]])
    torch.testing.assert_close(mean_attention(s), expected.mean(-1))


@pytest.mark.parametrize('form', FORMS)
def test_applied_to_u_it_is_the_scan(form):
    """With D and the gate, which concern single tokens."""
    s = make_scan(33, dtype=torch.float32, **FORMS[form])
    y = torch.einsum('bijd,bjd->bid', channel_attention(s, range(33)), s.u)
    torch.testing.assert_close((y + s.D * s.u) * F.silu(s.z), scan([s]), rtol=1e-4, atol=1e-5)


def test_parts_of_channels_add_up(monkeypatch):
    s = make_scan(21)
    expected = mean_attention(s)
    monkeypatch.setattr(analysis, 'MAX_NUMBERS', 32 * 3 * 4)  # 4 of the 6 channels
    torch.testing.assert_close(mean_attention(s), expected)


def test_not_all_at_once(monkeypatch):
    """Nothing is as large as L x L x D x N, nor, for some rows, as L x L x D."""
    length, channels, states, rows = 64, 32, 4, 3
    s = make_scan(length, channels, states, batch=1)
    monkeypatch.setattr(analysis, 'MAX_NUMBERS', length * length)
    with Largest() as largest:
        mean_attention(s)
    assert largest.size <= 2 * length * length
    with Largest() as largest:
        channel_attention(s, range(rows))
    assert largest.size <= rows * length * channels


def test_long_decays_stay_finite():
    """Steps whose decays over the sequence are far below what float32 holds."""
    s = make_scan(64, dtype=torch.float32)._replace(delta_bias=torch.full((6,), 30.))
    assert mean_attention(s).isfinite().all()
    torch.testing.assert_close(mean_attention(s), channel_attention(s, range(64)).mean(-1))


MIXERS = {
    'BiMamba': lambda: (BiMamba(8, d_state=3), (2, 13, 8)),
    'VideoMambaPro': lambda: (VideoMambaProMixer(8, d_state=3), (2, 13, 8)),
    'STVideoMamba': lambda: (STMixer(8, frames=3, order='spatial', d_state=3), (2, 13, 8)),
    'MambaVision': lambda: (MambaVisionMixer(8), (2, 12, 8)),
    'GroupMamba_columns': lambda: (GroupScan(8, column_major=True, reverse=True), (2, 3, 4, 8)),
    'VMamba': lambda: (SS2D(8, expand=2., d_state=2), (2, 3, 5, 8)),
}


@pytest.mark.parametrize('name', MIXERS)
@torch.no_grad()
def test_mixers(name):
    """In the order of a mixer's input it is how u, alike in all channels, changes the mean of the scans' outputs."""
    torch.manual_seed(0)
    mixer, shape = MIXERS[name]()
    mixer = mixer.double()
    for p in mixer.parameters():
        p.copy_(torch.randn_like(p) * 0.5)
    x = torch.randn(shape, dtype=torch.float64)
    length = math.prod(shape[1:-1])
    matrix = hidden_attention(mixer, x)
    assert matrix.shape == (2, length, length)

    inputs = mixer.project(x)
    for j in range(length):
        y = 0.
        for k, s in enumerate(inputs):
            mark = torch.zeros(2, length, 1, dtype=torch.float64)
            order = mixer.restore(torch.arange(length).view(1, length, 1), k, list(shape)).flatten()
            mark[:, order[j]] = 1
            s = s._replace(u=mark.expand_as(s.u).contiguous(), D=None, z=None)
            y = y + mixer.restore(scan([s]), k, list(shape)).reshape(2, length, -1)
        torch.testing.assert_close(matrix[:, :, j], y.mean(-1))
    torch.testing.assert_close(hidden_attention(mixer, x, [length - 1, 2]), matrix[:, [length - 1, 2]])


def test_what_has_no_such_matrix():
    with pytest.raises(ValueError, match='mixer: got a SpatialMambaMixer'):
        hidden_attention(SpatialMambaMixer(8), torch.randn(1, 3, 3, 8))
    with pytest.raises(ValueError, match='tokens: got 13, needs numbers from 0 to 12'):
        hidden_attention(BiMamba(8), torch.randn(1, 13, 8), [13])


@torch.no_grad()
def test_of_a_model():
    """What a model's mixer gives is its attention applied to u, gated, and projected."""
    model = timm.create_model('videomamba_tiny_patch16_224', img_size=32, depth=2, embed_dim=32).eval()
    x = torch.randn(1, 5, 32)
    mixer = model.blocks[1].mixer
    y = 0.
    for s in mixer.project(x):
        y = y + torch.einsum('bijd,bjd->bid', channel_attention(s, range(5)), s.u) + s.D * s.u
    torch.testing.assert_close(mixer.out_proj(y * F.silu(s.z)), mixer(x), rtol=1e-4, atol=1e-6)
