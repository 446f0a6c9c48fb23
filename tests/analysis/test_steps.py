"""Maps of step sizes and half-lives, against scans that are run."""
import math

import pytest
import timm
import torch
import torch.nn.functional as F

import timm_ssm  # noqa: F401  registers the models
from timm_ssm.analysis import delta_maps, half_lives
from timm_ssm.layers.mixer import scan_mixers
from timm_ssm.ops import selective_scan

from .test_rollout import MODELS, make


@torch.no_grad()
def test_half_life_of_a_state():
    """After so many equal tokens, a scan's output of its first token is half of what it was."""
    model = timm.create_model('videomamba_tiny_patch16_224', img_size=32, depth=1, embed_dim=32, d_state=2)
    mixer = model.blocks[0].mixer
    for proj in mixer.dt_proj, mixer.dt_proj_b:
        proj.weight.zero_()
        proj.bias.uniform_(-6, -3)
    lives = half_lives(model, torch.randn(1, 3, 32, 32))['blocks.0.mixer']
    assert lives.shape == (2, 64, 2)
    for in_tokens, bias, A_log in zip(lives, (mixer.dt_proj.bias, mixer.dt_proj_b.bias), (mixer.A_log, mixer.A_b_log)):
        for channel, state in ((0, 0), (5, 1), (63, 0)):
            length = round(in_tokens[channel, state].item())
            u = torch.zeros(1, length + 1, 1)
            u[:, 0] = 1
            C = torch.zeros(1, length + 1, 2)
            C[..., state] = 1
            y = selective_scan(
                u, torch.zeros_like(u), -A_log[channel:channel + 1].exp(), torch.ones_like(C), C,
                delta_bias=bias[channel:channel + 1])[0, :, 0]
            rounding = 1 + 1 / (2 * length)
            assert 0.5 / rounding < y[length] / y[0] < 0.5 * rounding


def test_zero_biases_forget():
    """Initialised as the authors' code does, no state lasts longer than two tokens; as Mamba does, they do."""
    x = torch.randn(1, 3, 32, 32)
    lives = {}
    for init in ('', 'mamba'):
        torch.manual_seed(0)
        model = timm.create_model('videomamba_tiny_patch16_224', img_size=32, depth=2, weight_init=init)
        lives[init] = torch.stack(list(half_lives(model, x).values()))
    assert lives[''].max() < 2 and lives[''][..., 0].median() == pytest.approx(1, rel=0.1)
    assert math.log(2) / 0.1 < lives['mamba'][..., 0].median() < math.log(2) / 0.001
    assert lives['mamba'].max() > 100


@torch.no_grad()
@pytest.mark.parametrize('name', [n for n in MODELS if not n.startswith('vit')])
def test_maps(name):
    """Of every mixer that scans, in the places of the tokens."""
    model, x = make(name)
    steps = delta_maps(model, x)
    wanted = [n for n in scan_mixers(model) if not n.startswith('pooled_block')]
    assert list(steps) == wanted == list(half_lives(model, x))
    for s in steps.values():
        assert s.maps.shape[0] == 2 and s.maps.shape[1] == len(s.low) == len(s.high)
        assert (s.low[:, None] <= s.maps.transpose(0, 1).flatten(1)).all() and (s.high > s.low).all()


@torch.no_grad()
@pytest.mark.parametrize('name', ['vim_tiny_patch16_224', 'groupmamba_tiny', 'mambavision_tiny'])
def test_places(name):
    """A mark on one token of the last mixer's step appears at the position that it has in the input."""
    model, x = make(name)
    x = x[:1]
    mixer = list(scan_mixers(model).values())[-1 if name != 'groupmamba_tiny' else -5]  # of columns, not pooled
    before = delta_maps(model, x)
    project = mixer.project

    def marked(tokens):
        inputs = project(tokens)
        if tokens.ndim == 4:  # (B, H, W, C), columns after one another
            index = 1 * tokens.shape[1] + 0  # second column, first row
        elif 'vim' in name:
            index = 6  # before the class token, which is at 8: second row, third column
        else:
            index = 1  # first row, second column
        changed = []
        for s in inputs:
            delta = s.delta.clone()
            delta[0, index] += 50.
            changed.append(s._replace(delta=delta))
        return changed
    mixer.project = marked
    after = delta_maps(model, x)
    changed = [n for n in after if (after[n].maps - before[n].maps).abs().max() > 40]
    assert changed
    difference = (after[changed[-1]].maps - before[changed[-1]].maps)[0, 0]
    row, column = divmod(int(difference.argmax()), difference.shape[1])
    assert (row, column) == ((1, 2) if 'vim' in name else (0, 1))


def test_models_without_scans():
    with pytest.raises(ValueError, match='model: got VisionTransformer, needs one with scans'):
        half_lives(*make('vit_tiny_patch16_224'))


@torch.no_grad()
def test_steps_are_softplus_of_biased_deltas():
    model, x = make('videomamba_tiny_patch16_224')
    model.eval()
    block = model.blocks[0]
    s = block.mixer.project(block.norm(model._embed(model.patch_embed(x))))[1]
    dt = F.softplus(s.delta + s.delta_bias)
    steps = delta_maps(model, x)['blocks.0.mixer']
    torch.testing.assert_close(steps.maps[:, 1], dt.mean(-1)[:, 1:].unflatten(1, (4, 4)))
    assert steps.low[1] == dt.min() and steps.high[1] == dt.max()
