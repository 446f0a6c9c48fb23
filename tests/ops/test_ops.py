"""What the ops are as PyTorch ops: parity, gradients, registration, autocast, errors, compilation, export, FLOPs."""
import importlib.util
import math
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.layers import set_exportable
from torch.utils.flop_counter import FlopCounterMode

import timm_ssm  # noqa: F401 (registers the models)
from timm_ssm.ops import (
    backend_report,
    backends,
    bidirectional_causal_conv1d,
    bidirectional_selective_scan,
    causal_conv1d,
    selective_scan,
)
from timm_ssm.ops.naive import causal_conv1d_naive, selective_scan_naive

from .utils import Largest, grads, pairs, relative_error, scan_inputs

FIXTURES = Path(__file__).parents[1] / 'fixtures'
NAMES = ('u', 'delta', 'A', 'B', 'C', 'D', 'z', 'delta_bias')


@pytest.mark.parametrize('implementation', [selective_scan, selective_scan_naive])
@pytest.mark.parametrize('reverse', [False, True])
@pytest.mark.parametrize('form', ['plain', 'residual', 'residual_masked'])
def test_reference(implementation, reverse, form):
    """Outputs and all gradients of the papers' code, in float64."""
    reference = load_file(FIXTURES / 'scan_residual.safetensors')

    def token_major(x):
        x = x.transpose(1, 2) if x.ndim == 3 else x
        return x.flip(1) if reverse and x.ndim == 3 else x

    inputs = {k: token_major(reference[k]) for k in NAMES}
    out, got = grads(
        implementation, inputs, [token_major(reference['grad_out'])],
        reverse=reverse, residual=form != 'plain', mask_diagonal=form == 'residual_masked')
    assert relative_error(out, token_major(reference[f'out/{form}'])) < 1e-13
    for name in NAMES:
        assert relative_error(got[name], token_major(reference[f'grad/{form}/{name}'])) < 1e-13, name


@pytest.mark.parametrize('form', [
    dict(), dict(reverse=True, residual=True), dict(reverse=True, residual=True, mask_diagonal=True)], ids=str)
@pytest.mark.parametrize('groups', [None, 2])
def test_gradcheck_scan(form, groups):
    inputs = scan_inputs(1, 5, 4, 3, groups=groups, dtype=torch.float64)
    args = [inputs[k].requires_grad_() for k in NAMES]
    assert torch.autograd.gradcheck(lambda *a: selective_scan(*a, **form), args)


def test_gradcheck_bidirectional_scan():
    first, second = (scan_inputs(1, 5, 2, 3, dtype=torch.float64, seed=s) for s in (0, 1))
    flat = [x for k in NAMES if k != 'z' for x in (first[k], second[k])] + [first['z']]

    def fn(*args):
        it = iter(args)
        inputs = {k: (next(it), next(it)) for k in NAMES if k != 'z'}
        return bidirectional_selective_scan(**inputs, z=next(it), residual=True, mask_diagonal=True)

    assert torch.autograd.gradcheck(fn, [x.requires_grad_() for x in flat])


@pytest.mark.parametrize('reverse', [False, True])
def test_gradcheck_conv(reverse):
    args = [torch.randn(2, 6, 3, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64),
            torch.randn(3, dtype=torch.float64)]
    assert torch.autograd.gradcheck(
        lambda *a: causal_conv1d(*a, reverse=reverse), [a.requires_grad_() for a in args])


def test_frozen_inputs():
    """Gradients arrive where they are wanted, whichever inputs are frozen (fine-tuning, LoRA)."""
    for wanted in NAMES:
        inputs = scan_inputs()
        inputs[wanted].requires_grad_()
        selective_scan(**inputs).sum().backward()
        assert inputs[wanted].grad is not None
        assert all(x.grad is None for k, x in inputs.items() if k != wanted)


@pytest.mark.parametrize('fn', [
    lambda x: selective_scan(**{**scan_inputs(), 'u': x}), lambda x: causal_conv1d(x, torch.ones(12, 4))])
def test_second_derivatives_are_refused(fn):
    x = torch.randn(2, 37, 12, requires_grad=True)
    with pytest.raises(RuntimeError, match='second derivative is not defined'):
        torch.autograd.grad(fn(x).sum(), x, create_graph=True)


