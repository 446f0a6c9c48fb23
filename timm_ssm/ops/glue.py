"""What both ops need between their Python function and PyTorch's dispatcher."""
from typing import Any, Callable, Iterable, List, Optional, Union

import torch
from timm.layers import is_exportable
from torch.autograd.forward_ad import unpack_dual

from .backends import select_backend
from .calls import ConvCall, ScanCall

_library = torch.library.Library('timm_ssm', 'FRAGMENT')


def exporting() -> bool:
    """Whether to run plain PyTorch operators alone: ONNX export, torch.jit.trace, or timm's exportable flag."""
    return (
        is_exportable()
        or torch.jit.is_tracing()
        or (torch.compiler.is_compiling() and torch.onnx.is_in_onnx_export())
    )


def flat(args: Iterable) -> List:
    """The arguments, and in place of pairs their items."""
    return [x for arg in args for x in (arg if isinstance(arg, (tuple, list)) else (arg,))]


def has_tangent(tensors: Iterable[Optional[torch.Tensor]]) -> bool:
    """Whether forward-mode AD differentiates a call on these tensors."""
    for x in tensors:
        if x is not None:
            primal, tangent = unpack_dual(x)
            if tangent is not None:
                return True
            if primal is x:  # no forward-mode AD anywhere: within it, primal is a view
                return False
    return False


def needs_grad(tensors: Iterable[Optional[torch.Tensor]]) -> bool:
    """Whether autograd has to record a call on these tensors."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def backend_name(call: Union[ScanCall, ConvCall], backend: Optional[str], save: bool) -> str:
    """The backend of a call's forward and backward pass; what is asked for, perhaps '', if there is no backward pass or
    if it runs later or not at all: under compilation and on the meta device. The op itself selects one then."""
    if not save or torch.compiler.is_compiling() or call.input.is_meta:
        return backend or ''
    return select_backend(call, backend or '').name


def autocast_dtype(x: torch.Tensor) -> Optional[torch.dtype]:
    """The dtype that autocast wants activations like `x` in, None to leave them: it is off, or they are float64."""
    device = x.device.type
    if x.dtype == torch.float64 or x.is_meta or not torch.is_autocast_enabled(device):  # meta knows no autocast
        return None
    return torch.get_autocast_dtype(device)


def as_parameter(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`x` as kernels take parameters: contiguous and in `dtype`."""
    return x if x.dtype == dtype and x.is_contiguous() else x.to(dtype).contiguous()


def define_op(schema: str, kernel: Callable, fake: Callable, transformed: Optional[Callable] = None) -> Any:
    """Define an op of the library `timm_ssm`.

    `torch.library.custom_op` does the same at twice the overhead of a call.

    Args:
        schema: Its schema, whose name may have an overload's name behind a dot.
        kernel: What runs it on every device.
        fake: Its result's shapes and dtypes, for compilation, export and the meta device.
        transformed: What runs it under the transforms of torch.func, in operators that these know.
    """
    name = schema.partition('(')[0]
    packet, _, overload = name.partition('.')
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, kernel, 'CompositeExplicitAutograd')
    torch.library.register_fake(f'timm_ssm::{name}', fake, lib=_library)
    if transformed is not None:
        _library.impl(name, transformed, 'FuncTorchDynamicLayerFrontMode')
    return getattr(getattr(torch.ops.timm_ssm, packet), overload or 'default')


def register_autograd(name: str, backward: Callable, setup_context: Callable) -> None:
    """Give an op a backward pass. It costs every call of the op as much as the rest of the call, gradients or not: what
    needs none calls an overload without."""
    torch.library.register_autograd(f'timm_ssm::{name}', backward, setup_context=setup_context, lib=_library)


def refuse_higher_order(name: str, grad_outs: List[Optional[torch.Tensor]]) -> None:
    """Raise in the backward pass of op `name` if its result is to be differentiated again.

    `once_differentiable` notices only where the incoming gradient requires grad itself, and else drops terms silently.
    """
    if torch.compiler.is_compiling():
        return
    if torch.is_grad_enabled() or has_tangent(grad_outs):
        raise RuntimeError(f'{name}: its second derivative is not defined, use create_graph=False')
