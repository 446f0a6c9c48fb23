"""`--fsdp`: parameters, gradients and optimiser state sharded over processes by PyTorch's FSDP2."""
import argparse
import re
from contextlib import contextmanager
from typing import Any, Dict, Iterator, List, Tuple

import torch
from timm.task import TrainingTask
from timm.utils import unwrap_model
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)  # the first process gets it, the others nothing


def shard(args: argparse.Namespace, task: TrainingTask) -> None:
    """Shard what a task trains, and the average of its weights, by blocks.

    A block's parameters are whole only while it runs. With `--amp` the weights of linear layers and convolutions, the
    bulk of them, are gathered in the lower precision, in which autocast would use them anyway. All others, those of
    the scans and norms, stay in float32, and so do the sums of gradients.
    """
    for ema in (False, True):
        model = task.get_trainable_module(ema=ema)
        if model is not None:
            _shard_model(args, unwrap_model(model))


def _shard_model(args: argparse.Namespace, model: nn.Module) -> None:
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    lower = MixedPrecisionPolicy(getattr(torch, args.amp_dtype), torch.float32)
    for _, block in reversed(named_blocks(model)):  # inner ones first
        matrices = [module for module in block.modules() if type(module) in (nn.Linear, nn.Conv2d)]
        if args.amp and matrices:
            fully_shard(matrices, mp_policy=lower)
        fully_shard(block, mp_policy=policy)
    fully_shard(model, mp_policy=policy)


def named_blocks(model: nn.Module) -> List[Tuple[str, nn.Module]]:
    """The blocks of a model of timm's kind, with their names in it."""
    return [(n, module) for n, module in model.named_modules() if re.search(r'(^|\.)(blocks|layers)\.\d+$', n)]


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """A sharded model whose parameters are whole for a while: processes need not run it in step. Others as they are."""
    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(part is not model, recurse=False)
            part.reshard()


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole_state(task: TrainingTask, optimizer: torch.optim.Optimizer) -> Dict[str, Any]:
    """The state of a sharded task and optimiser, as one process without shards would save it.

    All processes must call it; the first one gets the state, the others the keys of it alone.
    """
    model = task.get_trainable_module()
    state = dict(state_dict=get_model_state_dict(model, options=WHOLE))
    if task.has_ema():
        average = unwrap_model(task.get_trainable_module(ema=True))
        state['state_dict_ema'] = get_model_state_dict(average, options=WHOLE)
    named = get_optimizer_state_dict(model, optimizer, options=WHOLE)
    number = {name: i for i, name in enumerate(n for group in named.get('param_groups', ()) for n in group['params'])}
    state['optimizer'] = dict(
        state={number[name]: value for name, value in named.get('state', {}).items()},
        param_groups=[
            {**group, 'params': [number[n] for n in group['params']]} for group in named.get('param_groups', ())])
    return state


def load_whole_model(task: TrainingTask, state_dict: Dict[str, torch.Tensor], ema: bool = False) -> None:
    """Each process takes its shards of a whole state of the model, or of the average of its weights."""
    set_model_state_dict(unwrap_model(task.get_trainable_module(ema=ema)), state_dict, options=WHOLE)


def load_whole_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, state: Dict[str, Any]) -> None:
    """Each process takes its shards of a whole state."""
    if not state['state']:  # as of SGD without momentum: there is nothing to shard, which PyTorch takes for an error
        optimizer.load_state_dict(state)
        return
    names = {id(p): name for name, p in model.named_parameters()}
    ordered = [names[id(p)] for group in optimizer.param_groups for p in group['params']]
    named = dict(
        state={ordered[i]: value for i, value in state['state'].items()},
        param_groups=[{**group, 'params': [ordered[i] for i in group['params']]} for group in state['param_groups']])
    set_optimizer_state_dict(model, optimizer, named, options=WHOLE)
