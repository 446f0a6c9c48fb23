"""`--activation-budget`: recompute as little in the backward pass as it takes to keep activations in memory."""
import argparse
import copy
import logging
from functools import partial
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from .. import ops  # noqa: F401  (defines torch.ops.timm_ssm)
from .arguments import UsageError
from .sharding import named_blocks
from .sizes import largest_batch

_logger = logging.getLogger(__name__)

GIB = 2 ** 30
PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default}
LONG = 64  # multiply-accumulates for an element of a product from which on it is costly


class Activations(NamedTuple):
    """Bytes that a forward pass keeps for the backward pass: of all, and of each block."""
    total: int
    blocks: Dict[str, int]
    inputs: Dict[str, int]  # of the block's input
    costly: Dict[str, int]  # of the results that `keep_costly` keeps


class Recomputation(NamedTuple):
    """Names of the blocks to recompute, and the bytes that activations take then."""
    partly: List[str]  # all but the costly results
    wholly: List[str]
    taken: float


def keep_costly(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Keep what takes long to compute for its size: results of scans, attention, and products of long rows.

    Recomputed are norms, activation functions, depthwise convolutions, and steps dt from their few ranks.
    """
    costly = op is torch.ops.timm_ssm.selective_scan.default or 'scaled_dot_product' in op.__name__
    if op in PRODUCTS:
        costly = args[-1].shape[-2] >= LONG
    elif op is torch.ops.aten.convolution.default:
        costly = args[1][0].numel() >= LONG
    return CheckpointPolicy.MUST_SAVE if costly else CheckpointPolicy.PREFER_RECOMPUTE


def recompute(block: nn.Module, policy: Optional[Callable] = None) -> None:
    """Make a block recompute all that it does in the backward pass, or what a policy of PyTorch's says."""
    selective = {} if policy is None else dict(context_fn=partial(create_selective_checkpoint_contexts, policy))
    block.forward = partial(checkpoint, block.forward, use_reentrant=False, **selective)


def saved_activations(model: nn.Module, shape: Tuple[int, ...]) -> Activations:
    """What a model without storage, in training mode, keeps of each sample."""
    small, large = (_saved(model, (batch_size, *shape)) for batch_size in (2, 4))  # so that weights do not count

    def each(a: Dict[str, int], b: Dict[str, int]) -> Dict[str, int]:
        return {name: (b[name] - a[name]) // 2 for name in a}

    return Activations(
        (large.total - small.total) // 2, each(small.blocks, large.blocks), each(small.inputs, large.inputs),
        {name: size // 2 for name, size in _costly(model, (2, *shape)).items()})


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
    return Activations(size(), blocks, inputs, {})


def _costly(model: nn.Module, shape: Tuple[int, ...]) -> Dict[str, int]:
    """Bytes of what `keep_costly` keeps in each block."""
    blocks = dict(named_blocks(model))
    kept = dict.fromkeys(blocks, 0)

    def counted(name: str) -> Callable:
        def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
            decision = keep_costly(ctx, op, *args, **kwargs)
            if decision == CheckpointPolicy.MUST_SAVE:
                results = op(*args, **kwargs)  # once more: without storage it costs nothing
                results = results if isinstance(results, (list, tuple)) else [results]
                kept[name] += sum(x.nbytes for x in results if isinstance(x, torch.Tensor))
            return decision
        return policy

    for name, block in blocks.items():
        recompute(block, counted(name))
    try:
        model(torch.empty(shape, device='meta', dtype=next(model.parameters()).dtype))
    finally:
        for block in blocks.values():
            del block.forward
    return kept


def choose_blocks(activations: Activations, samples: int, budget: float) -> Recomputation:
    """The least to recompute: as many blocks as it takes partly, those that save most first; then as many wholly.

    Args:
        activations: Of one sample.
        samples: Of a batch.
        budget: Bytes that activations may take; if that is not enough, all blocks are recomputed wholly.

    Returns:
        The blocks, and the bytes of what is kept and of the most that comes back when one of them is recomputed.
    """
    total, largest = activations.total, 0
    kept, how = dict(activations.blocks), {}
    for level, results in enumerate((activations.costly, dict.fromkeys(kept, 0))):
        saving = {name: size - activations.inputs[name] - results[name] for name, size in kept.items()}
        for name in sorted(saving, key=saving.__getitem__, reverse=True):
            if samples * (total + largest) <= budget or saving[name] <= 0:
                break
            how[name] = level
            kept[name] -= saving[name]
            total -= saving[name]
            largest = max(largest, activations.blocks[name] - kept[name])
    partly, wholly = ([name for name, level in how.items() if level == n] for n in (0, 1))
    return Recomputation(partly, wholly, samples * (total + largest))


def plan_recomputation(args: argparse.Namespace, model: nn.Module, shape: Tuple[int, ...]) -> Recomputation:
    """What to recompute as the arguments ask, and the bytes that activations take then in one process.

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
    partly, wholly, taken = plan_recomputation(args, model, shape)
    if taken > args.activation_budget * GIB:
        raise UsageError(
            f'--activation-budget: got {args.activation_budget:g} GiB, needs {taken / GIB:.2g} with every block '
            f'recomputed; a smaller --batch-size needs less')
    blocks = dict(named_blocks(model))
    for name in partly:
        recompute(blocks[name], keep_costly)
    for name in wholly:
        recompute(blocks[name])
    _logger.info(
        f'{len(partly)} of {len(blocks)} blocks are recomputed but for their costly results, {len(wholly)} wholly: '
        f'{taken / GIB:.2f} GiB of activations')
