"""What the modules of a model that mix its tokens are given in a forward pass."""
from typing import Any, Callable, Dict, List, NamedTuple, Tuple

import torch
from torch import nn

from ..layers.mixer import ScanMixer
from ..training.evaluation import evaluating


class Record(NamedTuple):
    """A module and its arguments in a forward pass."""
    name: str
    module: nn.Module
    args: Tuple[Any, ...]
    kwargs: Dict[str, Any]


def is_attention(module: nn.Module) -> bool:
    """Whether a module is self-attention as timm has it, whose attention passes through a dropout unless fused."""
    return hasattr(module, 'fused_attn') and isinstance(getattr(module, 'attn_drop', None), nn.Module)


def is_scan(module: nn.Module) -> bool:
    return isinstance(module, ScanMixer)


def mixes_tokens(module: nn.Module) -> bool:
    return is_scan(module) or is_attention(module)


@torch.no_grad()
def record(model: nn.Module, x: torch.Tensor, wanted: Callable[[nn.Module], bool]) -> List[Record]:
    """Run a model in eval mode, and return what the wanted modules were given, in the order of their calls.

    Args:
        model: Any model; left in the mode that it was in.
        x: Its input.
        wanted: Tells whether a module is to be recorded.
    """
    records: List[Record] = []

    def see(name: str) -> Callable:
        def hook(module: nn.Module, args: Tuple[Any, ...], kwargs: Dict[str, Any]) -> None:
            records.append(Record(name, module, args, kwargs))
        return hook

    hooks = [
        module.register_forward_pre_hook(see(name), with_kwargs=True)
        for name, module in model.named_modules() if wanted(module)]
    try:
        with evaluating(model):
            model(x)
    finally:
        for hook in hooks:
            hook.remove()
    return records


def attention_of(record: Record) -> torch.Tensor:
    """The mean over heads of a self-attention's matrix (B, L, L)."""
    found: List[torch.Tensor] = []
    module = record.module
    hook = module.attn_drop.register_forward_pre_hook(lambda _, args: found.append(args[0]))
    fused, module.fused_attn = module.fused_attn, False
    try:
        module(*record.args, **record.kwargs)
    finally:
        module.fused_attn = fused
        hook.remove()
    return found[0].mean(1)
