import pytest
import torch

from timm_ssm.layers.norm import LayerNorm, RmsNorm


@pytest.mark.parametrize('norm', [RmsNorm, LayerNorm])
def test_precise_stream_of_a_less_precise_model(norm):
    """Statistics are those of the float32 stream; only the result is rounded to the dtype of the weight."""
    layer, x = norm(64, eps=1e-5).bfloat16(), 300 + torch.randn(3, 64)  # which bfloat16 would round to even numbers
    with torch.no_grad():
        layer.weight.uniform_(.5, 2.)
    centred = x.double() - (x.double().mean(-1, keepdim=True) if norm is LayerNorm else 0)
    expected = centred * (centred.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * layer.weight.double()
    out = layer(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), expected, rtol=2 ** -8, atol=1e-3)
    if norm is LayerNorm:  # the mean of 300 hides what it loses
        assert not torch.allclose(layer(x.bfloat16()).double(), expected, rtol=2 ** -8, atol=1e-1)


@pytest.mark.parametrize('norm', [RmsNorm, LayerNorm])
def test_script(norm):
    layer, x = norm(16), torch.randn(2, 16)
    torch.testing.assert_close(torch.jit.script(layer)(x), layer(x))
