"""The native CPU kernels against a Python loop over the tokens, and against themselves.

    python benchmarks/scan_cpu.py [--seconds 5] [--only overhead]

Ratios of medians, the alternatives timed in turns. The machine should be idle.
"""
import argparse
import ctypes
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from harness import Row, report, time_in_turns

from timm_ssm.ops import causal_conv1d, selective_scan
from timm_ssm.ops.backends import BACKENDS, native
from timm_ssm.ops.calls import ScanCall

#: (batch, length, channels, states)
SHORT = [(1, 197, 384, 16), (8, 197, 768, 16), (64, 196, 160, 8)]
LONG = [(1, 1569, 768, 16), (1, 3137, 1152, 16)]


def reference_loop(u, delta, A, B, C, D, z, delta_bias):
    """The scan as mamba-ssm's reference does it: channels first, all decays and inputs at once, then token by token.

    u, delta and z are (B, D, L), B and C (B, N, L).
    """
    dt = F.softplus(delta + delta_bias[:, None])
    decay = torch.exp(torch.einsum('bdl,dn->bdln', dt, A))
    own = torch.einsum('bdl,bnl,bdl->bdln', dt, B, u)
    h = torch.zeros_like(own[:, :, 0])
    ys = []
    for t in range(u.shape[2]):
        h = decay[:, :, t] * h + own[:, :, t]
        ys.append(torch.einsum('bdn,bn->bd', h, C[:, :, t]))
    return (torch.stack(ys, dim=2) + u * D[:, None]) * F.silu(z)


def make_inputs(batch, length, channels, d_state, dtype=torch.float32):
    """Inputs as they are in a model: A as it is initialised, step sizes of about 0.001 to 1, B and C slices."""
    g = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)

    _, B, C = randn(batch, length, 24 + 2 * d_state).split((24, d_state, d_state), dim=-1)
    u, z = randn(batch, length, 2 * channels).chunk(2, dim=-1)
    A = -torch.arange(1, d_state + 1, dtype=dtype).repeat(channels, 1)
    return u, randn(batch, length, channels), A, B, C, randn(channels), z, randn(channels) - 3


def channels_first(u, delta, A, B, C, D, z, delta_bias):
    u, delta, B, C, z = (x.transpose(1, 2).contiguous() for x in (u, delta, B, C, z))
    return u, delta, A, B, C, D, z, delta_bias


def with_gradients(function, inputs, grad_out):
    inputs = [x.detach().requires_grad_() for x in inputs]

    def run():
        return torch.autograd.grad(function(*inputs), inputs, grad_out)
    return run


def forward_row(shape, goal, stretch, seconds):
    inputs = make_inputs(*shape)
    first = channels_first(*inputs)
    with torch.no_grad():
        t = time_in_turns({
            'ours': lambda: selective_scan(*inputs, backend='native'),
            'loop': lambda: reference_loop(*first),
        }, seconds)
    states = torch.Size(shape).numel() / t['ours'] * 1e-9
    return Row(f'forward, x loop {shape}', t['loop'] / t['ours'], goal, stretch,
               detail=f"{t['ours'] * 1e3:.3f} ms, {states:.2f} states/ns")


def gradient_row(shape, seconds):
    inputs = make_inputs(*shape)
    grad_out = torch.randn(shape[:3])
    t = time_in_turns({
        'ours': with_gradients(lambda *a: selective_scan(*a, backend='native'), inputs, grad_out),
        'loop': with_gradients(reference_loop, channels_first(*inputs), grad_out.transpose(1, 2)),
    }, seconds)
    return Row(f'forward + backward, x loop {shape}', t['loop'] / t['ours'], 100, 150,
               detail=f"{t['ours'] * 1e3:.3f} ms")


def backward_row(shape, seconds):
    inputs = [x.detach().requires_grad_() for x in make_inputs(*shape)]
    grad_out = torch.randn(shape[:3])
    out = selective_scan(*inputs, backend='native')

    def forward():
        with torch.no_grad():
            selective_scan(*inputs, backend='native')

    t = time_in_turns({
        'forward': forward,
        'backward': lambda: torch.autograd.grad(out, inputs, grad_out, retain_graph=True),
    }, seconds)
    return Row(f'backward / forward {shape}', t['backward'] / t['forward'], 3., 2.5, less=True,
               detail=f"{t['backward'] * 1e3:.3f} ms")


