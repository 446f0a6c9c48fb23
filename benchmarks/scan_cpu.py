"""The native CPU kernels against the machine's own bounds, a Python loop over the tokens, and themselves.

    python benchmarks/scan_cpu.py [--seconds 5] [--only overhead]

A share of the bound is the least time that the work can take over the time that it took. The least time is the longest
of three: of the multiplications, of the exps, and of reading the inputs and writing the outputs once, each at the rate
that this machine reaches with nothing else to do (bounds.cpp).

Ratios of medians, the alternatives timed in turns. The machine should be idle.
"""
import argparse
import ctypes
import os
import shutil
import statistics
import subprocess
import tempfile
import timeit
from pathlib import Path

import torch
import torch.nn.functional as F
from harness import Row, report, time_in_turns

from timm_ssm.ops import causal_conv1d, selective_scan
from timm_ssm.ops.backends import BACKENDS, native
from timm_ssm.ops.calls import ConvCall, ScanCall

#: (batch, length, channels, states)
SHORT = [(1, 197, 384, 16), (8, 197, 768, 16), (64, 196, 160, 8)]
LONG = [(1, 1569, 768, 16), (1, 3137, 1152, 16)]
ONE_STATE = (1, 3136, 192, 1)


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


def eager_row(shape, seconds):
    """What a machine without a compiler gets."""
    inputs = make_inputs(*shape)
    first = channels_first(*inputs)
    with torch.no_grad():
        t = time_in_turns({
            'ours': lambda: selective_scan(*inputs, backend='eager'),
            'loop': lambda: reference_loop(*first),
        }, seconds)
    return Row(f'eager, forward, x loop {shape}', t['loop'] / t['ours'], 6, 12, detail=f"{t['ours'] * 1e3:.3f} ms")


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


def compiled(source):
    """A C++ source compiled for this machine alone, as a library; None without a compiler."""
    compiler = os.environ.get('CXX', 'g++')
    if not shutil.which(compiler):
        print(f'no {compiler}: cannot compile {source}')
        return None
    flags = '-std=c++17 -O3 -fPIC -shared -fopenmp -fvisibility=hidden -ffp-contract=fast -fno-math-errno ' \
            '-fno-trapping-math -w -march=native'
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'library.so'
        subprocess.run([compiler, *flags.split(), Path(__file__).parents[1] / source, '-o', path], check=True)
        return ctypes.CDLL(str(path))


def scan_call(shape):
    u, delta, A, B, C, D, z, bias = make_inputs(*shape)
    return ScanCall([u], [delta], [A], [B], [C], [D], [bias], z, True, [False], False, [False])


def bound_rows(seconds):
    """Every kernel as a share of what this machine can do."""
    lib = compiled('benchmarks/bounds.cpp')
    if lib is None:
        return []
    lib.multiply_adds.restype = lib.exps.restype = ctypes.c_double
    n, threads = ctypes.c_int64(20000), torch.get_num_threads()
    functions = {name: lambda name=name: getattr(lib, name)(n, threads) for name in ('multiply_adds', 'exps')}
    t = time_in_turns(functions, seconds)
    rates = {name: function() / t[name] for name, function in functions.items()}  # a second, of all threads
    rows = [Row(f'{name}, 1/ns', rate * 1e-9) for name, rate in rates.items()]
    return rows + [row for shape in (*SHORT, *LONG, ONE_STATE) for row in share_rows(shape, lib, rates, seconds)]


