import copy
import math

import pytest
import timm
import torch
from timm.models import group_parameters
from timm.models._features import FeatureGetterNet
from timm.task import TokenDistillationTask
from torch import nn
from torch.nn import functional as F

import timm_ssm  # noqa: F401  registers the models
from timm_ssm.models.groupmamba import GroupScan, MapAttention, checkpoint_filter_fn

from .utils import assert_close, check_fullsize, load_reference, released_shapes, synthetic_checkpoint

SMALL = dict(stem_dim=8, embed_dims=(16, 32, 48, 64), depths=(1, 1, 2, 1), mlp_ratios=(4, 4, 2, 2), num_classes=7)
SIZES = {'tiny': 23_361_917, 'small': 34_781_555, 'base': 57_150_838}


def small(name='groupmamba_tiny', **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, **{**SMALL, **kwargs})


def reference_model(**kwargs):
    """A model of the reference weights, and the reference numbers."""
    config, weights, tensors = load_reference('groupmamba')
    config['stem_dim'] = config.pop('stem_hidden_dim')
    model = small(**{**config, **kwargs}).eval()
    model.load_state_dict(checkpoint_filter_fn(weights, model), strict=True)
    return model, tensors


# Parity

def test_reference_logits_and_activations():
    model, reference = reference_model()
    modules = {}
    for i, stage in enumerate(model.stages):
        modules[f'mid/patch_embed{i + 1}.0'] = stage.downsample
        modules.update({f'mid/block{i + 1}.{j}': block for j, block in enumerate(stage.blocks)})
    assert set(modules) == {k for k in reference if k.startswith('mid/')}
    got = {}
    for k, module in modules.items():
        module.register_forward_hook(lambda m, a, out, k=k: got.__setitem__(k, out.flatten(1, 2)))
    with torch.no_grad():
        logits = model(reference['x'])
    assert_close(logits, reference['logits'])
    for k in modules:
        assert_close(got[k], reference[k])


def test_fullsize_reference():
    model = timm.create_model('groupmamba_tiny')
    model.load_state_dict(checkpoint_filter_fn(synthetic_checkpoint('groupmamba_tiny_224'), model), strict=True)
    check_fullsize('groupmamba_tiny_224', model)


@pytest.mark.parametrize('size', SIZES)
def test_released_names_and_sizes(size):
    """Every released name and shape loads strictly, and the parameter count is exact."""
    model = timm.create_model(f'groupmamba_{size}', device='meta')
    assert sum(p.numel() for p in model.parameters()) == SIZES[size]
    shapes = released_shapes()[f'groupmamba_{size}_224']
    released = {k: torch.empty(s, device='meta') for k, s in shapes.items()}
    model.load_state_dict(checkpoint_filter_fn(released, model), strict=True, assign=True)


@pytest.mark.parametrize('wrap', [
    lambda s: s,
    lambda s: {'model': s, 'epoch': 3},
    lambda s: {'state_dict': {f'module.{k}': v for k, v in s.items()}},
    lambda s: {k: v for k, v in s.items() if not k.endswith('num_batches_tracked')},
], ids=['bare', 'model', 'state_dict, prefix', 'no counters'])
def test_released_files(wrap, tmp_path):
    config, weights, reference = load_reference('groupmamba')
    config['stem_dim'] = config.pop('stem_hidden_dim')
    torch.save(wrap(weights), tmp_path / 'released.pth')
    overlay = dict(file=str(tmp_path / 'released.pth'), num_classes=7)
    model = small(pretrained=True, pretrained_cfg_overlay=overlay, **config).eval()
    with torch.no_grad():
        assert_close(model(reference['x']), reference['logits'])
    other = small(pretrained=True, pretrained_cfg_overlay=overlay, in_chans=1, **{**config, 'num_classes': 5})
    assert other.head.out_features == other.head_dist.out_features == 5


def test_own_checkpoint_round_trip():
    for name in ('groupmamba_tiny', 'stable_groupmamba_small'):
        model, again = small(name), small(name)
        again.load_state_dict(checkpoint_filter_fn(model.state_dict(), again), strict=True)
        assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))


