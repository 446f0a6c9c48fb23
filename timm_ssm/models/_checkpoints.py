"""Reading checkpoint files, and what the checkpoint filters of all families share."""
import argparse
import pickle
import re
import sys
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Union

import torch
from safetensors.torch import load_file
from timm.layers import to_2tuple
from timm.models import PretrainedCfg, clean_state_dict, get_pretrained_cfg, model_entrypoint
from torch import nn

from ._integrity import CheckpointError, verify_file

StateDict = Dict[str, torch.Tensor]

WEIGHTS_SUFFIXES = ('.safetensors', '.pth', '.pth.tar', '.pt', '.bin', '.ckpt')
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class CheckpointMismatch(CheckpointError):
    """The checkpoint is of another model; state_dict is what it holds, under this model's names as far as known."""

    def __init__(self, message: str, state_dict: Optional[StateDict] = None) -> None:
        super().__init__(message)
        self.state_dict = state_dict


class UnsupportedModel(CheckpointMismatch):
    """The checkpoint is of a model that is known by name and not among those here."""


def frames_in_name(name: str) -> int:
    """Frames of the clips that a model of this name takes by default; 1 for images."""
    frames = re.search(r'_f(\d+)_', name)
    return int(frames[1]) if frames else 1


class Checkpoint(NamedTuple):
    """What a checkpoint file says of a model: its parameters and, if a training script wrote it, how it was made."""
    state_dict: StateDict
    path: Optional[Path] = None
    arch: Optional[str] = None
    args: Dict[str, Any] = {}  # the script's arguments

    def model_args(self) -> Dict[str, Any]:
        """Constructor arguments in which the trained model differs from its defaults, but for those of training alone.

        They are the ones that timm's train.py and ours give it.
        """
        kwargs = {k: v for k, v in (self.args.get('model_kwargs') or {}).items() if not k.endswith('_rate')}
        in_chans, *img_size = self.args.get('input_size') or [self.args.get('in_chans')]
        img_size = img_size or self.args.get('img_size')
        cfg = (get_pretrained_cfg(self.arch) if self.arch else None) or PretrainedCfg()
        told = dict(global_pool=self.args.get('gp'))
        if in_chans != cfg.input_size[0]:
            told['in_chans'] = in_chans
        if cfg.fixed_input_size and to_2tuple(img_size) != tuple(cfg.input_size[1:]):  # others are alike for all sizes
            told['img_size'] = img_size
        if self.args.get('num_frames') != frames_in_name(self.arch or ''):
            told['num_frames'] = self.args.get('num_frames')
        if self.args.get('num_classes') != cfg.num_classes:
            told['num_classes'] = self.args.get('num_classes')
        kwargs = {**{k: v for k, v in told.items() if v is not None}, **kwargs}
        return {k: tuple(v) if isinstance(v, list) else v for k, v in kwargs.items()}


def read_file(path: Union[str, Path]) -> Dict[str, Any]:
    """All that a checkpoint file holds: checksums compared, no code run, one error for everything that can be wrong.

    Args:
        path: safetensors by that suffix, or what torch.save wrote, whatever its suffix.

    Raises:
        CheckpointError: The file is missing, damaged, no checkpoint, or needs code to be read.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f'{path}: {"it is a folder, needs a file" if path.is_dir() else "there is no such file"}')
    with open(path, 'rb') as f:
        start = f.read(64)
    if start.startswith(b'version https://git-lfs'):
        raise CheckpointError(f'{path}: a pointer to a file in Git LFS, not the file; fetch that with `git lfs pull`')
    verify_file(path)
    try:
        if path.suffix == '.safetensors':
            content = load_file(path)
        else:
            # timm's training checkpoints hold their arguments
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = torch.load(path, map_location='cpu', weights_only=True)
    except pickle.UnpicklingError as e:
        unsafe = _unsafe_globals(path)
        raise CheckpointError(f'{path}: ' + (
            f'reading it would run code ({", ".join(unsafe)}), which is refused; it needs to hold tensors and plain '
            'values only' if unsafe else 'it is no checkpoint, or damaged')) from e
    except Exception as e:  # what a damaged file makes the unpickler raise is of any kind
        reason = (str(e).splitlines() or [''])[0]
        if 'weights_only' in reason:  # PyTorch advises to run the code in a file that is none of its own
            reason = ''
        raise CheckpointError(
            f'{path}: it is no checkpoint, or damaged ({f"{type(e).__name__} {reason}".strip()})') from e
    if not isinstance(content, dict) or not all(isinstance(k, str) for k in content):
        raise CheckpointError(f'{path}: it holds a {type(content).__name__}, needs a dict of parameters by name')
    return content


def _unsafe_globals(path: Path) -> List[str]:
    try:
        return torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    except Exception:  # damaged, or of a format that this does not know
        return []


def read_checkpoint(path: Union[str, Path], use_ema: bool = True) -> Checkpoint:
    """Read the parameters in a checkpoint file, bare or as training scripts and the models' authors wrap them.

    Args:
        path: As in `read_file`.
        use_ema: Take the averaged weights if it holds them beside others.

    Raises:
        CheckpointError: As `read_file`, or it holds no parameters, or one that is not finite.
    """
    path, content = Path(path), read_file(path)
    averaged = [content[k] for k in ('state_dict_ema', 'model_ema') if use_ema and isinstance(content.get(k), dict)]
    state_dict = unwrap_state_dict(averaged[0] if averaged else content)
    state_dict = {k: v for k, v in state_dict.items() if isinstance(v, torch.Tensor)}
    if not state_dict:
        raise CheckpointError(
            f'{path}: it holds no parameters, but {", ".join(map(str, list(content)[:5])) or "nothing"}')
    for k, v in state_dict.items():
        if v.is_meta or v.layout is not torch.strided:
            raise CheckpointError(f'{path}: {k} is {"without values" if v.is_meta else v.layout}, needs a dense tensor')
        # the sum, which is quicker, is finite for all but tensors of huge values
        if v.dtype in FLOATS and not v.sum().isfinite() and not v.isfinite().all():
            raise CheckpointError(f'{path}: {k} is not finite')
    arch, args = content.get('arch'), content.get('args')
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    args = args if isinstance(args, dict) else {}
    return Checkpoint(state_dict, path, arch if isinstance(arch, str) else args.get('model'), args)


def load_checkpoint(model: nn.Module, path: Union[str, Path], use_ema: bool = True) -> Checkpoint:
    """timm's function of this name with the checks of `read_checkpoint`, and with the filter of the model's family.

    Raises:
        CheckpointError: As `read_checkpoint`, or the file is of another model.
    """
    checkpoint = read_checkpoint(path, use_ema)
    load_weights(model, checkpoint)
    return checkpoint


def load_weights(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Put a checkpoint's parameters into a model, all of them or none.

    Raises:
        CheckpointError: It is of another model.
    """
    try:
        state_dict = map_names(checkpoint.state_dict, model)
        model.load_state_dict(refuse_mismatch(state_dict, model, strict=True))
    except Exception as e:  # a foreign file makes a filter raise anything
        raise CheckpointError(f'{checkpoint.path}: {explain(e)}') from e


