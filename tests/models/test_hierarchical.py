"""What every variant of the hierarchical families can do, at a small width and depth."""
from functools import partial

import pytest
import timm
import torch

import timm_ssm  # noqa: F401  registers the models

from .utils import check_train_step

VARIANTS = timm.list_models(module=['mambavision', 'groupmamba'])


def tiny(name, **kwargs):
    """The variant at a small width, with every kind of its blocks."""
    torch.manual_seed(0)
    if name.startswith('mambavision'):
        small = dict(stem_dim=8, embed_dim=16, depths=(1, 1, 3, 2), num_heads=(1, 1, 2, 4), img_size=64)
    else:
        small = dict(stem_dim=8, embed_dims=(16, 32, 48, 64), depths=(1, 2, 2, 1))
    return timm.create_model(name, **{**small, 'num_classes': 5, **kwargs})


def test_all_variants_are_here():
    assert len(VARIANTS) == 7 + 4


@pytest.mark.parametrize('name', VARIANTS)
def test_build_on_meta(name):
    """The full-size variant: its configuration agrees with its registry entry and its feature_info."""
    model = timm.create_model(name, device='meta')
    cfg = timm.get_pretrained_cfg(name)
    assert all(v.is_meta for v in model.state_dict().values())
    classifiers = model.get_classifier()
    classifiers = classifiers if isinstance(classifiers, tuple) else (classifiers,)
    assert [c.out_features for c in classifiers] == [1000] * len(classifiers) and cfg.num_classes == 1000
    assert [f['reduction'] for f in model.feature_info] == [4, 8, 16, 32]
    assert model.feature_info[-1]['num_chs'] == model.num_features == classifiers[0].in_features
    assert cfg.pool_size == tuple(n // 32 for n in cfg.input_size[1:])


@pytest.mark.parametrize('name', VARIANTS)
def test_train_step_and_state_dict(name):
    x = torch.randn(2, 3, 64, 64)
    model = check_train_step(partial(tiny, name), x)
    with torch.no_grad():
        maps = model.forward_intermediates(x, intermediates_only=True)
    assert [m.shape for m in maps] == [(2, f['num_chs'], 64 // f['reduction'], 64 // f['reduction'])
                                       for f in model.feature_info]


@pytest.mark.parametrize('name', ['mambavision_tiny', 'groupmamba_tiny', 'stable_groupmamba_small'])
def test_symbolic_trace(name):
    """Plain torch.fx, without timm's leaf functions, takes the whole model; the graph takes another batch size."""
    model = tiny(name).eval()
    graph = torch.fx.symbolic_trace(model)
    for batch in (1, 2):
        x = torch.randn(batch, 3, 64, 64)
        torch.testing.assert_close(graph(x), model(x))


@pytest.mark.parametrize('name', ['mambavision_tiny', 'groupmamba_tiny'])
def test_wrong_arguments_and_input(name):
    model = tiny(name)
    for pool_without in (lambda: tiny(name, global_pool=''), lambda: model.reset_classifier(3, '')):
        with pytest.raises(ValueError, match=r"global_pool: got '' with num_classes \d, needs a pooling, or num_class"):
            pool_without()
    assert model.num_classes == 5 and model(torch.randn(2, 3, 64, 64)).shape == (2, 5)
    assert tiny(name, num_classes=0, global_pool='')(torch.randn(1, 3, 64, 64)).shape[2:] == (2, 2)
    with pytest.raises(AssertionError, match='x: got 4 channels, needs in_chans 3'):
        model(torch.randn(1, 4, 64, 64))
    with pytest.raises(AssertionError, match='x: got 3 dimensions, needs images'):
        model.forward_intermediates(torch.randn(3, 64, 64))
    for indices in ((), []):
        with pytest.raises(ValueError, match='indices: got .*, needs at least one of 0 to 3'):
            tiny(name, features_only=True, out_indices=indices)
        with pytest.raises(ValueError, match='indices: got .*, needs at least one of 0 to 3'):
            model.forward_intermediates(torch.randn(1, 3, 64, 64), indices=indices)


def test_image_size():
    """A family without windows says that it needs none; no image has no pixels."""
    with pytest.raises(TypeError, match='img_size: got 64, but GroupMamba takes images of any size: leave it out'):
        tiny('groupmamba_tiny', img_size=64)
    model = tiny('mambavision_tiny')
    for wrong in (lambda: tiny('mambavision_tiny', img_size=0), lambda: model.set_input_size((64, 0))):
        with pytest.raises(ValueError, match='img_size: got .*0.*, needs at least 1'):
            wrong()
    assert model.img_size == (64, 64)
