"""Implementations of the selective scan on the CPU, each to be run in a process of its own; `peers_cpu.py` starts them.

    PYTHON benchmarks/peers.py NAME INPUTS THREADS

PYTHON needs NumPy and the implementation. Each gets the same inputs in the layout that it wants, and computes all of
the scan: step sizes by bias and softplus, recurrence, skip connection and gate.
"""
import ctypes
import importlib.metadata
import importlib.util
import json
import math
import os
import sys
import sysconfig
import time
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple

import numpy as np

ORDER = ('u', 'delta', 'A', 'B', 'C', 'D', 'z', 'delta_bias')
KINDS = ('forward', 'forward + backward')


class Peer(NamedTuple):
    """An implementation with inputs: functions by kind, which return out, or the gradients of ORDER."""
    functions: Dict[str, Callable[[], Any]]
    version: str
    channels_first: bool = False  # are results (B, D, L)?


def of_torch(scan: Callable, x: Dict[str, np.ndarray], version: str, channels_first: bool = False) -> Peer:
    """A differentiable function of ORDER."""
    import torch

    *leaves, grad = (
        torch.from_numpy(x[k].swapaxes(1, 2).copy() if channels_first and x[k].ndim == 3 else x[k])
        for k in (*ORDER, 'grad'))
    leaves = [leaf.requires_grad_() for leaf in leaves]

    def forward():
        with torch.no_grad():
            return scan(*leaves)

    def both():
        return torch.autograd.grad(scan(*leaves), leaves, grad)

    return Peer(dict(zip(KINDS, (forward, both))), version, channels_first)


def ours(x: Dict[str, np.ndarray], threads: int) -> Peer:
    import timm_ssm
    from timm_ssm.ops import selective_scan
    return of_torch(partial(selective_scan, backend='native'), x, timm_ssm.__version__)


def loop(x: Dict[str, np.ndarray], threads: int) -> Peer:
    import torch
    from scan_cpu import reference_loop
    return of_torch(reference_loop, x, torch.__version__, channels_first=True)


def compiled_loop(x: Dict[str, np.ndarray], threads: int) -> Peer:
    import torch
    from scan_cpu import reference_loop
    return of_torch(torch.compile(reference_loop), x, torch.__version__, channels_first=True)


