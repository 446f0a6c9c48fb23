"""The ops under torch.func, forward-mode AD, torch.fx and tensor subclasses: right, or refused in one sentence."""
import pickle

import pytest
import timm
import torch
import torch.autograd.forward_ad as fwAD
from torch.nn.attention import SDPBackend, sdpa_kernel

import timm_ssm  # noqa: F401 (registers the models)
from timm_ssm.ops import bidirectional_causal_conv1d, bidirectional_selective_scan, causal_conv1d, selective_scan

from .utils import scan_inputs

NAMES = ('u', 'delta', 'A', 'B', 'C', 'D', 'z', 'delta_bias')


def scan(*args):
    return selective_scan(**dict(zip(NAMES, args)), reverse=True, residual=True, mask_diagonal=True)


def both_scans(*args):
    pairs = {k: x if k == 'z' else (x, x.flip(0)) for k, x in zip(NAMES, args)}
    return bidirectional_selective_scan(**pairs, mask_diagonal=True)


def conv(x, weight, bias):
    return causal_conv1d(x, weight, bias, centered=True)


def both_convs(x, weight, bias):
    return torch.stack(bidirectional_causal_conv1d(x, (weight, weight.flip(0)), (bias, -bias)))


def scan_args():
    inputs = scan_inputs(2, 4, 3, 2, dtype=torch.float64)
    return [inputs[k] for k in NAMES]


def conv_args():
    g = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=g, dtype=torch.float64) for shape in ((2, 5, 3), (3, 4), (3,))]


every_op = pytest.mark.parametrize('fn, make_args', [
    (scan, scan_args), (both_scans, scan_args), (conv, conv_args), (both_convs, conv_args)],
    ids=['scan', 'both_scans', 'conv', 'both_convs'])


def close(got, want, tolerance=1e-10):
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def finite_difference(fn, args, tangents, step=1e-6):
    ahead, behind = (fn(*[x + s * t for x, t in zip(args, tangents)]) for s in (step, -step))
    return (ahead - behind) / (2 * step)


@every_op
def test_reverse_mode(fn, make_args):
    """func.grad, vjp and jacrev give autograd's gradients."""
    args = make_args()
    leaves = [x.clone().requires_grad_() for x in args]
    grad_out = torch.randn_like(fn(*args))
    want = torch.autograd.grad(fn(*leaves), leaves, grad_out)
    every = tuple(range(len(args)))
    close(torch.func.grad(lambda *a: (fn(*a) * grad_out).sum(), argnums=every)(*args), want)
    close(torch.func.vjp(fn, *args)[1](grad_out), want)
    jacobians = torch.func.jacrev(fn, argnums=every)(*args)
    close(tuple(torch.tensordot(grad_out, j, dims=grad_out.ndim) for j in jacobians), want)


@every_op
def test_forward_mode(fn, make_args):
    """jvp, jacfwd and dual tensors, for every argument at once and one by one, also when compiled."""
    args = make_args()
    tangents = [torch.randn_like(x) for x in args]
    want = finite_difference(fn, args, tangents)
    close(torch.func.jvp(fn, tuple(args), tuple(tangents))[1], want, 1e-7)
    close(torch.func.jacfwd(fn)(*args), torch.func.jacrev(fn)(*args))
    with fwAD.dual_level():
        duals = [fwAD.make_dual(x, t) for x, t in zip(args, tangents)]
        close(fwAD.unpack_dual(fn(*duals)).tangent, want, 1e-7)
        close(fwAD.unpack_dual(torch.compile(fn, backend='aot_eager')(*duals)).tangent, want, 1e-7)
        one_by_one = [
            fwAD.unpack_dual(fn(*[d if i == j else x for j, x in enumerate(args)])).tangent
            for i, d in enumerate(duals)]
    close(sum(one_by_one), want, 1e-7)


