import copy
import json

import pytest
import timm
import torch
from timm.models import group_parameters, save_for_hf
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from torch import nn

import timm_ssm  # noqa: F401  registers the models
from timm_ssm.models.videomamba import checkpoint_filter_fn

from .utils import assert_close, check_fullsize, load_reference, record_blocks, released_shapes, synthetic_checkpoint

SMALL = dict(img_size=32, patch_size=8, embed_dim=32, depth=3, num_classes=7)


def small(released=None, **kwargs):
    """A small VideoMamba, from the checkpoint file `released` if given."""
    torch.manual_seed(0)
    if released is not None:
        kwargs.update(pretrained=True, pretrained_cfg_overlay=dict(file=str(released), num_classes=7))
    return timm.create_model('videomamba_tiny_patch16_224', **{**SMALL, **kwargs})


# Parity

def reference_model():
    config, weights, tensors = load_reference('videomamba_image')
    model = small(**config).eval()
    model.load_state_dict(checkpoint_filter_fn(weights, model), strict=True)
    return model, tensors


def test_reference_logits_and_activations():
    model, reference = reference_model()
    got = record_blocks(model)
    model.patch_embed.register_forward_hook(
        lambda m, a, out: got.__setitem__('mid/patch_embed', out.flatten(1, 3)))
    with torch.no_grad():
        logits = model(reference['x'])
    assert_close(logits, reference['logits'])
    mids = [k for k in reference if k.startswith('mid/')]
    assert len(mids) == 7
    for k in mids:
        assert_close(got[k], reference[k])


def test_fullsize_reference():
    model = timm.create_model('videomamba_tiny_patch16_224')
    model.load_state_dict(checkpoint_filter_fn(synthetic_checkpoint('videomamba_tiny_224'), model), strict=True)
    check_fullsize('videomamba_tiny_224', model)


@pytest.mark.parametrize('size, params', [
    ('tiny', 7_148_008), ('small', 25_796_584), ('middle', 74_217_448), ('base', 97_598_440)])
def test_released_names_and_sizes(size, params):
    """Every released name and shape loads strictly, and the parameter count is exact."""
    model = timm.create_model(f'videomamba_{size}_patch16_224', device='meta')
    assert sum(p.numel() for p in model.parameters()) == params
    shapes = released_shapes()[f'videomamba_{size}_224']
    released = {k: torch.empty(s, device='meta') for k, s in shapes.items()}
    model.load_state_dict(checkpoint_filter_fn(released, model), strict=True, assign=True)
    assert sum(v.numel() for v in released.values()) == params


@pytest.mark.parametrize('wrap', [
    lambda s: s,
    lambda s: {'model': s, 'epoch': 3},
    lambda s: {'module': s},
    lambda s: {'state_dict': s},
    lambda s: {f'module.{k}': v for k, v in s.items()},
    lambda s: {'model': {f'module.{k}': v for k, v in s.items()}},
], ids=['bare', 'model', 'module', 'state_dict', 'prefix', 'model, prefix'])
def test_checkpoint_containers(wrap, tmp_path):
    _, weights, reference = load_reference('videomamba_image')
    torch.save(wrap(weights), tmp_path / 'released.pth')
    model = small(tmp_path / 'released.pth').eval()
    with torch.no_grad():
        assert_close(model(reference['x']), reference['logits'])


def test_own_checkpoint_round_trip(tmp_path):
    model = small()
    torch.save(model.state_dict(), tmp_path / 'own.pth')
    for again in (small(tmp_path / 'own.pth'), small(checkpoint_path=str(tmp_path / 'own.pth'))):
        assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))


def test_checkpoint_of_another_model_is_refused():
    model = small()
    with pytest.raises(ValueError, match=r'checkpoint: it is not of videomamba_tiny_patch16_224: .* missing'):
        checkpoint_filter_fn(timm.create_model('test_resnet').state_dict(), model)
    wider = dict(small(embed_dim=48).state_dict())
    with pytest.raises(ValueError, match=r'is \(1, 1, 48\), needs \(1, 1, 32\)'):
        checkpoint_filter_fn(wider, model)


