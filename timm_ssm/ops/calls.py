"""What a backend is asked to run: one call of an op, its arguments checked and in their final dtypes."""
from typing import Any, Callable, List, NamedTuple, Optional, Sequence, Tuple

import torch

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

#: Tokens between the states that a forward pass saves for the backward pass.
CHUNK_SIZE = 32


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the recurrence, its parameters and its sums: float32, or float64 for float64 activations."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class ScanCall(NamedTuple):
    """One call of the scan over one or two directions, whose outputs are summed and then gated.

    Lists have one entry a direction; `D` and `delta_bias` are empty where they are not given. `u`, `delta`, `B`, `C`
    and `z` share one dtype and may have any strides, `A`, `D` and `delta_bias` are contiguous in `acc_dtype`. The
    fields are the arguments of the op's schema, in its order.
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

    @property
    def input(self) -> torch.Tensor:
        return self.u[0]

    def direction(self, i: int) -> Tuple[Optional[torch.Tensor], ...]:
        """u, delta, A, B, C, D and delta_bias of direction i, None for what is not given."""
        return tuple(xs[i] if xs else None for xs in self[:7])

    def new_states(self) -> torch.Tensor:
        """An uninitialised tensor for the states before every CHUNK_SIZE-th token in scan order:
        (directions, B, ceil(L / CHUNK_SIZE), N, D)."""
        batch, length, channels = self.u[0].shape
        chunks = (length + CHUNK_SIZE - 1) // CHUNK_SIZE
        return self.A[0].new_empty((len(self.u), batch, chunks, self.A[0].shape[1], channels))

    def tensors(self) -> List[Optional[torch.Tensor]]:
        """All tensors, those of `u` first and z, if only as None, last."""
        u, delta, A, B, C, D, delta_bias, z, *_ = self
        return [*u, *delta, *A, *B, *C, *D, *delta_bias, z]

    def with_tensors(self, tensors: Sequence[Any]) -> 'ScanCall':
        """The call with others in place of its `tensors()`."""
        rest = iter(tensors)
        return ScanCall(*([next(rest) for _ in xs] for xs in self[:7]), next(rest), *self[8:])


#: What a backend's scan_forward returns: out; y, the sum before the gate; states as `ScanCall.new_states`. y and states
#: are None unless the call is saved for a backward pass, y also where there is no gate.
ScanResult = Tuple[torch.Tensor, Optional[torch.Tensor], Optional[torch.Tensor]]
#: What scan_backward returns: [u, delta, A, B, C, D?, delta_bias?] of each direction, and z's gradient.
ScanGradients = Tuple[List[List[torch.Tensor]], Optional[torch.Tensor]]


class ConvCall(NamedTuple):
    """One call of the convolution over one or two directions of the same input, one output each.

    `bias` is empty where it is not given. `x` may have any strides, `weight` and `bias` are contiguous in `acc_dtype`.
    The fields are the arguments of the op's schema, in its order.
    """
    x: torch.Tensor  # (B, L, D)
    weight: List[torch.Tensor]  # (D, K)
    bias: List[torch.Tensor]  # (D,)
    silu: bool
    reverse: List[bool]
    centered: bool

    @property
    def input(self) -> torch.Tensor:
        return self.x

    def tensors(self) -> List[torch.Tensor]:
        """All tensors, x first."""
        return [self.x, *self.weight, *self.bias]

    def with_tensors(self, tensors: Sequence[Any]) -> 'ConvCall':
        """The call with others in place of its `tensors()`."""
        x, *rest = tensors
        n = len(self.weight)
        return ConvCall(x, rest[:n], rest[n:], *self[3:])


#: What conv_backward returns: the gradients of x (summed over directions), of the weights and of the biases.
ConvGradients = Tuple[torch.Tensor, List[torch.Tensor], List[torch.Tensor]]


_PLAIN = torch.Tensor, torch.nn.Parameter


def directions(name: str, xs: Sequence[torch.Tensor], count: int) -> List[torch.Tensor]:
    """Argument `name` of a call of `count` directions as a list of dense tensors.

    Raises:
        ValueError: It is something else.
    """
    if not isinstance(xs, (tuple, list)) or len(xs) != count:
        got = f'{len(xs)} items' if isinstance(xs, (tuple, list)) else 'None' if xs is None else type(xs).__name__
        raise ValueError(f'{name}: got {got}, needs a pair of tensors (forward, reverse)')
    for i, x in enumerate(xs):
        if type(x) in _PLAIN and x.layout is torch.strided and not x.is_nested:
            continue
        if not isinstance(x, torch.Tensor):
            got = 'None' if x is None else type(x).__name__
        elif x.is_nested:
            got = 'a nested tensor'
        elif x.layout != torch.strided:
            got = f'layout {x.layout}'
        elif _is_distributed(x):
            got = 'a DTensor'
        else:
            continue
        raise ValueError(f'{_item(name, i, count)}: got {got}, needs a dense tensor on one device')
    return list(xs)


def _item(name: str, i: int, count: int) -> str:
    return name if count == 1 else f'{name}[{i}]'


def _is_distributed(x: torch.Tensor) -> bool:
    if type(x) in _PLAIN or not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor  # slow to import, but the class of x has been imported
    return isinstance(x, DTensor)


#: What an argument has to be: its name; its tensors, one a direction; their shape, None if that of the first is already
#: known to be wrong; the dtypes that they may have; the shapes that the first may have, in words, if there is a choice.
Rule = Tuple[str, Sequence[torch.Tensor], Optional[Tuple[int, ...]], Sequence[torch.dtype], Optional[Callable[[], str]]]


def check(rules: Sequence[Rule], like: str, device: torch.device) -> None:
    """Check arguments.

    Args:
        rules: What they have to be.
        like: Name of the argument whose device, and dtype if there is no choice, they share.
        device: That device.

    Raises:
        ValueError: One of them has another shape, dtype or device.
    """
    for name, xs, shape, dtypes, needs in rules:
        for i, x in enumerate(xs):
            if x.shape != shape:
                wrong = f'shape {tuple(x.shape)}, needs {needs() if needs and i == 0 else shape}'
            elif x.dtype not in dtypes:
                wanted = f'one of {", ".join(map(str, dtypes))}' if len(dtypes) > 1 else f'{dtypes[0]} like {like}'
                wrong = f'dtype {x.dtype}, needs {wanted}'
            elif x.device != device:
                wrong = f'device {x.device}, needs {device} like {like}'
            else:
                continue
            raise ValueError(f'{_item(name, i, len(xs))}: got {wrong}')
