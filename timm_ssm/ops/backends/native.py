"""The CPU kernels in `csrc/`: vectorised C++ with OpenMP, behind a C interface called through ctypes.

`pip install` compiles them where there is a compiler; they are not linked against PyTorch, so one build serves every
version of it. `python setup.py build_ext --inplace` compiles them next to this file.
"""
import ctypes
import os
import struct
from pathlib import Path
from typing import Callable, List, Optional, Sequence, Tuple

import torch

from ..calls import CHUNK_SIZE, ConvCall, ConvGradients, ScanCall, ScanGradients, ScanResult, acc_dtype
from .base import Backend

_ABI_VERSION = 1  # as in native.h
_NO_TENSOR, _NO_GRADS = (0,) * 4, (0,) * (4 * 4 + 3)
_DIRECTION_FIELDS = 4 * 4 + 6 + len(_NO_GRADS)
_SCAN_FIELDS = 3 + 9 + 4 * 4 + 2 * _DIRECTION_FIELDS
_CONV_FIELDS = 3 + 7 + 2 * 4 + 2 * 9
_FIELD_SIZE = struct.calcsize('q')
#: What the library must have been built with: version, sizes of Scan and Conv, chunk size.
_ABI = (_ABI_VERSION, _SCAN_FIELDS * _FIELD_SIZE, _CONV_FIELDS * _FIELD_SIZE, CHUNK_SIZE)


def _load(path: Optional[Path]) -> Tuple[Optional[ctypes.CDLL], str]:
    """The library, or None and the reason why it cannot be used."""
    if path is None:
        return None, 'its C++ library was not built when the package was installed (no C++ compiler?)'
    try:
        lib = ctypes.CDLL(str(path))
    except OSError as e:
        return None, f'its C++ library does not load: {e}'
    try:
        lib.timm_ssm_abi.restype, lib.timm_ssm_isa.restype = ctypes.c_int64, ctypes.c_char_p
        functions = lib.timm_ssm_scan_forward, lib.timm_ssm_scan_backward, lib.timm_ssm_conv_forward, \
            lib.timm_ssm_conv_backward
        abi = tuple(lib.timm_ssm_abi(i) for i in range(len(_ABI)))
    except AttributeError:  # a function is missing
        abi = None
    if abi != _ABI:
        return None, f'its C++ library {path} was built for another version of timm-ssm: install the package again'
    for function in functions:
        function.argtypes = [ctypes.c_char_p]
    return lib, ''


_lib, _reason = _load(next(iter(sorted(Path(__file__).parent.glob('_native*.so'))), None))


def _instruction_sets() -> List[str]:
    """The instruction sets that the library was compiled for, from plain to fast; '' where this machine lacks one."""
    names: List[str] = []
    while _lib is not None and (name := _lib.timm_ssm_isa(len(names))) is not None:
        names.append(name.decode())
    return names


#: Index of the instruction set in use: the last one that this machine has.
_isa = max((i for i, name in enumerate(_instruction_sets()) if name), default=0)
_forked = False  # OpenMP's threads do not survive a fork, and a child that waits for them hangs


def _after_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, 'register_at_fork'):
    os.register_at_fork(after_in_child=_after_fork)


