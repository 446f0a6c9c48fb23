import pytest
import timm
import torch
from timm.models import save_for_hf
from torch import nn

import timm_ssm  # noqa: F401  registers the models
from timm_ssm.models.stvideomamba import checkpoint_filter_fn, sinusoidal_pos_embed
from timm_ssm.ops.naive import causal_conv1d_naive, selective_scan_naive

from .utils import load_reference

SMALL = dict(img_size=32, patch_size=8, embed_dim=32, num_classes=7)


def small(**kwargs):
    torch.manual_seed(0)
    return timm.create_model('stvideomamba_tiny_patch16_f16_224', **{**SMALL, 'num_frames': 6, 'depth': 3, **kwargs})


def test_architecture():
    model = timm.create_model('stvideomamba_small_patch16_f16_224', num_classes=174, device='meta')
    assert abs(sum(p.numel() for p in model.parameters()) / 26.3e6 - 1) < .001
    assert model.pos_embed.shape == (1, 1 + 8 * 14 * 14, 384) and len(model.blocks) == 24
    assert model.patch_embed.proj.kernel_size == model.patch_embed.proj.stride == (2, 16, 16)
    assert isinstance(model.norm, nn.LayerNorm) and isinstance(model.blocks[0].norm, nn.LayerNorm)
    assert model.norm.bias is not None


# Which tokens of 2 frames of 3 patches behind the class token (0) the reverse branch visits first to last
VISITS = {
    'spatiotemporal': [6, 5, 4, 3, 2, 1, 0],
    'spatial': [3, 2, 1, 6, 5, 4, 0],
    'temporal': [4, 5, 6, 1, 2, 3, 0],
}


@pytest.mark.parametrize('order', list(VISITS))
def test_reverse_orders(order):
    """The mixer against naive ops that walk explicitly arranged tokens forward."""
    mixer = small(num_frames=4, reverse_order=order).blocks[0].mixer.double()
    for p in mixer.parameters():
        nn.init.normal_(p, std=.5)
    x = torch.randn(2, 7, 32, dtype=torch.float64)
    u, z = mixer.in_proj(x).chunk(2, -1)

    def branch(u, z, conv, x_proj, dt_proj, A_log, D):
        c = causal_conv1d_naive(u, conv.weight.squeeze(1), conv.bias)
        dt, B, C = x_proj(c).split([2, 16, 16], -1)
        return selective_scan_naive(c, dt @ dt_proj.weight.T, -A_log.exp(), B, C, D, z, dt_proj.bias)

    y = branch(u, z, mixer.conv1d, mixer.x_proj, mixer.dt_proj, mixer.A_log, mixer.D)
    visit = torch.tensor(VISITS[order])
    y_b = branch(
        u[:, visit], z[:, visit], mixer.conv1d_b, mixer.x_proj_b, mixer.dt_proj_b, mixer.A_b_log, mixer.D_b)
    torch.testing.assert_close(mixer(x), mixer.out_proj(y + y_b[:, visit.argsort()]))