@pytest.mark.parametrize('scan', [selective_scan, selective_scan_naive])
def test_masked_single_token(scan):
    """A constant, but one that autograd knows."""
    inputs = scan_inputs(length=1, optional=False)
    inputs['u'].requires_grad_()
    out = scan(**inputs, mask_diagonal=True)
    assert not out.any()
    out.sum().backward()
    assert inputs['u'].grad.shape == inputs['u'].shape and not inputs['u'].grad.any()


@pytest.mark.parametrize('save', [False, True])
@pytest.mark.parametrize('z', [False, True])
def test_opcheck_scan(save, z):
    first, second = scan_inputs(), scan_inputs(seed=1)
    lists = [[first[k], second[k]] for k in ('u', 'delta', 'A', 'B', 'C', 'D', 'delta_bias')]
    flags = (True, [False, True], True, [False, True])
    args = (*lists, first['z'] if z else None, *flags)
    for op in (torch.ops.timm_ssm.selective_scan.default, torch.ops.timm_ssm.selective_scan.no_autograd):
        torch.library.opcheck(op, (*args, save, ''))
    out, *saved = torch.ops.timm_ssm.selective_scan(*args, True, '')
    torch.library.opcheck(
        torch.ops.timm_ssm.selective_scan_backward.default, (*args, torch.randn_like(out), saved, ''))


def test_opcheck_conv():
    x, weight, bias = torch.randn(2, 9, 4), [torch.randn(4, 3)] * 2, [torch.randn(4)] * 2
    args = (x, weight, bias, True, [False, True], False)
    for op in (torch.ops.timm_ssm.causal_conv1d.default, torch.ops.timm_ssm.causal_conv1d.no_autograd):
        torch.library.opcheck(op, (*args, ''))
    torch.library.opcheck(
        torch.ops.timm_ssm.causal_conv1d_backward.default, (*args, [torch.randn_like(x)] * 2, ''))


def test_fake_strides_are_real():
    """Shape inference promises contiguous results for any input strides."""
    inputs = scan_inputs()
    inputs['u'] = inputs['u'].transpose(0, 2).contiguous().transpose(0, 2)
    out = selective_scan(**inputs)
    meta = selective_scan(**{k: x.to('meta') for k, x in inputs.items()})
    assert out.stride() == meta.stride() and out.shape == meta.shape and meta.device.type == 'meta'


def test_autocast_keeps_parameters_in_float32():
    """Under autocast activations go low, A, D and delta_bias stay, and the recurrence is float32."""
    inputs = scan_inputs(length=64)
    low = {k: x.bfloat16() if k in ('u', 'delta', 'B', 'C', 'z') else x for k, x in inputs.items()}
    want = selective_scan_naive(**{k: x.double() for k, x in low.items()})
    with torch.autocast('cpu', torch.bfloat16):
        out, got = grads(selective_scan, inputs)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out.detach(), selective_scan(**low))
    assert relative_error(out, want) < 5e-3  # one rounding of the result; a bfloat16 A would be off by 1e-1
    assert {k: g.dtype for k, g in got.items()} == dict.fromkeys(inputs, torch.float32)


def test_half_precision_parameters_are_lifted():
    """A model cast to bfloat16 as a whole has bfloat16 A, D and biases: they are computed with in float32."""
    inputs = {k: x.bfloat16() for k, x in scan_inputs().items()}
    want = selective_scan_naive(**{k: x.double() for k, x in inputs.items()})
    out, got = grads(selective_scan, inputs)
    assert relative_error(out, want) < 5e-3
    assert all(g.dtype == torch.bfloat16 for g in got.values())


