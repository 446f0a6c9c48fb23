"""The Triton backend: fused kernels for NVIDIA and AMD GPUs, in Python alone.

`forward.py` and `backward.py` hold the scan, `conv.py` the convolution, `common.py` what they share. Kernels
run both directions of a call in one launch, and give bitwise the same result each time: no atomics, no autotuning.
With TRITON_INTERPRET=1 they serve CPU tensors through Triton's interpreter, which is slow and meant for tests.

Triton itself is imported when a kernel first runs.
"""
import os
from functools import cache
from typing import List, Optional, Union

import torch

from ...calls import CHUNK_SIZE, ConvCall, ConvGradients, ScanCall, ScanGradients, ScanResult
from ..base import Backend


def _interpreted() -> bool:
    return os.environ.get('TRITON_INTERPRET', '') == '1'


@cache
def _import_error() -> str:
    try:
        import triton  # noqa: F401
    except ImportError as e:
        return f'triton does not import: {e}'
    return ''


class Triton(Backend):
    name = 'triton'
    devices = ('cuda', 'cpu') if _interpreted() else ('cuda',)
    max_d_state = 64  # the state lives in registers

    def why_unavailable(self) -> Optional[str]:
        if _import_error():
            return _import_error()
        if not torch.cuda.is_available() and not _interpreted():
            return 'no GPU that PyTorch can use (TRITON_INTERPRET=1 runs the kernels on the CPU, slowly)'
        return None

    def why_unsupported(self, call: Union[ScanCall, ConvCall]) -> Optional[str]:
        if isinstance(call, ScanCall):
            length, d_state = call.input.shape[1], call.A[0].shape[1]
            most = 2 ** 30 // d_state - CHUNK_SIZE  # rows of B and C in scan order are addressed in 32 bits
            if length > most:
                return f'it takes up to {most} tokens of {d_state} states, the call has {length}'
        return super().why_unsupported(call)

    def scan_forward(self, call: ScanCall, save: bool) -> ScanResult:
        from .forward import scan_forward
        return scan_forward(call, save)

    def scan_backward(
            self,
            call: ScanCall,
            grad_out: torch.Tensor,
            y: Optional[torch.Tensor],
            states: torch.Tensor,
    ) -> ScanGradients:
        from .backward import scan_backward
        return scan_backward(call, grad_out, y, states)

    def conv_forward(self, call: ConvCall) -> List[torch.Tensor]:
        from .conv import conv_forward
        return conv_forward(call)

    def conv_backward(self, call: ConvCall, grad_outs: List[torch.Tensor]) -> ConvGradients:
        from .conv import conv_backward
        return conv_backward(call, grad_outs)
