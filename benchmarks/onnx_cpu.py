"""Models in onnxruntime against PyTorch with the native backend on the CPU, and forms of the scan in onnxruntime.

    python benchmarks/onnx_cpu.py export | models [--models NAME ...] [--seconds 5] [--folder FOLDER]
    python benchmarks/onnx_cpu.py scans [--seconds 5]

`export` times the export and counts operators; `models` takes the files that it left in FOLDER. Speeds are ratios of
medians, timed in turns. Memory is the peak of a process that runs one input twice and has no other work: with
onnxruntime it imports neither PyTorch nor this package. What the tables in results/ hold of other models stays there.
The machine should be idle.
"""
import argparse
import contextlib
import itertools
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Callable, Dict, Iterator, List, Sequence

import numpy as np
import onnxruntime
import timm
import torch
from harness import Row, report, time_in_turns
from torch.nn import functional as F

from timm_ssm.export import export, model_input_size
from timm_ssm.ops import selective_scan

MODELS = (
    'videomamba_tiny_patch16_224', 'mambavision_tiny', 'groupmamba_tiny', 'videomamba_tiny_patch16_f8_224',
    'videomamba_tiny_patch16_576', 'videomamba_tiny_patch16_f32_224')
#: (batch, tokens, channels, states) of VideoMamba-Ti's scan at 224 and of clips of 8 frames, of MambaVision-T's
SCANS = [(1, 197, 384, 16), (1, 1569, 384, 16), (1, 196, 160, 8)]

RUN_ONNX = '''
import sys, numpy, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1])
x = numpy.zeros(eval(sys.argv[2]), numpy.float32)
'''
RUN_TORCH = '''
import sys, timm, torch, timm_ssm
model = timm.create_model(sys.argv[1]).eval()
x = torch.zeros(eval(sys.argv[2]))
'''
#: KiB on Linux; getrusage would count the process that started this one
PEAK = 'print(*(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))'


def peak(code: str, *args: object) -> float:
    """MiB."""
    run = subprocess.run([sys.executable, '-c', code + PEAK, *map(str, args)], stdout=subprocess.PIPE, check=True)
    return float(run.stdout) / 2 ** 10


def is_image_model(name: str) -> bool:
    return '_f' not in name and '_576' not in name


def export_rows(name: str, folder: Path) -> Iterator[Row]:
    start = time.perf_counter()
    done = export(timm.create_model(name).eval(), folder / f'{name}.onnx')
    goal = 60 if is_image_model(name) else None
    yield Row(f'{name}: seconds to export and check', time.perf_counter() - start, goal, less=True)
    yield Row(f'{name}: operators', done.nodes, 2000 if name == 'videomamba_tiny_patch16_224' else None, less=True,
              detail=f'outputs differ by {done.difference:.1g} of the largest')


def model_rows(name: str, folder: Path, seconds: float) -> Iterator[Row]:
    file, model = folder / f'{name}.onnx', timm.create_model(name).eval()
    if not file.exists():
        export(model, file)
    x = torch.randn(1, *model_input_size(model))
    functions = dict(
        torch=partial(model, x), onnx=partial(onnxruntime.InferenceSession(file).run, None, {'input': x.numpy()}))
    with torch.inference_mode():
        times = time_in_turns(functions, seconds, turn=.5)
    yield Row(f'{name}: speed, onnxruntime / PyTorch', times['torch'] / times['onnx'],
              .7 if is_image_model(name) else None,
              detail=f'{times["onnx"] * 1e3:.1f} against {times["torch"] * 1e3:.1f} ms')
    shape = tuple(x.shape)
    memory = peak(RUN_ONNX + 'for _ in range(2): session.run(None, {"input": x})\n', file, shape)
    native = peak(RUN_TORCH + 'with torch.inference_mode(): model(x), model(x)\n', name, shape)
    yield Row(f'{name}: peak memory in MiB', memory, 1536 if '_f8_' in name else None, less=True,
              detail=f'PyTorch {native:.0f}')