# Input sizes

@pytest.mark.parametrize('img_size', [48, (32, 64), (64, 32)])
def test_checkpoint_is_resampled_to_another_input_size(img_size, tmp_path):
    """Loading at another size, set_input_size and dynamic_img_size agree; the class token's row stays."""
    _, weights, _ = load_reference('videomamba_image')
    torch.save(weights, tmp_path / 'released.pth')
    path = tmp_path / 'released.pth'
    loaded = small(path, img_size=img_size).eval()
    resized = small(path).eval()
    resized.set_input_size(img_size)
    dynamic = small(path, dynamic_img_size=True).eval()
    H, W = (img_size, img_size) if isinstance(img_size, int) else img_size
    x = torch.randn(2, 3, H, W)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), resized(x))
        torch.testing.assert_close(loaded(x), dynamic(x))
        maps = dynamic.forward_intermediates(x, intermediates_only=True)
    assert loaded.pos_embed.shape == (1, 1 + (H // 8) * (W // 8), 32)
    assert torch.equal(loaded.pos_embed[:, 0], weights['pos_embed'][:, 0])
    assert all(m.shape == (2, 32, H // 8, W // 8) for m in maps)


def test_same_token_count_other_grid():
    """4 x 4 to 2 x 8 patches keeps the number of tokens: the position embedding is resampled all the same."""
    model = small()
    before = model.pos_embed.clone()
    model.set_input_size((16, 64))
    assert model.pos_embed.shape == before.shape and not torch.equal(model.pos_embed, before)
    dynamic = small(dynamic_img_size=True).eval()
    x = torch.randn(1, 3, 16, 64)
    with torch.no_grad():
        torch.testing.assert_close(dynamic(x), model.eval()(x))


def test_checkpoint_of_as_many_patches_in_another_grid(tmp_path):
    """4 x 4 to 2 x 8 patches: the authors' are of squares, ours of what was published with them, or of the model's."""
    _, weights, _ = load_reference('videomamba_image')
    want = small()
    want.load_state_dict(checkpoint_filter_fn(weights, want), strict=True)
    square = copy.deepcopy(want)
    want.set_input_size((16, 64))
    model = small(img_size=(16, 64))
    assert torch.equal(checkpoint_filter_fn(weights, model)['pos_embed'], want.pos_embed)
    assert torch.equal(checkpoint_filter_fn(want.state_dict(), model)['pos_embed'], want.pos_embed)
    for name, source in (('square', square), ('wide', want)):
        args = {**SMALL, 'img_size': source.patch_embed.img_size}
        save_for_hf(source, tmp_path / name, model_args=args, safe_serialization=True)
        if hasattr(source, 'pretrained_model_args'):  # timm 1.0.31
            published = timm.create_model(f'local-dir:{tmp_path / name}', pretrained=True, img_size=(16, 64))
            assert torch.equal(published.pos_embed, want.pos_embed), name


def test_checkpoint_of_a_rectangle(tmp_path):
    source = small(img_size=(32, 64))
    with pytest.raises(ValueError, match='checkpoint: pos_embed has 32 patches, needs 6 x 6 or those of a square'):
        checkpoint_filter_fn(source.state_dict(), small(img_size=48))
    save_for_hf(source, tmp_path, model_args={**SMALL, 'img_size': (32, 64)}, safe_serialization=True)
    if hasattr(source, 'pretrained_model_args'):  # timm 1.0.31
        loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, img_size=48)
        source.set_input_size(48)
        assert torch.equal(loaded.pos_embed, source.pos_embed)


def test_patch_size_and_overlap():
    model = small()
    model.set_input_size(patch_size=4)
    assert model.patch_embed.grid_size == (8, 8) and model(torch.randn(1, 3, 32, 32)).shape == (1, 7)
    overlapping = small(stride=4)
    assert overlapping.patch_embed.grid_size == (7, 7)
    assert overlapping(torch.randn(1, 3, 32, 32)).shape == (1, 7)


@pytest.mark.parametrize('kwargs, shape, message', [
    ({}, (1, 3, 30, 32), "x: got height 30, needs the model's img_size 32"),
    ({}, (1, 3, 32, 40), "x: got width 40, needs the model's img_size 32"),
    (dict(dynamic_img_size=True), (1, 3, 30, 32), 'x: got height 30, needs a multiple of the stride 8'),
    ({}, (3, 32, 32), 'x: got 3 dimensions, needs images'),
    ({}, (1, 3, 4, 32, 32), 'x: got 5 dimensions, needs images'),
    ({}, (1, 4, 32, 32), 'x: got 4 channels, needs in_chans 3'),
    (dict(dynamic_img_size=True, stride=4), (1, 3, 32, 4), 'x: got width 4, needs at least the patch size 8'),
])
def test_wrong_input(kwargs, shape, message):
    with pytest.raises(AssertionError, match=message):
        small(**kwargs)(torch.randn(shape))


@pytest.mark.parametrize('kwargs, error, message', [
    (dict(global_pool='map'), ValueError, "global_pool: got 'map'"),
    (dict(weight_init='kaiming'), ValueError, "weight_init: got 'kaiming'"),
    (dict(num_frames=5, tubelet_size=2), ValueError, 'num_frames: got 5, needs a multiple of tubelet_size 2'),
    (dict(num_frames=0), ValueError, 'num_frames: got 0, needs at least 1'),
    (dict(stride=0), ValueError, r'stride: got \(0, 0\), needs at least 1'),
    (dict(img_size=7), ValueError, r'img_size: got \(7, 7\), needs at least the patch size 8 x 8'),
    (dict(features_only=True, out_indices=()), ValueError, r'indices: got \(\), needs at least one of 0 to 2'),
    (dict(not_an_argument=1), TypeError, 'not_an_argument'),
])
def test_wrong_arguments(kwargs, error, message):
    with pytest.raises(error, match=message):
        small(**kwargs)


@pytest.mark.parametrize('kwargs, message', [
    (dict(img_size=7), r'img_size: got \(7, 7\), needs at least the patch size 8 x 8'),
    (dict(img_size=0), r'img_size: got \(0, 0\), needs at least the patch size'),
    (dict(patch_size=33), r'img_size: got \(32, 32\), needs at least the patch size 33 x 33'),
    (dict(patch_size=0), r'patch_size: got \(0, 0\), needs at least 1'),
])
def test_wrong_size_later(kwargs, message):
    """A refused set_input_size leaves the model as it was."""
    model, x = small().eval(), torch.randn(1, 3, 32, 32)
    want = model(x)
    with pytest.raises(ValueError, match=message):
        model.set_input_size(**kwargs)
    assert torch.equal(model(x), want)


# timm's model interface

def test_heads_and_pooling():
    x = torch.randn(2, 3, 32, 32)
    model = small().eval()
    features = model.forward_features(x)
    assert features.shape == (2, 17, 32)
    torch.testing.assert_close(model(x), model.forward_head(features))
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), features[:, 0])
    torch.testing.assert_close(small(global_pool='avg').eval().pool(features), features[:, 1:].mean(1))
    model.reset_classifier(5)
    assert model.global_pool == 'token' and model(x).shape == (2, 5)
    model.reset_classifier(0, 'avg')
    torch.testing.assert_close(model(x), features[:, 1:].mean(1))
    model.reset_classifier(0, '')
    assert model(x).shape == features.shape
    assert isinstance(model.get_classifier(), nn.Identity)
    assert small(num_classes=0)(x).shape == (2, 32)
    assert small(in_chans=1)(x[:, :1]).shape == (2, 7)


def test_features():
    x = torch.randn(2, 3, 32, 64)
    model = small(img_size=(32, 64)).eval()
    final, maps = model.forward_intermediates(x)
    torch.testing.assert_close(final, model.forward_features(x))
    assert [m.shape for m in maps] == [(2, 32, 4, 8)] * 3 and all(m.is_contiguous() for m in maps)
    pairs = model.forward_intermediates(x, indices=[1], return_prefix_tokens=True, output_fmt='NLC', norm=True,
                                        intermediates_only=True)
    tokens, prefix = pairs[0]
    assert tokens.shape == (2, 32, 32) and prefix.shape == (2, 1, 32)
    torch.testing.assert_close(tokens.transpose(1, 2).unflatten(2, (4, 8)),
                               model.forward_intermediates(x, indices=[1], norm=True, intermediates_only=True)[0])
    backbone = small(img_size=(32, 64), features_only=True, out_indices=(0, 2)).eval()
    assert backbone.feature_info.channels() == [32, 32] and backbone.feature_info.reduction() == [8, 8]
    torch.testing.assert_close(backbone(x), [maps[0], maps[2]])
    pruned = copy.deepcopy(model)
    assert pruned.prune_intermediate_layers([1]) == [1] and len(pruned.blocks) == 2


def test_every_block_has_its_own_group():
    model = small()
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    block_groups = [{groups[f'blocks.{i}.{n}'] for n, _ in b.named_parameters()} for i, b in enumerate(model.blocks)]
    assert [len(g) for g in block_groups] == [1, 1, 1] and len(set.union(*block_groups)) == 3
    stem = {groups[n] for n in ('cls_token', 'pos_embed', 'patch_embed.proj.weight')}
    assert len(stem) == 1 and stem.isdisjoint(set.union(*block_groups))
    scales = {g['lr_scale'] for g in param_groups_layer_decay(model, layer_decay=.5)}
    assert scales == {1., .5, .25, .125, .0625}


def test_no_weight_decay():
    """A, D, norms, biases and embeddings take no weight decay, the other weights do."""
    model = small()
    optimizer = create_optimizer_v2(model, 'adamw', lr=1e-3, weight_decay=.1)
    decayed = {id(p) for g in optimizer.param_groups if g['weight_decay'] > 0 for p in g['params']}
    for name, p in model.named_parameters():
        expected = name.endswith('weight') and 'norm' not in name
        assert (id(p) in decayed) == expected, name


# Initialisation

def test_released_initialisation():
    model = small(depth=4, embed_dim=64)
    for block in model.blocks:
        mixer = block.mixer
        assert torch.count_nonzero(mixer.dt_proj.bias) == 0 and torch.count_nonzero(mixer.dt_proj_b.bias) == 0
        torch.testing.assert_close(mixer.A_log.exp()[3], torch.arange(1., 17.))
        assert (mixer.D_b == 1).all()
        assert abs(mixer.in_proj.weight.std().item() / .02 - 1) < .05
        bound = (6 / ((1 + 5) * 128)) ** .5 / 4 ** .5  # kaiming_uniform(a=sqrt(5)) / sqrt(depth)
        assert .9 * bound < mixer.out_proj.weight.abs().max() <= bound
    assert torch.count_nonzero(model.cls_token) == 0
    assert abs(model.pos_embed.std().item() / .02 - 1) < .1


def test_mamba_initialisation_of_dt():
    model = small(weight_init='mamba')
    for block in model.blocks:
        for proj in (block.mixer.dt_proj, block.mixer.dt_proj_b):
            dt = nn.functional.softplus(proj.bias)
            assert dt.min() >= 1e-3 * .99 and dt.max() <= 1e-1 * 1.01
            assert 2e-3 < dt.log().mean().exp() < 5e-2  # log-uniform: geometric mean 1e-2
            assert proj.weight.abs().max() <= proj.in_features ** -.5


@pytest.mark.parametrize('weight_init', ['', 'mamba'])
def test_initialisation_after_to_empty(weight_init):
    """Built on meta, materialised, initialised: the same distribution as built in place."""
    model = small(device='meta', weight_init=weight_init).to_empty(device='cpu')
    for p in model.parameters():
        nn.init.constant_(p, float('nan'))
    torch.manual_seed(0)
    model.init_weights()
    reference = small(weight_init=weight_init)
    for (name, p), q in zip(model.named_parameters(), reference.parameters()):
        assert p.isfinite().all(), name
        if p.numel() >= 128:
            assert abs(p.std() - q.std()) <= .25 * q.std() + 1e-6, name


# Training and precision

def train_gradients(model, x, seed=0):
    torch.manual_seed(seed)
    model.zero_grad()
    model(x).square().mean().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters()}


