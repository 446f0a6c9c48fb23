"""What Triton makes of the kernels, without a GPU: registers, spills, shuffles and the instructions of every loop.

    python benchmarks/inspect_triton.py [--target cuda:90 | hip:gfx942] [--dtype bfloat16] [--only NAME]

Each kernel is compiled as its launching function would have it compiled for the call at hand (the launch itself is
intercepted), for NVIDIA disassembled with the tools that Triton carries, and the instructions between each backward
branch and its target are counted. These are properties of the code, not times.
"""
import argparse
import os
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Dict, List, Tuple

os.environ.pop('TRITON_INTERPRET', None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from timm_ssm.ops.backends.triton import backward, common, conv, forward
from timm_ssm.ops.calls import ConvCall, ScanCall, acc_dtype

TYPES = {
    torch.float32: 'fp32', torch.float64: 'fp64', torch.bfloat16: 'bf16', torch.float16: 'fp16', torch.int32: 'i32'}
OPTIONS = ('num_warps', 'num_stages', 'enable_fp_fusion')
launches = []


def target_of(text: str) -> GPUTarget:
    """cuda:<compute capability> or hip:<architecture>"""
    kind, arch = text.split(':')
    if kind == 'cuda':
        return GPUTarget(kind, int(arch), 32)
    return GPUTarget(kind, arch, 64 if arch.startswith('gfx9') else 32)


def record_launches(target: GPUTarget) -> None:
    """From now on kernels are noted in `launches`, as (kernel, arguments, keywords, grid), instead of launched."""
    def record(self, *args, grid, warmup, **kwargs):
        launches.append((self, args, kwargs, grid))

    def tuning(x, n_pow2):
        plain = target.backend == 'hip' or x.dtype == torch.float64
        return dict(AT_ONCE=1, REDUCE='sum' if plain else 'tf32x3' if x.dtype == torch.float32 else 'tf32')

    JITFunction.run = record
    common.processors = lambda device: 132
    backward.tuning = tuning


def source_of(fn, args, kwargs):
    """What the JIT would compile for these arguments, specialised as it specialises."""
    signature, constants, divisible = {}, {}, []
    values = dict(zip(fn.arg_names, args), **kwargs)
    constexprs = {p.name for p in fn.params if p.is_constexpr}
    for i, name in enumerate(fn.arg_names):
        x = values[name]
        if name in constexprs or (isinstance(x, int) and x == 1):
            constants[name] = x
        elif isinstance(x, torch.Tensor):
            signature[name] = '*' + TYPES[x.dtype]
            if x.data_ptr() % 16 == 0:
                divisible.append(i)
        else:
            signature[name] = 'i32' if abs(x) < 2**31 else 'i64'
            if x % 16 == 0:
                divisible.append(i)
    if tuple(map(int, triton.__version__.split('.')[:2])) < (3, 3):
        from triton.backends.compiler import AttrsDescriptor
        return ASTSource(fn, signature, constants, AttrsDescriptor.from_hints({i: 16 for i in divisible}))  # noqa: C420
    signature = {name: signature.get(name, 'constexpr') for name in fn.arg_names}
    constants = {(fn.arg_names.index(k),): v for k, v in constants.items()}
    return ASTSource(fn, signature, constants, {(i,): [['tt.divisibility', 16]] for i in divisible})


def nvidia_tool(name: str) -> str:
    """A tool of this Triton, or of another one named by TRITON_TOOLS."""
    folder = os.environ.get('TRITON_TOOLS') or Path(triton.__file__).parent / 'backends/nvidia/bin'
    return str(Path(folder) / name)


def cuobjdump(kernel, flag: str) -> str:
    """What NVIDIA's tool says of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix='.cubin') as f:
        f.write(kernel.asm['cubin'])
        f.flush()
        run = subprocess.run([nvidia_tool('cuobjdump'), flag, f.name], capture_output=True, text=True, check=True)
    return run.stdout


def resources(kernel) -> Dict[str, int]:
    """Registers of a thread, bytes of memory that it needs beyond them, and bytes of shared memory of a program."""
    if 'amdgcn' in kernel.asm:
        text = kernel.asm['amdgcn']
        found = dict(re.findall(r'\.(vgpr_count|private_segment_fixed_size|group_segment_fixed_size):\s+(\d+)', text))
        registers, spilled, shared = map(int, (
            found['vgpr_count'], found['private_segment_fixed_size'], found['group_segment_fixed_size']))
    else:
        usage = {k: int(v) for k, v in re.findall(r'(REG|STACK|SHARED|LOCAL):(\d+)', cuobjdump(kernel, '-res-usage'))}
        registers, spilled, shared = usage['REG'], usage['LOCAL'] + usage['STACK'], usage['SHARED']
    shared = max(shared, kernel.metadata.shared)  # some is allocated by the launch alone
    return dict(registers=registers, spilled=spilled, shared=shared)


def instructions(kernel) -> List[Tuple[int, str]]:
    """(address, text) of each instruction of a kernel compiled for NVIDIA."""
    code = cuobjdump(kernel, '-sass')
    return [(int(a, 16), text.strip()) for a, text in re.findall(r'/\*([0-9a-f]{4,6})\*/\s+(.*?);', code)]


def loops(code):
    """Instruction counts by opcode of every loop, in order; an outer loop's count includes its inner loops'."""
    index = {a: i for i, (a, _) in enumerate(code)}
    for i, (a, text) in enumerate(code):
        target = re.search(r'\bBRA\b.*?(0x[0-9a-f]+)', text)
        if target and int(target[1], 16) < a:
            body = code[index[int(target[1], 16)]:i + 1]
            if len(body) > 16:
                yield Counter(re.sub(r'@!?U?P\S+ +', '', t).split()[0].split('.')[0] for _, t in body)


def scan_call(batch, length, channels, d_state, directions, dtype, groups=None) -> ScanCall:
    acc = acc_dtype(dtype)

    def act(*shape):
        return torch.zeros(shape, dtype=dtype)

    dt_rank = max(16, channels // 2 // 16)
    bc = []
    for _ in range(directions):  # B and C are slices of x_proj's output
        x = act(batch, length, dt_rank + 2 * d_state)
        bc.append((x[..., dt_rank:dt_rank + d_state], x[..., dt_rank + d_state:]))
    xz = act(batch, length, 2 * channels)
    return ScanCall(
        [act(batch, length, channels) for _ in range(directions)],
        [act(batch, length, channels) for _ in range(directions)],
        [torch.zeros(channels, d_state, dtype=acc) for _ in range(directions)],
        [b for b, _ in bc], [c for _, c in bc],
        [torch.zeros(channels, dtype=acc)] * directions, [torch.zeros(channels, dtype=acc)] * directions,
        xz[..., channels:], True, [False, True][:directions], False, [False, False][:directions])


def conv_call(batch, length, channels, directions, dtype) -> ConvCall:
    x = torch.zeros(batch, length, 2 * channels, dtype=dtype)[..., :channels]
    weight = [torch.zeros(channels, 4)] * directions
    return ConvCall(x, weight, [torch.zeros(channels)] * directions, True, [False, True][:directions], False)


def cases(dtype):
    call = scan_call(128, 197, 768, 16, 2, dtype)
    yield 'forward, both directions', lambda: forward.scan_forward(call, False)
    yield 'forward for training', lambda: forward.scan_forward(call, True)
    states = call.new_states()
    out = call.u[0].new_zeros(call.u[0].shape)
    yield 'backward, both directions', lambda: backward.scan_backward(call, out, out, states)
    small = scan_call(128, 196, 160, 8, 1, dtype)
    yield 'forward, N = 8, 160 channels', lambda: forward.scan_forward(small, True)
    small_out = small.u[0].new_zeros(small.u[0].shape)
    yield 'backward, N = 8, 160 channels', lambda: backward.scan_backward(
        small, small_out, small_out, small.new_states())
    long = scan_call(1, 1569, 384, 16, 2, dtype)
    yield 'forward, segmented', lambda: forward.scan_forward(long, True)
    long_out = long.u[0].new_zeros(long.u[0].shape)
    yield 'backward, segmented', lambda: backward.scan_backward(long, long_out, long_out, long.new_states())
    one = scan_call(1, 1, 1, 1, 2, dtype)  # sizes of 1 are compile-time constants
    one_out = one.u[0].new_zeros(one.u[0].shape)
    yield 'forward, smallest', lambda: forward.scan_forward(one, True)
    yield 'backward, smallest', lambda: backward.scan_backward(one, one_out, one_out, one.new_states())
    conv_one = conv_call(1, 1, 1, 1, dtype)
    yield 'conv forward, smallest', lambda: conv.conv_forward(conv_one)
    yield 'conv backward, smallest', lambda: conv.conv_backward(conv_one, [conv_one.x.contiguous()])
    odd = scan_call(1, 300, 37, 5, 1, dtype)._replace(residual=True, mask_diagonal=[True])
    odd_out = odd.u[0].new_zeros(odd.u[0].shape)
    yield 'forward, odd sizes, residual and masked', lambda: forward.scan_forward(odd, True)
    yield 'backward, odd sizes, residual and masked', lambda: backward.scan_backward(
        odd, odd_out, odd_out, odd.new_states())
    cc = conv_call(32, 197, 768, 2, dtype)
    yield 'conv forward', lambda: conv.conv_forward(cc)
    yield 'conv backward', lambda: conv.conv_backward(cc, [cc.x.contiguous()] * 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--target', default='cuda:90')
    parser.add_argument('--dtype', default='bfloat16')
    parser.add_argument('--only', default='', help='cases whose name contains this')
    parser.add_argument('--dump', default='', help='folder for the assembly')
    parser.add_argument('--ops', action='store_true', help='opcodes of the loops')
    args = parser.parse_args()
    target = target_of(args.target)
    kind = target.backend
    record_launches(target)

    print(f'Triton {triton.__version__}, {args.target}, {args.dtype}: inspected, not measured')
    for name, run in cases(getattr(torch, args.dtype)):
        if args.only not in name:
            continue
        launches.clear()
        run()
        for fn, fn_args, kwargs, _ in launches:
            options = {k: kwargs.pop(k) for k in OPTIONS if k in kwargs}
            kernel = triton.compile(source_of(fn, fn_args, kwargs), target=target, options=options)
            title = f'{name}: {fn.__name__}'
            if args.dump:
                Path(args.dump).mkdir(exist_ok=True)
                for ext in ('ttir', 'ttgir', 'ptx', 'amdgcn'):
                    if ext in kernel.asm:
                        (Path(args.dump) / f'{re.sub(r"[^a-z0-9]+", "_", title)}.{ext}').write_text(kernel.asm[ext])
            used = ', '.join(f'{v} {k}' for k, v in resources(kernel).items())
            if kind == 'hip':
                print(f'{title}: {used}')
                continue
            code = instructions(kernel)
            shuffles = sum(text.startswith('SHFL') or ' SHFL' in text for _, text in code)
            print(f'{title}: {used}, {len(code)} instructions, {shuffles} shuffles')
            if args.dump:
                (Path(args.dump) / f'{re.sub(r"[^a-z0-9]+", "_", title)}.sass').write_text(
                    '\n'.join(f'{a:06x} {t}' for a, t in code))
            for body in loops(code):
                print(f'    loop of {sum(body.values())} instructions',
                      ', '.join(f'{op} {k}' for op, k in body.most_common(24 if args.ops else 6)))


if __name__ == '__main__':
    main()