def test_checkpoint_of_another_model_is_refused():
    with pytest.raises(ValueError, match=r'checkpoint: it is not of groupmamba_tiny: .* missing'):
        checkpoint_filter_fn(timm.create_model('test_resnet').state_dict(), small())


# The four directions, against loops over the grid

class PlainGroupScan(nn.Module):
    """GroupScan as the paper describes it, position after position; takes over a GroupScan's parameters."""

    def __init__(self, scan: GroupScan, group: int) -> None:
        super().__init__()
        self.scan = scan
        self.group = group

    def positions(self, H, W):
        rows = [(i, j) for i in range(H) for j in range(W)]
        columns = [(i, j) for j in range(W) for i in range(H)]
        return [rows, columns, rows[::-1], columns[::-1]][self.group]

    def forward(self, x):
        p = self.scan
        B, H, W, C = x.shape
        rank = p.dt_proj.weight.shape[1]
        x, z = F.linear(x, p.in_proj.weight).split(C, dim=-1)
        x = F.silu(F.conv2d(x.permute(0, 3, 1, 2), p.conv2d.weight, p.conv2d.bias, padding=1, groups=C))
        x = x.permute(0, 2, 3, 1)
        a, h, y = -torch.exp(p.A_log[:, 0]), torch.zeros(B, C), torch.zeros(B, H, W, C)
        for i, j in self.positions(H, W):
            u = x[:, i, j]
            projected = F.linear(u, p.x_proj.weight)
            dt = F.softplus(F.linear(projected[:, :rank], p.dt_proj.weight, p.dt_proj.bias))
            h = torch.exp(dt * a) * h + dt * projected[:, rank:rank + 1] * u
            y[:, i, j] = projected[:, rank + 1:] * h + p.D * u
        return F.linear(p.norm(y) * F.silu(z), p.out_proj.weight)


@pytest.mark.parametrize('group', range(4))
def test_scan_on_a_rectangle(group):
    """Each direction of a rectangular grid, values and gradients."""
    scan = small().stages[1].blocks[0].mixer.mixers[group]
    for p in scan.parameters():
        nn.init.normal_(p, std=.5)
    x = torch.randn(2, 3, 5, 8, requires_grad=True)
    results = []
    for module in (scan, PlainGroupScan(scan, group)):
        scan.zero_grad()
        x.grad = None
        y = module(x)
        (y * torch.arange(y.numel()).view_as(y).cos()).sum().backward()
        results.append([y.detach(), x.grad, *(p.grad.clone() for p in scan.parameters())])
    assert len(results[0]) == 13
    for got, want in zip(*results):
        assert_close(got, want)


def test_model_on_a_rectangle():
    model, _ = reference_model()
    plain = copy.deepcopy(model)
    layers = [b.mixer for s in plain.stages for b in s.blocks] + [plain.pooled_block.mixer]
    for layer in layers:
        layer.mixers = nn.ModuleList([PlainGroupScan(scan, i) for i, scan in enumerate(layer.mixers)])
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        assert_close(model(x), plain(x), tolerance=2e-5)
        columns = copy.deepcopy(plain)
        for layer in [b.mixer for s in columns.stages for b in s.blocks]:
            layer.mixers[1].group = 0  # the comparison sees a wrong direction
        assert (model(x) - columns(x)).abs().max() > 1e-3 * model(x).abs().max()


def test_no_copy_of_flipped_tokens():
    """Reverse scans walk the tokens backwards where they lie."""
    model = small().eval()
    with torch.no_grad(), torch.profiler.profile() as profile:
        model(torch.randn(1, 3, 64, 64))
    names = {e.name for e in profile.events()}
    assert 'timm_ssm::selective_scan' in names and 'aten::flip' not in names


