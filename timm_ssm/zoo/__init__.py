"""Facts about the models: published figures, counted figures, datasets and their classes, model cards."""
from .datasets import DATASETS, class_names
from .published import PUBLISHED
from .registry import counted, describe, list_names

__all__ = ['DATASETS', 'PUBLISHED', 'class_names', 'counted', 'describe', 'list_names']
