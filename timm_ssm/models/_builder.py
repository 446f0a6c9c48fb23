"""timm's model builder with integrity checks: weights come verified, and errors say which file they are about."""
from typing import Any, Callable, Dict, List, Sequence, Union

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg as timm_build_model_with_cfg
from timm.models import load_pretrained, resolve_pretrained_cfg
from torch import nn

from ._checkpoints import FLOATS, StateDict, explain
from ._fetch import fetch_weights


def image_cfg(**kwargs) -> Dict[str, Any]:
    """The pretrained cfg of a classifier of ImageNet-1k at 224 pixels, where the arguments do not say otherwise."""
    return {
        'num_classes': 1000, 'input_size': (3, 224, 224), 'pool_size': (7, 7),
        'crop_pct': 0.875, 'interpolation': 'bicubic',
        'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'stem.0', 'classifier': 'head',
        **kwargs,
    }


def build_model_with_cfg(
        model_cls: Callable[..., nn.Module],
        variant: str,
        pretrained: bool,
        filter_fn: Callable[..., StateDict],
        filter_args: Sequence[str] = (),
        out_indices: Union[int, Sequence[int]] = 3,
        **kwargs,
) -> nn.Module:
    """timm's function of this name, which is given a pretrained model with its weights.

    The weights are fetched, verified and read once, by this package alone; timm adapts and loads what was read. Before
    anything is downloaded the constructor has seen the arguments.

    Args:
        filter_fn: Fits a checkpoint to the model.
        filter_args: Names of keyword arguments that are for filter_fn and not for the model.
        out_indices: With features_only, the blocks or stages to return features of; the last n if an int.

    Raises:
        RuntimeError: The weights cannot be fetched: one line that names the model, the file and the reason. Errors
            that name the file by themselves (a missing file, repository or permission) pass unchanged.
        ValueError: They are damaged or of another model.
    """
    filter_kwargs = {name: kwargs.pop(name) for name in filter_args if name in kwargs}

    def build_with_weights(**model_kwargs) -> nn.Module:
        model = model_cls(**model_kwargs)
        cfg = resolve_pretrained_cfg(variant, kwargs.get('pretrained_cfg'), kwargs.get('pretrained_cfg_overlay'))
        try:
            weights, origin = fetch_weights(cfg, kwargs.get('cache_dir'))
        except RuntimeError as e:
            raise RuntimeError(f'{variant}: {e}') from e
        # timm sets these two later, and filters ask for them
        model.pretrained_cfg = cfg.to_dict()
        model.pretrained_model_args = kwargs.get('pretrained_model_args') or {}
        try:
            load_pretrained(
                model,
                dict(model.pretrained_cfg, source='', state_dict=filter_fn(weights, model, **filter_kwargs)),
                num_classes=0 if kwargs.get('features_only') else model.num_classes,
                in_chans=model.in_chans,
            )
        except Exception as e:  # a foreign file makes filters and timm raise anything
            error = ValueError if isinstance(e, ValueError) else RuntimeError
            raise error(f'{variant}: cannot load {origin}: {explain(e)}') from e
        return model

    model = timm_build_model_with_cfg(
        build_with_weights if pretrained else model_cls,
        variant,
        False,
        feature_cfg=dict(out_indices=out_indices, feature_cls='getter'),
        **kwargs,
    )
    model.register_load_state_dict_pre_hook(_refuse_other_types)
    return model


def _refuse_other_types(
        model: nn.Module,
        state_dict: StateDict,
        prefix: str,
        local_metadata: Dict[str, Any],
        strict: bool,
        missing_keys: List[str],
        unexpected_keys: List[str],
        error_msgs: List[str],
) -> None:
    """Make load_state_dict, and with it timm's checkpoint_path, refuse what it would cast to floats without a word."""
    if local_metadata.get('assign_to_params_buffers'):
        return
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        given = state_dict.get(prefix + name)
        if given is not None and tensor.is_floating_point() and given.dtype not in FLOATS:
            error_msgs.append(f'{prefix}{name} is of type {given.dtype}, needs one of {", ".join(map(str, FLOATS))}')
