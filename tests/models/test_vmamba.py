import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

import timm_ssm  # noqa: F401  registers the models
from timm_ssm.models._checkpoints import load_checkpoint
from timm_ssm.models.vmamba import checkpoint_filter_fn

from .utils import assert_close, check_mixers, load_reference, record_stages, released_shapes

SMALL = dict(embed_dims=(16, 24, 32, 48), depths=(1, 1, 2, 1), num_classes=7)
SIZES = {
    'tiny': 30_249_064, 'small': 50_147_752, 'base': 88_557_800, 'tiny_s2l5': 30_705_832, 'small_s1l20': 49_012_840,
    'base_s1l20': 86_614_504,
}

RELEASES = 'https://github.com/MzeroMiko/VMamba/releases/download/%23v2cls'
FILES = {
    'tiny': 'vssm1_tiny_0230s_ckpt_epoch_264.pth', 'small': 'vssm_small_0229_ckpt_epoch_222.pth',
    'base': 'vssm_base_0229_ckpt_epoch_237.pth', 'tiny_s2l5': 'vssm_tiny_0230_ckpt_epoch_262.pth',
    'small_s1l20': 'vssm1_small_0229s_ckpt_epoch_240.pth', 'base_s1l20': 'vssm1_base_0229s_ckpt_epoch_225.pth',
}


def small(**kwargs):
    torch.manual_seed(0)
    return timm.create_model('vmamba_tiny', **{**SMALL, **kwargs})


def reference_model(**kwargs):
    """A model of the reference weights, those and the reference numbers."""
    config, weights, tensors = load_reference('vmamba')
    config.update(embed_dims=config.pop('dims'), expand=config.pop('ssm_ratio'))
    model = small(**{**config, **kwargs}).eval()
    model.load_state_dict(checkpoint_filter_fn(weights, model), strict=True)
    return model, weights, tensors


def test_reference_logits_and_activations():
    model, _, reference = reference_model()
    got = record_stages(model, mixer='op')
    model.norm.register_forward_hook(lambda m, a, out: got.__setitem__('mid/classifier.norm', out))
    with torch.no_grad():
        logits = model(reference['x'])
    assert_close(logits, reference['logits'], 5e-6)
    mids = [k for k in reference if k.startswith('mid/')]
    assert len(mids) == 13
    for k in mids:
        assert_close(got[k], reference[k], 5e-6)


def test_mixers():
    forward, reverse = (False, False, False), (True, False, False)
    check_mixers(
        small().double().eval(), torch.randn(2, 3, 64, 96, dtype=torch.float64), 5,
        [forward, forward, reverse, reverse], lambda mixer, scanned, inputs: mixer.out_proj(mixer.norm(sum(scanned))))


@pytest.mark.parametrize('size', SIZES)
def test_released_names_and_sizes(size):
    """Every released name and shape loads strictly, and the parameter count is exact."""
    model = timm.create_model(f'vmamba_{size}', device='meta')
    assert sum(p.numel() for p in model.parameters()) == SIZES[size]
    released = {k: torch.empty(s, device='meta') for k, s in released_shapes()[f'vmamba_{size}_224'].items()}
    model.load_state_dict(checkpoint_filter_fn(released, model), strict=True, assign=True)


def newer(weights):
    """Names and shapes of the authors' newer code."""
    out = {}
    for k, v in weights.items():
        if k.endswith(('x_proj_weight', 'dt_projs_weight')):
            k, v = k.replace('_weight', '.weight'), v.flatten(0, 1)
        out[k] = v
    return out


def as_convolutions(weights):
    return {k: v[:, :, None, None] if v.ndim == 2 and k.endswith('.weight') and 'head' not in k else v
            for k, v in newer(weights).items()}


def third_party(weights):
    """The conversion for transformers on the Hub."""
    stem = {'0': '0', '2': '1', '5': '3', '7': '4'}
    out = {}
    for k, v in newer(weights).items():
        if k.startswith('patch_embed'):
            _, i, rest = k.split('.')
            k = f'patch_embeddings.projection.{stem[i]}.{rest}'
        k = k.replace('downsample.1', 'downsample.down').replace('downsample.3', 'downsample.norm')
        k = k.removeprefix('classifier.')
        out[k if k.startswith('head') else f'vmamba.{k}'] = v
    return out


@pytest.mark.parametrize('style', [newer, as_convolutions, third_party])
def test_other_names_and_shapes(style):
    _, weights, reference = reference_model()
    model = small(embed_dims=(16, 24, 40, 48)).eval()
    model.load_state_dict(checkpoint_filter_fn(style(weights), model), strict=True)
    with torch.no_grad():
        assert_close(model(reference['x']), reference['logits'], 5e-6)


