"""Parameters of the mixers, norms of a precise stream, and the patch embedding."""
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from timm_ssm.layers import (
    CausalConv1d,
    DtProj,
    LayerNorm,
    PatchEmbed,
    RmsNorm,
    init_A_log,
    init_dt,
    resample_patch_kernel,
    state_decay,
)


def test_init_A_log():
    A_log = nn.Parameter(torch.empty(3, 4))
    init_A_log(A_log)
    torch.testing.assert_close(state_decay(A_log), -torch.arange(1., 5.).expand(3, 4))
    assert state_decay(A_log.bfloat16()).dtype == torch.float32 and state_decay(A_log.double()).dtype == torch.float64


def test_init_dt():
    """softplus(bias) is log-uniform over the whole of [dt_min, dt_max]."""
    torch.manual_seed(0)
    proj = DtProj(4, 1000)
    init_dt(proj, dt_min=1e-3, dt_max=1e-1)
    dt = F.softplus(proj.bias)
    assert 1e-3 <= dt.min() < 1.1e-3 and .09 < dt.max() <= .1
    assert abs(dt.log().mean() - math.log(1e-2)) < .1
    assert .45 < proj.weight.abs().max() <= .5


def test_dt_proj_leaves_its_bias_to_the_scan():
    proj = DtProj(4, 6)
    x = torch.randn(2, 3, 4)
    torch.testing.assert_close(proj(x), x @ proj.weight.T)


def test_causal_conv():
    """An nn.Conv1d of the same parameters, cut to the tokens before, with SiLU."""
    conv = CausalConv1d(6, 4)
    x = torch.randn(2, 9, 6)
    torch.testing.assert_close(conv(x).mT, F.silu(nn.Conv1d.forward(conv, x.mT)[..., :9]))


@pytest.mark.parametrize('norm, reference', [(RmsNorm, nn.RMSNorm), (LayerNorm, nn.LayerNorm)])
def test_norm_of_a_more_precise_stream(norm, reference):
    """A float32 stream through bfloat16 parameters: computed in float32, returned in bfloat16."""
    low, high = norm(16, eps=1e-5, dtype=torch.bfloat16), reference(16, eps=1e-5)
    nn.init.normal_(low.weight)
    high.load_state_dict({k: v.float() for k, v in low.state_dict().items()})
    x = 100. * torch.randn(2, 5, 16)
    got = low(x)
    assert got.dtype == torch.bfloat16 and torch.equal(got, high(x).bfloat16())


def test_patch_embed_is_row_major_in_every_frame():
    embed = PatchEmbed(img_size=(8, 12), patch_size=4, num_frames=4, tubelet_size=2, in_chans=1, embed_dim=1)
    nn.init.constant_(embed.proj.weight, 1 / 32)
    nn.init.zeros_(embed.proj.bias)
    patches = torch.arange(2 * 2 * 3.).reshape(1, 1, 2, 2, 3)
    clip = patches.repeat_interleave(2, 2).repeat_interleave(4, 3).repeat_interleave(4, 4)
    torch.testing.assert_close(embed(clip), patches.permute(0, 2, 3, 4, 1))


def test_resampled_kernel_of_an_enlarged_image():
    """The larger kernel gives an enlarged image the tokens of the original; every frame is resampled alike."""
    torch.manual_seed(0)
    kernel = torch.randn(5, 3, 4, 4)
    larger = resample_patch_kernel(kernel, (8, 8))
    x = torch.randn(1, 3, 4, 4)
    enlarged = F.interpolate(x, size=(8, 8), mode='bicubic', antialias=True)
    torch.testing.assert_close(F.conv2d(enlarged, larger), F.conv2d(x, kernel), rtol=1e-3, atol=1e-3)
    tubelet = resample_patch_kernel(kernel.unsqueeze(2).repeat(1, 1, 2, 1, 1), (8, 8))
    assert torch.equal(tubelet[:, :, 0], larger) and torch.equal(tubelet[:, :, 1], larger)
