"""Compile every variant of the Triton kernels that a model can ask for, for several GPUs, without one.

    python benchmarks/compile_triton.py [--targets cuda:90 hip:gfx942 ...] [--quick] [--list]

Variants come from the calls of all registered models at batch 1 and 128, and from calls of the ops with 1 to 64 states,
odd channels, groups, more than 2^31 elements and every form, for inference and for training: in bfloat16, the forms
also in the other dtypes. Models run on the meta device, launches are noted in place of being made, and each set of
compile-time arguments is compiled once. Shared memory, registers and numbers of programs are held against the limits of
the target. It takes hours; Triton keeps what it has compiled, hence a second run compiles changed kernels alone.

--quick compiles a few calls of the ops, in minutes. A run for all targets is recorded in
results/triton_compiled.json with the sources that it holds for; when these have changed, tests/ops/test_triton.py runs
--quick.
"""
import argparse
import json
import os
import time
from typing import Dict, Iterable, Iterator, List

os.environ.pop('TRITON_INTERPRET', None)

import timm
import torch
import triton
from inspect_triton import OPTIONS, launches, record_launches, resources, source_of, target_of
from torch.utils._python_dispatch import TorchDispatchMode
from triton_sources import RECORD, sources

from timm_ssm.export import model_input_size
from timm_ssm.ops.backends.triton import backward, conv, forward
from timm_ssm.ops.calls import FLOAT_DTYPES, ConvCall, ScanCall, acc_dtype

TARGETS = ('cuda:80', 'cuda:90', 'cuda:100', 'hip:gfx942', 'hip:gfx1100')
#: Bytes of shared memory that a program may have
SHARED = {'cuda:80': 163 << 10, 'cuda:90': 227 << 10, 'cuda:100': 227 << 10}
SHARED_AMD = 64 << 10


