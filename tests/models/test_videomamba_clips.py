import re

import pytest
import timm
import torch
from torch import nn

import timm_ssm  # noqa: F401  registers the models
from timm_ssm.models.videomamba import checkpoint_filter_fn

from .utils import assert_close, load_reference, record_blocks, released_shapes

SMALL = dict(img_size=32, patch_size=8, embed_dim=32, depth=2)


def clip_model(**kwargs):
    torch.manual_seed(0)
    return timm.create_model('videomamba_tiny_patch16_f8_224', **{**SMALL, 'num_classes': 7, **kwargs})


def image_model(**kwargs):
    torch.manual_seed(1)
    return timm.create_model('videomamba_tiny_patch16_224', **{**SMALL, 'num_classes': 7, **kwargs})


def reference_weights():
    config, weights, tensors = load_reference('videomamba_video')
    config.pop('kernel_size')  # the authors' name for the tubelet's depth
    return config, weights, tensors


def loaded(weights, **kwargs):
    model = clip_model(**kwargs).eval()
    model.load_state_dict(checkpoint_filter_fn(weights, model), strict=True)
    return model


def test_reference_logits_and_activations():
    config, weights, reference = reference_weights()
    model = loaded(weights, **config)
    got = record_blocks(model)
    model.patch_embed.register_forward_hook(
        lambda m, a, out: got.__setitem__('mid/patch_embed', out.permute(0, 4, 1, 2, 3)))
    with torch.no_grad():
        assert_close(model(reference['x']), reference['logits'])
    mids = [k for k in reference if k.startswith('mid/')]
    assert len(mids) == 5
    for k in mids:
        assert_close(got[k], reference[k])


@pytest.mark.parametrize('size, num_frames', [('small', 8), ('middle', 16)])
def test_released_names_and_sizes(size, num_frames):
    model = timm.create_model(f'videomamba_{size}_patch16_f{num_frames}_224', device='meta')
    shapes = released_shapes()[f'videomamba_{size}_video_f{num_frames}_224']
    released = {k: torch.empty(s, device='meta') for k, s in shapes.items()}
    model.load_state_dict(checkpoint_filter_fn(released, model), strict=True, assign=True)
    assert model.num_classes == 400


# Image weights

@pytest.mark.parametrize('inflation', ['center', 'mean'])
def test_image_weights_in_a_clip_model(inflation, tmp_path):
    """The way a user does it: tokens of a still clip are those of the image; temporal embedding zero, head new."""
    image = image_model(num_classes=5).eval()
    torch.save(image.state_dict(), tmp_path / 'image.pth')
    clip = clip_model(
        num_frames=6, tubelet_size=3, pretrained=True, inflation=inflation,
        pretrained_cfg_overlay=dict(file=str(tmp_path / 'image.pth'), num_classes=5)).eval()
    x = torch.randn(2, 3, 32, 32)
    still = x.unsqueeze(2).expand(-1, -1, 6, -1, -1)
    for frame in clip.patch_embed(still).unbind(1):
        torch.testing.assert_close(frame, image.patch_embed(x)[:, 0])
    kernel = image.patch_embed.proj.weight
    for t, part in enumerate(clip.patch_embed.proj.weight.unbind(2)):
        want = kernel / 3 if inflation == 'mean' else kernel * (t == 1)
        torch.testing.assert_close(part, want)
    assert torch.count_nonzero(clip.temporal_pos_embed) == 0
    assert torch.equal(clip.pos_embed, image.pos_embed)
    assert torch.equal(clip.blocks[1].mixer.A_b_log, image.blocks[1].mixer.A_b_log)
    assert clip.head.weight.shape == (7, 32) and clip.head.weight.std() > 0


def test_head_of_image_classes_is_replaced_even_if_it_fits():
    image, clip = image_model(), clip_model()
    before = clip.head.weight.clone()
    clip.load_state_dict(checkpoint_filter_fn(image.state_dict(), clip), strict=True)
    assert torch.equal(clip.head.weight, before) and not torch.equal(before, image.head.weight)
    headless = clip_model(num_classes=0)
    headless.load_state_dict(checkpoint_filter_fn(image.state_dict(), headless), strict=True)


def test_image_weights_of_another_patch_and_input_size():
    image = image_model(img_size=64, patch_size=16)
    clip = loaded(image.state_dict(), img_size=48)
    assert clip.patch_embed.proj.weight.shape == (32, 3, 1, 8, 8) and clip.pos_embed.shape == (1, 37, 32)


def test_other_input_channels(tmp_path):
    torch.save(clip_model(num_frames=4).state_dict(), tmp_path / 'clip.pth')
    overlay = dict(file=str(tmp_path / 'clip.pth'), num_classes=7)
    colour = clip_model(num_frames=4, pretrained=True, pretrained_cfg_overlay=overlay).eval()
    grey = clip_model(num_frames=4, in_chans=1, pretrained=True, pretrained_cfg_overlay=overlay).eval()
    x = torch.randn(2, 1, 4, 32, 32)
    torch.testing.assert_close(grey(x), colour(x.expand(-1, 3, -1, -1, -1)))