@pytest.mark.parametrize('change, message', [
    (dict(u=torch.randn(2, 37)), r'u: got shape \(2, 37\), needs \(batch, length, channels\)'),
    (dict(u=torch.ones(2, 37, 12, dtype=torch.int64)), 'u: got dtype torch.int64, needs one of'),
    (dict(delta=torch.randn(2, 36, 12)), r'delta: got shape \(2, 36, 12\), needs \(2, 37, 12\)'),
    (dict(delta=torch.randn(2, 37, 12).double()), 'delta: got dtype torch.float64, needs torch.float32 like u'),
    (dict(A=torch.randn(11, 16)), r'A: got shape \(11, 16\), needs \(12, d_state\)'),
    (dict(A=torch.ones(12, 16, dtype=torch.int32)), 'A: got dtype torch.int32, needs one of'),
    (dict(B=torch.randn(2, 37, 15)), r'B: got shape \(2, 37, 15\), needs \(2, 37, 16\) or'),
    (dict(B=torch.randn(2, 37, 5, 16)), r'B: got shape \(2, 37, 5, 16\), needs .* groups dividing the 12 channels'),
    (dict(C=torch.randn(2, 37, 2, 16)), r'C: got shape \(2, 37, 2, 16\), needs \(2, 37, 16\)'),
    (dict(D=torch.randn(13)), r'D: got shape \(13,\), needs \(12,\)'),
    (dict(z=torch.randn(2, 37, 24)), r'z: got shape \(2, 37, 24\), needs \(2, 37, 12\)'),
    (dict(z=torch.randn(2, 37, 12, device='meta')), 'z: got device meta, needs cpu like u'),
    (dict(delta_bias=torch.randn(2, 12)), r'delta_bias: got shape \(2, 12\), needs \(12,\)'),
    (dict(backend='cuda'), "backend: got 'cuda', needs one of"),
], ids=lambda x: str(x)[:30] if isinstance(x, str) else next(iter(x)))
def test_scan_errors(change, message):
    with pytest.raises(ValueError, match=message):
        selective_scan(**{**scan_inputs(), **change})


@pytest.mark.parametrize('args, message', [
    ((torch.randn(3, 4), torch.randn(4, 3)), r'x: got shape \(3, 4\), needs'),
    ((torch.ones(1, 3, 4).long(), torch.randn(4, 3)), 'x: got dtype torch.int64'),
    ((torch.randn(1, 3, 4), torch.randn(4, 1, 3)), r'weight: got shape \(4, 1, 3\), needs \(4, kernel size\)'),
    ((torch.randn(1, 3, 4), torch.randn(4, 3), torch.randn(3)), r'bias: got shape \(3,\), needs \(4,\)'),
    ((torch.randn(1, 3, 4), torch.randn(4, 3), None, 'relu'), "activation: got 'relu', needs 'silu' or None"),
])
def test_conv_errors(args, message):
    with pytest.raises(ValueError, match=message):
        causal_conv1d(*args)


@pytest.fixture
def no_backend(monkeypatch):
    """Every backend refuses to run: arguments are checked before one sees them."""
    def run(self, *args):
        raise AssertionError('a backend was called')

    for backend in backends.BACKENDS.values():
        for name in ('scan_forward', 'scan_backward', 'conv_forward', 'conv_backward'):
            monkeypatch.setattr(type(backend), name, run)


SECOND = [
    (dict(u=scan_inputs(batch=3)['u']), r'u\[1\]: got shape \(3, 37, 12\), needs \(2, 37, 12\)'),
    (dict(u=scan_inputs(length=5)['u']), r'u\[1\]: got shape \(2, 5, 12\), needs \(2, 37, 12\)'),
    (scan_inputs(batch=64), r'u\[1\]: got shape \(64, 37, 12\), needs \(2, 37, 12\)'),
    (scan_inputs(channels=24), r'u\[1\]: got shape \(2, 37, 24\), needs \(2, 37, 12\)'),
    (scan_inputs(dtype=torch.float64), r'u\[1\]: got dtype torch.float64, needs torch.float32 like u\[0\]'),
    (scan_inputs(d_state=8), r'A\[1\]: got shape \(12, 8\), needs \(12, 16\)'),
    (scan_inputs(groups=2), r'B\[1\]: got shape \(2, 37, 2, 16\), needs \(2, 37, 16\)'),
    (dict(C=scan_inputs(d_state=8)['C']), r'C\[1\]: got shape \(2, 37, 8\), needs \(2, 37, 16\)'),
    (dict(delta=scan_inputs(device='meta')['delta']), r'delta\[1\]: got device meta, needs cpu like u\[0\]'),
    (dict(D=None), r'D\[1\]: got None, needs a dense tensor'),
    (dict(delta_bias=None), r'delta_bias\[1\]: got None, needs a dense tensor'),
    (dict(D=torch.ones(13)), r'D\[1\]: got shape \(13,\), needs \(12,\)'),
    (dict(delta_bias=torch.ones(1)), r'delta_bias\[1\]: got shape \(1,\), needs \(12,\)'),
]


