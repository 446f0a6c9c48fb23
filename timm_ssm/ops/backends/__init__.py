"""The backends of the ops, and the choice between them.

`base.Backend` is what a backend is; docs/kernels.md says how to add one.
"""
import os
import warnings
from contextlib import contextmanager
from typing import Dict, Iterator, List, Optional, Set, Union

from ..calls import ConvCall, ScanCall
from .base import Backend
from .eager import Eager
from .mamba_ssm import MambaSsm
from .naive import Naive
from .native import Native
from .triton import Triton

BACKENDS: Dict[str, Backend] = {b.name: b for b in (Native(), Triton(), MambaSsm(), Eager(), Naive())}
#: Order of preference on each type of device; types not named here take the eager backend.
PREFERENCE = {
    'cpu': ('native', 'eager'),
    'cuda': ('triton', 'mamba_ssm', 'eager'),
}
#: The backend that the environment asks for, read once: looking there takes as long as the rest of `select_backend`.
FORCED = os.environ.get('TIMM_SSM_BACKEND', '')


def select_backend(call: Union[ScanCall, ConvCall], backend: str = '') -> Backend:
    """The backend that runs `call`: the one asked for, or the first of the device's order that can.

    Args:
        call: What is to be run.
        backend: Name of the backend to use; empty to take `FORCED` or, where that is empty too, to select by device.

    Raises:
        ValueError: The backend asked for does not exist.
        RuntimeError: The backend asked for cannot run here, or cannot run this call.
    """
    name = backend or FORCED
    if name:
        if name not in BACKENDS:
            raise ValueError(f'backend: got {name!r}, needs one of {", ".join(map(repr, BACKENDS))}')
        reason = _why_not(BACKENDS[name], call)
        if reason:
            asked_by = f'backend={backend}' if backend else f'TIMM_SSM_BACKEND={FORCED}'
            raise RuntimeError(f'{asked_by} cannot serve this call: {reason}')
    else:
        reasons = {}
        for name in PREFERENCE.get(call.input.device.type, ()):
            reasons[name] = _why_not(BACKENDS[name], call)
            if not reasons[name]:
                break
        else:
            name = 'eager'
        if name == 'eager':
            _warn_if_slow(call, reasons)
    if _used is not None:
        _used.add(name)
    return BACKENDS[name]


_used: Optional[Set[str]] = None


@contextmanager
def used_backends() -> Iterator[Set[str]]:
    """Within the context the set of the backends that have run calls, by name; not to be nested."""
    global _used
    _used = set()
    try:
        yield _used
    finally:
        _used = None


def _why_not(backend: Backend, call: Union[ScanCall, ConvCall]) -> str:
    return backend.why_unavailable() or backend.why_unsupported(call) or ''


#: State updates of a call (B L D N a direction) from which on `eager` is worth a warning: a small model's at batch 4.
SLOW = 1 << 24
_warned = False


def _warn_if_slow(call: Union[ScanCall, ConvCall], reasons: Dict[str, str]) -> None:
    """Say once per process that a large scan runs on the slow path, why, and what to do."""
    global _warned
    if _warned or isinstance(call, ConvCall) or len(call.u) * call.u[0].numel() * call.A[0].shape[1] < SLOW:
        return
    _warned = True
    lines = ''.join(f'\n  {name}: {reason}' for name, reason in reasons.items() if reason)
    warnings.warn(
        f'the selective scan of a large model runs on {call.u[0].device} in plain PyTorch, which is slow.{lines}\n'
        'See `python -m timm_ssm.env` for what can run here; with a GPU, install triton; on a CPU, reinstall timm-ssm '
        'with a C++ compiler at hand.', stacklevel=2)


def backend_report() -> Dict[str, Dict[str, Union[str, List[str]]]]:
    """What can run the ops on this machine.

    Returns:
        For each backend `available` ('yes', or the reason why not) and `serves`, the device types that use it first.
    """
    reasons = {name: backend.why_unavailable() for name, backend in BACKENDS.items()}
    first = {device: next(n for n in order if reasons[n] is None) for device, order in PREFERENCE.items()}
    return {
        name: {
            'available': reason or 'yes',
            'serves': [device for device, name_of_first in first.items() if name_of_first == name],
        }
        for name, reason in reasons.items()
    }
