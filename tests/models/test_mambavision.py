import argparse
import copy
import io

import pytest
import timm
import torch
from safetensors.torch import save as save_safetensors
from timm.models import group_parameters
from timm.models._features import FeatureGetterNet
from torch import nn

import timm_ssm  # noqa: F401  registers the models
from timm_ssm.models.mambavision import MambaVisionMixer, checkpoint_filter_fn

from .utils import assert_close, load_reference, released_shapes

SMALL = dict(stem_dim=8, embed_dim=16, depths=(1, 1, 3, 2), num_heads=(1, 1, 2, 4), img_size=64, num_classes=7)
REFERENCES = ['mambavision', 'mambavision_layerscale_pad']
SIZES = {
    'tiny': 31_794_248,
    'tiny2': 35_104_008,
    'small': 50_140_584,
    'base': 97_685_288,
    'large': 227_961_048,
    'large2': 241_554_824,
    'large3': 739_570_472,
}


def small(**kwargs):
    torch.manual_seed(0)
    return timm.create_model('mambavision_tiny', **{**SMALL, **kwargs})


def reference_arguments(config):
    """The authors' constructor arguments as ours."""
    names = dict(dim='embed_dim', in_dim='stem_dim', layer_scale='ls_init_value')
    return {names.get(k, k): v for k, v in config.items()}


def reference_model(name='mambavision', **kwargs):
    config, weights, tensors = load_reference(name)
    model = small(**{**reference_arguments(config), **kwargs}).eval()
    model.load_state_dict(checkpoint_filter_fn(weights, model), strict=True)
    return model, tensors


# Parity

@pytest.mark.parametrize('name', REFERENCES)
def test_reference_logits_and_activations(name):
    model, reference = reference_model(name)
    modules = {
        'mid/patch_embed': model.stem,
        'mid/levels.0': model.stages[1].downsample,  # the released levels include what begins our next stage
        'mid/levels.1': model.stages[2].downsample,
        'mid/levels.2': model.stages[3].downsample,
        'mid/levels.3': model.stages[3],
    }
    assert set(modules) == {k for k in reference if k.startswith('mid/')}
    got = {}
    for k, module in modules.items():
        module.register_forward_hook(lambda m, a, out, k=k: got.__setitem__(k, out))
    with torch.no_grad():
        logits = model(reference['x'])
    assert_close(logits, reference['logits'])
    for k in modules:
        assert_close(got[k], reference[k])


@pytest.mark.parametrize('size', SIZES)
def test_released_names_and_sizes(size):
    """Every released name and shape loads strictly, and the parameter count is exact."""
    model = timm.create_model(f'mambavision_{size}', device='meta')
    assert sum(p.numel() for p in model.parameters()) == SIZES[size]
    shapes = released_shapes().get(f'mambavision_{size}_224')
    assert (shapes is None) == (size == 'large3')
    if shapes:
        released = {k: torch.empty(s, device='meta') for k, s in shapes.items()}
        model.load_state_dict(checkpoint_filter_fn(released, model), strict=True, assign=True)


def without_counters(state_dict):
    return {k: v for k, v in state_dict.items() if not k.endswith('num_batches_tracked')}


def torch_file(content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize('file, make', [
    ('mambavision_tiny_1k.pth.tar', lambda s: torch_file(
        {'epoch': 3, 'arch': 'x', 'args': argparse.Namespace(lr=1.), 'state_dict': s, 'optimizer': {}})),
    ('mambavision_tiny_1k.pth.tar', lambda s: torch_file({'model': s})),
    ('mambavision_tiny_1k.pth.tar', lambda s: torch_file({'state_dict': {f'module.{k}': v for k, v in s.items()}})),
    ('mambavision_tiny_1k.pth.tar', lambda s: torch_file(without_counters(s))),
    ('model.safetensors', lambda s: save_safetensors({f'model.{k}': v.contiguous() for k, v in s.items()})),
], ids=['state_dict', 'model', 'module prefix', 'no counters', 'safetensors'])
def test_released_files(file, make, hub):
    """The authors' files, from the Hub, with what training leaves in them."""
    config, weights, reference = load_reference('mambavision')
    hub.add('nvidia/MambaVision-T-1K', {file: make(weights)})
    # without a file name timm takes the repository's model.safetensors
    overlay = dict(num_classes=7, **(dict(hf_hub_filename=None) if file == 'model.safetensors' else {}))
    model = small(pretrained=True, pretrained_cfg_overlay=overlay, **reference_arguments(config)).eval()
    with torch.no_grad():
        assert_close(model(reference['x']), reference['logits'])
    config = {**reference_arguments(config), 'num_classes': 5}
    other = small(pretrained=True, pretrained_cfg_overlay=overlay, in_chans=1, **config)
    assert other.head.out_features == 5 and other.stem[0].in_channels == 1


def test_own_checkpoint_round_trip():
    model = small(ls_init_value=1e-5)
    again = small(ls_init_value=1e-5)
    again.load_state_dict(checkpoint_filter_fn(model.state_dict(), again), strict=True)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))