class Calls(TorchDispatchMode):
    """Notes the calls of the ops, once each."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Dict[tuple, object] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kinds = {torch.ops.timm_ssm.selective_scan: ScanCall, torch.ops.timm_ssm.causal_conv1d: ConvCall}
        kind = kinds.get(func.overloadpacket)
        if kind is not None:
            call = kind(*args[:len(kind._fields)])
            tensors = [x if x is None else (x.shape, x.stride(), x.storage_offset()) for x in call.tensors()]
            self.found[repr((call.with_tensors([None] * len(tensors)), tensors))] = call
        return func(*args, **(kwargs or {}))


def of_models() -> Iterator[tuple]:
    names = [n for n in timm.list_models() if timm.models.model_entrypoint(n).__module__.startswith('timm_ssm.')]
    for batch in (1, 128):
        with Calls() as calls:
            for name in names:
                model = timm.create_model(name, device='meta')
                model(torch.empty((batch, *model_input_size(model)), device='meta'))
        yield from calls.found.values()


def meta(*shape: int) -> torch.Tensor:
    return torch.empty(shape, device='meta')


def scan(
        batch: int = 1,
        length: int = 197,
        channels: int = 96,
        d_state: int = 16,
        directions: int = 2,
        groups: int = 0,
        bare: bool = False,
        **form,
) -> ScanCall:
    n, bc = directions, (batch, length, groups, d_state) if groups else (batch, length, d_state)
    return ScanCall(
        [meta(batch, length, channels)] * n, [meta(batch, length, channels)] * n, [meta(channels, d_state)] * n,
        [meta(*bc)] * n, [meta(*bc)] * n, [] if bare else [meta(channels)] * n, [] if bare else [meta(channels)] * n,
        None if bare else meta(batch, length, channels), not bare, [False, True][-n:], False, [False] * n,
    )._replace(**form)


def few() -> Iterator[tuple]:
    yield scan()
    yield ConvCall(meta(1, 197, 96), [meta(96, 4)] * 2, [meta(96)] * 2, True, [False, True], False)
    yield scan(length=1569, channels=37, d_state=5, residual=True, mask_diagonal=[False, True])  # in segments


def sizes() -> Iterator[tuple]:
    for d_state in (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64):
        for length in (197, 1569):
            yield scan(length=length, channels=37, d_state=d_state)
            yield scan(batch=128, length=length, channels=768, d_state=d_state, directions=1)
    yield scan(1, 1, 1, 1)  # sizes of 1 are compile-time constants
    yield scan(2 ** 18, 197, 64, 1)  # beyond 2^31 elements, in many items and in one
    yield scan(2, 2 ** 24, 192)
    yield ConvCall(meta(2, 2 ** 24, 192), [meta(192, 4)] * 2, [], True, [False, True], False)


def forms() -> Iterator[tuple]:
    for residual in (False, True):
        for masked in (False, True):
            for directions in (1, 2):
                mask = [False, masked][-directions:]
                yield scan(directions=directions, residual=residual, mask_diagonal=mask)
                yield scan(directions=directions, residual=residual, mask_diagonal=mask, bare=True)
                yield scan(directions=directions, residual=residual, mask_diagonal=mask, groups=3)
    for kernel_size in (1, 2, 3, 4, 5, 7):
        for centered in (False, True):
            x, weight = meta(1, 197, 37), meta(37, kernel_size)
            yield ConvCall(x, [weight], [], False, [True], centered)
            yield ConvCall(x, [weight], [meta(37)], True, [False], centered)


def cast(call, dtype: torch.dtype):
    """The call in another dtype, with the same strides and offsets."""
    def other(x):
        if x is None:
            return None
        size = x.storage_offset() + sum((n - 1) * s for n, s in zip(x.shape, x.stride())) + 1
        base = torch.empty(size, dtype=dtype if x.ndim > 2 else acc_dtype(dtype), device='meta')  # else a parameter
        return base.as_strided(x.shape, x.stride(), x.storage_offset())

    return call.with_tensors([other(x) for x in call.tensors()])


def launch(call) -> None:
    """What inference and training launch for `call`."""
    if isinstance(call, ConvCall):
        conv.conv_forward(call)
        conv.conv_backward(call, [torch.empty_like(call.x, memory_format=torch.contiguous_format) for _ in call.weight])
        return
    forward.scan_forward(call, False)
    out, y, states = forward.scan_forward(call, True)
    backward.scan_backward(call, out, y, states)


def variants(calls: List) -> Iterable[list]:
    """[kernel, source, options, programs] of each variant; of its calls, the one with the most programs."""
    found: Dict[tuple, list] = {}
    for call in calls:
        launches.clear()
        launch(call)
        for fn, args, kwargs, grid in launches:
            options = {k: kwargs.pop(k) for k in OPTIONS if k in kwargs}
            # dtypes, and sizes beyond 32 bits; what divides a size or an address makes other loads, but no other code
            kinds = tuple(x.dtype if isinstance(x, torch.Tensor) else x >= 2 ** 31 for x in args)
            rest = tuple((k, v) for k, v in sorted(kwargs.items()) if k != 'ALIGNED')
            key = fn.__name__, kinds, rest, tuple(options.items())
            if key not in found:
                found[key] = [fn, source_of(fn, args, kwargs), options, 0]
            found[key][3] = max(found[key][3], grid[0])
    return found.values()


def problems(name: str, kernel, programs: int) -> Iterator[str]:
    target, used = target_of(name), resources(kernel)
    amd = target.backend == 'hip'
    threads = kernel.metadata.num_warps * target.warp_size
    limits = dict(shared=SHARED_AMD if amd else SHARED[name])
    if amd:  # of a SIMD's registers a wave has 512 on CDNA, of them 256 accumulators, and 256 on RDNA
        limits['registers'] = 512 if target.warp_size == 64 else 256
    else:
        limits['registers'] = min(255, (64 << 10) // threads)
    for what, limit in limits.items():
        if used[what] > limit:
            yield f'{used[what]} {what}, of which there are {limit}'
    most = (2 ** 32 - 1) // threads if amd else 2 ** 31 - 1
    if programs > most:
        yield f'{programs} programs, of which there can be {most}'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--targets', nargs='+', default=TARGETS, metavar='TARGET')
    parser.add_argument('--quick', action='store_true', help='a few calls of the ops')
    parser.add_argument('--list', action='store_true', help='count the variants, compile nothing')
    args = parser.parse_args()
    if args.quick:
        calls = [cast(call, torch.bfloat16) for call in few()]
    else:
        calls = [cast(call, torch.bfloat16) for call in (*sizes(), *of_models())]
        calls += [cast(call, dtype) for dtype in FLOAT_DTYPES for call in (*few(), *forms())]
    failed, counts = [], {}
    for name in args.targets:
        start, target = time.perf_counter(), target_of(name)
        record_launches(target)
        worst: Dict[str, Dict[str, int]] = {}
        for fn, source, options, programs in variants(calls):
            most = worst.setdefault(fn.__name__, dict(variants=0, registers=0, spilled=0, shared=0, programs=0))
            most['variants'] += 1
            most['programs'] = max(most['programs'], programs)
            if args.list:
                continue
            try:
                kernel = triton.compile(source, target=target, options=options)
                found = list(problems(name, kernel, programs))
            except Exception as e:
                found = [f'{type(e).__name__}: {e}']
            else:
                for what, value in resources(kernel).items():
                    most[what] = max(most[what], value)
            failed += [f'{name}, {fn.__name__}, {source.constants}: {problem}' for problem in found]
        counts[name] = worst
        print(f'{name}: {sum(w["variants"] for w in worst.values())} variants, {time.perf_counter() - start:.0f} s')
        for kernel_name, most in worst.items():
            print(f'    {kernel_name:26}', ', '.join(f'{k} {v}' for k, v in most.items()), flush=True)
    print('\n'.join(failed) or 'all within the limits')
    if failed:
        raise SystemExit(1)
    if not args.list and set(args.targets) == set(TARGETS):
        record = dict(date=time.strftime('%Y-%m-%d'), triton=triton.__version__, quick=args.quick, sources=sources(),
                      targets=counts)
        RECORD.write_text(json.dumps(record, indent=1) + '\n')


if __name__ == '__main__':
    main()
