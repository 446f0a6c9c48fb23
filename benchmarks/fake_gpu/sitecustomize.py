"""A GPU that is not there, to rehearse `make gpu` without one:

    PYTHONPATH=benchmarks/fake_gpu make gpu GPU_FLAGS='--quick --out FOLDER'

Python imports this module when it starts. PyTorch then says that it has a GPU; what is made for it, or moved there, is
on the CPU, where calls that ask for Triton run in its interpreter, and models with the CPU's own kernels. torch.compile
leaves things as they are. Times mean nothing.
"""
import contextlib
import os
import time
from types import SimpleNamespace

os.environ['TRITON_INTERPRET'] = '1'

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map


def on_host(x):
    is_gpu = x.startswith('cuda') if isinstance(x, str) else isinstance(x, torch.device) and x.type == 'cuda'
    return 'cpu' if is_gpu else x


class OnHost(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.cuda:
            return args[0]
        return func(*tree_map(on_host, args), **tree_map(on_host, kwargs or {}))


class Event:
    def __init__(self, enable_timing: bool = False) -> None:
        self.time = 0.

    def record(self) -> None:
        self.time = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: 'Event') -> float:
        return (end.time - self.time) * 1e3


NAME = 'no GPU at all'
PROPERTIES = SimpleNamespace(name=NAME, multi_processor_count=132, total_memory=1 << 34, major=9, minor=0, warp_size=32)
_autocast = torch.autocast

torch.autocast = lambda device_type, *args, **kwargs: _autocast(on_host(device_type), *args, **kwargs)
torch.compile = lambda model, *args, **kwargs: model
for _name, _fake in dict(
        is_available=lambda: True,
        device_count=lambda: 1,
        current_device=lambda: 0,
        get_device_name=lambda *args: NAME,
        get_device_properties=lambda *args: PROPERTIES,
        get_device_capability=lambda *args: (9, 0),
        synchronize=lambda *args: None,
        memory_allocated=lambda *args: 0,
        max_memory_allocated=lambda *args: 0,
        reset_peak_memory_stats=lambda *args: None,
        device=lambda *args: contextlib.nullcontext(),
        Event=Event,
).items():
    setattr(torch.cuda, _name, _fake)
OnHost().__enter__()
