"""What every variant of the hierarchical families can do, at a small width and depth."""
import copy
from functools import partial

import pytest
import timm
import torch
from timm.models import group_parameters
from torch import nn

import timm_ssm  # noqa: F401  registers the models

from .utils import check_train_step

VARIANTS = timm.list_models(module=['mambavision', 'groupmamba', 'vmamba', 'spatialmamba'])
ONE_OF_EACH = ['mambavision_tiny', 'groupmamba_tiny', 'vmamba_tiny', 'spatialmamba_tiny']
NEWER = ['vmamba_tiny', 'spatialmamba_tiny']  # the others have these tests in their own files
# the other variants of these differ by what `tiny` sets
TRAINED = [n for n in VARIANTS if not n.startswith(('vmamba', 'spatialmamba'))] + [*NEWER, 'vmamba_small']


def tiny(name, **kwargs):
    """The variant at a small width, with every kind of its blocks."""
    torch.manual_seed(0)
    if name.startswith('mambavision'):
        small = dict(stem_dim=8, embed_dim=16, depths=(1, 1, 3, 2), num_heads=(1, 1, 2, 4), img_size=64)
    elif name.startswith('vmamba'):
        small = dict(embed_dims=(16, 24, 32, 48), depths=(1, 1, 2, 1))
    elif name.startswith('spatialmamba'):
        small = dict(embed_dim=8, depths=(1, 1, 2, 1))
    else:
        small = dict(stem_dim=8, embed_dims=(16, 32, 48, 64), depths=(1, 2, 2, 1))
    return timm.create_model(name, **{**small, 'num_classes': 5, **kwargs})


def test_all_variants_are_here():
    assert len(VARIANTS) == 7 + 4 + 6 + 3


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


@pytest.mark.parametrize('name', TRAINED)
def test_train_step_and_state_dict(name):
    x = torch.randn(2, 3, 64, 64)
    model = check_train_step(partial(tiny, name), x)
    with torch.no_grad():
        maps = model.forward_intermediates(x, intermediates_only=True)
    assert [m.shape for m in maps] == [(2, f['num_chs'], 64 // f['reduction'], 64 // f['reduction'])
                                       for f in model.feature_info]


@pytest.mark.parametrize('name', [*ONE_OF_EACH, 'stable_groupmamba_small'])
def test_symbolic_trace(name):
    """Plain torch.fx, without timm's leaf functions, takes the whole model; the graph takes another batch size."""
    model = tiny(name).eval()
    graph = torch.fx.symbolic_trace(model)
    for batch in (1, 2):
        x = torch.randn(batch, 3, 64, 64)
        torch.testing.assert_close(graph(x), model(x))


@pytest.mark.parametrize('name', ONE_OF_EACH)
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


@pytest.mark.parametrize('name', [*ONE_OF_EACH, 'stable_groupmamba_small'])
def test_head_before_pooling(name):
    """timm resets a head whose pooling is '': it is made, and refused when it runs without a pooling."""
    model, x = tiny(name, num_classes=0, global_pool='').eval(), torch.randn(2, 3, 64, 64)
    model.reset_classifier(3)
    with pytest.raises(AssertionError, match="global_pool: got '' with a head, needs a pooling"):
        model(x)
    model.reset_classifier(3, 'avg')
    assert model(x).shape == (2, 3)


def test_image_size():
    """A family without windows says that it needs none; no image has no pixels."""
    for name in set(ONE_OF_EACH) - {'mambavision_tiny'}:
        with pytest.raises(TypeError, match='img_size: got 64, but .*Mamba takes images of any size: leave it out'):
            tiny(name, img_size=64)
    model = tiny('mambavision_tiny')
    for wrong in (lambda: tiny('mambavision_tiny', img_size=0), lambda: model.set_input_size((64, 0))):
        with pytest.raises(ValueError, match='img_size: got .*0.*, needs at least 1'):
            wrong()
    assert model.img_size == (64, 64)


@pytest.mark.parametrize('name', NEWER)
@pytest.mark.parametrize('height, width', [(92, 60), (8, 8)])
def test_any_input_size(name, height, width):
    """Strides round up, and the maps are those that the features' indices say."""
    model, x = tiny(name).eval(), torch.randn(2, 3, height, width)
    with torch.no_grad():
        final, maps = model.forward_intermediates(x, norm=True)
        assert model(x).shape == (2, 5)
        assert [m.shape[2:] for m in maps] == [(-(-height // s), -(-width // s)) for s in (4, 8, 16, 32)]
        torch.testing.assert_close(maps[3], final)
        torch.testing.assert_close(final, model.forward_features(x))
        last, = tiny(name, features_only=True, out_indices=[2]).eval()(x)
        torch.testing.assert_close(last, maps[2])
        pruned = copy.deepcopy(model)
        assert pruned.prune_intermediate_layers([1]) == [1] and len(pruned.stages) == 2
        assert pruned(x).shape[1] == pruned.num_features == maps[1].shape[1]


def two_stages(name, **kwargs):
    """A model that is quick to trace, and where a machine has no fast convolutions in bfloat16."""
    small = dict(depths=(1, 1), **(dict(embed_dims=(16, 24)) if name.startswith('vmamba') else {}))
    return tiny(name, **small, **kwargs).eval()


@pytest.mark.parametrize('name', NEWER)
def test_script_compile_and_export(name):
    model, x = two_stages(name), torch.randn(2, 3, 64, 32)
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.script(model)(x), model(x), rtol=1e-4, atol=1e-5)
        program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim('batch', max=64)},))
        y = torch.randn(3, 3, 64, 32)
        torch.testing.assert_close(program.module()(y), model(y))
        with torch.autocast('cpu', torch.bfloat16):  # the float32 scan is no graph break
            torch.testing.assert_close(torch.compile(model, fullgraph=True, backend='eager')(x), model(x))