def test_train_step_with_drop_path():
    model = small(drop_path_rate=.5, drop_rate=.1, pos_drop_rate=.1).train()
    rates = [getattr(b.drop_path, 'drop_prob', 0.) for b in model.blocks]
    assert rates == pytest.approx([0., .25, .5])
    optimizer = create_optimizer_v2(model, 'adamw', lr=1e-2)
    x, target = torch.randn(8, 3, 32, 32), torch.arange(8) % 7
    losses = []
    for _ in range(15):
        loss = nn.functional.cross_entropy(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < .7 * losses[0]


def test_gradient_checkpointing_leaves_gradients_unchanged():
    model, x = small(drop_path_rate=.3).train(), torch.randn(4, 3, 32, 32)
    want = train_gradients(model, x)
    model.set_grad_checkpointing()
    got = train_gradients(model, x)
    assert all(torch.equal(got[k], want[k]) for k in want)


def test_autocast_precision():
    """Under autocast the residual stream and the state-space parameters are float32, projections bfloat16."""
    model, x = small().train(), torch.randn(2, 3, 32, 32)
    seen = {}
    model.blocks[1].register_forward_hook(lambda m, a, out: seen.update(stream=out.dtype))
    model.blocks[1].mixer.in_proj.register_forward_hook(lambda m, a, out: seen.update(proj=out.dtype))
    model.blocks[1].mixer.register_forward_hook(lambda m, a, out: seen.update(mixer=out.dtype))
    reference = model(x)
    with torch.autocast('cpu', torch.bfloat16):
        out = model(x)
    assert seen == dict(stream=torch.float32, proj=torch.bfloat16, mixer=torch.bfloat16)
    assert (out.float() - reference).abs().max() < .05 * reference.abs().max()
    out.float().square().mean().backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float64])
