import pytest
import timm
import torch
from timm.layers import Attention

import timm_ssm  # noqa: F401  registers the models
from timm_ssm.layers import BiMamba


def layers(model):
    return ''.join({Attention: 'T', BiMamba: 'm'}[type(b.mixer)] for b in model.blocks)


@pytest.mark.parametrize('size, depth, params, published', [
    ('tiny', 16, 6_994_792, 7e6), ('small', 16, 27_187_432, 27e6), ('middle', 24, 77_016_232, 76e6),
    ('base', 16, 100_082_152, 101e6), ('large', 16, 184_564_712, 187e6)])
def test_sizes(size, depth, params, published):
    model = timm.create_model(f'stablemamba_{size}_patch16_224', device='meta')
    count = sum(p.numel() for p in model.parameters())
    assert count == params and abs(count / published - 1) < .015
    assert layers(model) == 'mmmTmmmm' * (depth // 8)
    attention = model.blocks[3].mixer
    assert attention.head_dim == 64 and attention.qkv.bias is None and attention.proj.bias is not None


@pytest.mark.parametrize('attn_every, attn_position, expected', [
    (8, 'start', 'TmmmmmmmTmmmmmmm'),
    (8, 'end', 'mmmmmmmTmmmmmmmT'),
    (2, 'middle', 'Tm' * 8),
    (4, 'middle', 'mTmm' * 4),
    (16, 'middle', 'mmmmmmmTmmmmmmmm'),
    (1, 'middle', 'T' * 16),
])
def test_ablations(attn_every, attn_position, expected):
    model = timm.create_model(
        'stablemamba_tiny_patch16_224', attn_every=attn_every, attn_position=attn_position, device='meta')
    assert layers(model) == expected


def test_layer_is_the_papers_equations():
    """z' = z + mixer(norm(z)); z = z' + mlp(norm(z')), for both kinds of layer, with the norm written out."""
    torch.manual_seed(0)
    model = timm.create_model('stablemamba_tiny_patch16_224', embed_dim=64, mlp_ratio=3., num_heads=4, img_size=32)

    def norm(x):
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()

    z = torch.randn(2, 5, 64)
    for layer in model.blocks[2:4]:
        h = z + layer.mixer(norm(z))
        fc1, fc2 = layer.mlp.fc1, layer.mlp.fc2
        assert fc1.out_features == 192 and fc1.bias is not None and fc2.bias is not None
        h = h + fc2(torch.nn.functional.gelu(fc1(norm(h))))
        torch.testing.assert_close(layer(z), h)
    assert model.blocks[3].mixer.num_heads == 4


@pytest.mark.parametrize('kwargs, message', [
    (dict(attn_every=0), 'attn_every: got 0, needs at least 1'),
    (dict(attn_position='center'), "attn_position: got 'center', needs 'start', 'middle' or 'end'"),
    (dict(num_heads=5), 'num_heads: got 5, needs a divisor of embed_dim 192'),
])
def test_wrong_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model('stablemamba_tiny_patch16_224', **kwargs)
