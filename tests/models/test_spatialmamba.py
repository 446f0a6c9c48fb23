import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

import timm_ssm  # noqa: F401  registers the models
from timm_ssm.models.spatialmamba import StateFusion, checkpoint_filter_fn

from .utils import assert_close, check_mixers, load_reference, record_stages, released_shapes

SMALL = dict(embed_dim=8, depths=(1, 1, 2, 1), num_classes=7)
SIZES = {'tiny': 26_748_862, 'small': 43_074_280, 'base': 95_745_592}


def small(**kwargs):
    torch.manual_seed(0)
    return timm.create_model('spatialmamba_tiny', **{**SMALL, **kwargs})


def reference_model(**kwargs):
    """A model of the reference weights, those and the reference numbers."""
    config, weights, tensors = load_reference('spatialmamba')
    model = small(embed_dim=config.pop('dims'), **{**config, **kwargs}).eval()
    model.load_state_dict(checkpoint_filter_fn(weights, model), strict=True)
    return model, weights, tensors


def test_reference_logits_and_activations():
    model, _, reference = reference_model()
    got = record_stages(model, mixer='self_attention', channels_last=True)
    model.norm.register_forward_hook(
        lambda m, a, out: got.__setitem__('mid/norm', out.permute(0, 2, 3, 1).flatten(1, 2)))
    model.stages[0].blocks[0].mixer.fusion.register_forward_hook(
        lambda m, a, out: got.__setitem__('mid/layers.0.blocks.0.self_attention.state_fusion', out))
    with torch.no_grad():
        logits = model(reference['x'])
    assert_close(logits, reference['logits'], 5e-6)
    mids = [k for k in reference if k.startswith('mid/')]
    assert len(mids) == 14
    for k in mids:
        assert_close(got[k], reference[k], 5e-6)


def test_mixers():
    """The scan gives the states; C and D are applied when they are fused."""
    def finish(mixer, scanned, inputs):
        u, C = (mixer.restore(t, 0, inputs[0].bypass.shape) for t in (inputs[0].u, inputs[0].C))
        fused = mixer.fusion(scanned[0].permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return mixer.out_proj(mixer.norm(C * fused + mixer.D * u) * F.silu(inputs[0].bypass))

    check_mixers(
        small().double().eval(), torch.randn(2, 3, 64, 96, dtype=torch.float64), 5, [(False, False, False)], finish,
        adapt=lambda inputs: inputs._replace(C=torch.ones_like(inputs.C), D=None))


@pytest.mark.parametrize('size', SIZES)
def test_released_names_and_sizes(size):
    """Every released name and shape loads strictly, and the parameter count is exact."""
    model = timm.create_model(f'spatialmamba_{size}', device='meta')
    assert sum(p.numel() for p in model.parameters()) == SIZES[size]
    released = {k: torch.empty(s, device='meta') for k, s in released_shapes()[f'spatialmamba_{size}_224'].items()}
    model.load_state_dict(checkpoint_filter_fn(released, model), strict=True, assign=True)


def test_local_files(tmp_path):
    """The authors' classifiers and detectors, from a file; of the latter the backbone."""
    source, weights, reference = reference_model()
    detector = {f'backbone.{k}': v for k, v in weights.items() if not k.startswith(('norm.', 'head.'))}
    detector['backbone.outnorm0.weight'] = torch.ones(8)
    torch.save({'model': weights, 'epoch': 3}, tmp_path / 'classifier.pth')
    torch.save({'state_dict': {**detector, 'neck.fpn.weight': torch.ones(2)}}, tmp_path / 'detector.pth')
    x = reference['x']
    for file in ('classifier.pth', 'detector.pth'):
        overlay = dict(file=str(tmp_path / file), num_classes=7)
        model = small(pretrained=True, pretrained_cfg_overlay=overlay).eval()
        with torch.no_grad():
            maps = [m.forward_intermediates(x, intermediates_only=True) for m in (model, source)]
            assert all(torch.equal(a, b) for a, b in zip(*maps))
            assert torch.equal(model(x), source(x)) == (file == 'classifier.pth')


def test_checkpoint_of_another_model_is_refused():
    for other in ('test_resnet', 'vmamba_tiny'):
        with pytest.raises(ValueError, match=r'checkpoint: it is not of spatialmamba_tiny: .* missing'):
            checkpoint_filter_fn(timm.create_model(other, device='meta').state_dict(), small())


@pytest.mark.parametrize('height, width', [(7, 9), (2, 3), (1, 1)])
def test_fusion(height, width):
    """It is one 11 x 11 convolution of 25 taps over the map with its border repeated, however small the map."""
    fusion = StateFusion(3)
    for p in fusion.parameters():
        nn.init.normal_(p)
    merged = torch.zeros(3, 1, 11, 11)
    for kernel, alpha, dilation in zip(fusion.weight, fusion.alpha, (1, 3, 5)):
        merged[:, :, 5 - dilation:6 + dilation:dilation, 5 - dilation:6 + dilation:dilation] += alpha * kernel
    assert (merged[0] != 0).sum() == 25
    h = torch.randn(2, 3, height, width)
    want = F.conv2d(F.pad(h, (5, 5, 5, 5), mode='replicate'), merged, groups=3)
    torch.testing.assert_close(fusion(h), want)


def test_evaluation_follows_the_weights():
    """No merged kernel outlives a change of the weights, as it does in the authors' evaluation."""
    model, x = small().eval(), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = model(x)
        for stage in model.stages:
            for block in stage.blocks:
                block.mixer.fusion.alpha.mul_(-2.)
        assert not torch.allclose(model(x), before, rtol=1e-3)


def test_initialisation():
    """Built in place, and built on meta, materialised and initialised."""
    materialised = small(device='meta').to_empty(device='cpu')
    for p in materialised.parameters():
        nn.init.constant_(p, float('nan'))
    materialised.init_weights()
    for model in (small(), materialised):
        assert all(v.isfinite().all() for v in model.state_dict().values())
        mixer = model.stages[3].blocks[0].mixer
        dt = F.softplus(mixer.dt_proj.bias)
        assert dt.min() >= 1e-3 * .99 and dt.max() <= 1e-1 * 1.01
        assert (mixer.A_log == 0).all() and (mixer.D == 1).all()
        assert (mixer.fusion.weight == 1).all() and (mixer.fusion.alpha == 1).all()
        bound = 128 ** -.5  # PyTorch's for a linear layer of 128 inputs
        assert .9 * bound < mixer.x_proj.weight.abs().max() <= bound
        assert abs(mixer.in_proj.weight.std().item() / .02 - 1) < .1
