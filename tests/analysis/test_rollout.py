"""Rollout against products of whole matrices, and the numbers that judge a map."""
import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import timm_ssm  # noqa: F401  registers the models
from timm_ssm.analysis import deletion_insertion, grad_cam, hidden_attention, overlay, rollout, to_pixels
from timm_ssm.analysis.tokens import join_windows, split_windows
from timm_ssm.layers import ScanMixer

from .test_attention import brute_force

ISOTROPIC = dict(img_size=32, patch_size=8, embed_dim=32, depth=3, num_classes=5)
HIERARCHICAL = dict(depths=(1, 1, 2, 2), num_classes=5)
MODELS = {
    'videomamba_tiny_patch16_224': ISOTROPIC,
    'vim_tiny_patch16_224': ISOTROPIC,
    'videomambapro_tiny_patch16_224': dict(ISOTROPIC, global_pool='avg'),
    'stablemamba_tiny_patch16_224': dict(ISOTROPIC, attn_every=3, num_heads=2),
    'vit_tiny_patch16_224': dict(ISOTROPIC, num_heads=2),
    'videomamba_tiny_patch16_f8_224': ISOTROPIC,
    'stvideomamba_tiny_patch16_f16_224': dict(ISOTROPIC, num_frames=8, reverse_order='spatial'),
    'mambavision_tiny': dict(HIERARCHICAL, img_size=64, window_size=3, embed_dim=16, num_heads=(1, 1, 2, 2)),
    'groupmamba_tiny': dict(HIERARCHICAL, stem_dim=8, embed_dims=(16, 16, 32, 32)),
    'stable_groupmamba_small': dict(HIERARCHICAL, stem_dim=8, embed_dims=(16, 16, 32, 32), attn_every=2),
    'vmamba_tiny': dict(HIERARCHICAL, embed_dims=(16, 16, 32, 32)),
}


def make(name):
    """A model of random weights, whose tokens differ, and an input of two."""
    torch.manual_seed(0)
    model = timm.create_model(name, **MODELS[name])
    for p in model.parameters():
        if p.ndim > 1:
            nn.init.normal_(p, std=p[0].numel() ** -0.5)
    size = 32 if 'img_size' in MODELS[name] and MODELS[name]['img_size'] == 32 else 64
    frames = [8] if '_f' in name else []
    return model, torch.randn(2, 3, *frames, size, size)


def record(modules, model, x):
    """Modules and what they are given as a model runs, in the order of their calls."""
    inputs = []
    hooks = [m.register_forward_pre_hook(lambda module, args: inputs.append((module, args[0]))) for m in modules]
    model.eval()(x)
    for hook in hooks:
        hook.remove()
    return inputs


def normalised(matrix):
    return matrix.abs() / matrix.abs().sum(-1, keepdim=True)


def attention_by_hand(module, x):
    """Softmax of the scores of timm's attention, by its own weights."""
    q, k, _ = module.qkv(x).unflatten(2, (3, module.num_heads, -1)).permute(2, 0, 3, 1, 4)
    return (module.scale * q @ k.mT).softmax(-1).mean(1)


def matrix_by_hand(module, x):
    if not isinstance(module, ScanMixer):
        return attention_by_hand(module, x)
    return normalised(hidden_attention(module, x))


@torch.no_grad()
@pytest.mark.parametrize('name', [
    'videomamba_tiny_patch16_224', 'videomambapro_tiny_patch16_224', 'stablemamba_tiny_patch16_224',
    'vit_tiny_patch16_224', 'videomamba_tiny_patch16_f8_224', 'stvideomamba_tiny_patch16_f16_224'])