def explain(error: Exception) -> str:
    """Why weights do not load, in one line."""
    lines = str(error).strip().splitlines() or ['']
    if lines[0].startswith('Error(s) in loading state_dict') and lines[1:]:
        return lines[1].strip()  # the first of them
    return lines[0] if type(error) in (RuntimeError, ValueError, CheckpointMismatch, UnsupportedModel) else (
        f'{type(error).__name__} {lines[0]}'.strip())


def map_names(state_dict: StateDict, model: nn.Module) -> StateDict:
    """The checkpoint under the model's names, by its family's checkpoint_filter_fn; unchanged for models of timm's.

    Raises:
        CheckpointMismatch: It is of another model.
    """
    module = sys.modules[model_entrypoint(model.pretrained_cfg['architecture']).__module__]
    if not module.__name__.startswith(__package__):
        return state_dict
    return module.checkpoint_filter_fn(dict(state_dict), model)


def unwrap_state_dict(state_dict: StateDict) -> StateDict:
    """The parameters of a checkpoint: bare or under 'model', 'module' or 'state_dict', names without those prefixes."""
    for key in ('state_dict', 'model', 'module'):
        if isinstance(state_dict.get(key), dict):
            return unwrap_state_dict(state_dict[key])
    return {k.removeprefix('model.'): v for k, v in clean_state_dict(state_dict).items()}


def refuse_mismatch(
        state_dict: StateDict,
        model: nn.Module,
        adaptable: Sequence[str] = (),
        strict: bool = False,
) -> StateDict:
    """Return state_dict, or refuse that of another model, in one line instead of a list of all its parameters.

    Args:
        state_dict: Parameters under the model's names.
        model: Model they are meant for.
        adaptable: Prefixes of parameters whose shapes the loader adapts later (classifier, input convolution).
        strict: Refuse it for any parameter that is missing or that the model does not have, too.

    Raises:
        CheckpointMismatch: Most of the model's parameters are not in state_dict, or one of them has another shape or is
            not of a floating point type that PyTorch computes with.
    """
    wanted = model.state_dict()
    missing, unexpected = [k for k in wanted if k not in state_dict], [k for k in state_dict if k not in wanted]
    problem: Optional[str] = None
    if 2 * len(missing) > len(wanted) or (strict and missing):
        problem = (
            f'{len(missing)} of {len(wanted)} parameters are missing, such as {missing[0]}; '
            f'it holds {unexpected[0] if unexpected else "nothing"} instead')
    elif strict and unexpected:
        problem = f'it has {len(unexpected)} parameters more, such as {unexpected[0]}'
    for k in wanted:
        if problem is None and k in state_dict:
            v, w = state_dict[k], wanted[k]
            if v.shape != w.shape and not k.startswith(tuple(adaptable)):
                problem = f'{k} is {tuple(v.shape)}, needs {tuple(w.shape)}'
            elif w.is_floating_point() and v.dtype not in FLOATS:
                problem = f'{k} is of type {v.dtype}, needs one of {", ".join(map(str, FLOATS))}'
    if problem:
        name = getattr(model, 'pretrained_cfg', {}).get('architecture') or type(model).__name__
        raise CheckpointMismatch(f'checkpoint: it is not of {name}: {problem}', state_dict)
    return state_dict