@pytest.mark.parametrize('tubelet_size', [1, 4])
def test_checkpoint_of_other_tubelets(tubelet_size, tmp_path):
    """One frame is inflated, several are not resampled."""
    torch.save(clip_model(tubelet_size=2).state_dict(), tmp_path / 'clip.pth')
    overlay = dict(file=str(tmp_path / 'clip.pth'), num_classes=7)
    with pytest.raises(ValueError, match=f"have 2 frames, the model's {tubelet_size}; .* tubelet_size=2"):
        clip_model(tubelet_size=tubelet_size, pretrained=True, pretrained_cfg_overlay=overlay)
    image_like = clip_model(tubelet_size=1)
    inflated = loaded(image_like.state_dict(), tubelet_size=4)
    kernel = image_like.patch_embed.proj.weight
    torch.testing.assert_close(inflated.patch_embed.proj.weight, torch.cat([kernel * (t == 2) for t in range(4)], 2))


def test_refused_checkpoints(tmp_path):
    with pytest.raises(ValueError, match="inflation: got 'middle', needs 'center' or 'mean'"):
        checkpoint_filter_fn(image_model().state_dict(), clip_model(), inflation='middle')
    torch.save(clip_model().state_dict(), tmp_path / 'clip.pth')
    overlay = dict(file=str(tmp_path / 'clip.pth'), num_classes=7)
    with pytest.raises(ValueError, match=r'cannot load .*clip\.pth: checkpoint: it is of a clip model'):
        image_model(pretrained=True, pretrained_cfg_overlay=overlay)
    with pytest.raises(ValueError, match=r"cannot load .*clip\.pth: inflation: got 'middle'"):
        clip_model(pretrained=True, pretrained_cfg_overlay=overlay, inflation='middle')


# Other frame counts and sizes

def test_other_frame_count():
    """The temporal embedding is interpolated: a linear ramp stays one inside, a constant stays constant."""
    config, weights, _ = reference_weights()
    ramp = torch.arange(4.).view(1, 4, 1).expand(-1, -1, 32)
    model = loaded({**weights, 'temporal_pos_embedding': ramp}, **{**config, 'num_frames': 8})
    want = torch.tensor([0., .25, .75, 1.25, 1.75, 2.25, 2.75, 3.])
    torch.testing.assert_close(model.temporal_pos_embed[0, :, 5], want)
    assert model(torch.randn(1, 3, 8, 32, 32)).shape == (1, 7)


@pytest.mark.parametrize('img_size', [48, (32, 64)])
def test_other_input_size(img_size):
    config, weights, _ = reference_weights()
    larger = loaded(weights, **{**config, 'img_size': img_size})
    resized = loaded(weights, **config)
    resized.set_input_size(img_size)
    dynamic = loaded(weights, **config, dynamic_img_size=True)
    x = torch.randn(2, 3, 4, *larger.patch_embed.img_size)
    with torch.no_grad():
        torch.testing.assert_close(larger(x), resized(x))
        torch.testing.assert_close(larger(x), dynamic(x))


def test_other_patch_size():
    model = clip_model(num_frames=4, tubelet_size=2)
    model.set_input_size(patch_size=4)
    assert model.patch_embed.proj.weight.shape == (32, 3, 2, 4, 4)
    assert model(torch.randn(1, 3, 4, 32, 32)).shape == (1, 7)


@pytest.mark.parametrize('shape, message', [
    ((1, 3, 4, 32, 32), 'x: got 4 frames, needs num_frames 8'),
    ((1, 3, 32, 32), r'x: got 4 dimensions, needs clips \(batch, channels, frames, height, width\)'),
    ((1, 3, 8, 32, 40), "x: got width 40, needs the model's img_size 32"),
])
def test_wrong_input(shape, message):
    with pytest.raises(AssertionError, match=message):
        clip_model()(torch.randn(shape))


# timm's model interface

def test_features_have_a_temporal_axis():
    model = clip_model(num_frames=4, tubelet_size=2, img_size=(32, 64)).eval()
    x = torch.randn(2, 3, 4, 32, 64)
    final, maps = model.forward_intermediates(x, norm=True)
    assert final.shape == (2, 1 + 2 * 4 * 8, 32) and [m.shape for m in maps] == [(2, 32, 2, 4, 8)] * 2
    torch.testing.assert_close(maps[-1].flatten(2).mT, final[:, 1:])
    torch.testing.assert_close(final, model.forward_features(x))
    backbone = clip_model(num_frames=4, features_only=True, out_indices=(0, 1))
    assert [m.shape for m in backbone(torch.randn(1, 3, 4, 32, 32))] == [(1, 32, 4, 4, 4)] * 2
    averaged = clip_model(num_frames=4, tubelet_size=2, img_size=(32, 64), global_pool='avg').eval()
    torch.testing.assert_close(averaged.pool(final), final[:, 1:].mean(1))


def test_order_of_frames_matters():
    model, x = clip_model().eval(), torch.randn(1, 3, 8, 32, 32)
    nn.init.normal_(model.head.weight)
    with torch.no_grad():
        assert not torch.allclose(model(x), model(x.flip(2)), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize('name', timm.list_models('videomamba_*_patch16_f*', pretrained=True))
def test_registry(name):
    frames, img_size = (int(n) for n in re.findall(r'_f(\d+)_(\d+)', name)[0])
    model = timm.create_model(name, device='meta', depth=1)
    assert model.patch_embed.num_frames == frames and model.patch_embed.img_size == (img_size, img_size)


@pytest.mark.parametrize('size, embed_dim', [('tiny', 192), ('small', 384), ('middle', 576), ('base', 768)])
def test_authors_names(size, embed_dim):
    with pytest.warns(UserWarning, match=f'videomamba_{size} to current videomamba_{size}_patch16_224'):
        model = timm.create_model(f'videomamba_{size}', num_frames=8, depth=1, device='meta')
    assert model.embed_dim == embed_dim and model.patch_embed.is_clip
