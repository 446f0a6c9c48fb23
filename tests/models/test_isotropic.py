"""What every variant of every isotropic family can do, at a small depth and width."""
import re
from functools import partial

import pytest
import timm
import torch
from timm.data import resolve_data_config
from timm.layers import set_fused_attn
from timm.models._features_fx import create_feature_extractor
from torch import nn

import timm_ssm  # noqa: F401  registers the models

from .utils import check_train_step

MODULES = ['videomamba', 'stablemamba', 'videomambapro', 'stvideomamba', 'vim']
VARIANTS = timm.list_models(module=MODULES)
ONE_OF_EACH = [
    'videomamba_tiny_patch16_224', 'videomamba_tiny_patch16_f8_224', 'stablemamba_tiny_patch16_224',
    'stablemamba_tiny_patch16_f16_224', 'videomambapro_tiny_patch16_224', 'videomambapro_tiny_patch16_f8_224',
    'stvideomamba_tiny_patch16_f16_224', 'vim_tiny_patch16_224',
]


def tiny(name, **kwargs):
    torch.manual_seed(0)
    small = dict(img_size=32, embed_dim=32, depth=2, num_classes=5)
    if name.startswith('stablemamba'):
        small['attn_every'] = 2  # attention first, then Mamba
    return timm.create_model(name, **{**small, **kwargs})


def frames(name):
    match = re.search(r'_f(\d+)_', name)
    return int(match.group(1)) if match else None


def batch(name, size=2):
    torch.manual_seed(0)
    return torch.randn(size, 3, *([frames(name)] if frames(name) else []), 32, 32)


def test_all_families_are_here():
    assert {n.partition('_')[0] for n in VARIANTS} == set(MODULES) and set(ONE_OF_EACH) <= set(VARIANTS)
    assert len(VARIANTS) == (10 + 18) + (5 + 4) + (3 + 9) + 2 + 5


@pytest.mark.parametrize('name', VARIANTS)
def test_build_on_meta(name):
    """The full-size variant: its configuration agrees with its name, its registry entry and its feature_info."""
    model = timm.create_model(name, device='meta')
    cfg = timm.get_pretrained_cfg(name)
    img_size = int(name.rpartition('_')[2])
    assert cfg.input_size == (3, img_size, img_size) and model.patch_embed.img_size == (img_size, img_size)
    assert model.patch_embed.num_frames == (frames(name) or 1)
    assert model.num_classes == cfg.num_classes and model.get_classifier().out_features == cfg.num_classes
    assert all(p.is_meta for p in model.state_dict().values())
    assert len(model.feature_info) == len(model.blocks)
    assert {f['num_chs'] for f in model.feature_info} == {model.embed_dim}


@pytest.mark.parametrize('name', VARIANTS)
def test_train_step_and_state_dict(name):
    check_train_step(partial(tiny, name), batch(name))


@pytest.mark.parametrize('name', ONE_OF_EACH)
def test_every_parameter_learns(name):
    """No parameter is left out of the computation (the first token of a last scan alone would leave its decay out)."""
    model = tiny(name, global_pool='avg').double()
    for p in model.parameters():
        nn.init.normal_(p, std=.3)
    model(batch(name).double()).square().sum().backward()
    assert not [n for n, p in model.named_parameters() if p.grad.abs().max() == 0]


@pytest.mark.parametrize('name', ONE_OF_EACH)
def test_trace_and_script(name):
    """FX traces it and finds the blocks, TorchScript gives the same numbers, checkpointing the same gradients."""
    model, x = tiny(name, scriptable=True).eval(), batch(name)
    want = model(x)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), want)
    blocks = create_feature_extractor(model, {'blocks.1': 'x', 'head': 'y'})(x)
    torch.testing.assert_close(blocks['y'], want)
    torch.testing.assert_close(torch.jit.script(model)(x), want, rtol=1e-4, atol=1e-5)
    want.sum().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.set_grad_checkpointing()
    model.train()(x).sum().backward()
    for got, want in zip([p.grad for p in model.parameters()], grads):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize('name', ONE_OF_EACH)
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64])
def test_dtype(name, dtype):
    """Built in a dtype, or under autocast: close to float32, the residual stream float32 at least."""
    model, x = tiny(name).eval(), batch(name)
    with torch.no_grad():
        want = model(x)
        with torch.autocast('cpu', torch.bfloat16):
            torch.testing.assert_close(model(x).float(), want, rtol=0., atol=.05 * want.abs().max().item())
        other = tiny(name, dtype=dtype).eval()
        other.load_state_dict(model.state_dict())
        streams = []
        other.blocks[1].register_forward_hook(lambda m, a, out: streams.append(out.dtype))
        got = other(x.to(dtype))
    assert got.dtype == dtype and streams[0] == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(got.float(), want, rtol=0., atol=.05 * want.abs().max().item())