@pytest.mark.parametrize('height, width', [(64, 64), (32, 96), (40, 72)])
def test_any_input_size(height, width):
    model = small().eval()
    with torch.no_grad():
        x = torch.randn(2, 3, height, width)
        maps = model.forward_intermediates(x, intermediates_only=True)
        assert [m.shape[-2:] for m in maps] == [(-(-height // r), -(-width // r)) for r in (4, 8, 16, 32)]
        assert model(x).isfinite().all()


# StableGroupMamba

def attention_places(model):
    """(stage, block, group) of every attention."""
    return [
        (i, j, k) for i, stage in enumerate(model.stages) for j, block in enumerate(stage.blocks)
        for k, mixer in enumerate(block.mixer.mixers) if isinstance(mixer, MapAttention)]


def test_stable_groupmamba():
    model = timm.create_model('stable_groupmamba_small', device='meta')
    plain = timm.create_model('stable_groupmamba_small', device='meta', attn_every=0)
    assert sum(p.numel() for p in plain.parameters()) == 39_207_191
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == 39.3
    blocks = [(1, 1), (1, 3), *((2, j) for j in range(1, 16, 2)), (3, 1)]
    assert attention_places(model) == [(i, j, n % 4) for n, (i, j) in enumerate(blocks)]
    assert attention_places(plain) == [] and all(isinstance(m, GroupScan) for m in model.pooled_block.mixer.mixers)
    attn = model.stages[2].blocks[1].mixer.mixers[2].attn
    assert attn.head_dim == 32 and attn.num_heads == 3 and attn.qkv.bias is not None and attn.proj.bias is not None


def test_attention_sees_the_whole_map():
    model = small('stable_groupmamba_small', depths=(2, 2, 2, 2), embed_dims=(16, 32, 128, 256))
    assert attention_places(model) == [(1, 1, 0), (2, 1, 1), (3, 1, 2)]
    attention = model.stages[2].blocks[1].mixer.mixers[1]
    x = torch.randn(1, 3, 5, 32)
    y = attention(x)
    assert y.shape == x.shape
    shuffled = torch.randperm(15)
    again = attention(x.flatten(1, 2)[:, shuffled].view_as(x))  # no position: the order of tokens does not matter
    torch.testing.assert_close(again.flatten(1, 2), y.flatten(1, 2)[:, shuffled])
    model(torch.randn(2, 3, 64, 96)).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


# Heads

def test_two_heads():
    model, x = small().eval(), torch.randn(2, 3, 64, 64)
    features = model.forward_head(model.forward_features(x), pre_logits=True)
    mean = (model.head(features) + model.head_dist(features)) / 2
    torch.testing.assert_close(model(x), mean)
    assert model.get_classifier() == (model.head, model.head_dist)
    model.set_distilled_training()
    torch.testing.assert_close(model(x), mean)  # still evaluation
    logits, logits_dist = model.train()(x)
    assert logits.shape == logits_dist.shape == (2, 7) and not torch.allclose(logits, logits_dist)
    model.set_distilled_training(False)
    assert model(x).shape == (2, 7)


def test_distillation_task():
    student, teacher = small(), timm.create_model('test_resnet', num_classes=7)
    task = TokenDistillationTask(student, teacher, criterion=nn.CrossEntropyLoss(), distill_type='hard', verbose=False)
    loss = task.train()(torch.randn(2, 3, 64, 64), torch.tensor([1, 2]))['loss']
    loss.backward()
    assert student.head.weight.grad.abs().max() > 0 and student.head_dist.weight.grad.abs().max() > 0
    with pytest.raises(ValueError, match='set_distilled_training: the model has one head'):
        small(distillation=False).set_distilled_training()


def test_two_heads_into_one():
    """A model of one head takes the mean of the released two, and predicts the same."""
    model, reference = reference_model(distillation=False)
    assert model.head_dist is None and model.get_classifier() is model.head
    with torch.no_grad():
        assert_close(model(reference['x']), reference['logits'])


def test_heads_and_pooling():
    model, x = small().eval(), torch.randn(2, 3, 64, 96)
    features = model.forward_features(x)
    assert features.shape == (2, 64, 2, 3) and model.forward_head(features, pre_logits=True).shape == (2, 64)
    model.reset_classifier(5)
    assert model(x).shape == (2, 5) and model.head_dist.out_features == 5
    pooled = model.forward_head(features, pre_logits=True)
    model.reset_classifier(0)
    torch.testing.assert_close(model(x), pooled)
    model.reset_classifier(0, '')
    torch.testing.assert_close(model(x), features)
    model.reset_classifier(3, 'avg')
    assert model(x).shape == (2, 3)


@pytest.mark.parametrize('kwargs, error, message', [
    (dict(global_pool='max'), ValueError, "global_pool: got 'max', needs 'avg' or ''"),
    (dict(embed_dims=(16, 32, 50, 64)), ValueError, 'embed_dims: got 50, needs multiples of 4'),
    (dict(not_an_argument=1), TypeError, 'not_an_argument'),
])
def test_wrong_arguments(kwargs, error, message):
    with pytest.raises(error, match=message):
        small(**kwargs)


# timm's model interface

def test_features():
    x = torch.randn(2, 3, 64, 96)
    model = small().eval()
    nn.init.constant_(model.norm.weight, 2.)
    with torch.no_grad():
        final, maps = model.forward_intermediates(x)
        torch.testing.assert_close(final, model.forward_features(x))
        torch.testing.assert_close(maps[3], final)  # the norm is of the pooled features
        normed = model.forward_intermediates(x, norm=True, intermediates_only=True)
        assert torch.equal(normed[2], maps[2])
        torch.testing.assert_close(normed[3], model.norm(maps[3]))
        nhwc = model.forward_intermediates(x, indices=[1], output_fmt='NHWC', intermediates_only=True)
        assert torch.equal(nhwc[0].permute(0, 3, 1, 2), maps[1])
        getter = FeatureGetterNet(copy.deepcopy(model), out_indices=(1, 3), output_fmt='NHWC', norm=True)
        torch.testing.assert_close(getter(x), [normed[i].permute(0, 2, 3, 1) for i in (1, 3)])
        backbone = small(features_only=True).eval()  # the same values: small() fixes the seed
        assert backbone.feature_info.channels() == [16, 32, 48, 64]
        assert backbone.feature_info.reduction() == [4, 8, 16, 32]
        torch.testing.assert_close(backbone(x), maps)
        assert all(m.is_contiguous() for m in maps)
        script = torch.jit.script(backbone)
        torch.testing.assert_close(script(x), maps, rtol=1e-4, atol=1e-5)
    pruned = copy.deepcopy(model)
    assert pruned.prune_intermediate_layers([2]) == [2]
    assert isinstance(pruned.pooled_block, nn.Identity) and pruned.num_features == 48
    pruned.reset_classifier(5, 'avg')
    assert pruned(x).shape == (2, 5)


def test_parameter_groups():
    model = small()
    assert len(model.no_weight_decay()) == 2 * 4 * 6  # A_log and D, four groups, five blocks and the pooled one
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    blocks = [f'stages.{i}.blocks.{j}.' for i, s in enumerate(model.stages) for j in range(len(s.blocks))]
    assert len({groups[n] for b in blocks for n in groups if n.startswith(b)}) == len(blocks) == 5
    assert max(groups.values()) == groups['pooled_block.mixer.proj.weight'] == groups['head.weight']


def train_gradients(model, x):
    torch.manual_seed(0)
    model.zero_grad()
    model(x).square().mean().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize('name', ['groupmamba_tiny', 'stable_groupmamba_small'])
def test_gradient_checkpointing_leaves_gradients_unchanged(name):
    model, x = small(name, drop_path_rate=.3, depths=(1, 2, 2, 1)).train(), torch.randn(4, 3, 64, 64)
    want = train_gradients(model, x)
    model.set_grad_checkpointing()
    got = train_gradients(model, x)
    assert all(torch.equal(got[k], want[k]) for k in want)


def test_channels_last():
    x = torch.randn(2, 3, 64, 96).contiguous(memory_format=torch.channels_last)
    model = small().eval()
    with torch.no_grad():
        want = model.forward_features(x.contiguous())
        got = model.to(memory_format=torch.channels_last).forward_features(x)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert got.is_contiguous(memory_format=torch.channels_last)


def test_scan_is_float32_under_autocast(monkeypatch):
    """The scan's activations are float32 under autocast, the projections around it bfloat16."""
    import timm_ssm.layers.mixer as scans
    model, x = small().train(), torch.randn(2, 3, 64, 64)
    scan, seen = scans.selective_scan, []

    def spy(u, delta, A, B, C, *args, **kwargs):
        out = scan(u, delta, A, B, C, *args, **kwargs)
        seen.append({t.dtype for t in (u, delta, A, B, C, out)})
        return out

    monkeypatch.setattr(scans, 'selective_scan', spy)
    mixer = model.stages[0].blocks[0].mixer.mixers[1]
    mixer.in_proj.register_forward_hook(lambda m, a, out: seen.append(out.dtype))
    want = model(x)
    seen.clear()
    with torch.autocast('cpu', torch.bfloat16):
        out = model(x)
    assert seen.count({torch.float32}) == 24 and seen.count(torch.bfloat16) == 1 and len(seen) == 25
    assert (out.float() - want).abs().max() < .05 * want.abs().max()


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64])
def test_model_in_another_dtype(dtype):
    model, x = small('stable_groupmamba_small', depths=(1, 2, 2, 1)).eval(), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        want = model(x)
        got = model.to(dtype)(x.to(dtype))
    assert got.dtype == dtype and (got.float() - want).abs().max() < .1 * want.abs().max()
    assert small(dtype=dtype).head_dist.weight.dtype == dtype


def test_initialisation():
    """Built in place, and built on meta, materialised and initialised."""
    materialised = small(device='meta').to_empty(device='cpu')
    for p in materialised.parameters():
        nn.init.constant_(p, float('nan'))
    materialised.init_weights()
    for model in (small(), materialised):
        assert all(v.isfinite().all() for v in model.state_dict().values())
        mixer = model.stages[3].blocks[0].mixer
        scan = mixer.mixers[3]
        dt = F.softplus(scan.dt_proj.bias)
        assert dt.min() >= 1e-3 * .99 and dt.max() <= 1e-1 * 1.01
        assert scan.dt_proj.weight.abs().max() <= scan.dt_proj.in_features ** -.5
        assert (scan.A_log == 0).all() and (scan.D == 1).all() and mixer.skip_scale == 1
        assert abs(mixer.proj.weight.std().item() / .02 - 1) < .1
        dwconv = model.stages[3].blocks[0].mlp.dwconv  # fan-out of a depthwise 3 x 3 convolution: 9
        assert abs(dwconv.weight.std().item() / math.sqrt(2 / 9) - 1) < .1


# Compilation and export

def test_compile_and_export():
    model, x = small(depths=(1, 1, 1, 1), attn_every=1).eval(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        want = model(x)
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend='aot_eager')(x), want)
        program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim('batch', max=64)},))
        y = torch.randn(3, 3, 32, 32)
        torch.testing.assert_close(program.module()(y), model(y))