def test_position_embeddings():
    x = torch.randn(1, 3, 6, 32, 32)
    plain, sine, learnt = (small(pos_embed_type=t).eval() for t in ('none', 'sinusoidal', 'learnable'))
    assert plain.pos_embed is None and sine.pos_embed is None and learnt.pos_embed.requires_grad
    sine.load_state_dict(plain.state_dict(), strict=True)
    tokens = plain._pos_embed(plain.patch_embed(x))
    added = sine._pos_embed(sine.patch_embed(x)) - tokens
    assert tokens.shape == (1, 49, 32)
    for t, c in ((0, 0), (5, 0), (5, 1), (48, 6), (48, 7)):
        angle = torch.tensor(t / 10000 ** (c // 2 * 2 / 32))
        torch.testing.assert_close(added[0, t, c], angle.cos() if c % 2 else angle.sin(), rtol=1e-4, atol=1e-4)
    assert sinusoidal_pos_embed(3, 5).shape == (1, 3, 5)
    sine.set_input_size((32, 64))
    assert sine(torch.randn(1, 3, 6, 32, 64)).shape == (1, 7)


# Image weights

def from_image(weights, **kwargs):
    loading = {k: kwargs.pop(k) for k in ('pos_embed_init', 'image_source') if k in kwargs}
    model = small(**kwargs).eval()
    model.load_state_dict(checkpoint_filter_fn(weights, model, **loading), strict=True)
    return model


def test_expand():
    _, weights, _ = load_reference('videomamba_image')
    model = from_image(weights)
    assert torch.equal(model.pos_embed[:, :1], weights['pos_embed'][:, :1])
    for frame in model.pos_embed[:, 1:].unflatten(1, (3, 16)).unbind(1):
        assert torch.equal(frame, weights['pos_embed'][:, 1:])
    kernel = model.patch_embed.proj.weight
    torch.testing.assert_close(kernel, (weights['patch_embed.proj.weight'] / 2).unsqueeze(2).expand_as(kernel))
    assert torch.equal(model.norm.weight, weights['norm_f.weight']) and torch.count_nonzero(model.norm.bias) == 0
    assert torch.equal(model.head.weight, small().head.weight)
    larger = from_image(weights, img_size=48)
    assert larger.pos_embed.shape == (1, 1 + 3 * 36, 32)


def test_interpolate_tokens():
    _, weights, _ = load_reference('videomamba_image')
    ramp = torch.arange(17.).view(1, 17, 1).expand(-1, -1, 32)
    model = from_image({**weights, 'pos_embed': ramp}, pos_embed_init='interpolate_tokens')
    tokens = model.pos_embed[0, :, 3]
    assert tokens[0] == 0
    torch.testing.assert_close(tokens[2:-1], 1 + (torch.arange(46.) + 1.5) / 3 - .5)
    assert tokens[1] == 1 and tokens[-1] == 16


def test_interpolate_channels():
    _, weights, _ = load_reference('videomamba_image')
    ramp = torch.arange(32.).expand(1, 17, 32)
    model = from_image({**weights, 'pos_embed': ramp}, pos_embed_init='interpolate_channels')
    assert torch.equal(model.pos_embed[0, 0], ramp[0, 0])
    channels = model.pos_embed[0, 1:].unflatten(0, (3, 16))[:, 5].flatten()  # 3 frames x 32 channels of patch 5
    torch.testing.assert_close(channels[1:-1], (torch.arange(94.) + 1.5) / 3 - .5)


def test_random():
    _, weights, _ = load_reference('videomamba_image')
    assert torch.equal(from_image(weights, pos_embed_init='random').pos_embed, small().pos_embed)


def test_vim_weights():
    """The averaged directions become a sum of halves, and the class token's row comes to the front."""
    _, weights, _ = load_reference('vim_image')
    model = from_image(weights, image_source='vim')
    torch.testing.assert_close(
        model.blocks[1].mixer.out_proj.weight, weights['layers.1.mixer.out_proj.weight'] / 2)
    assert torch.equal(model.pos_embed[:, 0], weights['pos_embed'][:, 8])
    vim = timm.create_model('vim_tiny_patch16_224', depth=3, **SMALL)
    from timm_ssm.models.vim import checkpoint_filter_fn as vim_filter_fn
    vim.load_state_dict(vim_filter_fn(weights, vim))
    ours = from_image(vim.state_dict(), image_source='vim')
    assert all(torch.equal(v, ours.state_dict()[k]) for k, v in model.state_dict().items())


def test_image_weights_through_create_model(tmp_path):
    _, weights, _ = load_reference('videomamba_image')
    torch.save({'model': weights}, tmp_path / 'image.pth')
    overlay = dict(file=str(tmp_path / 'image.pth'), num_classes=7)
    model = small(pretrained=True, pretrained_cfg_overlay=overlay, pos_embed_init='random')
    assert torch.equal(model.blocks[1].mixer.D, weights['layers.1.mixer.D'])
    assert not torch.equal(model.pos_embed[:, 1:17], weights['pos_embed'][:, 1:])


# Clip weights of other sizes

def test_own_checkpoint_of_other_sizes():
    source = small()
    with torch.no_grad():
        frame, rows = torch.arange(3.).repeat_interleave(16), torch.arange(4.).repeat_interleave(4).repeat(3)
        source.pos_embed[:, 1:] = (10 * frame + rows)[:, None]
    longer = from_image(source.state_dict(), num_frames=12)
    got = longer.pos_embed[0, 1:, 0].unflatten(0, (6, 4, 4))
    torch.testing.assert_close(got[:, 2, 1], 10 * torch.tensor([0., .25, .75, 1.25, 1.75, 2.]) + 2)
    larger = from_image(source.state_dict(), img_size=64)
    source.set_input_size(64)
    assert torch.equal(larger.pos_embed, source.pos_embed)
    by_frame = larger.pos_embed[0, 1:, 0].unflatten(0, (3, 64)).mean(1)
    torch.testing.assert_close(by_frame, torch.tensor([1.5, 11.5, 21.5]), rtol=0, atol=.1)


def test_frames_and_image_size_told_apart(tmp_path):
    """4 frames of 4 x 4 patches are as many as 1 frame of 8 x 8: what is known of the checkpoint decides, or no one."""
    source = small(num_frames=8)
    frame = torch.arange(4.).repeat_interleave(16)
    with torch.no_grad():
        source.pos_embed[:, 1:] = frame[:, None]
    model = small(num_frames=8, img_size=64)
    with pytest.raises(ValueError, match=r'pos_embed has 64 patches.* could be both: .*input_size'):
        checkpoint_filter_fn(source.state_dict(), model)
    torch.save(source.state_dict(), tmp_path / 'own.pth')
    overlay = dict(file=str(tmp_path / 'own.pth'), num_classes=7, input_size=(3, 32, 32))
    told = small(num_frames=8, img_size=64, pretrained=True, pretrained_cfg_overlay=overlay)
    torch.testing.assert_close(told.pos_embed[0, 1:, 0], torch.arange(4.).repeat_interleave(64))
    save_for_hf(source, tmp_path / 'hub', model_args=dict(**SMALL, num_frames=8, depth=3), safe_serialization=True)
    if hasattr(source, 'pretrained_model_args'):  # timm 1.0.31: frame count and size may both change
        both = timm.create_model(f'local-dir:{tmp_path}/hub', pretrained=True, num_frames=4, img_size=64)
        torch.testing.assert_close(both.pos_embed[0, 1:, 0], torch.tensor([.5, 2.5]).repeat_interleave(64))


def test_refused():
    _, weights, _ = load_reference('videomamba_video')
    with pytest.raises(ValueError, match='checkpoint: it is of a VideoMamba for clips'):
        checkpoint_filter_fn(weights, small())
    with pytest.raises(ValueError, match="pos_embed_init: got 'tile', needs one of 'expand'"):
        checkpoint_filter_fn({}, small(), pos_embed_init='tile')
    with pytest.raises(ValueError, match="image_source: got 'vit', needs 'videomamba' or 'vim'"):
        checkpoint_filter_fn({}, small(), image_source='vit')
    with pytest.raises(ValueError, match='checkpoint: pos_embed has 48 patches'):
        checkpoint_filter_fn(small().state_dict(), small(num_frames=10, img_size=40))
    for kwargs, message in (
            (dict(reverse_order='time'), "reverse_order: got 'time'"),
            (dict(pos_embed_type='rope'), "pos_embed_type: got 'rope'"),
            (dict(num_frames=1), 'num_frames: got 1, needs at least 2'),
            (dict(num_frames=5), 'num_frames: got 5, needs a multiple of tubelet_size 2'),
            (dict(weight_init='he'), "weight_init: got 'he'")):
        with pytest.raises(ValueError, match=message):
            small(**kwargs)
