"""What the page shows of a model: its classes, where it looked, how long it took and on what."""
import functools
import time
from typing import Dict, List, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn

from ..analysis import overlay, rollout, to_pixels
from ..hub.classify import class_names, create_opener, load_model
from ..ops.backends import used_backends

TOPK = 5


class Prediction(NamedTuple):
    """What a model says of an image or clip."""
    classes: Dict[str, float]  # probabilities of the likeliest, in order
    pictures: List[Image.Image]  # each frame that the model was given, beside itself under the rollout
    why_not: str  # there is no rollout, and the pictures are the frames alone
    seconds: float  # of the forward pass
    rollout_seconds: float
    backend: str


@functools.lru_cache(maxsize=4)
def get_model(name: str, device: str) -> nn.Module:
    """A model with its weights, as `load_model` names it."""
    return load_model(name, device)


@torch.inference_mode()
def predict(name: str, path: str, device: str = 'cpu') -> Prediction:
    """Classify an image or clip with the model that takes it.

    Args:
        name: Model, as for `load_model`.
        path: File that `kind_of` has accepted.
        device: Where the model runs.

    Raises:
        ValueError: The file is damaged.
    """
    model = get_model(name, device)
    x = create_opener(model)(path)[None].to(device)
    model(x)  # what only the first run does is not counted
    with used_backends() as used:
        start = time.perf_counter()
        probabilities = model(x).float().softmax(-1)[0].cpu()
        seconds = time.perf_counter() - start
    top, names = probabilities.topk(min(TOPK, len(probabilities))), class_names(model)
    # two classes of ImageNet are cranes
    labels = [names[i] if names.count(names[i]) == 1 else f'{names[i]} ({i})' for i in top.indices.tolist()]
    pictures, why_not = to_pixels(model, x), ''
    start = time.perf_counter()
    try:
        pictures = np.concatenate([pictures, overlay(pictures, rollout(model, x))], -2)
    except ValueError as e:
        why_not = str(e)
    return Prediction(
        dict(zip(labels, top.values.tolist())),
        [Image.fromarray(p) for p in pictures.reshape(-1, *pictures.shape[-3:])],
        why_not,
        seconds,
        time.perf_counter() - start,
        ', '.join(sorted(used)) or 'PyTorch, as the model has no scans',
    )
