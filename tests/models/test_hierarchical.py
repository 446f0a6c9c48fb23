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