def test_checkpoint_of_another_model_is_refused():
    with pytest.raises(ValueError, match=r'checkpoint: it is not of mambavision_tiny: .* missing'):
        checkpoint_filter_fn(timm.create_model('test_resnet').state_dict(), small())
    with pytest.raises(ValueError, match='checkpoint: it is not of mambavision_tiny: stem'):
        checkpoint_filter_fn(small(embed_dim=32).state_dict(), small())


# Architecture

def test_mixers_come_before_attention():
    for depths, scans in (((1, 1, 4, 3), (2, 2)), ((1, 1, 7, 1), (4, 1))):
        model = small(depths=depths, device='meta')
        for stage, n in zip(model.stages[2:], scans):
            assert [isinstance(b.mixer, MambaVisionMixer) for b in stage.blocks] == [
                i < n for i in range(len(stage.blocks))]


def test_drop_path_grows_over_all_blocks():
    model = small(drop_path_rate=.6)
    rates = [getattr(m, 'drop_prob', 0.) for n, m in model.named_modules() if n.endswith(('drop_path', 'drop_path1'))]
    assert rates == pytest.approx([0., .1, .2, .3, .4, .5, .6])
    assert timm.create_model('mambavision_large3', device='meta').stages[3].blocks[9].drop_path2.drop_prob == 0.5


def test_initialisation():
    """Built in place, and built on meta, materialised and initialised."""
    materialised = small(device='meta').to_empty(device='cpu')
    for p in materialised.parameters():
        nn.init.constant_(p, float('nan'))
    materialised.init_weights()
    for model in (small(), materialised):
        mixer = model.stages[2].blocks[0].mixer
        assert torch.count_nonzero(mixer.dt_proj.bias) == 0 and (mixer.D == 1).all()
        torch.testing.assert_close(mixer.A_log.exp()[3], torch.arange(1., 9.))
        assert abs(model.stages[3].blocks[0].mlp.fc1.weight.std().item() / .02 - 1) < .1
        assert all(p.isfinite().all() for p in model.state_dict().values())


# Input sizes and windows

WINDOWS = {  # of stages 3 and 4
    'mambavision_tiny.in1k': [(14, 14), (7, 7)],
    'mambavision_base.in21k_ft_in1k': [(14, 14), (7, 7)],
    'mambavision_large2.in21k_ft_in1k_512': [(32, 32), (16, 16)],
    'mambavision_large3.in21k_ft_in1k_256': [(16, 16), (8, 8)],
    'mambavision_large3.in21k_ft_in1k_512': [(32, 32), (16, 16)],
}


def windows(model):
    assert model.stages[0].window_size is None and model.stages[1].window_size is None
    return [s.window_size for s in model.stages[2:]]


@pytest.mark.parametrize('name', WINDOWS)
def test_windows_of_the_released_models(name):
    assert windows(timm.create_model(name, device='meta')) == WINDOWS[name]


def test_set_input_size():
    model = timm.create_model('mambavision_tiny', device='meta')
    for size, expected in [
        (256, [(16, 16), (8, 8)]), (512, [(32, 32), (16, 16)]), ((96, 160), [(6, 10), (3, 5)]),
        (40, [(3, 3), (2, 2)]), (224, [(14, 14), (7, 7)]),
    ]:
        model.set_input_size(size)
        assert windows(model) == expected
        assert windows(timm.create_model('mambavision_tiny', img_size=size, device='meta')) == expected
    model.set_input_size(window_size=(8, 8, 7, 5))
    assert windows(model) == [(7, 7), (5, 5)]
    model.set_input_size((448, 224))
    assert windows(model) == [(14, 7), (10, 5)]
    model.set_input_size(224)
    assert windows(model) == [(7, 7), (5, 5)]
    assert windows(small(window_size=6)) == [(6, 6), (6, 6)]
    assert windows(small(window_size=(8, 8, (2, 3), 1))) == [(2, 3), (1, 1)]


@pytest.mark.parametrize('window_size', [(7, 7), (8, 8, 0, 7), 0])
def test_wrong_windows(window_size):
    with pytest.raises(ValueError, match='window_size: got'):
        small(window_size=window_size)