@pytest.mark.parametrize('features_only', [False, True])
def test_detector(features_only, tmp_path):
    """The backbone of a detection or segmentation checkpoint; what it does not have stays new."""
    source, weights, _ = reference_model()
    detector = {f'backbone.{k}': v for k, v in weights.items() if not k.startswith('classifier')}
    detector.update({f'backbone.outnorm{i}.weight': torch.ones(2) for i in range(4)})
    detector['rpn_head.rpn_conv.weight'] = torch.ones(2)
    torch.save({'meta': {}, 'state_dict': detector}, tmp_path / 'mask_rcnn.pth')
    overlay = dict(file=str(tmp_path / 'mask_rcnn.pth'), num_classes=7)
    kwargs = dict(features_only=True) if features_only else {}
    model = small(embed_dims=(16, 24, 40, 48), pretrained=True, pretrained_cfg_overlay=overlay, **kwargs).eval()
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        maps = source.forward_intermediates(x, intermediates_only=True)
        got = model(x) if features_only else model.forward_intermediates(x, intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(got, maps))
    with pytest.raises(ValueError, match='4 of .* parameters are missing, such as norm.weight'):  # to evaluate, say
        load_checkpoint(small(embed_dims=(16, 24, 40, 48)), tmp_path / 'mask_rcnn.pth')


def test_first_version_is_refused_by_name():
    """VMamba v0, whose names differ little: its convolution has a bias, its blocks no MLP, its in_proj a gate."""
    weights = {
        'patch_embed.proj.weight': torch.zeros(96, 3, 4, 4),
        'layers.0.blocks.0.ln_1.weight': torch.zeros(96),
        'layers.0.blocks.0.self_attention.in_proj.weight': torch.zeros(384, 96),
        'layers.0.blocks.0.self_attention.conv2d.bias': torch.zeros(192),
    }
    for first in (weights, {k.replace('self_attention', 'op'): v for k, v in weights.items()}):
        with pytest.raises(ValueError, match=r'checkpoint: it is of the first version of VMamba \(v0,'):
            checkpoint_filter_fn({'model': first}, small())


def test_checkpoint_of_another_model_is_refused():
    with pytest.raises(ValueError, match=r'checkpoint: it is not of vmamba_tiny: .* missing'):
        checkpoint_filter_fn(timm.create_model('test_resnet').state_dict(), small())


def test_more_states():
    """d_state states a channel, of rates 1 to d_state, of which a release with one has the first."""
    model, x = small(d_state=4, expand=2.).eval(), torch.randn(1, 3, 40, 56)
    mixer = model.stages[0].blocks[0].mixer
    assert mixer.A_log.shape == (4, 32, 4) and mixer.x_proj.out_features == 4 * (1 + 8)
    torch.testing.assert_close(mixer.A_log[2, 5].exp(), torch.arange(1., 5.))
    assert model(x).shape == (1, 7)


def test_initialisation():
    """Built in place, and built on meta, materialised and initialised."""
    materialised = small(device='meta').to_empty(device='cpu')
    for p in materialised.parameters():
        nn.init.constant_(p, float('nan'))
    materialised.init_weights()
    for model in (small(), materialised):
        assert all(v.isfinite().all() for v in model.state_dict().values())
        block = model.stages[3].blocks[0]
        for dt_proj in block.mixer.dt_proj:
            dt = F.softplus(dt_proj.bias)
            assert dt.min() >= 1e-3 * .99 and dt.max() <= 1e-1 * 1.01
            assert .5 < dt_proj.weight.abs().max() * dt_proj.in_features ** .5 <= 1
        assert (block.mixer.A_log == 0).all() and (block.mixer.D == 1).all()
        bound = 48 ** -.5  # PyTorch's for a linear layer of 48 inputs
        assert .9 * bound < block.mixer.x_proj.weight.abs().max() <= bound
        assert abs(block.mlp.fc1.weight.std().item() / .02 - 1) < .1 and (block.mlp.fc1.bias == 0).all()


def test_tags():
    """Each released file has one tag, and is of the size that it says."""
    files = {n: timm.get_pretrained_cfg(n).url for n in timm.list_pretrained('vmamba*')}
    assert files == {f'vmamba_{size}.in1k': f'{RELEASES}/{file}' for size, file in FILES.items()}
    cfgs = [timm.get_pretrained_cfg(n) for n in files]
    assert {(c.license, c.input_size, c.num_classes) for c in cfgs} == {('mit', (3, 224, 224), 1000)}


def test_authors_names():
    for theirs, name in (('tiny_s1l8', 'tiny'), ('small_s2l15', 'small'), ('base_s2l15', 'base')):
        with pytest.warns(UserWarning, match=f'to current vmamba_{name}'):
            model = timm.create_model(f'vmamba_{theirs}', device='meta')
        assert sum(p.numel() for p in model.parameters()) == SIZES[name]
