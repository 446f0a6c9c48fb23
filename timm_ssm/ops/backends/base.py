"""What a backend is, and which calls it serves."""
from typing import List, Optional, Tuple, Union

import torch

from ..calls import FLOAT_DTYPES, ConvCall, ConvGradients, ScanCall, ScanGradients, ScanResult

_DEVICES = {'cpu': 'the CPU', 'cuda': 'a GPU'}


class Backend:
    """One implementation of the ops.

    The attributes are its row of the capability table: `why_unsupported` and the tests follow from them.
    """
    name: str
    devices: Tuple[str, ...] = ()  # types of device that it runs on, () for all
    dtypes: Tuple[torch.dtype, ...] = FLOAT_DTYPES  # of the activations
    max_d_state: Optional[int] = None
    kernel_sizes: Optional[Tuple[int, ...]] = None  # of the convolution, None for all
    forms: Tuple[str, ...] = ('residual', 'mask_diagonal', 'centered')
    empty: bool = True  # takes inputs without elements
    deterministic: bool = True  # gives the same bits each time, gradients included

    def why_unavailable(self) -> Optional[str]:
        """Why this backend cannot be used on this machine, None if it can."""
        return None

    def why_unsupported(self, call: Union[ScanCall, ConvCall]) -> Optional[str]:
        """Why this backend cannot run `call`, None if it can."""
        x = call.input
        if isinstance(call, ScanCall):
            forms = {'residual': call.residual, 'mask_diagonal': any(call.mask_diagonal)}
            d_state = call.A[0].shape[1]
            if self.max_d_state is not None and d_state > self.max_d_state:
                return f'it takes up to {self.max_d_state} states, the call has {d_state}'
        else:
            forms = {'centered': call.centered}
            kernel_size = call.weight[0].shape[1]
            if self.kernel_sizes is not None and kernel_size not in self.kernel_sizes:
                return f'it takes kernels of {", ".join(map(str, self.kernel_sizes))} taps, the call has {kernel_size}'
        for form, used in forms.items():
            if used and form not in self.forms:
                return f'it has no `{form}`'
        if x.dtype not in self.dtypes:
            return f'it takes {", ".join(map(str, self.dtypes))}, the call is in {x.dtype}'
        if not self.empty and x.numel() == 0:
            return 'it takes no empty input'
        if self.devices and x.device.type not in self.devices:
            return f'it runs on {" and ".join(_DEVICES.get(d, d) for d in self.devices)}, the call is on {x.device}'
        return None

    def scan_forward(self, call: ScanCall, save: bool) -> ScanResult:
        """Run `call`, with what the backward pass wants if `save`."""
        raise NotImplementedError

    def scan_backward(
            self,
            call: ScanCall,
            grad_out: torch.Tensor,
            y: Optional[torch.Tensor],
            states: torch.Tensor,
    ) -> ScanGradients:
        """Gradients of every tensor of `call`, contiguous; y and states as this backend's scan_forward returned them.
        """
        raise NotImplementedError

    def conv_forward(self, call: ConvCall) -> List[torch.Tensor]:
        """Run `call`: one output a direction."""
        raise NotImplementedError

    def conv_backward(self, call: ConvCall, grad_outs: List[torch.Tensor]) -> ConvGradients:
        """Gradients of every tensor of `call`."""
        raise NotImplementedError
