"""The Triton backend: fused kernels for NVIDIA and AMD GPUs, in Python alone.

`forward.py` and `backward.py` hold the scan, `conv.py` the convolution, `common.py` what they share. Kernels
run both directions of a call in one launch, and give bitwise the same result each time: no atomics, no autotuning.
With TRITON_INTERPRET=1 they serve CPU tensors through Triton's interpreter, which is slow and meant for tests.

Triton itself is imported when a kernel first runs.
"""
import os
from functools import cache
from typing import List, Optional, Tuple

import torch

from ...calls import ConvCall, ScanCall, ScanResult

NAME = 'triton'
MAX_D_STATE = 64  # the state lives in registers


def _interpreted() -> bool:
    return os.environ.get('TRITON_INTERPRET', '') == '1'


@cache
def unavailable() -> Optional[str]:
    """Why this backend cannot be used on this machine, None if it can."""
    try:
        import triton  # noqa: F401
    except ImportError as e:
        return f'triton does not import: {e}'
    if not torch.cuda.is_available() and not _interpreted():
        return 'no GPU that PyTorch can use (TRITON_INTERPRET=1 runs the kernels on the CPU, slowly)'
    return None


def _refuses(x: torch.Tensor) -> Optional[str]:
    if x.device.type == 'cuda' or (x.device.type == 'cpu' and _interpreted()):
        return None
    return f'it runs on a GPU, the call is on {x.device}'


def refuses_scan(call: ScanCall) -> Optional[str]:
    """Why this backend cannot run `call`, None if it can."""
    d_state = call.A[0].shape[1]
    if d_state > MAX_D_STATE:
        return f'it takes up to {MAX_D_STATE} states, the call has {d_state}'
    return _refuses(call.u[0])


def refuses_conv(call: ConvCall) -> Optional[str]:
    """Why this backend cannot run `call`, None if it can."""
    return _refuses(call.x)


def scan_forward(call: ScanCall, save: bool) -> ScanResult:
    """Run `call`. A chunk's states are laid out (N, D)."""
    from .forward import scan_forward
    return scan_forward(call, save)


def scan_backward(
        call: ScanCall,
        grad_out: torch.Tensor,
        y: torch.Tensor,
        states: torch.Tensor,
) -> Tuple[List[List[torch.Tensor]], Optional[torch.Tensor]]:
    """Gradients of every input of `call`: a list over directions of [u, delta, A, B, C, D?, delta_bias?], and z's."""
    from .backward import scan_backward
    return scan_backward(call, grad_out, y, states)


def conv_forward(call: ConvCall) -> List[torch.Tensor]:
    """Run `call`: one output a direction."""
    from .conv import conv_forward
    return conv_forward(call)


def conv_backward(
        call: ConvCall,
        grad_outs: List[torch.Tensor],
) -> Tuple[torch.Tensor, List[torch.Tensor], List[torch.Tensor]]:
    """Gradients of x (summed over directions), of the weights and of the biases of `call`."""
    from .conv import conv_backward
    return conv_backward(call, grad_outs)
