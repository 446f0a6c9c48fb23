"""Models in onnxruntime against PyTorch with the native backend on the CPU, and forms of the scan in onnxruntime.

    python benchmarks/onnx_cpu.py export | models | large | scans [--seconds 5] [--folder FOLDER]

`export` times the export and counts operators; the others take the files that it left in FOLDER. Speeds are ratios of
medians, timed in turns. Memory is the peak of a process that runs one input twice and has no other work: with
onnxruntime it imports neither PyTorch nor this package. The machine should be idle.
"""
import argparse
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Callable, Dict, Iterator

import numpy as np
import onnxruntime
import timm
import torch
from harness import Row, report, time_in_turns

from timm_ssm.export import export, model_input_size
from timm_ssm.ops import selective_scan

MODELS = {
    'models': ('videomamba_tiny_patch16_224', 'mambavision_tiny', 'groupmamba_tiny', 'videomamba_tiny_patch16_f8_224'),
    'large': ('videomamba_tiny_patch16_576', 'videomamba_tiny_patch16_f32_224'),
}
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


def linear_attention(shape: tuple, whole: bool = False) -> bytes:
    """A model of onnxruntime's own operator, which computes the scan with one key head a channel; the `whole` scan has
    a bias of delta, a skip connection and a gate, too."""
    from onnx import TensorProto, helper

    _, _, channels, d_state = shape
    tokens, states = ['b', 'l', channels], ['b', 'l', d_state]
    inputs = dict(u=tokens, delta=tokens, A=[channels, d_state], B=states, C=states)
    nodes = [
        helper.make_node('Softplus', ['step' if whole else 'delta'], ['dt']),
        helper.make_node('Mul', ['dt', 'u'], ['x']),
        helper.make_node('Unsqueeze', ['dt', 'last'], ['dt_']),
        helper.make_node('Mul', ['dt_', 'A'], ['decay_']),
        helper.make_node('Reshape', ['decay_', 'flat'], ['decay']),
        helper.make_node(
            'LinearAttention', ['C', 'B', 'x', '', 'decay'], ['y', 'state'], domain='com.microsoft',
            update_rule='gated', scale=1., q_num_heads=1, kv_num_heads=channels)]
    if whole:
        inputs.update(D=[channels], z=tokens, delta_bias=[channels])
        nodes.insert(0, helper.make_node('Add', ['delta', 'delta_bias'], ['step']))
        nodes += [
            helper.make_node('Mul', ['u', 'D'], ['skip']),
            helper.make_node('Add', ['y', 'skip'], ['sum']),
            helper.make_node('Sigmoid', ['z'], ['s']),
            helper.make_node('Mul', ['z', 's'], ['gate']),
            helper.make_node('Mul', ['sum', 'gate'], ['out'])]
    graph = helper.make_graph(
        nodes, 'scan', [helper.make_tensor_value_info(k, TensorProto.FLOAT, v) for k, v in inputs.items()],
        [helper.make_tensor_value_info('out' if whole else 'y', TensorProto.FLOAT, tokens)],
        [helper.make_tensor('last', TensorProto.INT64, [1], [-1]),
         helper.make_tensor('flat', TensorProto.INT64, [3], [0, 0, channels * d_state])])
    opsets = [helper.make_opsetid('', 18), helper.make_opsetid('com.microsoft', 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


class Scan(torch.nn.Module):
    """The op as a model of one input, as `export` wants it; the rest are parameters."""

    def __init__(self, u: torch.Tensor, *others: torch.Tensor) -> None:
        super().__init__()
        self.others = torch.nn.ParameterList(others)

    def forward(self, u: torch.Tensor) -> torch.Tensor:
        return selective_scan(u, *self.others)


def scan_rows(folder: Path, seconds: float) -> Iterator[Row]:
    for shape in SCANS:
        batch, length, channels, d_state = shape
        u, delta = torch.randn(2, batch, length, channels)
        B, C = torch.randn(2, batch, length, d_state)
        args = u, delta, -torch.rand(channels, d_state), B, C
        model = Scan(*args).eval()
        session = onnxruntime.InferenceSession(linear_attention(shape))
        feed = {k: x.numpy() for k, x in zip(('u', 'delta', 'A', 'B', 'C'), args)}
        functions: Dict[str, Callable] = {
            'native': lambda args=args: [selective_scan(*args).numpy()],
            'LinearAttention': partial(session.run, ['y'], feed)}
        for scan in ('loop', 'doubling'):
            file = folder / 'scan.onnx'
            export(model, file, scan=scan, input_size=u.shape[1:], batch_size=batch)
            functions[scan] = partial(onnxruntime.InferenceSession(file).run, None, {'input': u.numpy()})
        with torch.inference_mode():
            for function in functions.values():
                np.testing.assert_allclose(function()[0], functions['native']()[0], rtol=1e-3, atol=1e-3)
            times = time_in_turns(functions, seconds)
        for name in ('loop', 'LinearAttention', 'doubling'):
            yield Row(f'scan of {shape}: time of {name} / native', times[name] / times['native'], less=True,
                      detail=f'{times[name] * 1e3:.2f} against {times["native"] * 1e3:.2f} ms')


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('what', choices=('export', *MODELS, 'scans'))
    parser.add_argument('--seconds', type=float, default=5., help='time to spend on each comparison')
    parser.add_argument('--folder', type=Path, help='where models are kept, to be exported once')
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        if args.what == 'scans':
            found = scan_rows(folder, args.seconds)
        elif args.what == 'export':
            found = (row for names in MODELS.values() for name in names for row in export_rows(name, folder))
        else:
            found = (row for name in MODELS[args.what] for row in model_rows(name, folder, args.seconds))
        for row in found:
            print(row.name, row.value, row.detail, flush=True)
            rows.append(row)
    report(f'onnx_cpu_{args.what}', rows, onnxruntime=onnxruntime.__version__)


if __name__ == '__main__':
    main()