def test_model_in_another_dtype(dtype):
    """Cast as a whole, inputs, features and logits are of that dtype and the residual stream is float32 at least."""
    model, x = small().eval(), torch.randn(2, 3, 32, 32)
    reference = model(x)
    model.to(dtype)
    seen = []
    model.blocks[0].register_forward_hook(lambda m, a, out: seen.append(out.dtype))
    out = model(x.to(dtype))
    maps = model.forward_intermediates(x.to(dtype), intermediates_only=True)
    assert out.dtype == maps[0].dtype == model.forward_features(x.to(dtype)).dtype == dtype
    assert seen[0] == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (out.float() - reference).abs().max() < .05 * reference.abs().max()
    assert small(dtype=dtype).pos_embed.dtype == dtype


def test_projections_are_called():
    """Hooks, LoRA and quantisation act on nn.Linear's forward: every projection goes through it, once a block."""
    model = small()
    calls = []
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    for name, module in linears.items():
        module.register_forward_hook(lambda m, a, out, name=name: calls.append(name))
    model(torch.randn(1, 3, 32, 32))
    assert sorted(calls) == sorted(linears) and len(linears) == 3 * 6 + 1


def test_lora():
    peft = pytest.importorskip('peft')
    model, x = small().eval(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        want = model(x)
    config = peft.LoraConfig(target_modules=['in_proj', 'x_proj', 'dt_proj', 'out_proj'], modules_to_save=['head'])
    lora = peft.get_peft_model(model, config).train()
    torch.testing.assert_close(lora.eval()(x), want)
    optimizer = torch.optim.SGD([p for p in lora.parameters() if p.requires_grad], lr=1.)
    for _ in range(2):  # the second factor of an adapter is zero at first and hides the first one's gradient
        lora(x).square().mean().backward()
        optimizer.step()
    trained = [n for n, p in lora.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    assert all(any(f'{t}.lora_{ab}' in n for n in trained)
               for t in ('in_proj', 'x_proj', 'dt_proj', 'out_proj') for ab in 'AB')
    with torch.no_grad():
        adapted = lora(x)
        merged = lora.merge_and_unload()
        torch.testing.assert_close(merged(x), adapted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(adapted, want)


# Compilation and export

def test_compile_fullgraph_training():
    model, x = small(depth=2).train(), torch.randn(2, 3, 32, 32)
    want = train_gradients(model, x)
    got = train_gradients(torch.compile(model, fullgraph=True, backend='aot_eager'), x)
    for k in want:
        torch.testing.assert_close(got[f'_orig_mod.{k}'], want[k])


def test_export_program():
    model, x = small(depth=2).eval(), torch.randn(2, 3, 32, 32)
    batch = torch.export.Dim('batch', max=64)  # torch 2.6 cannot do without a maximum
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
    y = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(program.module()(y), model(y))


@pytest.mark.parametrize('dynamo', [True, False])
def test_onnx(dynamo, tmp_path):
    """Both ONNX exporters, a batch size other than the example's, checked in onnxruntime."""
    pytest.importorskip('onnxscript')
    onnxruntime = pytest.importorskip('onnxruntime')
    model, x = small(depth=2).eval(), torch.randn(2, 3, 32, 32)
    path = str(tmp_path / 'model.onnx')
    if dynamo:
        batch = dict(dynamic_shapes=({0: torch.export.Dim('batch')},))
    else:
        batch = dict(dynamic_axes={'x': {0: 'batch'}})
    torch.onnx.export(model, (x,), path, input_names=['x'], dynamo=dynamo, **batch)
    y = torch.randn(3, 3, 32, 32)
    got, = onnxruntime.InferenceSession(path).run(None, {'x': y.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), model(y), rtol=1e-3, atol=1e-5)


def test_torchscript_save_and_load(tmp_path):
    model, x = small(depth=2, scriptable=True).eval(), torch.randn(2, 3, 32, 32)
    torch.jit.script(model).save(str(tmp_path / 'model.pt'))
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.load(str(tmp_path / 'model.pt'))(x), model(x), rtol=1e-4, atol=1e-5)


def test_deterministic():
    model, x = small().train(), torch.randn(2, 3, 32, 32)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = train_gradients(model, x), train_gradients(model, x)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_registry():
    names = timm.list_models('videomamba_*_patch16_*', exclude_filters='*_f*')
    assert len(names) == 10 and set(names) == {
        'videomamba_base_patch16_224',
        *(f'videomamba_{s}_patch16_{r}' for s in ('tiny', 'small', 'middle') for r in (224, 448, 576))}
    for name in names:
        cfg = timm.get_pretrained_cfg(name)
        assert cfg.hf_hub_id == 'OpenGVLab/VideoMamba' and cfg.license == 'apache-2.0'
        assert cfg.input_size[-1] == int(name.rpartition('_')[2])
        model = timm.create_model(name, device='meta')
        assert model.patch_embed.img_size == cfg.input_size[1:]
        json.dumps(cfg.to_dict())