class Native(Backend):
    name = 'native'
    devices = ('cpu',)

    def why_unavailable(self) -> Optional[str]:
        return None if _lib is not None else _reason

    def scan_forward(self, call: ScanCall, save: bool) -> ScanResult:
        u = call.u[0]
        if u.dtype != acc_dtype(u.dtype):
            out, y, states = self.scan_forward(_wide_scan(call), save)
            return out.to(u.dtype), y if y is None else y.to(u.dtype), states
        out = torch.empty_like(u, memory_format=torch.contiguous_format)
        y = torch.empty_like(out) if save and call.z is not None else None
        states = call.new_states() if save else None
        if out.numel():
            _run_scan(_lib.timm_ssm_scan_forward, call, out, y, states)
        return out, y, states

    def scan_backward(
            self,
            call: ScanCall,
            grad_out: torch.Tensor,
            y: Optional[torch.Tensor],
            states: torch.Tensor,
    ) -> ScanGradients:
        dtype = grad_out.dtype
        if dtype != acc_dtype(dtype):
            grads, dz = self.scan_backward(
                _wide_scan(call), grad_out.float(), y if y is None else y.float(), states)
            for g in grads:
                for i in (0, 1, 3, 4):
                    g[i] = g[i].to(dtype)
            return grads, dz if dz is None else dz.to(dtype)

        batch, length, channels = grad_out.shape
        d_state, groups = call.A[0].shape[1], call.B[0].shape[2] if call.B[0].ndim == 4 else 1
        # Channels share dB and dC: each part of them sums its own. More parts keep more threads busy, and cost memory.
        parts = max(1, min(6, 32 // max(1, batch * groups), channels // groups // 32))
        new = grad_out.new_empty if grad_out.numel() else grad_out.new_zeros
        shape_B = (parts * batch, length, groups, d_state)
        grads = [[
            new(grad_out.shape), new(grad_out.shape), new(shape_B), new(shape_B),
            new((batch, channels, d_state)), new((batch, channels)) if call.D else None,
            new((batch, channels)) if call.delta_bias else None,
        ] for _ in call.u]
        dz = None if call.z is None else new(grad_out.shape)
        if grad_out.numel():
            _run_scan(
                _lib.timm_ssm_scan_backward, call, grad_out, None if dz is None else y, states, parts, dz,
                grads)

        results = []
        for B, (du, ddelta, dB, dC, *parameters) in zip(call.B, grads):
            dB, dC = (_sum(x.view(parts, *B.shape)) for x in (dB, dC))
            dA, dD, dbias = (None if x is None else _sum(x) for x in parameters)
            results.append([x for x in (du, ddelta, dA, dB, dC, dD, dbias) if x is not None])
        return results, dz

    def conv_forward(self, call: ConvCall) -> List[torch.Tensor]:
        x = call.x
        if x.dtype != acc_dtype(x.dtype):
            return [out.to(x.dtype) for out in self.conv_forward(call._replace(x=x.float()))]
        outs = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in call.weight]
        if x.numel():
            _run_conv(_lib.timm_ssm_conv_forward, call, outs)
        return outs

    def conv_backward(
            self,
            call: ConvCall,
            grad_outs: List[torch.Tensor],
    ) -> ConvGradients:
        x = call.x
        if x.dtype != acc_dtype(x.dtype):
            dx, *dparameters = self.conv_backward(call._replace(x=x.float()), [g.float() for g in grad_outs])
            return dx.to(x.dtype), *dparameters
        new = x.new_empty if x.numel() else x.new_zeros
        dx = new(x.shape)
        dweights, dbiases = ([new((x.shape[0], *p.shape)) for p in ps] for ps in (call.weight, call.bias))
        if x.numel():
            _run_conv(_lib.timm_ssm_conv_backward, call, grad_outs, dx, dweights, dbiases)
        return dx, [_sum(d) for d in dweights], [_sum(d) for d in dbiases]


def _tensor(x: Optional[torch.Tensor], alive: List[torch.Tensor]) -> Tuple[int, ...]:
    """Address and strides of batch, token and group (which ungrouped tensors do not use): `Tensor` in native.h.

    A tensor whose last dimension is not contiguous is copied first; the copy must stay alive until the call returns.
    """
    if x is None:
        return _NO_TENSOR
    stride = x.stride()
    if stride[-1] != 1 and x.shape[-1] > 1:
        x = x.contiguous()
        alive.append(x)
        stride = x.stride()
    return x.data_ptr(), stride[0], stride[1], stride[2]


def _parameter(xs: List[torch.Tensor], i: int, alive: List[torch.Tensor]) -> int:
    """Address of direction i's parameter, 0 if there is none.

    The public functions hand over contiguous ones; a graph that calls the op itself may not, and is copied from.
    """
    if not xs:
        return 0
    x = xs[i]
    if not x.is_contiguous():
        x = x.contiguous()
        alive.append(x)
    return x.data_ptr()


def _run(function: Callable[[bytes], int], dtype: torch.dtype, fields: List[int]) -> None:
    threads = 1 if _forked else torch.get_num_threads()
    if function(struct.pack(f'{3 + len(fields)}q', _isa, threads, dtype is torch.float64, *fields)):
        raise MemoryError('native: no memory left')


def _run_scan(
        function: Callable[[bytes], int],
        call: ScanCall,
        out: torch.Tensor,
        y: Optional[torch.Tensor],
        states: Optional[torch.Tensor],
        parts: int = 1,
        dz: Optional[torch.Tensor] = None,
        grads: Optional[List[List[Optional[torch.Tensor]]]] = None,
) -> None:
    """Pack `Scan` of native.h and run it. `out` is the incoming gradient in a backward pass."""
    B, alive = call.B[0], []
    fields = [
        *call.u[0].shape, B.shape[2] if B.ndim == 4 else 1, call.A[0].shape[1], len(call.u), call.delta_softplus,
        call.residual, parts, *_tensor(call.z, alive), *_tensor(y, alive), *_tensor(out, alive), *_tensor(dz, alive),
    ]
    for i in range(len(call.u)):
        for xs in (call.u, call.delta, call.B, call.C):
            fields += _tensor(xs[i], alive)
        fields += (
            _parameter(call.A, i, alive), _parameter(call.D, i, alive), _parameter(call.delta_bias, i, alive),
            0 if states is None else states[i].data_ptr(),
            call.reverse[i], call.mask_diagonal[i])
        if grads is None:
            fields += _NO_GRADS
        else:
            for x in grads[i][:4]:
                fields += _tensor(x, alive)
            fields += [0 if x is None else x.data_ptr() for x in grads[i][4:]]
    _run(function, out.dtype, fields)


def _wide_scan(call: ScanCall) -> ScanCall:
    """`call` with activations in float32."""
    lists = {name: [x.float() for x in getattr(call, name)] for name in ('u', 'delta', 'B', 'C')}
    return call._replace(**lists, z=call.z if call.z is None else call.z.float())


def _sum(x: torch.Tensor) -> torch.Tensor:
    """The sum over the first axis."""
    return x[0] if x.shape[0] == 1 else x.sum(0)


def _run_conv(
        function: Callable[[bytes], int],
        call: ConvCall,
        outs: List[torch.Tensor],
        dx: Optional[torch.Tensor] = None,
        dweights: Sequence[torch.Tensor] = (),
        dbiases: Sequence[torch.Tensor] = (),
) -> None:
    """Pack `Conv` of native.h and run it. `outs` are the incoming gradients in a backward pass."""
    x, alive = call.x, []
    fields = [
        *x.shape, call.weight[0].shape[1], len(outs), call.silu, call.centered, *_tensor(x, alive),
        *_tensor(dx, alive)]
    for i, out in enumerate(outs):
        fields += (
            _parameter(call.weight, i, alive), _parameter(call.bias, i, alive), call.reverse[i],
            *_tensor(out, alive),
            dweights[i].data_ptr() if dweights else 0, dbiases[i].data_ptr() if dbiases else 0)
    _run(function, x.dtype, fields)