@pytest.mark.parametrize('height, width', [(64, 64), (64, 96), (40, 72), (33, 47)])
def test_any_input_size(height, width):
    model = small().eval()
    x = torch.randn(2, 3, height, width)
    with torch.no_grad():
        maps = model.forward_intermediates(x, intermediates_only=True)
        assert [m.shape[-2:] for m in maps] == [(-(-height // r), -(-width // r)) for r in (4, 8, 16, 32)]
        assert model(x).isfinite().all()


def test_windows_do_not_mix():
    """What happens in one window stays there, in stages 3 and 4."""
    model = small(img_size=64).eval()
    stage = model.stages[2]
    x = torch.randn(1, 32, 16, 16)  # 8 x 8 after downsampling: 2 x 2 windows of 4 x 4
    with torch.no_grad():
        want = stage(x)
        other = x.clone()
        other[:, :, 10:, 10:] += 1.  # reaches rows and columns 5 and later
        got = stage(other)
    assert torch.equal(got[:, :, :4], want[:, :, :4]) and torch.equal(got[:, :, :, :4], want[:, :, :, :4])
    assert not torch.allclose(got[:, :, 4:, 4:], want[:, :, 4:, 4:])


# timm's model interface

def test_heads_and_pooling():
    model, x = small().eval(), torch.randn(2, 3, 64, 64)
    features = model.forward_features(x)
    assert features.shape == (2, 128, 2, 2)
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), features.mean((2, 3)))
    model.reset_classifier(5, 'max')
    model.reset_classifier(4)
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), features.amax((2, 3)))
    assert model(x).shape == (2, 4) and model.get_classifier() is model.head
    model.reset_classifier(3, 'catavgmax')
    assert model(x).shape == (2, 3) and model.head_hidden_size == 256
    model.reset_classifier(0, '')
    torch.testing.assert_close(model(x), features)
    assert small(num_classes=0)(x).shape == (2, 128)


def test_features():
    x = torch.randn(2, 3, 64, 96)
    model = small().eval()
    nn.init.constant_(model.norm.weight, 2.)
    with torch.no_grad():
        final, maps = model.forward_intermediates(x)
        torch.testing.assert_close(final, model.forward_features(x))
        normed = model.forward_intermediates(x, norm=True, intermediates_only=True)
        torch.testing.assert_close(normed[3], final)
        assert not torch.allclose(maps[3], final) and torch.equal(normed[2], maps[2])
        nhwc = model.forward_intermediates(x, indices=[1], output_fmt='NHWC', intermediates_only=True)
        assert torch.equal(nhwc[0].permute(0, 3, 1, 2), maps[1])
        getter = FeatureGetterNet(copy.deepcopy(model), out_indices=(1, 3), output_fmt='NHWC', norm=True)
        torch.testing.assert_close(getter(x), [normed[i].permute(0, 2, 3, 1) for i in (1, 3)])
        backbone = small(features_only=True).eval()  # the same values: small() fixes the seed
        assert backbone.feature_info.channels() == [16, 32, 64, 128]
        assert backbone.feature_info.reduction() == [4, 8, 16, 32]
        torch.testing.assert_close(backbone(x), maps)
        assert all(m.is_contiguous() for m in maps)
        two = small(features_only=True, out_indices=(0, 2)).eval()
        torch.testing.assert_close(two(x), [maps[0], maps[2]])
        assert len(two.model.stages) == 3
        script = torch.jit.script(backbone)
        torch.testing.assert_close(script(x), maps, rtol=1e-4, atol=1e-5)
    pruned = copy.deepcopy(model)
    assert pruned.prune_intermediate_layers([2]) == [2]
    pruned.reset_classifier(7, 'avg')
    pruned.set_input_size(96)
    assert pruned(x).shape == (2, 7) and pruned.num_features == pruned.head_hidden_size == 64


def test_parameter_groups():
    model = small()
    assert model.no_weight_decay() == {
        f'stages.{i}.blocks.{j}.mixer.{p}' for i, j in ((2, 0), (2, 1), (3, 0)) for p in ('A_log', 'D')}
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    blocks = [n.rpartition('.conv1.weight')[0] or n.rpartition('.norm1.weight')[0] for n in groups]
    blocks = sorted({b for b in blocks if b})
    assert len(blocks) == 7 and len({groups[n] for b in blocks for n in groups if n.startswith(f'{b}.')}) == 7
    assert len({groups[n] for n in groups if n.startswith('stem')}) == 1
    coarse = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    assert len(set(coarse.values())) == 6  # stem, four stages, norm and head