def mambapy(x: Dict[str, np.ndarray], threads: int) -> Peer:
    import torch.nn.functional as F
    from mambapy.mamba import MambaBlock, MambaConfig
    block = MambaBlock(MambaConfig(d_model=x['u'].shape[2] // 2, n_layers=1))

    def scan(u, delta, A, B, C, D, z, delta_bias):  # as in MambaBlock.forward
        return block.selective_scan(u, F.softplus(delta + delta_bias), A, B, C, D) * F.silu(z)

    return of_torch(scan, x, importlib.metadata.version('mambapy'))


def ipex(x: Dict[str, np.ndarray], threads: int) -> Peer:
    import intel_extension_for_pytorch  # noqa: F401 (registers the op)
    import torch
    u, delta, A, B, C, D, z, delta_bias = (torch.from_numpy(x[k]) for k in ORDER)
    A = A.t().contiguous()

    def forward():  # it overwrites delta, and unsqueezes B and C in place
        out, _ = torch.ops.torch_ipex.selective_scan_fn(
            u, delta.clone(), A, B.transpose(1, 2), C.transpose(1, 2), D, z.transpose(1, 2), delta_bias, True, False)
        return out

    return Peer({'forward': forward}, importlib.metadata.version('intel-extension-for-pytorch'), channels_first=True)


def onnxruntime(x: Dict[str, np.ndarray], threads: int) -> Peer:
    import onnxruntime
    from onnx_cpu import linear_attention
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(linear_attention((*x['u'].shape, x['A'].shape[1]), whole=True), options)
    feed = {k: x[k] for k in ORDER}
    return Peer({'forward': lambda: session.run(['out'], feed)[0]}, onnxruntime.__version__)


def modular(x: Dict[str, np.ndarray], threads: int) -> Peer:
    from max.driver import CPU, Buffer
    from max.dtype import DType
    from max.engine import InferenceSession
    from max.graph import DeviceRef, Graph, TensorType, ops
    kernels = next(Path(sysconfig.get_path('platlib')).glob('modular/lib/mojo/state_space.moj*'))
    inputs = [x[k].swapaxes(1, 2).copy() if x[k].ndim == 3 else x[k] for k in ORDER]
    inputs[3:5] = [b[:, None] for b in inputs[3:5]]  # one group
    (batch, channels, length), d_state = inputs[0].shape, x['A'].shape[1]

    def tensor(*shape):
        return TensorType(DType.float32, shape, DeviceRef.CPU())

    with Graph('scan', input_types=[tensor(*a.shape) for a in inputs], custom_extensions=[kernels]) as graph:
        out = tensor(batch, channels, length)
        results = ops.custom(
            'selective_scan_fwd', DeviceRef.CPU(), [v.tensor for v in graph.inputs],
            [out, tensor(batch, channels, math.ceil(length / 2048), 2 * d_state), out],
            parameters={'delta_softplus': True})
        graph.output(results[2])
    model = InferenceSession([CPU()], threads).load(graph)
    buffers = [Buffer.from_numpy(a) for a in inputs]
    return Peer(
        {'forward': lambda: model.execute(*buffers)[0].to_numpy()}, importlib.metadata.version('max'),
        channels_first=True)


def ggml(x: Dict[str, np.ndarray], threads: int) -> Peer:
    """The part of llama.cpp's graph for a layer of Mamba from the bias of the step to the gate, by the libraries of
    llama-cpp-python or in the folder that GGML_LIB names."""
    folder = os.environ.get('GGML_LIB')
    if not folder:
        spec = importlib.util.find_spec('llama_cpp')
        if spec is None:
            raise ImportError('neither llama_cpp nor GGML_LIB')
        folder = Path(spec.origin).parent / 'lib'
    libraries = [ctypes.CDLL(f'{folder}/libggml-{part}.so', mode=ctypes.RTLD_GLOBAL) for part in ('base', 'cpu')]

    def call(name, *args, restype=ctypes.c_void_p):
        library = next(lib for lib in libraries if hasattr(lib, name))
        function = getattr(library, name)
        function.restype = restype
        return ctypes.c_void_p(result) if (result := function(*args)) and restype else None

    class Init(ctypes.Structure):
        _fields_ = [('mem_size', ctypes.c_size_t), ('mem_buffer', ctypes.c_void_p), ('no_alloc', ctypes.c_bool)]

    backend = call('ggml_backend_cpu_init')
    call('ggml_backend_cpu_set_n_threads', backend, threads, restype=None)
    context = call('ggml_init', Init(1 << 20, None, True))
    arrays = {}

    def tensor(array, kind=0):  # float32
        shape = [*reversed(array.shape), 1, 1, 1][:4]
        made = call('ggml_new_tensor_4d', context, kind, *map(ctypes.c_int64, shape))
        arrays[made.value] = np.ascontiguousarray(array)
        return made

    (batch, length, channels), d_state = x['u'].shape, x['A'].shape[1]
    u, delta, z = (tensor(x[k]) for k in ('u', 'delta', 'z'))
    A, D, delta_bias = (tensor(x[k]) for k in ('A', 'D', 'delta_bias'))
    heads = tensor(x['u'][..., None])  # channels as heads of one
    B, C = (tensor(x[k][:, :, None]) for k in 'BC')
    state, ids = tensor(np.zeros((batch, channels, 1, d_state), np.float32)), tensor(np.arange(batch, dtype='i4'), 26)
    y = call('ggml_ssm_scan', context, state, heads, call('ggml_add', context, delta, delta_bias), A, B, C, ids,
             ctypes.c_int64(1))
    y = call('ggml_view_3d', context, y, *map(ctypes.c_int64, (channels, length, batch)),
             *map(ctypes.c_size_t, (4 * channels, 4 * channels * length, 0)))
    out = call('ggml_swiglu_split', context, z, call('ggml_add', context, y, call('ggml_mul', context, u, D)))
    graph = call('ggml_new_graph', context)
    call('ggml_build_forward_expand', graph, out, restype=None)
    call('ggml_backend_alloc_ctx_tensors', context, backend)
    for made, array in arrays.items():
        call('ggml_backend_tensor_set', ctypes.c_void_p(made), array.ctypes.data_as(ctypes.c_void_p),
             ctypes.c_size_t(0), ctypes.c_size_t(array.nbytes), restype=None)
    memory = (ctypes.c_float * x['u'].size).from_address(call('ggml_get_data', out).value)
    result = np.frombuffer(memory, np.float32).reshape(x['u'].shape)

    def forward():
        call('ggml_backend_graph_compute', backend, graph)
        return result

    return Peer({'forward': forward}, ctypes.cast(call('ggml_version'), ctypes.c_char_p).value.decode())


PEERS: Dict[str, Callable[[Dict[str, np.ndarray], int], Peer]] = {
    'ours': ours,
    'mamba-ssm reference loop': loop,
    'torch.compile of the loop': compiled_loop,
    'mambapy': mambapy,
    'MAX selective_scan_fwd': modular,
    'onnxruntime LinearAttention': onnxruntime,
    'llama.cpp ssm_scan': ggml,
    'IPEX selective_scan_fn': ipex,
}


def error(peer: Peer, kind: str, x: Dict[str, np.ndarray]) -> float:
    """The largest |got - want| / max |want| of the results of one call."""
    results = peer.functions[kind]()
    errors = []
    for got, name in zip(*((results,), ('out',)) if kind == KINDS[0] else (results, (f'grad_{k}' for k in ORDER))):
        got, want = np.asarray(got), x[name]
        if peer.channels_first and got.ndim == 3:
            got = got.swapaxes(1, 2)
        assert got.shape == want.shape, f'{name}: shape {got.shape} in place of {want.shape}'
        errors.append(np.abs(got - want).max() / np.abs(want).max())
    return float(max(errors))


def serve(name: str, file: str, threads: int) -> None:
    """Answer requests, [kind, seconds] as JSON in a line: without seconds with the error, else with times of calls."""
    replies = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)  # where what libraries print does no harm
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    x, peer = dict(np.load(file)), None
    for line in sys.stdin:
        kind, seconds = json.loads(line)
        try:
            peer = peer or PEERS[name](x, threads)
            if kind not in peer.functions:
                reply = {'reason': ''}
            elif seconds is None:
                reply = {'error': error(peer, kind, x), 'version': peer.version}
            else:
                reply = {'times': times(peer.functions[kind], seconds)}
        except Exception as e:
            reply = {'reason': f'{type(e).__name__}: {e}'.split('\n')[0][:200]}
        print(json.dumps(reply), file=replies, flush=True)


def times(function: Callable[[], Any], seconds: float) -> List[float]:
    """Of calls for so long, at least one."""
    samples, start = [], time.perf_counter()
    until = start + seconds
    while not samples or start < until:
        function()
        now = time.perf_counter()
        samples.append(now - start)
        start = now
    return samples


if __name__ == '__main__':
    serve(sys.argv[1], sys.argv[2], int(sys.argv[3]))