def build_rows(seconds):
    """The library as it was built, against one compiled for this machine alone."""
    compiler = os.environ.get('CXX', 'g++')
    if not shutil.which(compiler):
        print(f'no {compiler}: cannot compare with -march=native')
        return
    source = Path(__file__).parents[1] / 'csrc' / 'native.cpp'
    flags = '-std=c++17 -O3 -fPIC -shared -fopenmp -fvisibility=hidden -ffp-contract=fast -fno-math-errno ' \
            '-fno-trapping-math -w -march=native'
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'native.so'
        subprocess.run([compiler, *flags.split(), source, '-o', path], check=True)
        libraries = {'generic': native._lib, 'march': ctypes.CDLL(str(path))}
        for name in ('scan_forward', 'scan_backward'):
            getattr(libraries['march'], f'timm_ssm_{name}').argtypes = [ctypes.c_char_p]
        for shape in SHORT[:2]:
            u, delta, A, B, C, D, z, bias = make_inputs(*shape)
            call = ScanCall([u], [delta], [A], [B], [C], [D], [bias], z, True, [False], False, [False])
            out, y, states = BACKENDS['native'].scan_forward(call, True)

            def run(name, function, *args):
                native._lib = libraries[name]
                return function(*args)

            for title, args in (('forward', (BACKENDS['native'].scan_forward, call, False)),
                                ('backward', (BACKENDS['native'].scan_backward, call, out, y, states))):
                t = time_in_turns({
                    name: lambda name=name, args=args: run(name, *args) for name in libraries}, seconds)
                yield Row(f'generic / -march=native, {title} {shape}', t['march'] / t['generic'], .95)
        native._lib = libraries['generic']


def thread_rows(seconds):
    most = torch.get_num_threads()
    for shape in (SHORT[1], LONG[0]):
        inputs = make_inputs(*shape)
        grad_out = torch.randn(shape[:3])

        def run(threads, inputs=inputs):
            torch.set_num_threads(threads)
            with torch.no_grad():
                selective_scan(*inputs, backend='native')

        both = with_gradients(lambda *a: selective_scan(*a, backend='native'), inputs, grad_out)

        def run_both(threads, both=both):
            torch.set_num_threads(threads)
            both()

        for title, function in (('forward', run), ('forward + backward', run_both)):
            t = time_in_turns({n: lambda n=n, function=function: function(n) for n in (1, 2)}, seconds)
            yield Row(f'1 -> 2 threads, {title} {shape}', t[1] / t[2], 1.8)
    torch.set_num_threads(most)


def error_rows():
    for shape in (*SHORT[:2], LONG[0]):
        inputs = make_inputs(*shape)
        got = selective_scan(*inputs, backend='native').double()
        want = selective_scan(*(x.double() for x in inputs), backend='eager')
        yield Row(f'max error / max {shape}', ((got - want).abs().max() / want.abs().max()).item(), 1e-6, less=True)


def overhead_rows(seconds):
    inputs = make_inputs(1, 2, 16, 16)
    conv = torch.randn(1, 2, 16), torch.randn(16, 4), torch.randn(16)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        t = time_in_turns({
            'scan': lambda: selective_scan(*inputs),
            'conv': lambda: causal_conv1d(*conv),
        }, seconds)
    torch.set_num_threads(threads)
    yield Row('call of selective_scan, tiny input, us', t['scan'] * 1e6, 30, less=True)
    yield Row('call of causal_conv1d, tiny input, us', t['conv'] * 1e6, 30, less=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--seconds', type=float, default=5., help='time to spend on each comparison')
    parser.add_argument('--only', help='run one section: forward, gradient, backward, build, threads, error, overhead')
    args = parser.parse_args()
    seconds = args.seconds
    sections = {
        'forward': lambda: [
            *(forward_row(shape, 45, 70, seconds) for shape in SHORT),
            *(forward_row(shape, 85, 110, seconds) for shape in LONG),
        ],
        'gradient': lambda: [gradient_row(shape, seconds) for shape in SHORT],
        'backward': lambda: [backward_row(shape, seconds) for shape in (*SHORT, *LONG)],
        'build': lambda: build_rows(seconds),
        'threads': lambda: thread_rows(seconds),
        'error': error_rows,
        'overhead': lambda: overhead_rows(seconds),
    }
    if args.only and args.only not in sections:
        parser.error(f'--only: got {args.only!r}, needs one of {", ".join(sections)}')
    rows = [row for name, section in sections.items() if args.only in (None, name) for row in section()]
    name = 'scan_cpu' if args.only is None else f'scan_cpu_{args.only}'
    report(name, rows, instruction_set=native._instruction_sets()[native._isa])


if __name__ == '__main__':
    main()
