"""What pretrained tags say of the datasets, and the names of their classes."""
import functools
import json
from pathlib import Path
from typing import Dict, List, Optional, Tuple

from ..models._datasets import DATASETS, Dataset

__all__ = ['DATASETS', 'Dataset', 'class_names', 'tag_class_names', 'trained_on']


def trained_on(tag: str) -> List[str]:
    """Keys of the datasets that a pretrained tag names: 'in21k_ft_in1k' is of ImageNet-21k, then of ImageNet-1k."""
    return [part for part in tag.split('_') if part in DATASETS]


def class_names(dataset: str) -> Tuple[str, ...]:
    """Names of a dataset's classes, in the order of the released models' outputs.

    Kinetics-400's order is that of the released VideoMamba weights, which is not the alphabetical one. Breakfast's has
    not been verified against released weights. class_names.json says where each is from.

    Args:
        dataset: 'k400', 'ssv2', 'hmdb51' or 'breakfast'; ImageNet's names come with timm, as `timm.data.ImageNetInfo`.
    """
    known = _class_lists()
    if dataset not in known:
        raise ValueError(f'dataset: got {dataset!r}, needs one of {", ".join(map(repr, known))}')
    return known[dataset]


def tag_class_names(tag: str) -> Optional[Tuple[str, ...]]:
    """Names of the classes that a pretrained tag's weights tell apart; None for ImageNet's and unknown ones."""
    datasets = trained_on(tag)
    return _class_lists().get(datasets[-1]) if datasets else None


@functools.cache
def _class_lists() -> Dict[str, Tuple[str, ...]]:
    content = json.loads(Path(__file__).with_name('class_names.json').read_text(encoding='utf-8'))
    return {dataset: tuple(entry['names']) for dataset, entry in content.items()}