def share_rows(shape, lib, rates, seconds):
    batch, length, channels, d_state = shape
    backend, call = BACKENDS['native'], scan_call(shape)
    u, weights, biases = call.input, [torch.randn(channels, 4)] * 2, [torch.randn(channels)] * 2
    conv = ConvCall(u, weights, biases, True, [False, True], False)
    out, y, states = backend.scan_forward(call, True)

    def stream():
        outs = [torch.empty(u.shape) for _ in range(2)]
        lib.read_one_write_two(
            ctypes.c_void_p(u.data_ptr()), ctypes.c_int64(u.stride(1)),
            *(ctypes.c_void_p(x.data_ptr()) for x in outs),
            ctypes.c_int64(batch * length), ctypes.c_int64(channels), torch.get_num_threads())

    t = time_in_turns({
        'stream': stream,
        'convolution': lambda: backend.conv_forward(conv),
        'forward': lambda: backend.scan_forward(call, False),
        'backward': lambda: backend.scan_backward(call, out, y, states),
    }, seconds)
    # of a state: dt A, a h, + dt B u and + C h forward; the first three again, and 8 for the gradients, backward
    exp2, updates = lib.exp2_multiplications(), u.numel() * d_state
    tensor = t['stream'] / 3  # the time to read or to write a tensor like u
    for name, goal, stretch, tensors, multiplications, exps in (
            ('convolution', .6, .8, 3, 2 * 4 * u.numel(), 0),
            ('forward', .5, .65, 4, (4 + exp2) * updates, updates),
            ('backward', .4, .55, 8, (11 + exp2) * updates, updates)):
        bounds = {
            'memory': tensors * tensor,
            'multiplications': multiplications / rates['multiply_adds'],
            'exps': exps / rates['exps'],
        }
        which = max(bounds, key=bounds.get)
        yield Row(f'{name}, share of the bound {shape}', bounds[which] / t[name], goal, stretch,
                  detail=f'{t[name] * 1e3:.3f} ms, bound by {which}')


def build_rows(seconds):
    """The library as it was built, against one compiled for this machine alone."""
    march = compiled('csrc/native.cpp')
    if march is None:
        return
    libraries = {'generic': native._lib, 'march': march}
    for name in ('scan_forward', 'scan_backward'):
        getattr(march, f'timm_ssm_{name}').argtypes = [ctypes.c_char_p]
    for shape in SHORT[:2]:
        call = scan_call(shape)
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


def overhead_rows():
    inputs = make_inputs(1, 2, 16, 16)
    conv = torch.randn(1, 2, 16), torch.randn(16, 4), torch.randn(16)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        for name, call in (('selective_scan', lambda: selective_scan(*inputs)),
                           ('causal_conv1d', lambda: causal_conv1d(*conv))):
            times = sorted(t / 20 * 1e6 for t in timeit.repeat(call, number=20, repeat=1000))
            yield Row(f'call of {name}, tiny input, us', statistics.median(times), 30, less=True,
                      detail=f'at least {times[0]:.1f}')
    torch.set_num_threads(threads)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--seconds', type=float, default=5., help='time to spend on each comparison')
    parser.add_argument('--only', help='run one section: bound, forward, eager, gradient, backward, build, '
                                       'threads, error, overhead')
    args = parser.parse_args()
    seconds = args.seconds
    sections = {
        'bound': lambda: bound_rows(seconds),
        'forward': lambda: [
            *(forward_row(shape, 45, 70, seconds) for shape in SHORT),
            *(forward_row(shape, 85, 110, seconds) for shape in LONG),
        ],
        'eager': lambda: [eager_row(shape, seconds) for shape in SHORT],
        'gradient': lambda: [gradient_row(shape, seconds) for shape in SHORT],
        'backward': lambda: [backward_row(shape, seconds) for shape in (*SHORT, *LONG)],
        'build': lambda: build_rows(seconds),
        'threads': lambda: thread_rows(seconds),
        'error': error_rows,
        'overhead': overhead_rows,
    }
    if args.only and args.only not in sections:
        parser.error(f'--only: got {args.only!r}, needs one of {", ".join(sections)}')
    rows = [row for name, section in sections.items() if args.only in (None, name) for row in section()]
    name = 'scan_cpu' if args.only is None else f'scan_cpu_{args.only}'
    report(name, rows, instruction_set=native._instruction_sets()[native._isa])


if __name__ == '__main__':
    main()