@pytest.mark.parametrize('second, message', SECOND, ids=range(len(SECOND)))
def test_second_direction_errors(no_backend, second, message):
    """The second direction is checked against the first."""
    with pytest.raises(ValueError, match=message):
        bidirectional_selective_scan(**pairs(scan_inputs(), {**scan_inputs(seed=1), **second}))


@pytest.mark.parametrize('name', [name for name in NAMES if name != 'z'])
@pytest.mark.parametrize('wrong', ['one', 'three', 'tensor', 'none'])
def test_pair_errors(no_backend, name, wrong):
    inputs = pairs(scan_inputs(), scan_inputs(seed=1))
    x = inputs[name][0]
    value, got = {'one': ((x,), '1 items'), 'three': ((x, x, x), '3 items'), 'tensor': (x, 'Tensor'),
                  'none': (None, 'None')}[wrong]
    if wrong == 'none' and name in ('D', 'delta_bias'):
        pytest.skip('may be None')
    with pytest.raises(ValueError, match=fr'^{name}: got {got}, needs a pair of tensors \(forward, reverse\)$'):
        bidirectional_selective_scan(**{**inputs, name: value})


W, BIAS = torch.randn(4, 3), torch.randn(4)


@pytest.mark.parametrize('args, message', [
    (((W, torch.randn(4, 2)),), r'weight\[1\]: got shape \(4, 2\), needs \(4, 3\)'),
    (((W, torch.randn(5, 3)),), r'weight\[1\]: got shape \(5, 3\), needs \(4, 3\)'),
    (((W, W.long()),), r'weight\[1\]: got dtype torch.int64'),
    (((W, W.to('meta')),), r'weight\[1\]: got device meta, needs cpu like x'),
    (((W,),), r'weight: got 1 items, needs a pair'),
    ((W,), r'weight: got Tensor, needs a pair'),
    (((W, W, W),), r'weight: got 3 items, needs a pair'),
    (((W, W), (BIAS, None)), r'bias\[1\]: got None, needs a dense tensor'),
    (((W, W), (BIAS,)), r'bias: got 1 items, needs a pair'),
    (((W, W), (BIAS, torch.randn(3))), r'bias\[1\]: got shape \(3,\), needs \(4,\)'),
])
def test_bidirectional_conv_errors(no_backend, args, message):
    with pytest.raises(ValueError, match=message):
        bidirectional_causal_conv1d(torch.randn(1, 5, 4), *args)