def test_isotropic(name):
    """The row of the class token, or the mean over patches, of the product of all layers' matrices."""
    model, x = make(name)
    grid = (4, 4) if x.ndim == 4 else (8 // model.patch_embed.tubelet_size, 4, 4)
    mixers = [block.attn if hasattr(block, 'attn') else block.mixer for block in model.blocks]
    product = torch.eye(1 + int(np.prod(grid)))
    for module, tokens in record(mixers, model, x):
        product = (product + matrix_by_hand(module, tokens) @ product) / 2
    expected = product[:, 0] if model.global_pool == 'token' else product[:, 1:].mean(1)
    torch.testing.assert_close(rollout(model, x), expected[:, 1:].view(2, *grid), rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_class_token_in_the_middle():
    """Vim's patches lie around the class token, whose row it is."""
    model, x = make('vim_tiny_patch16_224')
    product = torch.eye(17)
    tokens = model._embed(model.patch_embed(x))
    for block in model.eval().blocks:
        product = (product + matrix_by_hand(block.mixer, block.norm(tokens)) @ product) / 2
        tokens = block(tokens)
    expected = torch.cat([product[:, 8, :8], product[:, 8, 9:]], dim=1).view(2, 4, 4)
    torch.testing.assert_close(rollout(model, x), expected, rtol=1e-4, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize('name', ['groupmamba_tiny', 'vmamba_tiny'])
def test_four_directions(name):
    """Of a model of one layer: scans by rows, by columns and back along both, each a matrix by the definition.

    Those of GroupMamba's groups of channels are averaged, each on its own; those of VMamba's directions add up.
    """
    model, x = make(name)
    model.prune_intermediate_layers([0])
    x = x[..., :32, :24]
    rows, columns = 8, 6
    scans = [
        s for mixer, tokens in record([m for m in model.stages.modules() if isinstance(m, ScanMixer)], model, x)
        for s in mixer.project(tokens)]
    assert [s.reverse for s in scans] == [False, False, True, True]
    positions = [(r, c) for r in range(rows) for c in range(columns)]
    by_columns = sorted(positions, key=lambda p: p[::-1])
    matrices = []
    for i, s in enumerate(scans):
        lies = [(by_columns if i % 2 else positions).index(p) for p in positions]
        matrices.append(brute_force(s).mean(-1)[:, lies][:, :, lies])
    mean = sum(map(normalised, matrices)) / 4 if name == 'groupmamba_tiny' else normalised(sum(matrices))
    expected = ((torch.eye(rows * columns) + mean) / 2).mean(1).view(2, rows, columns)
    torch.testing.assert_close(rollout(model, x), expected, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_hybrid_of_windows():
    """MambaVision: a scan, then attention, in windows of 3 x 3 of two stages, whose maps of 4 x 4 and 2 x 2 are padded.

    Each layer is one matrix of all positions of the padded map, by the definition within windows and 0 between them.
    """
    model, x = make('mambavision_tiny')
    layers = {}
    for stage in 2, 3:
        layers[stage] = record([block.mixer for block in model.stages[stage].blocks], model, x)
        assert [isinstance(module, ScanMixer) for module, _ in layers[stage]] == [True, False]
    share = torch.full((2, 2, 2), 1 / 4)
    for stage, size, padded in (3, 2, 3), (2, 4, 6):
        if share.shape[1] < size:  # four positions for each, and what padding took does not count
            share = share.repeat_interleave(2, 1).repeat_interleave(2, 2)
            share = share / share.sum((1, 2), keepdim=True)
        share = F.pad(share, (0, padded - size, 0, padded - size))
        windows = padded // 3
        for module, tokens in reversed(layers[stage]):
            if isinstance(module, ScanMixer):
                s, = module.project(tokens)
                matrix = brute_force(s).mean(-1)
                nothing = (matrix == 0).all(-1, keepdim=True)  # reaches padding, which keeps what it has
                matrix = torch.where(nothing, torch.eye(9), normalised(matrix))
            else:
                matrix = attention_by_hand(module, tokens)
            whole = torch.zeros(2, *4 * [padded])
            for (image, down, across), m in zip(np.ndindex(2, windows, windows), matrix):
                r, c = slice(3 * down, 3 * down + 3), slice(3 * across, 3 * across + 3)
                whole[image, r, c, r, c] = m.view(3, 3, 3, 3)
            share = (share + torch.einsum('brc,brcde->bde', share, whole)) / 2
        share = share[:, :size, :size]
    assert share.sum() < 2 - 1e-3
    torch.testing.assert_close(rollout(model, x), share, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('name', MODELS)
def test_shares(name):
    """They are shares, the model is left as it was, and samples do not mix."""
    model, x = make(name)
    model.train()
    share = rollout(model, x)
    assert model.training and not any(m._forward_pre_hooks for m in model.modules())
    assert all(m.fused_attn for m in model.modules() if hasattr(m, 'fused_attn'))
    assert share.min() >= 0 and share.flatten(1).sum(1).max() <= 1 + 1e-5
    if not hasattr(model, 'num_prefix_tokens'):
        lost = 'mambavision' in name  # to the padding of windows
        if not lost:
            torch.testing.assert_close(share.sum((1, 2)), torch.ones(2))
        assert share.shape[1:] == ((4, 4) if lost else (16, 16))
    torch.testing.assert_close(rollout(model, x[1:]), share[1:], rtol=1e-3, atol=1e-6)


def test_windows():
    maps = torch.arange(1., 36).view(1, 5, 7)
    tokens = split_windows(maps, (3, 4))
    assert tokens.shape == (4, 12) and tokens[1].tolist() == [5, 6, 7, 0, 12, 13, 14, 0, 19, 20, 21, 0]
    assert torch.equal(join_windows(tokens, (5, 7), (3, 4)), maps)


def test_models_that_mix_otherwise():
    for name, kwargs, message in (
            ('resnet10t', dict(stem_width=8, channels=(8, 8, 8, 8)), 'model: got ResNet, needs scans'),
            ('spatialmamba_tiny', dict(depths=(1, 1, 1, 1), embed_dim=16), 'SpatialMambaMixer'),
            ('swin_tiny_patch4_window7_224', dict(depths=(1, 1), embed_dim=12, num_heads=(1, 1), img_size=64,
                                                  window_size=2), 'model: got Swin'),
            ('videomamba_tiny_patch16_224', dict(ISOTROPIC, global_pool='max'),
             "global_pool: got 'max'")):
        with pytest.raises(ValueError, match=message):
            rollout(timm.create_model(name, **kwargs), torch.randn(1, 3, *(2 * [kwargs.get('img_size', 64)])))


class Corner(nn.Module):
    """A classifier that sees one corner of an image alone."""

    def forward(self, x):
        seen = x[..., :2, :2].mean((1, 2, 3))
        return torch.stack([4 * seen, -4 * seen], dim=1)


def test_deletion_and_insertion():
    x = torch.ones(2, 3, 8, 8)
    wrong = (torch.arange(4.)[:, None] + torch.arange(4.)).expand(2, 4, 4)
    right = -wrong
    good, bad = (deletion_insertion(Corner(), x, m, steps=16) for m in (right, wrong))
    all_there, nothing = torch.sigmoid(torch.tensor(8.)), 0.5
    for curves in good, bad:
        assert curves.deletion[0, 0] == curves.insertion[0, -1] == pytest.approx(all_there)
        assert curves.deletion[0, -1] == curves.insertion[0, 0] == pytest.approx(nothing)
    assert (good.deletion_area < bad.deletion_area - 0.2).all()
    assert (good.insertion_area > bad.insertion_area + 0.2).all()
    assert (deletion_insertion(Corner(), x, right, torch.tensor([1, 1])).deletion[:, 0] < 1e-3).all()


@pytest.mark.parametrize('name', ['videomamba_tiny_patch16_224', 'vim_tiny_patch16_224', 'vit_tiny_patch16_224',
                                  'videomamba_tiny_patch16_f8_224', 'groupmamba_tiny'])
def test_grad_cam(name):
    """By the definition, from the model run by hand from the features on."""
    model, x = make(name)
    model.eval()
    cam = grad_cam(model, x, torch.tensor([1, 2]))
    assert cam.min() >= 0 and cam.max() > 0
    if name != 'groupmamba_tiny':
        assert cam.shape == rollout(model, x).shape
        return
    features = model.forward_intermediates(x, intermediates_only=True)[-1].detach().requires_grad_()
    logits = model.forward_head(model.forward_final(features))
    for i, label in enumerate((1, 2)):
        gradient, = torch.autograd.grad(logits[i, label], features, retain_graph=True)
        expected = F.relu((features[i] * gradient[i].mean((1, 2), keepdim=True)).sum(0))
        torch.testing.assert_close(cam[i], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('name', ['videomamba_tiny_patch16_224', 'videomamba_tiny_patch16_f8_224'])
def test_overlay(name):
    model, x = make(name)
    pixels = to_pixels(model, x)
    assert pixels.shape == (2, *x.shape[2:], 3) and pixels.dtype == np.uint8
    mean, std = (torch.tensor(model.pretrained_cfg[k]).view(-1, *(1,) * (x.ndim - 2)) for k in ('mean', 'std'))
    back = (torch.from_numpy(pixels).movedim(-1, 1) / 255 - mean) / std
    inside = ((x * std + mean) > 0) & ((x * std + mean) < 1)
    assert ((back - x) * inside).abs().max() < 0.02

    share = torch.zeros(2, *x.shape[2:-2], 4, 4)
    share[..., 1, 2] = 1
    laid = overlay(np.zeros_like(pixels), share).astype(int).sum(-1)
    assert laid.shape == x[:, 0].shape
    bright = laid.reshape(-1, 32, 32)[0]
    row, column = np.unravel_index(bright.argmax(), bright.shape)
    assert 8 <= row < 16 and 16 <= column < 24 and bright[0, 0] < 10
