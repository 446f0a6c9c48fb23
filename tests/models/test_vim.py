import pytest
import timm
import torch

import timm_ssm  # noqa: F401  registers the models
from timm_ssm.models.vim import checkpoint_filter_fn

from .utils import assert_close, load_reference, record_blocks, released_shapes


def small(**kwargs):
    torch.manual_seed(0)
    return timm.create_model('vim_tiny_patch16_224', **{
        **dict(img_size=32, patch_size=8, embed_dim=32, depth=3, num_classes=7), **kwargs})


def reference_model(**kwargs):
    config, weights, tensors = load_reference('vim_image')
    model = small(**config, **kwargs).eval()
    model.load_state_dict(checkpoint_filter_fn(weights, model), strict=True)
    return model, weights, tensors


def test_reference_logits_and_activations():
    model, _, reference = reference_model()
    got = record_blocks(model)
    with torch.no_grad():
        assert_close(model(reference['x']), reference['logits'])
    mids = [k for k in reference if k.startswith('mid/')]
    assert len(mids) == 6
    for k in mids:
        assert_close(got[k], reference[k])


def test_class_token_comes_out_first():
    model, _, reference = reference_model()
    x = reference['x']
    tokens = model.forward_features(x)
    torch.testing.assert_close(model.head(tokens[:, 0]), model(x))
    final, pairs = model.forward_intermediates(x, return_prefix_tokens=True, norm=True, output_fmt='NLC')
    torch.testing.assert_close(torch.cat(pairs[-1][::-1], dim=1), final)
    torch.testing.assert_close(final, tokens)


@pytest.mark.parametrize('img_size', [48, (32, 64), 24])  # 24: an odd number of patches
def test_other_input_sizes(img_size):
    """Loading the authors' checkpoint at another size, set_input_size and dynamic_img_size agree."""
    resized, weights, _ = reference_model()
    dynamic, _, _ = reference_model(dynamic_img_size=True)
    loaded = small(img_size=img_size).eval()
    loaded.load_state_dict(checkpoint_filter_fn(weights, loaded), strict=True)
    resized.set_input_size(img_size)
    x = torch.randn(2, 3, *loaded.patch_embed.img_size)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), resized(x))
        torch.testing.assert_close(loaded(x), dynamic(x))
    assert torch.equal(loaded.pos_embed[:, 0], weights['pos_embed'][:, 8])  # the middle of 16 patches


@pytest.mark.parametrize('weight_init', ['', 'mamba'])
def test_released_initialisation(weight_init):
    """The authors zero the biases of the reverse step sizes alone, and leave Mamba's projections as they are."""
    model = small(depth=4, embed_dim=64, weight_init=weight_init)
    for block in model.blocks:
        mixer = block.mixer
        for proj, zero in ((mixer.dt_proj, False), (mixer.dt_proj_b, not weight_init)):
            dt = torch.nn.functional.softplus(proj.bias)
            assert (proj.bias == 0).all() if zero else 1e-3 * .99 <= dt.min() < dt.max() <= .1 * 1.01
        for proj in (mixer.in_proj, mixer.x_proj, mixer.x_proj_b, mixer.dt_proj, mixer.dt_proj_b):
            bound = proj.in_features ** -.5
            assert .9 * bound < proj.weight.abs().max() <= bound
        bound = 128 ** -.5 / 4 ** .5  # over sqrt(depth)
        assert .9 * bound < mixer.out_proj.weight.abs().max() <= bound
    assert abs(model.cls_token.std().item() / .02 - 1) < .3
    assert abs(model.patch_embed.proj.weight.std().item() * (3 * 8 * 8) ** .5 - 1) < .1
    assert (model.patch_embed.proj.bias == 0).all()


def test_own_checkpoint_keeps_its_rows():
    model, _, _ = reference_model()
    again = small()
    again.load_state_dict(checkpoint_filter_fn(model.state_dict(), again), strict=True)
    assert torch.equal(again.pos_embed, model.pos_embed)


@pytest.mark.parametrize('size, params', [('tiny', 7_148_008), ('small', 25_796_584), ('base', 97_598_440)])
def test_released_names_and_sizes(size, params):
    """Vim-B's names are VideoMamba-B's, as those of the two smaller sizes are."""
    shapes = released_shapes()
    assert shapes['vim_small_224'] == shapes['videomamba_small_224']
    model = timm.create_model(f'vim_{size}_patch16_224', device='meta')
    family = 'videomamba' if size == 'base' else 'vim'
    released = {k: torch.empty(s, device='meta') for k, s in shapes[f'{family}_{size}_224'].items()}
    model.load_state_dict(checkpoint_filter_fn(released, model), strict=True, assign=True)
    assert sum(p.numel() for p in model.parameters()) == params


def test_overlapping_patches():
    model = timm.create_model('vim_tiny_patch16_stride8_224', depth=1)
    assert model.patch_embed.grid_size == (27, 27)
    assert model.forward_features(torch.randn(1, 3, 224, 224)).shape == (1, 27 * 27 + 1, 192)


@pytest.mark.parametrize('name', [
    'vim_tiny_patch16_224', 'vim_tiny_patch16_stride8_224', 'vim_small_patch16_224', 'vim_small_patch16_stride8_224',
    'vim_base_patch16_224'])
def test_authors_names(name):
    token = 'middle_cls_token' if 'base' in name else 'midclstok'
    theirs = f'{name}_bimambav2_final_pool_mean_abs_pos_embed_with_{token}_div2'
    with pytest.warns(UserWarning, match=f'to current {name}'):
        model = timm.create_model(theirs, depth=1, device='meta')
    assert model.embed_dim == dict(tiny=192, small=384, base=768)[name.split('_')[1]]
    assert model.patch_embed.stride == ((8, 8) if 'stride8' in name else (16, 16))
    assert theirs not in timm.list_models('vim_*')