@pytest.fixture
def distributed_tensor():
    from torch.distributed.tensor import DeviceMesh, DTensor, Replicate
    torch.distributed.init_process_group('gloo', store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield lambda x: DTensor.from_local(x, DeviceMesh('cpu', [0]), [Replicate()])
    torch.distributed.destroy_process_group()


KINDS = {
    'sparse': (lambda x: x.to_sparse(), 'layout torch.sparse_coo'),
    'csr': (lambda x: (x.flatten(1) if x.ndim > 1 else x[None]).to_sparse_csr(), 'layout torch.sparse_csr'),
    'nested': (lambda x: torch.nested.nested_tensor([x, x]), 'a nested tensor'),
    'jagged': (lambda x: torch.nested.nested_tensor([x, x], layout=torch.jagged), 'a nested tensor'),
    'mkldnn': (lambda x: x.to_mkldnn(), 'layout torch._mkldnn'),
    'array': (lambda x: x.numpy(), 'ndarray'),
    'none': (lambda x: None, 'None'),
}


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('name', NAMES)
@pytest.mark.filterwarnings('ignore::UserWarning')
def test_kinds_of_tensor_scan(no_backend, kind, name):
    """Whatever is not a dense tensor is refused in one sentence."""
    make, got = KINDS[kind]
    if kind == 'none' and name in ('D', 'z', 'delta_bias'):
        pytest.skip('may be None')
    inputs = scan_inputs()
    with pytest.raises(ValueError, match=f'^{name}: got {got}, needs a dense tensor on one device$'):
        selective_scan(**{**inputs, name: make(inputs[name])})


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('name', ['x', 'weight'])
@pytest.mark.filterwarnings('ignore::UserWarning')
def test_kinds_of_tensor_conv(no_backend, kind, name):
    make, got = KINDS[kind]
    inputs = dict(x=torch.randn(1, 5, 4), weight=W)
    with pytest.raises(ValueError, match=f'^{name}: got {got}, needs a dense tensor on one device$'):
        causal_conv1d(**{**inputs, name: make(inputs[name])})


def test_distributed_tensors(no_backend, distributed_tensor):
    inputs = scan_inputs()
    for name in NAMES:
        with pytest.raises(ValueError, match=f'^{name}: got a DTensor, needs a dense tensor on one device$'):
            selective_scan(**{**inputs, name: distributed_tensor(inputs[name])})
    with pytest.raises(ValueError, match='^x: got a DTensor, needs a dense tensor'):
        causal_conv1d(distributed_tensor(torch.randn(1, 5, 4)), W)


def test_backward_uses_the_backend_of_the_forward(monkeypatch):
    """Whatever the choice would be by the time of the backward pass."""
    ran = []
    for name in ('eager', 'naive'):
        kind = type(backends.BACKENDS[name])
        for method in ('scan_forward', 'scan_backward', 'conv_forward', 'conv_backward'):
            def run(self, *args, name=name, method=method, original=getattr(kind, method)):
                ran.append((name, method))
                return original(self, *args)
            monkeypatch.setattr(kind, method, run)
    monkeypatch.setattr(backends, 'PREFERENCE', {'cpu': ('eager',)})
    inputs = {k: x.requires_grad_() for k, x in scan_inputs(length=3).items()}
    out = causal_conv1d(selective_scan(**inputs), torch.ones(12, 4, requires_grad=True))
    monkeypatch.setattr(backends, 'FORCED', 'naive')
    monkeypatch.setattr(backends, 'PREFERENCE', {'cpu': ('naive',)})
    out.sum().backward()
    assert ran == [('eager', f'{op}_{way}') for op, way in (
        ('scan', 'forward'), ('conv', 'forward'), ('conv', 'backward'), ('scan', 'backward'))]


@pytest.mark.parametrize('train', [False, True])
def test_states_are_saved_for_training_alone(monkeypatch, train):
    saved = []
    eager = type(backends.BACKENDS['eager'])
    original = eager.scan_forward
    monkeypatch.setattr(
        eager, 'scan_forward', lambda self, call, save: saved.append(save) or original(self, call, save))
    inputs = {k: x.requires_grad_(train) for k, x in scan_inputs(length=3).items()}
    selective_scan(**inputs, backend='eager')
    with torch.no_grad():
        selective_scan(**inputs, backend='eager')
    assert saved == [train, False]


def test_save_false_is_kept():
    """What was not saved cannot be differentiated, and nothing is saved behind the caller's back."""
    lists = [[scan_inputs()[k].requires_grad_()] for k in ('u', 'delta', 'A', 'B', 'C', 'D', 'delta_bias')]
    out, = torch.ops.timm_ssm.selective_scan(
        *lists, scan_inputs()['z'], True, [False], False, [False], False, '')
    with pytest.raises(RuntimeError, match='selective_scan: got save=False, needs save=True'):
        out.sum().backward()


def test_op_takes_strided_parameters():
    """A graph that calls the op past the public function may hold parameters in another layout."""
    inputs = scan_inputs()
    lists = [[inputs[k]] for k in ('u', 'delta', 'A', 'B', 'C', 'D', 'delta_bias')]
    flags = (inputs['z'], True, [False], False, [False], False, '')
    want = torch.ops.timm_ssm.selective_scan(*lists, *flags)[0]
    lists[2] = [inputs['A'].t().contiguous().t()]
    lists[5] = [torch.stack((inputs['D'], inputs['D'] + 1), 1)[:, 0]]
    assert torch.equal(torch.ops.timm_ssm.selective_scan(*lists, *flags)[0], want)
    x, w = torch.randn(1, 5, 4), torch.randn(4, 3)
    want, = torch.ops.timm_ssm.causal_conv1d(x, [w], [], True, [False], False, '')
    got, = torch.ops.timm_ssm.causal_conv1d(x, [w.t().contiguous().t()], [], True, [False], False, '')
    assert torch.equal(got, want)


@pytest.mark.parametrize('train', [False, True])
def test_meta_is_shapes_alone(train):
    """A whole model on the meta device: each op is one dispatch, however many tokens there are."""
    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(func.name().partition('.')[0])  # whatever the overload
            return func(*args, **(kwargs or {}))

    counts = []
    for size in (32, 512):
        names = []
        model = timm.create_model('videomamba_tiny_patch16_224', img_size=size, depth=2, device='meta').train(train)
        with Count(), torch.set_grad_enabled(train):
            out = model(torch.empty(1, 3, size, size, device='meta'))
            if train:
                out.sum().backward()
        assert out.device.type == 'meta' and out.shape == (1, 1000)
        assert names.count('timm_ssm::selective_scan') == 2
        assert names.count('timm_ssm::selective_scan_backward') == (2 if train else 0)
        counts.append(len(names))
    assert counts[0] == counts[1]


def test_forced_backend(monkeypatch):
    inputs = scan_inputs()
    monkeypatch.setattr(backends, 'FORCED', 'none such')
    with pytest.raises(ValueError, match='none such'):
        selective_scan(**inputs)
    selective_scan(**inputs, backend='naive')  # the argument wins
    monkeypatch.setattr(backends, 'FORCED', 'naive')
    assert torch.equal(selective_scan(**inputs), selective_scan(**inputs, backend='naive'))
    monkeypatch.setenv('TIMM_SSM_BACKEND', 'naive')
    spec = importlib.util.find_spec(backends.__name__)
    again = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(again)
    assert again.FORCED == 'naive'


def test_backend_report():
    report = backend_report()
    assert report['naive']['available'] == report['eager']['available'] == 'yes'
    assert sum('cpu' in row['serves'] for row in report.values()) == 1


def test_compile_fullgraph():
    """No graph breaks, forward and backward, one and two directions."""
    first, second = scan_inputs(), scan_inputs(seed=1)

    def fn(x, w, **kwargs):
        x, x_b = bidirectional_causal_conv1d(x, (w, w.flip(0)))
        kwargs['u'] = (x, x_b)
        return bidirectional_selective_scan(**kwargs, residual=True, mask_diagonal=True)

    inputs = {'x': first['u'], 'w': torch.randn(12, 4), **{k: v for k, v in pairs(first, second).items() if k != 'u'}}
    compiled = torch.compile(fn, fullgraph=True, backend='aot_eager')
    want, want_grads = grads(fn, inputs)
    got, got_grads = grads(compiled, inputs)
    torch.testing.assert_close(got, want)
    for k in want_grads:
        torch.testing.assert_close(got_grads[k], want_grads[k])


class Scan(torch.nn.Module):

    def forward(self, u, delta, A, B, C, D, z, delta_bias):
        return selective_scan(u, delta, A, B, C, D, z, delta_bias, reverse=True)


@pytest.mark.parametrize('strict', [False, True])
def test_export(strict):
    """The op stays one node, and the batch stays dynamic."""
    inputs = tuple(scan_inputs(batch=2).values())
    inputs = tuple(dict(zip(scan_inputs(), inputs))[k] for k in NAMES)
    batch = torch.export.Dim('batch')
    dynamic = tuple({0: batch} if k in ('u', 'delta', 'B', 'C', 'z') else None for k in NAMES)
    program = torch.export.export(Scan(), inputs, dynamic_shapes=dynamic, strict=strict)
    assert sum('selective_scan' in str(node.target) for node in program.graph.nodes) == 1
    larger = scan_inputs(batch=3)
    out = program.module()(*(larger[k] for k in NAMES))
    torch.testing.assert_close(out, selective_scan(**larger, reverse=True))


FORMS = [
    dict(), dict(reverse=True), dict(residual=True), dict(reverse=True, residual=True, mask_diagonal=True),
    dict(mask_diagonal=True)]


@pytest.mark.parametrize('form', FORMS, ids=str)
@pytest.mark.parametrize('length', [1, 2, 37])
@pytest.mark.parametrize('groups', [None, 3])
def test_exportable(form, length, groups):
    """Under exportable the op is plain PyTorch without a loop over tokens, and means the same, gradients included."""
    inputs = scan_inputs(length=length, groups=groups, dtype=torch.float64)
    want, want_grads = grads(selective_scan_naive, inputs, **form)
    with set_exportable(True):
        got, got_grads = grads(selective_scan, inputs, **form)
        program = torch.export.export(Scan(), tuple(inputs[k] for k in NAMES))
    assert not any('timm_ssm' in str(node.target) for node in program.graph.nodes)
    assert relative_error(got, want) < 1e-12
    for k in want_grads:
        assert relative_error(got_grads[k], want_grads[k]) < 1e-11, k


@pytest.mark.parametrize('form', [dict(), dict(reverse=True), dict(centered=True), dict(activation=None)], ids=str)
def test_exportable_conv(form):
    args = torch.randn(2, 9, 5), torch.randn(5, 3), torch.randn(5)
    with set_exportable(True):
        got = causal_conv1d(*args, **form)
    torch.testing.assert_close(got, causal_conv1d_naive(*args, **form))


@pytest.mark.parametrize('reverse, residual, mask_diagonal', [(False, False, False), (True, True, True)])
def test_torchscript(reverse, residual, mask_diagonal):
    def fn(u, delta, A, B, C, D, z, delta_bias, reverse: bool, residual: bool, mask_diagonal: bool):
        return selective_scan(u, delta, A, B, C, D, z, delta_bias, True, reverse, residual, mask_diagonal)

    inputs = scan_inputs()
    args = (*(inputs[k] for k in NAMES), reverse, residual, mask_diagonal)
    torch.testing.assert_close(torch.jit.script(fn)(*args), fn(*args), rtol=1e-4, atol=1e-5)


def test_flops():
    """9 B L D N a direction, B L D for the skip of each direction and for the gate; 2 B L D K for a convolution."""
    first, second = scan_inputs(2, 37, 12, 16), scan_inputs(2, 37, 12, 16, seed=1)
    tokens = 2 * 37 * 12
    with FlopCounterMode(display=False) as counter:
        selective_scan(**first)
    assert counter.get_total_flops() == 9 * tokens * 16 + 2 * tokens
    with FlopCounterMode(display=False) as counter:
        bidirectional_selective_scan(**pairs(first, second))
    assert counter.get_total_flops() == 2 * (9 * tokens * 16 + tokens) + tokens
    with FlopCounterMode(display=False) as counter:
        causal_conv1d(first['u'], torch.randn(12, 4))
    assert counter.get_total_flops() == 2 * tokens * 4
    with FlopCounterMode(display=False) as counter:
        grads(selective_scan, first)
    assert counter.get_total_flops() == 3 * (9 * tokens * 16 + 2 * tokens)


OPS = [
    (selective_scan, lambda: list(scan_inputs().values())),
    (causal_conv1d, lambda: [torch.randn(2, 9, 4), torch.ones(4, 3)]),
]


@pytest.mark.parametrize('fn, make_args', OPS)
def test_modes_and_profilers_see_the_op(fn, make_args):
    args, name = make_args(), f'timm_ssm::{fn.__name__}'
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.name().partition('.')[0])
            return func(*args, **(kwargs or {}))

    with torch.no_grad():
        out = fn(*args)
        with Watch():
            assert torch.equal(fn(*args), out)
        assert name in seen
        with torch.profiler.profile() as profile:
            assert torch.equal(fn(*args), out)
        assert name in [event.key for event in profile.key_averages()]


