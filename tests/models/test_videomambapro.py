import pytest
import timm
import torch
from torch import nn

import timm_ssm  # noqa: F401  registers the models
from timm_ssm.models.videomambapro import MIXER_MODES, VideoMambaProMixer, checkpoint_filter_fn
from timm_ssm.ops.naive import causal_conv1d_naive, selective_scan_naive

from .utils import assert_close, load_reference


def small(**kwargs):
    torch.manual_seed(0)
    return timm.create_model('videomambapro_tiny_patch16_224', **{
        **dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_classes=7), **kwargs})


@pytest.mark.parametrize('mode', ['v1', 'v2'])
def test_released_mixers(mode):
    """Through the mixer's arguments and through the model's."""
    _, weights, reference = load_reference(f'videomambapro_mixer_{mode}')
    mixers = [VideoMambaProMixer(32, **MIXER_MODES[mode]), small(mixer_mode=mode).blocks[1].mixer]
    for mixer in mixers:
        mixer.load_state_dict(weights, strict=True)
        with torch.no_grad():
            assert_close(mixer(reference['x']), reference['y'])


@pytest.mark.parametrize('residual', [True, False])
@pytest.mark.parametrize('mask_diagonal', [True, False])
def test_default_mixer(residual, mask_diagonal):
    """The paper's mixer and its ablation, written out with the naive ops."""
    mixer = small(residual=residual, mask_diagonal=mask_diagonal).blocks[0].mixer.double()
    for p in mixer.parameters():
        nn.init.normal_(p, std=.5)
    x = torch.randn(2, 11, 32, dtype=torch.float64)
    u, z = mixer.in_proj(x).chunk(2, -1)
    want = 0
    for suffix, reverse in (('', False), ('_b', True)):
        conv, dt_proj = getattr(mixer, 'conv1d' + suffix), getattr(mixer, 'dt_proj' + suffix)
        A_log, D = getattr(mixer, 'A_b_log' if reverse else 'A_log'), getattr(mixer, 'D' + suffix)
        c = causal_conv1d_naive(u, conv.weight.squeeze(1), conv.bias, reverse=reverse)
        dt, B, C = mixer.x_proj(c).split([2, 16, 16], -1)
        want = want + selective_scan_naive(
            c, dt @ dt_proj.weight.T, -A_log.exp(), B, C, D, z, dt_proj.bias,
            reverse=reverse, residual=residual, mask_diagonal=mask_diagonal and reverse)
    torch.testing.assert_close(mixer(x), mixer.out_proj(want))


def test_each_change_changes_the_function():
    """With neither, a model with two x_proj is VideoMamba's; each switch alone gives another function."""
    x = torch.randn(1, 3, 32, 32)
    models = {(r, m): small(residual=r, mask_diagonal=m) for r in (False, True) for m in (False, True)}
    state = {k: nn.init.normal_(v.clone(), std=.3) for k, v in small().state_dict().items()}
    outs = {}
    for key, model in models.items():
        model.load_state_dict(state)
        outs[key] = model.eval()(x)
    keys = list(outs)
    assert all(not torch.allclose(outs[a], outs[b], rtol=1e-3) for i, a in enumerate(keys) for b in keys[:i])
    videomamba = timm.create_model('videomamba_tiny_patch16_224', img_size=32, patch_size=8, embed_dim=32, depth=2,
                                   num_classes=7).eval()
    for k in [k for k in state if k.endswith('x_proj.weight')]:
        state[k.replace('x_proj', 'x_proj_b')] = state[k]
    videomamba.load_state_dict(state, strict=True)
    torch.testing.assert_close(videomamba(x), outs[False, False])


@pytest.mark.parametrize('size, millions', [('tiny', 6.74), ('small', 24.76), ('middle', 71.71)])
def test_sizes(size, millions):
    model = timm.create_model(f'videomambapro_{size}_patch16_224', device='meta')
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == millions


@pytest.mark.parametrize('mode', list(MIXER_MODES))
def test_checkpoint_tells_its_mode(mode, tmp_path):
    """The authors' names load into the mode they have; another mode says which argument to set."""
    model = small(mixer_mode=mode)
    released = {k.replace('blocks.', 'layers.').replace('norm.', 'norm_f.') if not k.startswith('blocks.')
                else k.replace('blocks.', 'layers.', 1): v for k, v in model.state_dict().items()}
    assert 'norm_f.weight' in released and 'layers.0.norm.weight' in released
    torch.save({'model': released}, tmp_path / 'released.pth')
    overlay = dict(file=str(tmp_path / 'released.pth'), num_classes=7)
    again = small(mixer_mode=mode, pretrained=True, pretrained_cfg_overlay=overlay)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
    for other in set(MIXER_MODES) - {mode}:
        with pytest.raises(ValueError, match=f"released.pth: checkpoint: it has .* with mixer_mode='{mode}'"):
            small(mixer_mode=other, pretrained=True, pretrained_cfg_overlay=overlay)


def test_wrong_arguments():
    with pytest.raises(ValueError, match="mixer_mode: got 'v3', needs 'paper', 'v1' or 'v2'"):
        small(mixer_mode='v3')
    with pytest.raises(ValueError, match="tie_reverse: got 'A', needs '', 'x_proj' or 'all'"):
        VideoMambaProMixer(32, tie_reverse='A')
    with pytest.raises(ValueError, match='checkpoint: it is not of'):
        checkpoint_filter_fn(timm.create_model('test_vit').state_dict(), small())


@pytest.mark.parametrize('name, size, embed_dim', [('t16', 'tiny', 192), ('s16', 'small', 384), ('m16', 'middle', 576)])
def test_authors_names(name, size, embed_dim):
    with pytest.warns(UserWarning, match=f'to current videomambapro_{size}_patch16_224'):
        assert timm.create_model(f'videomambapro_{name}_in1k', depth=1, device='meta').embed_dim == embed_dim
