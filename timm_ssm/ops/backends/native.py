"""The CPU kernels in `csrc/`: vectorised C++ with OpenMP, behind a C interface called through ctypes.

`pip install` compiles them where there is a compiler; they are not linked against PyTorch, so one build serves every
version of it. `python setup.py build_ext --inplace` compiles them next to this file.
"""
import ctypes
import os
import struct
from pathlib import Path
from typing import List, Optional, Tuple

import torch

from ..calls import ConvCall, ScanCall, acc_dtype

_LIBRARY = next(iter(sorted(Path(__file__).parent.glob('_native*.so'))), None)
_lib, _reason = None, 'its C++ library was not built when the package was installed (no C++ compiler?)'
if _LIBRARY is not None:
    try:
        _lib = ctypes.CDLL(str(_LIBRARY))
    except OSError as e:
        _reason = f'its C++ library does not load: {e}'

if _lib is not None:
    for _name in ('scan_forward', 'scan_backward', 'conv_forward', 'conv_backward'):
        getattr(_lib, f'timm_ssm_{_name}').argtypes = [ctypes.c_char_p]
    _lib.timm_ssm_isa.restype = ctypes.c_char_p


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


def unavailable() -> Optional[str]:
    """Why this backend cannot be used on this machine, None if it can."""
    return None if _lib is not None else _reason


def refuses_scan(call: ScanCall) -> Optional[str]:
    """Why this backend cannot run `call`, None if it can."""
    return None if call.u[0].is_cpu else 'it runs on the CPU'


def refuses_conv(call: ConvCall) -> Optional[str]:
    """Why this backend cannot run `call`, None if it can."""
    return None if call.x.is_cpu else 'it runs on the CPU'


def _run(name: str, fields: List[int]) -> None:
    if getattr(_lib, f'timm_ssm_{name}')(struct.pack(f'{len(fields)}q', *fields)):
        raise MemoryError(f'native: no memory left for {name}')


def _head(dtype: torch.dtype) -> List[int]:
    return [_isa, 1 if _forked else torch.get_num_threads(), dtype == torch.float64]


_ABSENT = (0, 0, 0, 0)


