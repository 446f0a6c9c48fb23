"""The machines that run the ops, one module each, and the choice between them.

A backend is a module with

    unavailable() -> Optional[str]           why it cannot be used on this machine, None if it can
    refuses_scan(call: ScanCall) -> Optional[str]    why it cannot run this call, None if it can
    scan_forward(call, save) -> ScanResult
    scan_backward(call, grad_out, y, states) -> (gradients of each direction, gradient of z)
    refuses_conv(call: ConvCall), conv_forward(call), conv_backward(call, grad_outs)

as `ops/naive.py`, itself one of them, spells out.
"""
import functools
import importlib
import os
import warnings
from types import ModuleType
from typing import Dict, List, Optional, Union

from ..calls import ConvCall, ScanCall

_MODULES = {
    'native': 'timm_ssm.ops.backends.native',
    'triton': 'timm_ssm.ops.backends.triton',
    'mamba_ssm': 'timm_ssm.ops.backends.mamba_ssm',
    'naive': 'timm_ssm.ops.naive',
}
BACKENDS = tuple(_MODULES)
#: Order of preference on each device type; devices not named here take `naive`.
_PREFERENCE = {
    'cpu': ('native', 'naive'),
    'cuda': ('triton', 'mamba_ssm', 'naive'),
}
#: The backend that the environment asks for, read once: looking there takes as long as all the rest of `choose`.
FORCED = os.environ.get('TIMM_SSM_BACKEND', '')


@functools.lru_cache(None)
def backend_module(name: str) -> ModuleType:
    """Import the module of the backend called `name`."""
    if name not in _MODULES:
        raise ValueError(f'backend: got {name!r}, needs one of {", ".join(map(repr, _MODULES))}')
    return importlib.import_module(_MODULES[name])


def choose(call: Union[ScanCall, ConvCall], backend: str = '') -> ModuleType:
    """The backend that runs `call`: the one asked for, or the first of the device's order that can.

    Args:
        call: What is to be run.
        backend: Name of the backend to use; empty to take `FORCED` or, where that is empty too, to choose by device.

    Raises:
        ValueError: The backend asked for does not exist.
        RuntimeError: The backend asked for cannot run here, or cannot run this call.
    """
    if backend or FORCED:
        module = backend_module(backend or FORCED)
        reason = _refusal(module, call)
        if reason:
            asked_by = f'backend={backend}' if backend else f'TIMM_SSM_BACKEND={FORCED}'
            raise RuntimeError(f'{asked_by} cannot serve this call: {reason}')
        return module
    device = (call.u[0] if isinstance(call, ScanCall) else call.x).device
    refusals = {}
    for name in _PREFERENCE.get(device.type, ('naive',)):
        module = backend_module(name)
        reason = _refusal(module, call)
        if not reason:
            if name == 'naive':
                _warn_if_slow(call, refusals)
            return module
        refusals[name] = reason
    raise AssertionError('unreachable: the naive backend runs every call')


#: State updates of a call (B L D N a direction) from which on `naive` is worth a warning: a small model's at batch 4.
SLOW = 1 << 24
_warned = False


def _warn_if_slow(call: Union[ScanCall, ConvCall], refusals: Dict[str, str]) -> None:
    """Say once per process that a large scan runs on the slow path, why, and what to do."""
    global _warned
    if _warned or isinstance(call, ConvCall) or len(call.u) * call.u[0].numel() * call.A[0].shape[1] < SLOW:
        return
    _warned = True
    reasons = ''.join(f'\n  {name}: {reason}' for name, reason in refusals.items())
    warnings.warn(
        f'the selective scan of a large model runs on {call.u[0].device} in plain PyTorch, which is slow.{reasons}\n'
        'See `python -m timm_ssm.env` for what can run here; with a GPU, install triton; on a CPU, reinstall timm-ssm '
        'with a C++ compiler at hand.', stacklevel=2)


def _refusal(module: ModuleType, call: Union[ScanCall, ConvCall]) -> Optional[str]:
    return module.unavailable() or (
        module.refuses_scan(call) if isinstance(call, ScanCall) else module.refuses_conv(call))


def backend_report() -> Dict[str, Dict[str, Union[str, List[str]]]]:
    """What can run the ops on this machine.

    Returns:
        For each backend `available` ('yes', or the reason why not) and `serves`, the device types that use it first.
    """
    reasons = {name: backend_module(name).unavailable() for name in _MODULES}
    first = {device: next(n for n in order if reasons[n] is None) for device, order in _PREFERENCE.items()}
    return {
        name: {
            'available': reason or 'yes',
            'serves': [device for device, chosen in first.items() if chosen == name],
        }
        for name, reason in reasons.items()
    }