def linear_attention(shape: tuple, reverse: bool = False, whole: bool = False) -> bytes:
    """A model of onnxruntime's own operator, which computes the scan with one key head a channel. It has no direction:
    what it takes and what it gives is reversed around it. The `whole` scan has a bias of delta, a skip connection and a
    gate, too."""
    from onnx import TensorProto, helper

    _, _, channels, d_state = shape
    tokens, states = ['b', 'l', channels], ['b', 'l', d_state]
    inputs = dict(u=tokens, delta=tokens, A=[channels, d_state], B=states, C=states)
    nodes = []

    def add(operator: str, inputs: List[str], outputs: Sequence[str], **attributes: object) -> None:
        nodes.append(helper.make_node(operator, inputs, outputs, **attributes))

    turned = {name: f'{name}_turned' if reverse else name for name in ('u', 'delta', 'B', 'C', 'y')}
    if reverse:
        for name in ('u', 'delta', 'B', 'C'):
            add('Slice', [name, '-1', '-end', '1', '-1'], [turned[name]])
    if whole:
        inputs.update(D=[channels], z=tokens, delta_bias=[channels])
        add('Add', [turned['delta'], 'delta_bias'], ['step'])
    add('Exp', ['step' if whole else turned['delta']], ['exp'])  # softplus, faster than by the operator of that name
    add('Add', ['exp', 'one'], ['1 + exp'])
    add('Log', ['1 + exp'], ['dt'])
    add('Mul', ['dt', turned['u']], ['x'])
    add('Unsqueeze', ['dt', '-1'], ['dt_'])
    add('Mul', ['dt_', 'A'], ['decay_'])
    add('Reshape', ['decay_', 'flat'], ['decay'])
    add('LinearAttention', [turned['C'], turned['B'], 'x', '', 'decay'], [turned['y'], 'state'], update_rule='gated',
        scale=1., q_num_heads=1, kv_num_heads=channels, domain='com.microsoft')
    if reverse:
        add('Slice', [turned['y'], '-1', '-end', '1', '-1'], ['y'])
    if whole:
        add('Mul', ['u', 'D'], ['skip'])
        add('Add', ['y', 'skip'], ['sum'])
        add('Sigmoid', ['z'], ['s'])
        add('Mul', ['z', 's'], ['gate'])
        add('Mul', ['sum', 'gate'], ['out'])
    constants = {'-1': [-1], '1': [1], '-end': [-2 ** 62], 'flat': [0, 0, channels * d_state]}
    graph = helper.make_graph(
        nodes, 'scan', [helper.make_tensor_value_info(k, TensorProto.FLOAT, v) for k, v in inputs.items()],
        [helper.make_tensor_value_info('out' if whole else 'y', TensorProto.FLOAT, tokens)],
        [helper.make_tensor('one', TensorProto.FLOAT, [1], [1.]),
         *(helper.make_tensor(k, TensorProto.INT64, [len(v)], v) for k, v in constants.items())])
    opsets = [helper.make_opsetid('', 18), helper.make_opsetid('com.microsoft', 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


def chunked_doubling(
        u: torch.Tensor,
        delta: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        reverse: bool,
        chunk: int = 32,
) -> torch.Tensor:
    """The scan by doubling within chunks of the sequence, each from the last state of the one before."""
    if reverse:
        u, delta, B, C = (x.flip(1) for x in (u, delta, B, C))
    dt = F.softplus(delta)
    ys, last = [], 0.
    for dt_c, x_c, B_c, C_c in zip(*(x.split(chunk, dim=1) for x in (dt, dt * u, B, C))):
        a, b = torch.exp(dt_c.unsqueeze(-1) * A), x_c.unsqueeze(-1) * B_c.unsqueeze(2)
        b = torch.cat([b[:, :1] + a[:, :1] * last, b[:, 1:]], dim=1)
        step = 1
        while step < b.shape[1]:
            a_before, b_before = (F.pad(x[:, :-step], (0, 0, 0, 0, step, 0)) for x in (a, b))
            a, b = a * a_before, b + a * b_before
            step *= 2
        last = b[:, -1:]
        ys.append((b * C_c.unsqueeze(2)).sum(-1))
    y = torch.cat(ys, dim=1)
    return y.flip(1) if reverse else y


class Scan(torch.nn.Module):
    """A function of the scan's inputs as a model of one input, as `export` wants it; the rest are parameters."""

    def __init__(self, function: Callable, u: torch.Tensor, *others: torch.Tensor) -> None:
        super().__init__()
        self.function = function
        self.others = torch.nn.ParameterList(others)

    def forward(self, u: torch.Tensor) -> torch.Tensor:
        return self.function(u, *self.others)


def scan_rows(seconds: float) -> Iterator[Row]:
    for shape, reverse in itertools.product(SCANS, (False, True)):
        batch, length, channels, d_state = shape
        u, delta = torch.randn(2, batch, length, channels)
        B, C = torch.randn(2, batch, length, d_state)
        args = u, delta, -torch.rand(channels, d_state), B, C
        scan = partial(selective_scan, reverse=reverse)
        forms = {'LinearAttention': linear_attention(shape, reverse)}
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / 'scan.onnx'
            for name, function, form in (
                    ('loop', scan, 'loop'), ('doubling', scan, 'doubling'),
                    ('doubling in chunks', partial(chunked_doubling, reverse=reverse), 'doubling')):
                model = Scan(function, *args).eval()
                export(model, file, scan=form, input_size=u.shape[1:], batch_size=batch)
                forms[name] = file.read_bytes()
        feed = {k: x.numpy() for k, x in zip(('u', 'delta', 'A', 'B', 'C'), args)}
        for threads in sorted({1, torch.get_num_threads()}):
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = threads
            functions: Dict[str, Callable] = {'native': lambda args=args, scan=scan: [scan(*args).numpy()]}
            for name, form in forms.items():
                session = onnxruntime.InferenceSession(form, options)
                inputs = feed if name == 'LinearAttention' else {'input': feed['u']}
                functions[name] = partial(session.run, None, inputs)
            with torch.inference_mode(), torch_threads(threads):
                for function in functions.values():
                    np.testing.assert_allclose(function()[0], functions['native']()[0], rtol=1e-3, atol=1e-3)
                times = time_in_turns(functions, seconds)
            for name in forms:
                yield Row(
                    f'{shape}{", reverse" * reverse}, {threads} thread{"s" * (threads > 1)}: time of {name} / native',
                    times[name] / times['native'], less=True,
                    detail=f'{times[name] * 1e3:.2f} against {times["native"] * 1e3:.2f} ms')


@contextlib.contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('what', choices=('export', 'models', 'scans'))
    parser.add_argument('--models', nargs='+', default=MODELS, choices=MODELS)
    parser.add_argument('--seconds', type=float, default=5., help='time to spend on each comparison')
    parser.add_argument('--folder', type=Path, help='where models are kept, to be exported once')
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        if args.what == 'scans':
            found = scan_rows(args.seconds)
        elif args.what == 'export':
            found = (row for name in args.models for row in export_rows(name, folder))
        else:
            found = (row for name in args.models for row in model_rows(name, folder, args.seconds))
        for row in found:
            print(row.name, row.value, row.detail, flush=True)
            rows.append(row)
    report(f'onnx_cpu_{args.what}', rows, keep=True, onnxruntime=onnxruntime.__version__)


if __name__ == '__main__':
    main()