def train_gradients(model, x):
    torch.manual_seed(0)
    model.zero_grad()
    model(x).square().mean().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters()}


def test_gradient_checkpointing_leaves_gradients_unchanged():
    model, x = small(drop_path_rate=.3, ls_init_value=1.).train(), torch.randn(4, 3, 64, 64)
    want = train_gradients(model, x)
    model.set_grad_checkpointing()
    got = train_gradients(model, x)
    assert all(torch.equal(got[k], want[k]) for k in want)


def test_channels_last():
    x = torch.randn(2, 3, 64, 96).contiguous(memory_format=torch.channels_last)
    model = small().eval()
    with torch.no_grad():
        want = model.forward_features(x.contiguous())
        model = model.to(memory_format=torch.channels_last)
        got = model.forward_features(x)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert got.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64])
def test_model_in_another_dtype(dtype):
    model, x = small(ls_init_value=1.).eval(), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        want = model(x)
        got = model.to(dtype)(x.to(dtype))
    assert got.dtype == dtype and (got.float() - want).abs().max() < .05 * want.abs().max()
    assert small(dtype=dtype).stages[2].blocks[0].mixer.A_log.dtype == dtype


def test_doubled_dt_bias():
    """The projection's bias counts twice."""
    mixer = small().stages[2].blocks[0].mixer
    nn.init.constant_(mixer.dt_proj.bias, .25)
    x = torch.randn(2, 16, 64)
    with torch.no_grad():
        want = mixer(x)
        mixer.dt_proj.bias.zero_()
        original = mixer.dt_proj.forward
        mixer.dt_proj.forward = lambda dt: original(dt) + .5
        torch.testing.assert_close(mixer(x), want)


# Compilation and export

def test_compile_and_export():
    model, x = small().eval(), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        want = model(x)
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend='aot_eager')(x), want)
        program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim('batch', max=64)},))
        y = torch.randn(3, 3, 64, 64)
        torch.testing.assert_close(program.module()(y), model(y))


@pytest.mark.parametrize('dynamo', [True, False])
def test_onnx(dynamo, tmp_path):
    pytest.importorskip('onnxscript')
    onnxruntime = pytest.importorskip('onnxruntime')
    model, x = small().eval(), torch.randn(2, 3, 64, 64)
    path = str(tmp_path / 'model.onnx')
    batch = dict(dynamic_shapes=({0: torch.export.Dim('batch')},)) if dynamo else dict(dynamic_axes={'x': {0: 'batch'}})
    torch.onnx.export(model, (x,), path, input_names=['x'], dynamo=dynamo, **batch)
    y = torch.randn(3, 3, 64, 64)
    got, = onnxruntime.InferenceSession(path).run(None, {'x': y.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), model(y), rtol=1e-3, atol=1e-5)


# Registry

# image size, crop and the authors' name of the released models
RELEASED = {
    'tiny.in1k': (224, 1., 'mamba_vision_T'),
    'tiny2.in1k': (224, .98, 'mamba_vision_T2'),
    'small.in1k': (224, .93, 'mamba_vision_S'),
    'base.in1k': (224, 1., 'mamba_vision_B'),
    'base.in21k_ft_in1k': (224, 1., 'mamba_vision_B_21k'),
    'large.in1k': (224, 1., 'mamba_vision_L'),
    'large.in21k_ft_in1k': (224, 1., 'mamba_vision_L_21k'),
    'large2.in1k': (224, 1., 'mamba_vision_L2'),
    'large2.in21k_ft_in1k_512': (512, .93, 'mamba_vision_L2_512_21k'),
    'large3.in21k_ft_in1k_256': (256, 1., 'mamba_vision_L3_256_21k'),
    'large3.in21k_ft_in1k_512': (512, .93, 'mamba_vision_L3_512_21k'),
}


@pytest.mark.parametrize('name', RELEASED)
def test_tags(name):
    size, crop_pct, authors_name = RELEASED[name]
    cfg = timm.get_pretrained_cfg(f'mambavision_{name}')
    assert (cfg.input_size, cfg.crop_pct) == ((3, size, size), crop_pct)
    assert (cfg.crop_mode == 'squash') == (size == 512)
    assert 'nc' in cfg.license and 'non-commercial' in cfg.notes[0] and not cfg.fixed_input_size
    with pytest.warns(UserWarning, match=f'Mapping deprecated model name {authors_name} to current mambavision_{name}'):
        model = timm.create_model(authors_name, device='meta')
    assert model.pretrained_cfg['hf_hub_filename'] == cfg.hf_hub_filename and model.img_size == (size, size)
