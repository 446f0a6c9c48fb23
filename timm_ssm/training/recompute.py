"""`--activation-budget`: recompute as few blocks in the backward pass as it takes to keep activations in memory."""
import argparse
import copy
import logging
from functools import partial
from typing import Callable, Dict, List, NamedTuple, Tuple

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from .arguments import UsageError
from .sharding import named_blocks
from .sizes import largest_batch

_logger = logging.getLogger(__name__)

GIB = 2 ** 30


class Activations(NamedTuple):
    """Bytes that a forward pass keeps for the backward pass: of all, and of each block within it and of its input."""
    total: int
    blocks: Dict[str, int]
    inputs: Dict[str, int]


def saved_activations(model: nn.Module, shape: Tuple[int, ...]) -> Activations:
    """What a model without storage, in training mode, keeps of each sample."""
    small, large = (_saved(model, (batch_size, *shape)) for batch_size in (2, 4))  # so that weights do not count

    def each(a: Dict[str, int], b: Dict[str, int]) -> Dict[str, int]:
        return {name: (b[name] - a[name]) // 2 for name in a}

    return Activations(
        (large.total - small.total) // 2, each(small.blocks, large.blocks), each(small.inputs, large.inputs))


def _saved(model: nn.Module, shape: Tuple[int, ...]) -> Activations:
    kept: Dict[StorageWeakRef, torch.Tensor] = {}  # by storage, which views share; held, so that no other gets its name
    blocks: Dict[str, int] = {}
    inputs: Dict[str, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        return kept.setdefault(StorageWeakRef(tensor.untyped_storage()), tensor)

    def size() -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())

    def enter(name: str) -> Callable:
        def hook(module: nn.Module, args: Tuple) -> None:
            inputs[name] = sum(x.untyped_storage().nbytes() for x in args if isinstance(x, torch.Tensor))
            blocks[name] = -size()
        return hook

    def leave(name: str) -> Callable:
        def hook(module: nn.Module, args: Tuple, output: object) -> None:
            blocks[name] += size()
        return hook

    hooks = []
    for name, block in named_blocks(model):
        hooks += [block.register_forward_pre_hook(enter(name)), block.register_forward_hook(leave(name))]
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            model(torch.empty(shape, device='meta', dtype=next(model.parameters()).dtype))
    finally:
        for hook in hooks:
            hook.remove()
    return Activations(size(), blocks, inputs)


def choose_blocks(activations: Activations, samples: int, budget: float) -> Tuple[List[str], float]:
    """The fewest blocks to recompute, those that save most first; all of them if that is not enough.

    Args:
        activations: Of one sample.
        samples: Of a batch.
        budget: Bytes that activations may take.

    Returns:
        The names of the blocks, and the bytes that activations take then: what is kept, and of the blocks that are
        recomputed one at a time.
    """
    total, largest, chosen = activations.total, 0, []
    saving = {name: size - activations.inputs[name] for name, size in activations.blocks.items()}
    for name in sorted(saving, key=saving.__getitem__, reverse=True):
        if samples * (total + largest) <= budget or saving[name] <= 0:
            break
        chosen.append(name)
        total -= saving[name]
        largest = max(largest, activations.blocks[name])
    return chosen, samples * (total + largest)


def plan_recomputation(
        args: argparse.Namespace,
        model: nn.Module,
        shape: Tuple[int, ...],
) -> Tuple[List[str], float]:
    """Blocks to recompute as the arguments ask, and the bytes that activations take then in one process.

    Args:
        args: Arguments of training.
        model: On any device, unchanged.
        shape: Of one sample.
    """
    # without storage, and in the type of most activations; autocast keeps some in float32
    on_paper = copy.deepcopy(model).to('meta', getattr(torch, args.amp_dtype) if args.amp else None).train()
    if args.grad_checkpointing:
        on_paper.set_grad_checkpointing(False)
    samples, shape = largest_batch(args, shape)
    budget = 0 if args.grad_checkpointing else (args.activation_budget or float('inf')) * GIB
    return choose_blocks(saved_activations(on_paper, shape), samples, budget)


def recompute_blocks(args: argparse.Namespace, model: nn.Module, shape: Tuple[int, ...]) -> None:
    """Make a model recompute blocks so that its activations fit `--activation-budget`.

    Raises:
        UsageError: They cannot.
    """
    chosen, taken = plan_recomputation(args, model, shape)
    if taken > args.activation_budget * GIB:
        raise UsageError(
            f'--activation-budget: got {args.activation_budget:g} GiB, needs {taken / GIB:.2g} with every block '
            f'recomputed; a smaller --batch-size needs less')
    blocks = dict(named_blocks(model))
    for name in chosen:
        block = blocks[name]
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    _logger.info(f'{len(chosen)} of {len(blocks)} blocks are recomputed: {taken / GIB:.2f} GiB of activations')
