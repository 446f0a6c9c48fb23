"""`timm_ssm.compat`: mamba-ssm's and causal-conv1d's functions, against plain references, and in place of theirs."""
import inspect
import sys

import pytest
import torch
import torch.nn.functional as F

from timm_ssm import compat
from timm_ssm.__main__ import main

BATCH, CHANNELS, LENGTH, STATES, RANK = 2, 6, 70, 4, 3


def scan_reference(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False):
    """What mamba-ssm documents, token by token, in its layout. Returns the output and the last state."""
    groups = {2: lambda x: x[None, :, :, None].expand(BATCH, -1, -1, LENGTH),  # (D, N)
              3: lambda x: x[:, None].expand(-1, CHANNELS, -1, -1),  # (B, N, L)
              4: lambda x: x.repeat_interleave(CHANNELS // x.shape[1], dim=1)}  # (B, G, N, L)
    B, C = groups[B.ndim](B), groups[C.ndim](C)
    dt = delta if delta_bias is None else delta + delta_bias[:, None]
    dt = F.softplus(dt) if delta_softplus else dt
    h, ys = torch.zeros(BATCH, CHANNELS, STATES, dtype=u.dtype), []
    for t in range(LENGTH):
        h = torch.exp(dt[..., t, None] * A) * h + (dt * u)[..., t, None] * B[..., t]
        ys.append((C[..., t] * h).sum(-1))
    y = torch.stack(ys, dim=-1)
    y = y if D is None else y + D[:, None] * u
    return y if z is None else y * F.silu(z), h


def conv_reference(x, weight, bias=None, activation=None):
    y = F.conv1d(F.pad(x, (weight.shape[1] - 1, 0)), weight[:, None], bias, groups=weight.shape[0])
    return F.silu(y) if activation else y


def tensor(*shape, scale=1.):
    return (scale * torch.randn(*shape, dtype=torch.float64)).requires_grad_()


def same(function, reference, *args):
    """Results and the gradients of all tensors agree."""
    tensors = [x for x in args if isinstance(x, torch.Tensor)]
    out, expected = function(*args), reference(*args)
    torch.testing.assert_close(out, expected)
    weight = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad((out * weight).sum(), tensors), torch.autograd.grad((expected * weight).sum(), tensors))


SHAPES = {'tokens': (BATCH, STATES, LENGTH), 'groups': (BATCH, 2, STATES, LENGTH), 'constant': (CHANNELS, STATES)}


@pytest.mark.parametrize('options', [False, True])
@pytest.mark.parametrize('B, C', [('tokens', 'tokens'), ('groups', 'groups'), ('constant', 'constant')])
def test_selective_scan_fn(B, C, options):
    torch.manual_seed(0)
    sequence = (BATCH, CHANNELS, LENGTH)
    A = (-torch.rand(CHANNELS, STATES, dtype=torch.float64)).requires_grad_()
    args = [tensor(*sequence), tensor(*sequence, scale=.5), A, tensor(*SHAPES[B]), tensor(*SHAPES[C])]
    if options:
        args += [tensor(CHANNELS), tensor(*sequence), tensor(CHANNELS), True]
    same(compat.selective_scan_fn, lambda *a: scan_reference(*a)[0], *args)
    out, state = compat.selective_scan_fn(*args, **({} if options else dict(D=None)), return_last_state=True)
    expected, last = scan_reference(*args)
    assert out.is_contiguous()
    torch.testing.assert_close((out, state), (expected, last))


def test_complex_decay_is_refused():
    x = torch.randn(1, 2, 3)
    A = torch.randn(2, 4, dtype=torch.complex64)
    with pytest.raises(ValueError, match='^A: got dtype torch.complex64, needs a real one$'):
        compat.selective_scan_fn(x, x, A, torch.randn(1, 4, 3), torch.randn(1, 4, 3))


@pytest.mark.parametrize('activation', [None, 'silu', 'swish'])
def test_causal_conv1d_fn(activation):
    torch.manual_seed(0)
    x, weight, bias = tensor(BATCH, CHANNELS, LENGTH), tensor(CHANNELS, 4), tensor(CHANNELS)
    same(lambda *a: compat.causal_conv1d_fn(*a, activation=activation), lambda *a: conv_reference(*a, activation),
         x, weight, bias)
    # the order of arguments before causal-conv1d 1.2
    torch.testing.assert_close(
        compat.causal_conv1d_fn(x, weight, bias, activation), conv_reference(x, weight, bias, activation))


def test_causal_conv1d_in_pieces():
    """Final states as initial states continue a sequence, and the update does it token by token."""
    torch.manual_seed(0)
    x, weight, bias = torch.randn(BATCH, CHANNELS, 9), torch.randn(CHANNELS, 4), torch.randn(CHANNELS)
    whole = conv_reference(x, weight, bias, 'silu')
    first, states = compat.causal_conv1d_fn(x[..., :2], weight, bias, return_final_states=True, activation='silu')
    out = torch.empty_like(states)
    second, states = compat.causal_conv1d_fn(
        x[..., 2:5], weight, bias, initial_states=states, return_final_states=True, final_states_out=out,
        activation='silu')
    assert states is out
    torch.testing.assert_close(torch.cat([first, second], dim=-1), whole[..., :5])
    conv_state = F.pad(states, (1, 0))
    for t in range(5, 9):
        y = compat.causal_conv1d_update(x[..., t], conv_state, weight, bias, 'silu')
        torch.testing.assert_close(y, whole[..., t])
    torch.testing.assert_close(conv_state, x[..., 5:])
    with pytest.raises(ValueError, match='^seq_idx: '):
        compat.causal_conv1d_fn(x, weight, bias, torch.zeros(BATCH, 9, dtype=torch.int32))


def inner_reference(xz, conv_weight, conv_bias, x_proj, dt_proj, out_proj, out_bias, A, A_b, D, delta_bias):
    x, z = xz.chunk(2, dim=1)
    x = conv_reference(x, conv_weight.squeeze(1), conv_bias, 'silu')
    dt, B, C = (F.linear(x.mT, x_proj)).mT.split([RANK, STATES, STATES], dim=1)
    dt = dt_proj @ dt
    y, _ = scan_reference(x, dt, A, B, C, D, z, delta_bias, True)
    if A_b is not None:
        flipped = [t.flip(-1) for t in (x, dt, B, C, z)]
        y_b, _ = scan_reference(*flipped[:2], A_b, *flipped[2:4], D, flipped[4], delta_bias, True)
        y = y + y_b.flip(-1)
    return F.linear(y.mT, out_proj, out_bias)


@pytest.mark.parametrize('name', ['mamba_inner_fn', 'mamba_inner_fn_no_out_proj', 'bimamba_inner_fn'])
def test_inner_functions(name):
    torch.manual_seed(0)
    A, A_b = ((-torch.rand(CHANNELS, STATES, dtype=torch.float64)).requires_grad_() for _ in range(2))
    args = [
        tensor(BATCH, 2 * CHANNELS, LENGTH), tensor(CHANNELS, 1, 4), tensor(CHANNELS),
        tensor(RANK + 2 * STATES, CHANNELS, scale=.5), tensor(CHANNELS, RANK, scale=.5),
        tensor(5, CHANNELS), tensor(5), A, A_b, tensor(CHANNELS), tensor(CHANNELS)]

    def run(xz, conv, conv_bias, x_proj, dt_proj, out_proj, out_bias, A, A_b, D, delta_bias):
        head, tail = (xz, conv, conv_bias, x_proj, dt_proj), (None, None, D, delta_bias)
        if name == 'mamba_inner_fn':
            return compat.mamba_inner_fn(*head, out_proj, out_bias, A, *tail)
        if name == 'bimamba_inner_fn':
            return compat.bimamba_inner_fn(*head, out_proj, out_bias, A, A_b, *tail)
        return F.linear(compat.mamba_inner_fn_no_out_proj(*head, A, *tail).mT, out_proj, out_bias)

    if name == 'bimamba_inner_fn':
        same(run, inner_reference, *args)
    else:
        del args[8]
        same(lambda *a: run(*a[:8], None, *a[8:]), lambda *a: inner_reference(*a[:8], None, *a[8:]), *args)


def test_norms_with_a_residual_stream():
    torch.manual_seed(0)
    x, residual = torch.randn(2, 3, 8, dtype=torch.bfloat16), torch.randn(2, 3, 8)
    norm = compat.RMSNorm(8)
    out, stream = norm(x, residual, prenorm=True, residual_in_fp32=True)
    assert out.dtype == torch.bfloat16 and stream.dtype == torch.float32
    torch.testing.assert_close(stream, x.float() + residual)
    torch.testing.assert_close(out, F.rms_norm(stream, (8,), norm.weight, 1e-5).to(torch.bfloat16))
    weight, bias = torch.randn(8), torch.randn(8)
    torch.testing.assert_close(
        compat.layer_norm_fn(residual, weight, bias, eps=1e-3), F.layer_norm(residual, (8,), weight, bias, 1e-3))
    assert compat.layer_norm_fn(x, weight, bias, prenorm=True, residual_in_fp32=True)[1].dtype == torch.float32


#: First parameters of the originals (mamba-ssm 2.2, causal-conv1d 1.5, the fork of Vim and VideoMamba).
SIGNATURES = {
    'selective_scan_fn': 'u delta A B C D z delta_bias delta_softplus return_last_state',
    'mamba_inner_fn': 'xz conv1d_weight conv1d_bias x_proj_weight delta_proj_weight out_proj_weight out_proj_bias '
                      'A B C D delta_bias B_proj_bias C_proj_bias delta_softplus checkpoint_lvl',
    'mamba_inner_fn_no_out_proj': 'xz conv1d_weight conv1d_bias x_proj_weight delta_proj_weight '
                                  'A B C D delta_bias B_proj_bias C_proj_bias delta_softplus checkpoint_lvl',
    'bimamba_inner_fn': 'xz conv1d_weight conv1d_bias x_proj_weight delta_proj_weight out_proj_weight out_proj_bias '
                        'A A_b B C D delta_bias B_proj_bias C_proj_bias delta_softplus checkpoint_lvl',
    'causal_conv1d_fn': 'x weight bias seq_idx initial_states return_final_states final_states_out activation',
    'causal_conv1d_update': 'x conv_state weight bias activation',
    'layer_norm_fn': 'x weight bias residual',
}


@pytest.mark.parametrize('name', SIGNATURES)
def test_order_of_arguments(name):
    names = SIGNATURES[name].split()
    assert list(inspect.signature(getattr(compat, name)).parameters)[:len(names)] == names


# A repository that brings its own copy of mamba_ssm's Python, as those of Vim and VideoMamba do, and its model.
REPOSITORY = {
    'mamba_ssm/__init__.py': 'from mamba_ssm.ops.selective_scan_interface import selective_scan_fn\nOWN = True\n',
    'mamba_ssm/ops/__init__.py': '',
    'mamba_ssm/ops/selective_scan_interface.py': 'import selective_scan_cuda\n\ndef selective_scan_fn(*args):\n'
                                                 '    return selective_scan_cuda.fwd(*args)\n',
    'main.py': '''
import torch
from causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from mamba_ssm.ops.selective_scan_interface import {names}
from mamba_ssm.ops.triton.layernorm import RMSNorm, layer_norm_fn, rms_norm_fn
import mamba_ssm

torch.manual_seed(0)
u, A, B = torch.randn(1, 2, 5), -torch.rand(2, 3), torch.randn(1, 3, 5)
print(getattr(mamba_ssm, 'OWN', False), selective_scan_fn.__module__)
print(selective_scan_fn(u, u, A, B, B))
''',
}
FORK = 'selective_scan_fn, mamba_inner_fn, bimamba_inner_fn, mamba_inner_fn_no_out_proj'


@pytest.fixture
def run_script(tmp_path, monkeypatch, capsys):
    """Runs files' main.py by `python -m timm_ssm`, in this process; returns what it prints."""
    def is_theirs(name):
        return name.partition('.')[0] in ('mamba_ssm', 'causal_conv1d', 'selective_scan_cuda', 'causal_conv1d_cuda')

    def run(files):
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text.replace('{names}', FORK))
        monkeypatch.setattr(sys, 'argv', ['timm_ssm', str(tmp_path / 'main.py')])
        main()
        return capsys.readouterr().out

    before = {name: sys.modules.pop(name) for name in list(sys.modules) if is_theirs(name)}
    monkeypatch.setattr(sys, 'path', sys.path[:])
    monkeypatch.setattr(sys, 'meta_path', sys.meta_path[:])
    yield run
    for name in list(filter(is_theirs, sys.modules)):
        del sys.modules[name]
    sys.modules.update(before)


@pytest.mark.parametrize('own', [True, False])
def test_authors_scripts_run(run_script, own):
    files = {k: v for k, v in REPOSITORY.items() if own or k == 'main.py'}
    torch.manual_seed(0)
    u, A, B = torch.randn(1, 2, 5), -torch.rand(2, 3), torch.randn(1, 3, 5)
    assert run_script(files) == f'{own} timm_ssm.compat\n{compat.selective_scan_fn(u, u, A, B, B)}\n'


def test_originals_are_left_alone(run_script):
    """With an extension that imports, the original module is the one that is found."""
    files = {
        'mamba_ssm/__init__.py': '',
        'mamba_ssm/ops/__init__.py': '',
        'mamba_ssm/ops/selective_scan_interface.py': 'import selective_scan_cuda\nOWN = True\n',
        'selective_scan_cuda.py': '',
        'causal_conv1d_cuda.py': '',
        'causal_conv1d.py': 'OWN = True\n',
        'main.py': 'import causal_conv1d\nfrom mamba_ssm.ops import selective_scan_interface\n'
                   'print(causal_conv1d.OWN, selective_scan_interface.OWN)\n',
    }
    assert run_script(files) == 'True True\n'