@pytest.mark.parametrize('name', NEWER)
def test_onnx(name, tmp_path):
    pytest.importorskip('onnxscript')
    onnxruntime = pytest.importorskip('onnxruntime')
    model, x = two_stages(name), torch.randn(2, 3, 32, 64)
    path = str(tmp_path / 'model.onnx')
    torch.onnx.export(model, (x,), path, input_names=['x'], dynamo=False, dynamic_axes={'x': {0: 'batch'}})
    y = torch.randn(3, 3, 32, 64)
    got, = onnxruntime.InferenceSession(path).run(None, {'x': y.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), model(y), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize('name', NEWER)
def test_gradient_checkpointing_leaves_gradients_unchanged(name):
    model, x = two_stages(name, drop_path_rate=.3).train(), torch.randn(2, 3, 64, 64)
    gradients = []
    for enable in (False, True):
        torch.manual_seed(0)
        model.zero_grad()
        model.set_grad_checkpointing(enable)
        model(x).square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


@pytest.mark.parametrize('name', NEWER)
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64])
def test_dtype(name, dtype):
    """Built in a dtype, or under autocast: close to float32, the scans in float32 at least."""
    model, x = two_stages(name), torch.randn(2, 3, 64, 64)
    other = two_stages(name, dtype=dtype)
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        want = model(x)
        got = other(x.to(dtype))
        with torch.autocast('cpu', torch.bfloat16):
            torch.testing.assert_close(model(x).float(), want, rtol=0., atol=.05 * want.abs().max().item())
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), want, rtol=0., atol=.05 * want.abs().max().item())


@pytest.mark.parametrize('name', NEWER)
def test_parameter_groups(name):
    """Every block has its own group; A and D take no weight decay."""
    model = tiny(name)
    assert len(model.no_weight_decay()) == 2 * 5
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    blocks = [f'stages.{i}.blocks.{j}.' for i, s in enumerate(model.stages) for j in range(len(s.blocks))]
    assert len({groups[n] for b in blocks for n in groups if n.startswith(b)}) == len(blocks) == 5
    assert groups['norm.weight'] == 5 and groups['head.weight'] == max(groups.values()) == 6


@pytest.mark.parametrize('name', NEWER)
def test_every_parameter_learns(name):
    model = tiny(name).double()
    for p in model.parameters():
        nn.init.normal_(p, std=.3)
    model(torch.randn(2, 3, 64, 64, dtype=torch.float64)).square().sum().backward()
    # a convolution's bias before a batch norm has no effect on what follows
    dead = [n for n, p in model.named_parameters() if p.grad.abs().max() == 0]
    assert not dead, dead