@every_op
def test_vmap(fn, make_args):
    """Over any mixture of arguments, along any of their axes, and over gradients (per-sample gradients)."""
    args = make_args()
    several = [torch.stack([x, x * .5, -x.abs()], dim=-1) for x in args]
    dims = [-1] + [None] * (len(args) - 1)
    for in_dims in ([-1] * len(args), dims, dims[::-1]):
        given = [x if d is None else xs for x, xs, d in zip(args, several, in_dims)]
        want = torch.stack([fn(*[x if d is None else x[..., i] for x, d in zip(given, in_dims)]) for i in range(3)])
        close(torch.func.vmap(fn, in_dims=tuple(in_dims))(*given), want)

    def loss(*a):
        return fn(*a).square().sum()

    got = torch.func.vmap(torch.func.grad(loss), in_dims=-1)(*several)
    close(got, torch.stack([torch.func.grad(loss)(*[x[..., i] for x in several]) for i in range(3)]))


@every_op
def test_second_order(fn, make_args):
    """Where PyTorch composes transforms, second derivatives are right; autograd's own are refused."""
    args = make_args()
    hessian = torch.func.hessian(lambda x: fn(x, *args[1:]).square().sum())(args[0])
    gradient = torch.func.grad(lambda x: fn(x, *args[1:]).square().sum())
    t = torch.randn_like(args[0])
    close(torch.tensordot(hessian, t, dims=t.ndim), finite_difference(gradient, args[:1], [t]), 1e-6)


@every_op
def test_forward_over_backward_is_refused(fn, make_args):
    leaves = [x.requires_grad_() for x in make_args()]
    out = fn(*leaves)
    with fwAD.dual_level():
        grad_out = fwAD.make_dual(torch.ones_like(out), torch.ones_like(out))
        with pytest.raises(RuntimeError, match='second derivative is not defined'):
            torch.autograd.grad(out, leaves, grad_out)


@pytest.mark.parametrize('name, size, kwargs', [
    ('videomamba_tiny_patch16_224', 32, dict(img_size=32, depth=2)),
    ('mambavision_tiny', 64, dict(img_size=64, stem_dim=8, embed_dim=16, depths=(1, 1, 3, 2), num_heads=(1, 1, 2, 4))),
    ('groupmamba_tiny', 64, dict(stem_dim=8, embed_dims=(16, 32, 48, 64), depths=(1, 1, 1, 1))),
])
def test_whole_models(name, size, kwargs):
    """A model's directional derivative by jvp is that of finite differences, and of its gradient."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3, **kwargs).double().eval()
    x, t = torch.randn(2, 1, 3, size, size).double()
    with sdpa_kernel(SDPBackend.MATH):  # the one form of attention that PyTorch differentiates forwards
        _, got = torch.func.jvp(model, (x,), (t,))
    close(got, finite_difference(model, [x], [t]), 1e-6)
    gradient = torch.func.grad(lambda x: model(x).sum())(x)
    close((gradient * t).sum(), got.sum(), 1e-9)


class Net(torch.nn.Module):

    def forward(self, u, delta, A, B, C, D, z, delta_bias):
        x, x_b = bidirectional_causal_conv1d(u, (A, A))
        x = causal_conv1d(x + x_b, A)
        y = bidirectional_selective_scan((x, u), (delta, delta), (-A.exp(), A), (B, C), (C, B), (D, D), z)
        return selective_scan(y, delta, A, B, C, D, z, delta_bias, reverse=True)


def test_symbolic_trace():
    """torch.fx keeps each op as one node, in any module and for a plain tracer."""
    args = scan_args()
    graph = torch.fx.symbolic_trace(Net())
    ops = [node.target for node in graph.graph.nodes if node.op == 'call_function']
    for op in (bidirectional_causal_conv1d, causal_conv1d, bidirectional_selective_scan, selective_scan):
        assert ops.count(op) == 1
    assert torch.equal(graph(*args), Net()(*args))
    assert torch.equal(pickle.loads(pickle.dumps(graph))(*args), Net()(*args))


class Logged(torch.Tensor):
    calls = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.calls.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


def test_tensor_subclass():
    args = conv_args()
    out = causal_conv1d(args[0].as_subclass(Logged), *args[1:])
    assert type(out) is Logged and causal_conv1d in Logged.calls
    assert torch.equal(out.as_subclass(torch.Tensor), causal_conv1d(*args))
    out = bidirectional_causal_conv1d(args[0], (args[1], args[1].as_subclass(Logged)))[1]
    assert torch.equal(out.as_subclass(torch.Tensor), causal_conv1d(*args[:2], reverse=True))
