"""The models of this package, and what is known about their pretrained tags."""
import fnmatch
from pathlib import Path
from typing import Any, Dict, List, Optional

import timm
import torch
from huggingface_hub import try_to_load_from_cache
from timm.models import get_pretrained_cfg, model_entrypoint
from torch import nn

import timm_ssm  # noqa: F401  registers the models

from ..models.published import PUBLISHED, Published

# what a pretrained tag says about the training data, by its parts
DATASETS = {
    'in1k': 'ImageNet-1k',
    'in21k': 'ImageNet-21k',
    'k400': 'Kinetics-400',
    'ssv2': 'Something-Something V2',
    'breakfast': 'Breakfast',
}


def list_names(filters: Optional[List[str]] = None, pretrained: bool = False) -> List[str]:
    """Names of this package's models, or of their pretrained tags, that match one of the shell-style filters."""
    names = [
        n for n in timm.list_models(pretrained=pretrained)
        if model_entrypoint(n.partition('.')[0]).__module__.startswith('timm_ssm.')]
    return [n for n in names if not filters or any(fnmatch.fnmatch(n, f) for f in filters)]


def meta_model(name: str, **kwargs) -> nn.Module:
    """The model without storage for its parameters."""
    return timm.create_model(name, device=torch.device('meta'), **kwargs)


def datasets(tag: str) -> List[str]:
    """The data sets of a pretrained tag: 'in21k_ft_in1k' was trained on ImageNet-21k, then on ImageNet-1k."""
    return [DATASETS[part] for part in tag.split('_') if part in DATASETS]


def cached_file(name: str) -> Optional[Path]:
    """Where the Hub's cache holds the weights of a pretrained tag; None if it does not."""
    cfg = get_pretrained_cfg(name)
    for file in [cfg.hf_hub_filename] if cfg.hf_hub_filename else ['model.safetensors', 'pytorch_model.bin']:
        path = try_to_load_from_cache(cfg.hf_hub_id, file)
        if isinstance(path, str):
            return Path(path)
    return None


def describe(name: str) -> Dict[str, Any]:
    """A pretrained tag as a row of `timm-ssm list`."""
    cfg = get_pretrained_cfg(name)
    published = PUBLISHED.get(name, Published(None, None, ''))
    return dict(
        name=name,
        top1=published.top1,
        params=sum(p.numel() for p in meta_model(name).parameters()),
        gmacs=published.gmacs,
        input_size=tuple(cfg.input_size),
        license=cfg.license,
        cached=cached_file(name) is not None,
    )


def table(rows: List[List[str]], header: List[str]) -> str:
    """Rows under a header, in columns; all but the first are right-aligned."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [
        '  '.join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths))).rstrip()
        for row in [header, ['-' * w for w in widths], *rows]]
    return '\n'.join(lines)
