"""What the checkpoint filters of all families share."""
from typing import Dict, Optional, Sequence

import torch
from torch import nn

StateDict = Dict[str, torch.Tensor]


class CheckpointMismatch(ValueError):
    """The checkpoint is of another model; state_dict is what it holds, under this model's names."""

    def __init__(self, message: str, state_dict: StateDict) -> None:
        super().__init__(message)
        self.state_dict = state_dict


def unwrap_state_dict(state_dict: StateDict) -> StateDict:
    """The parameters of a checkpoint: bare or under 'model', 'module' or 'state_dict', names without those prefixes."""
    for key in ('state_dict', 'model', 'module'):
        if isinstance(state_dict.get(key), dict):
            return unwrap_state_dict(state_dict[key])
    return {k.removeprefix('module.').removeprefix('model.'): v for k, v in state_dict.items()}


def check_fits(state_dict: StateDict, model: nn.Module, adaptable: Sequence[str] = ()) -> StateDict:
    """Refuse a checkpoint of another model, in one line instead of a list of all its parameters.

    Args:
        state_dict: Parameters under the model's names.
        model: Model they are meant for.
        adaptable: Prefixes of parameters that the loader adapts later (classifier, input convolution).

    Returns:
        state_dict.

    Raises:
        CheckpointMismatch: Most of the model's parameters are not in state_dict, or one of them has another shape.
    """
    wanted = model.state_dict()
    found = [k for k in wanted if k in state_dict]
    problem: Optional[str] = None
    if 2 * len(found) < len(wanted):
        missing = next(k for k in wanted if k not in state_dict)
        unexpected = next((k for k in state_dict if k not in wanted), 'nothing')
        problem = (
            f'{len(wanted) - len(found)} of {len(wanted)} parameters are missing, such as {missing}; '
            f'it holds {unexpected} instead')
    for k in found:
        if problem is None and state_dict[k].shape != wanted[k].shape and not k.startswith(tuple(adaptable)):
            problem = f'{k} is {tuple(state_dict[k].shape)}, needs {tuple(wanted[k].shape)}'
    if problem:
        name = getattr(model, 'pretrained_cfg', {}).get('architecture') or type(model).__name__
        raise CheckpointMismatch(f'checkpoint: it is not of {name}: {problem}', state_dict)
    return state_dict