def _readable(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`x` in the kernels' dtype and with its last dimension contiguous, itself wherever possible."""
    if x.dtype != dtype:
        x = x.to(dtype)
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _fields(x: torch.Tensor) -> Tuple[int, int, int, int]:
    """Address and strides of batch, token and group, as `Tensor` in native.h."""
    strides = x.stride()
    return x.data_ptr(), strides[0], strides[1], strides[2]


def _scan_fields(call: ScanCall, parts: int, z, y, out, dz, directions: List[List]) -> List[int]:
    batch, length, channels = call.u[0].shape
    fields = _head(out.dtype)
    fields += (
        batch, length, channels, call.B[0].shape[2] if call.B[0].ndim == 4 else 1, call.A[0].shape[1], len(call.u),
        call.delta_softplus, call.residual, parts)
    for x in (z, y, out, dz):
        fields += _ABSENT if x is None else _fields(x)
    for i, (u, delta, B, C, states, grads) in enumerate(directions):
        for x in (u, delta, B, C):
            fields += _fields(x)
        fields += (
            call.A[i].data_ptr(), call.D[i].data_ptr() if call.D else 0,
            call.delta_bias[i].data_ptr() if call.delta_bias else 0,
            0 if states is None else states.data_ptr(), call.reverse[i], call.mask_diagonal[i])
        if grads is not None:
            *tensors, dparameters = grads
            for x in tensors:
                fields += _fields(x)
            fields.append(dparameters.data_ptr())
        else:
            fields += _ABSENT * 4 + (0,)
    return fields


def scan_forward(call: ScanCall, save: bool) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Run `call`; see `ops.selective_scan` for what is returned."""
    u = call.u[0]
    dtype, acc = u.dtype, acc_dtype(u.dtype)
    states = call.new_states(save)
    out = torch.empty(u.shape, dtype=acc)
    y = torch.empty(u.shape if save and call.z is not None else 0, dtype=acc)
    if out.numel():
        directions = [
            [_readable(x[i], acc) for x in (call.u, call.delta, call.B, call.C)] + [states[i] if save else None, None]
            for i in range(len(call.u))
        ]
        z = None if call.z is None else _readable(call.z, acc)
        _run('scan_forward', _scan_fields(call, 1, z, y if y.numel() else None, out, None, directions))
    return out.to(dtype), y.to(dtype), states


def scan_backward(
        call: ScanCall,
        grad_out: torch.Tensor,
        y: torch.Tensor,
        states: torch.Tensor,
) -> Tuple[List[List[torch.Tensor]], Optional[torch.Tensor]]:
    """Gradients of every input of `call`: a list over directions of [u, delta, A, B, C, D?, delta_bias?], and z's."""
    dtype, acc = grad_out.dtype, acc_dtype(grad_out.dtype)
    batch, length, channels = grad_out.shape
    d_state, groups = call.A[0].shape[1], call.B[0].shape[2] if call.B[0].ndim == 4 else 1
    # Channels share dB and dC: each part of them sums its own, and there are enough parts to keep many threads busy.
    parts = max(1, min(128 // max(1, batch * groups), channels // groups // 32))
    new = torch.zeros if grad_out.numel() == 0 else torch.empty
    directions = []
    for i in range(len(call.u)):
        grads = [new(batch, length, channels, dtype=acc) for _ in range(2)]
        grads += [new(parts * batch, length, groups, d_state, dtype=acc) for _ in range(2)]
        grads.append(new(batch, d_state + 2, channels, dtype=acc))
        directions.append(
            [_readable(x[i], acc) for x in (call.u, call.delta, call.B, call.C)] + [states[i], grads])
    z = dz = None
    if call.z is not None:
        z, dz = _readable(call.z, acc), new(grad_out.shape, dtype=acc)
    if grad_out.numel():
        y, grad = None if z is None else _readable(y, acc), _readable(grad_out, acc)
        _run('scan_backward', _scan_fields(call, parts, z, y, grad, dz, directions))

    results = []
    for i, (*_, grads) in enumerate(directions):
        du, ddelta, dB, dC, dparameters = grads
        dB, dC = (x.view(parts, *call.B[i].shape).sum(0) if parts > 1 else x.view(call.B[i].shape) for x in (dB, dC))
        dparameters = dparameters.sum(0)
        result = [du.to(dtype), ddelta.to(dtype), dparameters[:d_state].t().contiguous(), dB.to(dtype), dC.to(dtype)]
        if call.D:
            result.append(dparameters[d_state].clone())
        if call.delta_bias:
            result.append(dparameters[d_state + 1].clone())
        results.append(result)
    return results, None if dz is None else dz.to(dtype)


def _conv_fields(call: ConvCall, x, dx, outs, dparameters) -> List[int]:
    batch, length, channels = x.shape
    fields = _head(x.dtype)
    fields += (batch, length, channels, call.weight[0].shape[1], len(outs), call.silu, call.centered)
    fields += _fields(x)
    fields += _ABSENT if dx is None else _fields(dx)
    for i, out in enumerate(outs):
        fields += (
            call.weight[i].data_ptr(), call.bias[i].data_ptr() if call.bias else 0, call.reverse[i], *_fields(out),
            dparameters[i].data_ptr() if dparameters else 0)
    return fields


def conv_forward(call: ConvCall) -> List[torch.Tensor]:
    """Run `call`: one output a direction."""
    dtype, acc = call.x.dtype, acc_dtype(call.x.dtype)
    outs = [torch.empty(call.x.shape, dtype=acc) for _ in call.weight]
    if call.x.numel():
        x = _readable(call.x, acc)
        _run('conv_forward', _conv_fields(call, x, None, outs, None))
    return [out.to(dtype) for out in outs]


def conv_backward(
        call: ConvCall,
        grad_outs: List[torch.Tensor],
) -> Tuple[torch.Tensor, List[torch.Tensor], List[torch.Tensor]]:
    """Gradients of x (summed over directions), of the weights and of the biases of `call`."""
    dtype, acc = call.x.dtype, acc_dtype(call.x.dtype)
    batch, _, channels = call.x.shape
    kernel_size = call.weight[0].shape[1]
    new = torch.zeros if call.x.numel() == 0 else torch.empty
    dx = new(call.x.shape, dtype=acc)
    dparameters = [new(batch, kernel_size + 1, channels, dtype=acc) for _ in call.weight]
    if call.x.numel():
        x, grad_outs = _readable(call.x, acc), [_readable(g, acc) for g in grad_outs]
        _run('conv_backward', _conv_fields(call, x, dx, grad_outs, dparameters))
    dparameters = [p.sum(0) for p in dparameters]
    return (
        dx.to(dtype), [p[:kernel_size].t().contiguous() for p in dparameters],
        [p[kernel_size].clone() for p in dparameters] if call.bias else [])