@pytest.mark.parametrize('name', ONE_OF_EACH)
def test_features_and_sizes(name):
    """Maps have a temporal axis for clips; set_input_size and dynamic_img_size agree; unknown arguments are refused."""
    model = tiny(name, patch_size=8).eval()
    model.set_input_size((32, 48))
    dynamic = tiny(name, patch_size=8, dynamic_img_size=True).eval()
    x = torch.cat([batch(name), batch(name)[..., :16]], dim=-1)
    with torch.no_grad():
        torch.testing.assert_close(dynamic(x), model(x))
        final, maps = model.forward_intermediates(x, indices=[0, 1], norm=True)
    grid = (4, 6)
    if frames(name):
        grid = (frames(name) // model.patch_embed.tubelet_size, 4, 6)
    assert [m.shape for m in maps] == [(2, 32, *grid)] * 2
    torch.testing.assert_close(maps[1].flatten(2).mT, final[:, 1:])
    with pytest.raises(TypeError, match='not_an_argument'):
        tiny(name, not_an_argument=1)


@pytest.mark.parametrize('name', [n for n in ONE_OF_EACH if frames(n)])
def test_wrong_clips(name):
    """Images and clips of other frame counts are refused in words, by every family that takes clips."""
    model = tiny(name)
    with pytest.raises(AssertionError, match=r'x: got 4 dimensions, needs clips \(batch, channels, frames, height'):
        model(torch.randn(1, 3, 32, 32))
    with pytest.raises(AssertionError, match=f'x: got 6 frames, needs num_frames {frames(name)}'):
        model(torch.randn(1, 3, 6, 32, 32))


@pytest.mark.parametrize('name', VARIANTS)
def test_input_of_timms_benchmark(name):
    """timm's benchmark.py makes batches of the cfg's test size: those of a clip model are clips of its frames."""
    model = timm.create_model(name, device='meta', depth=1)
    size = resolve_data_config({}, model=model, use_test_size=True)['input_size']
    assert tuple(size) == (3, *([frames(name)] if frames(name) else []), *model.patch_embed.img_size)
    assert len(resolve_data_config({}, model=model)['input_size']) == 3


@pytest.mark.parametrize('name', [n for n in ONE_OF_EACH if frames(n)])
def test_other_clips_than_the_checkpoints(name, tmp_path):
    """Twice the frames and another size, from a file: what is neither time nor place is the checkpoint's."""
    source = tiny(name, patch_size=8)
    torch.save(source.state_dict(), tmp_path / 'clip.pth')
    overlay = dict(file=str(tmp_path / 'clip.pth'), num_classes=5)
    longer = tiny(name, patch_size=8, num_frames=2 * frames(name), pretrained=True, pretrained_cfg_overlay=overlay)
    larger = tiny(name, patch_size=8, img_size=48, pretrained=True, pretrained_cfg_overlay=overlay)
    for model, size in ((longer, 32), (larger, 48)):
        state = model.state_dict()
        assert all(torch.equal(v, state[k]) for k, v in source.state_dict().items() if 'pos_embed' not in k)
        assert model(torch.randn(1, 3, model.patch_embed.num_frames, size, size)).shape == (1, 5)
    source.set_input_size(48)
    assert torch.equal(larger.pos_embed, source.pos_embed)
    if longer.temporal_pos_embed is not None:
        assert longer.temporal_pos_embed.shape[1] == 2 * source.temporal_pos_embed.shape[1]
        assert torch.equal(larger.temporal_pos_embed, source.temporal_pos_embed)


@pytest.mark.parametrize('name', [n for n in ONE_OF_EACH if frames(n)])
def test_image_weights_in_every_clip_family(name, tmp_path):
    """A new head, and where embeddings are VideoMamba's the tokens of a still clip are those of the image."""
    family = name.partition('_')[0]
    source = 'videomamba' if family == 'stvideomamba' else family
    image = tiny(f'{source}_tiny_patch16_224', num_classes=9).eval()
    torch.save(image.state_dict(), tmp_path / 'image.pth')
    overlay = dict(file=str(tmp_path / 'image.pth'), num_classes=9)
    clip = tiny(name, pretrained=True, pretrained_cfg_overlay=overlay).eval()
    assert torch.equal(clip.blocks[1].mixer.out_proj.weight, image.blocks[1].mixer.out_proj.weight)
    x = torch.randn(2, 3, 32, 32)
    still = x.unsqueeze(2).expand(-1, -1, frames(name), -1, -1)
    want = image._pos_embed(image.patch_embed(x))
    got = clip._pos_embed(clip.patch_embed(still))
    torch.testing.assert_close(got[:, :1], want[:, :1])
    for tokens in got[:, 1:].unflatten(1, (-1, 4)).unbind(1):
        torch.testing.assert_close(tokens, want[:, 1:])


def test_attention_backends_agree():
    x = batch('stablemamba_tiny_patch16_224')
    try:
        set_fused_attn(False)
        plain = tiny('stablemamba_tiny_patch16_224').eval()
    finally:
        set_fused_attn(True)
    fused = tiny('stablemamba_tiny_patch16_224').eval()
    assert not plain.blocks[0].mixer.fused_attn and fused.blocks[0].mixer.fused_attn
    torch.testing.assert_close(plain(x), fused(x))