def test_compiled_under_autocast():
    """The float32 scan is no graph break."""
    model, x = small(depths=(1, 1, 1, 1)).eval(), torch.randn(2, 3, 32, 32)
    compiled = torch.compile(model, fullgraph=True, backend='eager')
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize('dynamo', [pytest.param(True, marks=pytest.mark.slow), False])
def test_onnx(dynamo, tmp_path):
    pytest.importorskip('onnxscript')
    onnxruntime = pytest.importorskip('onnxruntime')
    model, x = small(depths=(1, 1, 1, 1)).eval(), torch.randn(2, 3, 32, 32)
    path = str(tmp_path / 'model.onnx')
    batch = dict(dynamic_shapes=({0: torch.export.Dim('batch')},)) if dynamo else dict(dynamic_axes={'x': {0: 'batch'}})
    torch.onnx.export(model, (x,), path, input_names=['x'], dynamo=dynamo, **batch)
    y = torch.randn(3, 3, 32, 32)
    got, = onnxruntime.InferenceSession(path).run(None, {'x': y.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), model(y), rtol=1e-3, atol=1e-5)


# Registry

def test_tags():
    for size in SIZES:
        cfg = timm.get_pretrained_cfg(f'groupmamba_{size}')
        assert cfg.classifier == ('head', 'head_dist') and not cfg.fixed_input_size
    assert not timm.get_pretrained_cfg('stable_groupmamba_small.untrained').has_weights
