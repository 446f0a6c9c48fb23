"""Both steps of every family's mixer: what `project` returns is what the scans are given, and its tokens' order."""
import pytest
import timm
import torch
from torch.nn import functional as F

import timm_ssm  # noqa: F401  registers the models
from timm_ssm.layers import scan_mixers

from ..models.utils import check_mixers, mixer_calls

ISOTROPIC = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_classes=5)
CLIP = dict(ISOTROPIC, num_frames=4)
GROUPS = dict(stem_dim=8, embed_dims=(16, 32, 48, 64), depths=(1, 2, 2, 1), num_classes=5)
FORWARD, REVERSE = (False, False, False), (True, False, False)  # reverse, residual, mask_diagonal

# arguments, mixers of the model, and the flags of each direction of the first mixer
FAMILIES = {
    'videomamba': (('videomamba_tiny_patch16_224', ISOTROPIC), 2, [FORWARD, REVERSE]),
    'videomamba clips': (('videomamba_tiny_patch16_f8_224', CLIP), 2, [FORWARD, REVERSE]),
    'vim': (('vim_tiny_patch16_224', ISOTROPIC), 2, [FORWARD, REVERSE]),
    'stablemamba': (('stablemamba_tiny_patch16_224', dict(ISOTROPIC, attn_every=2)), 1, [FORWARD, REVERSE]),
    'videomambapro': (
        ('videomambapro_tiny_patch16_224', ISOTROPIC), 2, [(False, True, False), (True, True, True)]),
    'videomambapro v1': (
        ('videomambapro_tiny_patch16_224', dict(ISOTROPIC, mixer_mode='v1')), 2,
        [(False, True, False), (True, True, True)]),
    'videomambapro v2': (
        ('videomambapro_tiny_patch16_224', dict(ISOTROPIC, mixer_mode='v2', residual=False)), 2, [FORWARD, REVERSE]),
    'stvideomamba': (('stvideomamba_tiny_patch16_f16_224', CLIP), 2, [FORWARD, REVERSE]),
    'stvideomamba spatial': (
        ('stvideomamba_tiny_patch16_f16_224', dict(CLIP, reverse_order='spatial')), 2, [FORWARD, REVERSE]),
    'stvideomamba temporal': (
        ('stvideomamba_tiny_patch16_f16_224', dict(CLIP, reverse_order='temporal')), 2, [FORWARD, REVERSE]),
    'mambavision': (
        ('mambavision_tiny', dict(
            stem_dim=8, embed_dim=16, depths=(1, 1, 3, 2), num_heads=(1, 1, 2, 4), img_size=64, num_classes=5)),
        3, [FORWARD]),
    'groupmamba': (('groupmamba_tiny', GROUPS), 4 * 7, [FORWARD]),
    'stable_groupmamba': (('stable_groupmamba_small', GROUPS), 4 * 7 - 2, [FORWARD]),
}


def model_and_input(family):
    (name, kwargs), _, _ = FAMILIES[family]
    torch.manual_seed(0)
    model = timm.create_model(name, **kwargs).double().eval()
    size = (32, 32) if 'patch_size' in kwargs else (64, 96)
    frames = [kwargs['num_frames']] if 'num_frames' in kwargs else []
    return model, torch.randn(2, 3, *frames, *size, dtype=torch.float64)


def finish(mixer, scanned, inputs):
    """A mixer's output from its restored scans, as its paper says."""
    kind = type(mixer).__name__
    if kind == 'GroupScan':
        return mixer.out_proj(F.silu(inputs[0].bypass) * mixer.norm(scanned[0]))
    if kind == 'MambaVisionMixer':
        return mixer.out_proj(torch.cat([scanned[0], inputs[0].bypass], -1))
    return mixer.out_proj(sum(scanned) / (2 if kind == 'VimMixer' else 1))


@pytest.mark.parametrize('family', FAMILIES)
def test_projections_scanned_by_the_specification_give_the_mixer(family):
    """project alone, the naive scan, and the paper's way out are the mixer's forward; its flags are the family's."""
    model, x = model_and_input(family)
    _, count, flags = FAMILIES[family]
    check_mixers(model, x, count, flags, finish)


@pytest.mark.parametrize('group', range(4))
def test_restored_map(group):
    """What a group scans, row-major or column-major, comes back as the map that its convolution made."""
    model, x = model_and_input('groupmamba')
    mixer, tokens, _ = mixer_calls(model, x)[group]
    with torch.no_grad():
        inputs = mixer.project(tokens)[0]
        want = F.silu(mixer.conv2d(mixer.in_proj(tokens)[..., :4].permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
    assert tokens.shape == (2, 16, 24, 4) and inputs.reverse == (group >= 2)
    torch.testing.assert_close(mixer.restore(inputs.u, 0, tokens.shape), want)
    columns = want.transpose(1, 2) if group % 2 else want
    torch.testing.assert_close(inputs.u, columns.flatten(1, 2))


def test_scan_mixers_names():
    """The names lead to the mixers, attention is left out, and a model without scans has none."""
    (name, kwargs), _, _ = FAMILIES['stablemamba']
    model = timm.create_model(name, **kwargs)
    assert {n: model.get_submodule(n) for n in ['blocks.1.mixer']} == scan_mixers(model)
    assert scan_mixers(timm.create_model('test_vit')) == {}
