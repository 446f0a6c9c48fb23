"""What both ops need between their Python function and PyTorch's dispatcher."""
from typing import Any, Callable, Iterable, Optional

import torch
from timm.layers import is_exportable
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

#: Context manager in which an op's call goes straight to its kernel, past autograd.
below_autograd = torch._C._AutoDispatchBelowAutograd


def exporting() -> bool:
    """Whether to run plain PyTorch operators alone: ONNX export, torch.jit.trace, or timm's exportable flag."""
    return (
        is_exportable()
        or torch.jit.is_tracing()
        or (torch.compiler.is_compiling() and torch.onnx.is_in_onnx_export())
    )


def needs_grad(tensors: Iterable[Optional[torch.Tensor]]) -> bool:
    """Whether autograd has to record a call on these tensors."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def run(op: Any, kernel: Callable, tensors: Iterable[Optional[torch.Tensor]], *args) -> Any:
    """Call op(*args), whose tensors are `tensors`.

    Where nobody is watching the op, that is kernel(*args): converting the arguments for PyTorch's dispatcher and back
    takes a third of a call.
    """
    if torch.compiler.is_compiling() or needs_grad(tensors):
        return op(*args)
    if _plain(tensors):
        return kernel(*args)
    with below_autograd():
        return op(*args)


def _plain(tensors: Iterable[Optional[torch.Tensor]]) -> bool:
    """Whether the dispatcher would do nothing but call the kernel: no modes, transforms, profiles, subclasses."""
    return not (
        is_in_torch_dispatch_mode()
        or torch._C._functorch.maybe_current_level() is not None
        or torch.autograd._profiler_enabled()
        or not _PLAIN.issuperset(map(type, tensors))
    )


_PLAIN = {torch.Tensor, torch.nn.Parameter, type(None)}


def autocast_dtype(x: torch.Tensor) -> Optional[torch.dtype]:
    """The dtype that autocast wants activations like `x` in, None to leave them: it is off, or they are float64."""
    if not torch._C._is_any_autocast_enabled():
        return None
    device_type = x.device.type
    if (
            device_type == 'meta'  # knows no autocast
            or not torch.is_autocast_enabled(device_type)
            or x.dtype == torch.float64
    ):
        return None
    return torch.get_autocast_dtype(device_type)


def parameter(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`x` as kernels take parameters: contiguous and in `dtype`."""
    return x if x.dtype == dtype and x.is_contiguous() else x.to(dtype).contiguous()


def refuse_second_derivative(name: str) -> None:
    """Raise in the backward pass of op `name` if its result is to be differentiated again.

    `once_differentiable` notices only where the incoming gradient requires grad itself, and else drops terms silently.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(f'{name}: its second derivative is not defined, use create_graph=False')
