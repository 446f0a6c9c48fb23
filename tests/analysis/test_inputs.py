"""What models make of changes of their input: receptive fields and high frequencies."""
import numpy as np
import pytest
import timm
import torch
from torch import nn

import timm_ssm  # noqa: F401  registers the models
from timm_ssm.analysis import amplify_high_frequencies, field_sizes, frequency_sensitivity, receptive_field

from .test_rollout import make


class Convolutions(nn.Module):
    """Three 3 x 3 convolutions, whose receptive field is known."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(*[nn.Conv2d(3, 3, 3, padding=1) for _ in range(3)])

    def forward_intermediates(self, x, indices=None, intermediates_only=True):
        return [self.layers(x)]


def test_receptive_field_of_convolutions():
    torch.manual_seed(0)
    model = Convolutions()
    x = torch.randn(3, 3, 15, 15)
    field = receptive_field(model, x)
    assert field.shape == (15, 15) and field.sum() == pytest.approx(1)
    inside = torch.zeros(15, 15, dtype=torch.bool)
    inside[4:11, 4:11] = True
    assert (field[inside] > 0).all() and (field[~inside] == 0).all()
    assert torch.equal(field, receptive_field(model, x))
    assert field_sizes(field, [1.]) == [7]


def test_sizes_of_fields():
    field = torch.full((10, 10), 0.01)
    assert field_sizes(field, [.04, .05, .5, 1.]) == [2, 4, 8, 10]


@pytest.mark.parametrize('name', ['videomamba_tiny_patch16_224', 'vim_tiny_patch16_224', 'groupmamba_tiny'])
def test_receptive_field_at_other_sizes(name):
    model, x = make(name)
    for size in (32, 64):
        if hasattr(model, 'set_input_size'):
            model.set_input_size(img_size=size)
        field = receptive_field(model, torch.randn(1, 3, size, size))
        assert field.shape == (size, size) and field.min() >= 0


def test_receptive_field_of_clips():
    model, x = make('videomamba_tiny_patch16_f8_224')
    field = receptive_field(model, x)
    assert field.shape == (8, 32, 32)
    assert field[4].sum() == field.sum((1, 2)).max()  # the middle frame's own


def test_amplification():
    """What is below the threshold stays; what is above is multiplied."""
    row = torch.arange(32.)
    low, high = torch.cos(2 * torch.pi * 2 * row / 32), torch.cos(2 * torch.pi * 15 * row / 32)
    slow, fast = (w[:, None] * w for w in (low, high))
    x = torch.stack([slow, fast, slow + fast])[None]
    y = amplify_high_frequencies(x, 7.)
    torch.testing.assert_close(y, torch.stack([slow, 7 * fast, slow + 7 * fast])[None], rtol=1e-4, atol=1e-5)
    frequencies = np.fft.fftfreq(32)
    ring = np.hypot(frequencies[:, None], frequencies)
    changed = torch.fft.fft2(amplify_high_frequencies(torch.randn(32, 32), 0.)).abs() < 1e-4
    assert 0.19 < changed.float().mean() < 0.22
    assert ring[changed.numpy()].min() >= ring[~changed.numpy()].max()


@pytest.mark.parametrize('name', ['videomamba_tiny_patch16_224', 'vit_tiny_patch16_224', 'mambavision_tiny'])
def test_sensitivity(name):
    model, x = make(name)
    similarity = frequency_sensitivity(model, x, [1, 5, 30], batch_size=1)
    depths = 4 if name == 'mambavision_tiny' else 3
    assert similarity.shape == (3, depths)
    torch.testing.assert_close(similarity[0], torch.ones(depths))
    assert (similarity[2] < similarity[1]).all() and (similarity[1] < 1).all()
    torch.testing.assert_close(similarity, frequency_sensitivity(model, x, [1, 5, 30]), rtol=1e-4, atol=1e-5)


def test_models_without_intermediates():
    for analyse in (receptive_field, frequency_sensitivity):
        with pytest.raises(ValueError, match='model: got Identity, needs one with forward_intermediates'):
            analyse(nn.Identity(), torch.randn(1, 3, 8, 8))


def test_any_model_of_timm():
    model = timm.create_model('resnet10t')
    assert frequency_sensitivity(model, torch.randn(1, 3, 64, 64), [1, 30]).shape == (2, 5)
