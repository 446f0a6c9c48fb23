import pytest
import torch
from torch.nn import functional as F

from timm_ssm.layers.patch_embed import PatchEmbed


@pytest.mark.parametrize('kwargs, shape, grid', [
    (dict(img_size=32, patch_size=8), (2, 3, 32, 32), (1, 4, 4)),
    (dict(img_size=(32, 16), patch_size=(8, 4)), (2, 3, 32, 16), (1, 4, 4)),
    (dict(img_size=32, patch_size=8, stride=4), (2, 3, 32, 32), (1, 7, 7)),
    (dict(img_size=16, patch_size=8, num_frames=4), (2, 3, 4, 16, 16), (4, 2, 2)),
    (dict(img_size=16, patch_size=8, num_frames=4, tubelet_size=2, in_chans=1), (2, 1, 4, 16, 16), (2, 2, 2)),
])
def test_tokens_are_projected_patches(kwargs, shape, grid):
    """Each token is the inner product of the kernel with the pixels of its patch."""
    embed, x = PatchEmbed(embed_dim=5, **kwargs), torch.randn(shape)
    out = embed(x)
    assert out.shape == (2, *grid, 5) and embed.grid_size == grid[1:]
    assert embed.num_patches == grid[1] * grid[2]
    (dh, dw), (h, w), dt = embed.stride, embed.patch_size, embed.tubelet_size
    x, kernel = (t if embed.is_clip else t.unsqueeze(2) for t in (x, embed.proj.weight))
    for t, i, j in ((0, 0, 0), (grid[0] - 1, grid[1] - 1, grid[2] - 2)):
        patch = x[:, :, t * dt:(t + 1) * dt, i * dh:i * dh + h, j * dw:j * dw + w]
        expected = torch.einsum('bcthw,dcthw->bd', patch, kernel) + embed.proj.bias
        torch.testing.assert_close(out[:, t, i, j], expected, rtol=1e-5, atol=1e-5)


def test_another_patch_size_sees_the_same_content():
    """FlexiViT's resampling: a smooth image gives the same tokens in larger patches, on larger images."""
    embed = PatchEmbed(img_size=32, patch_size=8, embed_dim=5)
    x = torch.randn(1, 3, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)  # constant within a patch
    before = embed(x)
    embed.proj.weight.requires_grad_(False)
    embed.set_input_size(64, 16)
    after = embed(F.interpolate(x, scale_factor=2, mode='nearest'))
    assert embed.patch_size == embed.stride == (16, 16) and embed.grid_size == (4, 4)
    assert not embed.proj.weight.requires_grad and embed.proj.bias.requires_grad
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-3)


def test_overlapping_patches_keep_their_stride():
    embed = PatchEmbed(img_size=32, patch_size=8, stride=4, embed_dim=5)
    embed.set_input_size(40)
    assert embed.stride == (4, 4) and embed.grid_size == (9, 9)
    assert embed(torch.zeros(1, 3, 40, 40)).shape == (1, 1, 9, 9, 5)


@pytest.mark.parametrize('kwargs, message', [
    (dict(img_size=7, patch_size=8), r'img_size: got \(7, 7\), needs at least the patch size 8 x 8'),
    (dict(patch_size=0), r'patch_size: got \(0, 0\), needs at least 1'),
    (dict(num_frames=5, tubelet_size=2), 'num_frames: got 5, needs a multiple of tubelet_size 2'),
])
def test_refused_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        PatchEmbed(embed_dim=5, **kwargs)
