"""Patches for other versions of timm and Pillow; each is deleted when its reason is gone."""
import functools
from typing import Any, Optional

import torch
from PIL import Image
from timm.data import auto_augment

try:
    from timm.models._input import update_model_input_size
except ImportError:  # timm < 1.0.31 keeps no record of a model's current input size
    def update_model_input_size(model, img_size, **model_args) -> None:
        """Do nothing."""

__all__ = ['mend_device_ids', 'mend_posterize', 'update_model_input_size']


def posterize(img: Image.Image, bits_to_keep: int, **kwargs: Any) -> Image.Image:
    """timm's op, and a black image where no bits are kept."""
    if bits_to_keep < 1:
        return auto_augment.brightness(img, 0.)
    return auto_augment.posterize(img, bits_to_keep, **kwargs)


def mend_posterize() -> None:
    """Let timm's augmentations (AutoAugment, RandAugment, AugMix) keep 0 bits of a pixel.

    From a magnitude of 10 on, which noise reaches in the papers' `rand-m9-mstd0.5-inc1`, timm 1.0.31 posterizes to
    0 bits. This gave a black image until Pillow 13, which raises a ValueError. Does nothing where timm's op works.
    """
    try:
        auto_augment.posterize(Image.new('L', (1, 1)), 0)
    except ValueError:
        # our function by its own name: processes that load data find it by import, whichever way they are started
        ops = {name: posterize for name, op in auto_augment.NAME_TO_OP.items() if op is auto_augment.posterize}
        auto_augment.NAME_TO_OP.update(ops)


def mend_device_ids() -> None:
    """Let timm's train.py run in several processes on CPUs.

    It names its device to DistributedDataParallel, which takes devices of GPUs only (timm 1.0.31).
    """
    from timm import task

    def without_cpus(prepare):
        @functools.wraps(prepare)
        def prepare_distributed(self, device_ids: Optional[list] = None, **kwargs: Any):
            if device_ids and all(torch.device(d).type == 'cpu' for d in device_ids):
                device_ids = None
            return prepare(self, device_ids=device_ids, **kwargs)
        return prepare_distributed

    for kind in vars(task).values():
        if isinstance(kind, type) and 'prepare_distributed' in vars(kind):
            kind.prepare_distributed = without_cpus(kind.prepare_distributed)
