"""What a backend is asked to run: the arguments of one call of an op, already checked."""
from typing import List, NamedTuple, Optional, Tuple

import torch

#: Tokens between the states that a forward pass keeps for the backward pass.
STATE_STRIDE = 32


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the recurrence, its parameters and its sums: float32, or float64 for float64 activations."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class ScanCall(NamedTuple):
    """One call of the scan over one or two directions, whose outputs are summed and then gated.

    Lists have one entry a direction; `D` and `delta_bias` are empty where they are not given. `u`, `delta`, `B`, `C`
    and `z` share one dtype and may have any strides, `A`, `D` and `delta_bias` are contiguous in `acc_dtype`.
    """
    u: List[torch.Tensor]  # (B, L, D)
    delta: List[torch.Tensor]  # (B, L, D)
    A: List[torch.Tensor]  # (D, N)
    B: List[torch.Tensor]  # (B, L, N) or (B, L, G, N)
    C: List[torch.Tensor]  # as B
    D: List[torch.Tensor]  # (D,)
    delta_bias: List[torch.Tensor]  # (D,)
    z: Optional[torch.Tensor]  # (B, L, D)
    delta_softplus: bool
    reverse: List[bool]
    residual: bool
    mask_diagonal: List[bool]

    def new_states(self) -> torch.Tensor:
        """An uninitialised tensor for the states before every STATE_STRIDE-th token in scan order:
        (directions, B, ceil(L / STATE_STRIDE), D, N)."""
        u = self.u[0]
        dtype = acc_dtype(u.dtype)
        batch, length, channels = u.shape
        chunks = (length + STATE_STRIDE - 1) // STATE_STRIDE
        return u.new_empty((len(self.u), batch, chunks, channels, self.A[0].shape[1]), dtype=dtype)


#: What a backend's scan_forward returns: out; y, the sum before the gate; states as `ScanCall.new_states`. y and states
#: are None unless the call is saved for a backward pass, y also where there is no gate.
ScanResult = Tuple[torch.Tensor, Optional[torch.Tensor], Optional[torch.Tensor]]


class ConvCall(NamedTuple):
    """One call of the convolution over one or two directions of the same input, one output each.

    `bias` is empty where it is not given. `x` may have any strides, `weight` and `bias` any float dtype.
    """
    x: torch.Tensor  # (B, L, D)
    weight: List[torch.Tensor]  # (D, K)
    bias: List[torch.Tensor]  # (D,)
    silu: bool
    reverse: List[bool]
    centered: bool
