"""The ops as ONNX graphs, in onnxruntime, against the ops themselves."""
import pytest
import torch

from timm_ssm.ops import bidirectional_causal_conv1d, bidirectional_selective_scan, causal_conv1d, selective_scan

pytest.importorskip('onnxscript')
onnxruntime = pytest.importorskip('onnxruntime')
from timm_ssm.export import onnx_ops  # noqa: E402  needs onnxscript

BATCH, LENGTH = torch.export.Dim('batch'), torch.export.Dim('length')


def to_onnx(function, args, dynamic):
    """`function` of `args` in onnxruntime; `dynamic` has the dynamic axes of each argument."""
    class Module(torch.nn.Module):
        def forward(self, *args):
            return function(*args)

    program = torch.export.export(Module(), args, dynamic_shapes=(tuple(dynamic),))
    onnx = torch.onnx.export(
        program, (), custom_translation_table=onnx_ops.TABLE, dynamo=True, opset_version=18, optimize=False,
        verbose=False)
    onnx_ops.simplify(onnx.model)
    session = onnxruntime.InferenceSession(onnx.model_proto.SerializeToString())

    def run(*args):
        outs = session.run(None, {i.name: x.numpy() for i, x in zip(session.get_inputs(), args)})
        return torch.from_numpy(outs[0]) if len(outs) == 1 else tuple(map(torch.from_numpy, outs))
    return run


def inputs(batch, length, channels, d_state, groups=0, dtype=torch.float32):
    """u, delta, A, B, C, D, z, delta_bias"""
    generator = torch.Generator().manual_seed(length)

    def r(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    tokens = (batch, length, channels)
    mixing = (batch, length, groups, d_state) if groups else (batch, length, d_state)
    A = -torch.rand(channels, d_state, generator=generator, dtype=dtype) * 2
    return r(*tokens), 3 * r(*tokens), A, r(*mixing), r(*mixing), r(channels), r(*tokens), r(channels)


DYNAMIC_BATCH = [{0: BATCH}, {0: BATCH}, None, {0: BATCH}, {0: BATCH}, None, {0: BATCH}, None]
DYNAMIC = [shape and {**shape, 1: LENGTH} for shape in DYNAMIC_BATCH]
# in chunks, or, if `few` is 0, token by token; of every form of the scan
CASES = [
    dict(),
    dict(few=0),
    dict(reverse=True, residual=True),
    dict(few=0, reverse=True, residual=True, mask_diagonal=True),
    dict(residual=True, mask_diagonal=True, groups=2),
    dict(few=0, reverse=True, groups=2, d_state=1),
]


@pytest.mark.parametrize('case', CASES, ids=str)
def test_scan(case, monkeypatch):
    """Any batch and any length: less than a chunk, whole chunks, and chunks and a rest."""
    case = dict(case)
    monkeypatch.setattr(onnx_ops, 'FEW_STATES', case.pop('few', 2048))
    shape = (6, case.pop('d_state', 4), case.pop('groups', 0))
    run = to_onnx(lambda *args: selective_scan(*args, **case), inputs(2, 10, *shape), DYNAMIC)
    for batch, length in ((1, 5), (3, 64), (2, 77)):
        args = inputs(batch, length, *shape)
        torch.testing.assert_close(run(*args), selective_scan(*args, **case), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('length', [1, 9, 10])
def test_scan_of_one_length(length):
    """Lengths that are known, with and without a rest after the last chunk; float64 is computed as such."""
    run = to_onnx(lambda *args: selective_scan(*args, reverse=True), inputs(2, length, 6, 1), DYNAMIC_BATCH)
    args = inputs(3, length, 6, 1)
    torch.testing.assert_close(run(*args), selective_scan(*args, reverse=True), rtol=1e-4, atol=1e-5)


def test_scan_without_options_in_float64():
    args = inputs(2, 10, 6, 4, dtype=torch.float64)[:5]
    run = to_onnx(lambda *args: selective_scan(*args, delta_softplus=False), args, [None] * 5)
    torch.testing.assert_close(run(*args), selective_scan(*args, delta_softplus=False))


def test_scan_in_float16_runs_in_float32():
    u, delta, A, B, C, D, z, bias = inputs(2, 10, 6, 4)
    args = [u.half(), delta.half(), A, B.half(), C.half(), D, z.half(), bias]
    run = to_onnx(selective_scan, tuple(args), [None] * 8)
    torch.testing.assert_close(run(*args), selective_scan(*args), rtol=2e-3, atol=2e-3)


def test_bidirectional_scan():
    forward, reverse = inputs(2, 10, 6, 4), inputs(2, 10, 6, 4)[::-1][::-1]
    pairs = [(a, b.flip(0)) for a, b in zip(forward, reverse)]
    z = pairs.pop(6)[0]

    def scan(*flat):
        *flat, z = flat
        u, delta, A, B, C, D, bias = (tuple(flat[i:i + 2]) for i in range(0, 14, 2))
        return bidirectional_selective_scan(u, delta, A, B, C, D, z, bias, mask_diagonal=True)

    args = tuple(x for pair in pairs for x in pair) + (z,)
    torch.testing.assert_close(to_onnx(scan, args, [None] * 15)(*args), scan(*args), rtol=1e-4, atol=1e-5)


def test_large_and_small_steps():
    """softplus keeps its digits where exp(x) vanishes beside 1, and is linear far beyond."""
    _, _, A, B, C, *_ = inputs(1, 9, 6, 4)
    delta = torch.linspace(-14, 90, 54).reshape(1, 9, 6)
    u = delta.exp().clamp(max=1).reciprocal()  # so that small steps count
    run = to_onnx(selective_scan, (u, delta, A, B, C), [None] * 5)
    torch.testing.assert_close(run(u, delta, A, B, C), selective_scan(u, delta, A, B, C), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    'reverse, centered, activation', [(False, False, 'silu'), (True, False, None), (False, True, None)])
def test_conv(reverse, centered, activation):
    def conv(x, weight, bias):
        return causal_conv1d(x, weight, bias, activation, reverse, centered)

    torch.manual_seed(0)
    args = torch.randn(2, 9, 6), torch.randn(6, 4), torch.randn(6)
    run = to_onnx(conv, args, [{0: BATCH, 1: LENGTH}, None, None])
    args = torch.randn(3, 2, 6), *args[1:]
    torch.testing.assert_close(run(*args), conv(*args))


def test_bidirectional_conv():
    torch.manual_seed(0)

    def conv(x, *weight):
        return bidirectional_causal_conv1d(x, weight)

    args = torch.randn(2, 9, 6), torch.randn(6, 4), torch.randn(6, 4)
    torch.testing.assert_close(to_onnx(conv, args, [None] * 3)(*args), conv(*args))