@pytest.mark.parametrize('fn, make_args', OPS)
def test_trace(fn, make_args):
    """torch.jit.trace leaves plain operators, which run where timm_ssm is not installed."""
    args = make_args()
    traced = torch.jit.trace(lambda x: fn(x, *args[1:]), args[0])
    assert 'timm_ssm::' not in str(traced.graph)
    torch.testing.assert_close(traced(args[0]), fn(*args), rtol=1e-4, atol=1e-5)


def test_eager_memory_is_linear_in_length():
    """Saved states grow with the length, the rest does not: no (B, L, D, N) tensor is ever made."""
    limit = 40 * 64 * 16  # elements of a chunk's states, with room
    inputs = scan_inputs(batch=1, length=1024, channels=64)
    from timm_ssm.ops.calls import ScanCall
    eager = backends.BACKENDS['eager']
    lists = [[inputs[k]] for k in ('u', 'delta', 'A', 'B', 'C', 'D', 'delta_bias')]
    call = ScanCall(*lists, inputs['z'], True, [False], False, [False])
    with Largest() as largest:
        out, y, states = eager.scan_forward(call, True)
        eager.scan_backward(call, torch.randn_like(out), y, states)
    assert states.numel() == math.ceil(1024 / 32) * 64 * 16
    assert largest.size <= max(limit, 1024 * 64)
