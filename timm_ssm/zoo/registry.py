"""The models of this package with their facts: tags, figures, licences, cached files."""
import fnmatch
import functools
import json
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import timm
import torch
from huggingface_hub import try_to_load_from_cache
from timm.models import get_pretrained_cfg, model_entrypoint
from timm.models._hub import get_cache_dir
from torch import nn

import timm_ssm  # noqa: F401  registers the models

from ..models._checkpoints import frames_in_name
from .datasets import trained_on
from .published import PUBLISHED, Published


@functools.cache
def counted() -> Dict[str, Tuple[int, float]]:
    """Parameters and GMACs of every model with tag, as `python -m timm_ssm.zoo` counted them."""
    counts = json.loads(Path(__file__).with_name('counted.json').read_text(encoding='utf-8'))
    return {name: (params, gmacs) for name, (params, gmacs) in counts.items()}


def list_names(
        filters: Optional[List[str]] = None,
        pretrained: bool = False,
        include_tags: Optional[bool] = None,
) -> List[str]:
    """Names of this package's models, as timm.list_models, that match any of the shell-style filters, if there are."""
    names = [
        n for n in timm.list_models(pretrained=pretrained, include_tags=include_tags)
        if model_entrypoint(n.partition('.')[0]).__module__.startswith('timm_ssm.')]
    return [n for n in names if not filters or any(fnmatch.fnmatch(n, f) for f in filters)]


@functools.cache
def meta_model(name: str, **kwargs) -> nn.Module:
    """The model without storage for its parameters; always the same one."""
    return timm.create_model(name, device=torch.device('meta'), **kwargs)


def num_frames(model: nn.Module) -> int:
    """Frames of the clips that a model takes; 1 for images."""
    return getattr(getattr(model, 'patch_embed', None), 'num_frames', 1)


def clip_args(model: nn.Module) -> Dict[str, Any]:
    """How the clips that a model was trained on were sampled, as arguments of train.py.

    They are its attribute of this name, from a checkpoint of training or a config.json, or else its tag's.
    """
    ssv2 = trained_on(model.pretrained_cfg.get('tag') or '')[-1:] == ['ssv2']
    by_tag = dict(num_frames=num_frames(model), clip_sampling='ssv2' if ssv2 else 'sparse')
    return getattr(model, 'clip_args', by_tag)


def input_shape(name: str) -> Tuple[int, ...]:
    """What a model or pretrained tag takes: (channels, height, width), or (channels, frames, height, width)."""
    size, frames = tuple(get_pretrained_cfg(name).input_size), frames_in_name(name)
    return (size[0], frames, *size[1:]) if frames > 1 else size


def cached_file(name: str) -> Optional[Path]:
    """Where the Hub's cache, or timm's for files from elsewhere, holds the weights of a pretrained tag; None if not."""
    cfg = get_pretrained_cfg(name)
    if cfg.url:
        path = Path(get_cache_dir()) / cfg.url.rpartition('/')[2]
        return path if path.exists() else None
    for file in [cfg.hf_hub_filename] if cfg.hf_hub_filename else ['model.safetensors', 'pytorch_model.bin']:
        path = try_to_load_from_cache(cfg.hf_hub_id, file)
        if isinstance(path, str):
            return Path(path)
    return None


def describe(name: str) -> Dict[str, Any]:
    """A model with its tag as a row of `timm-ssm list`."""
    cfg = get_pretrained_cfg(name)
    published = PUBLISHED.get(name, Published(None, None, ''))
    params, gmacs = counted()[name]
    return dict(
        name=name if cfg.has_weights else name.partition('.')[0],
        top1=published.top1,
        params=params,
        gmacs=gmacs,
        published_gmacs=published.gmacs,
        input_size=input_shape(name),
        license=cfg.license,
        cached=cfg.has_weights and cached_file(name) is not None,
    )


def table(rows: List[List[str]], header: List[str], right: Sequence[int] = ()) -> str:
    """Rows under a header, in columns; those in `right` are aligned to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    return '\n'.join(
        '  '.join(c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths))).rstrip()
        for row in [header, ['-' * w for w in widths], *rows])
