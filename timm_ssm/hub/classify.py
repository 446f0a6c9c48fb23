"""Images to class names and probabilities."""
import io
import urllib.request
from pathlib import Path
from typing import Any, Iterator, List, Tuple

import timm
import torch
from PIL import Image
from timm.data import CustomDatasetInfo, ImageNetInfo, create_transform, infer_imagenet_subset, resolve_data_config
from timm.data.readers.img_extensions import get_img_extensions
from torch import nn
from tqdm import tqdm

import timm_ssm  # noqa: F401  registers the models

from ..models._checkpoints import read_checkpoint
from ..zoo.datasets import tag_class_names
from ..zoo.registry import num_frames
from .checkpoints import rebuild


def load_model(name: str, device: str = 'cpu') -> nn.Module:
    """A model for images with its weights.

    Args:
        name: Pretrained tag, 'hf-hub:owner/name', a folder that `timm-ssm convert` wrote, or a checkpoint of training.
        device: Where to put it.
    """
    path = Path(name.removeprefix('local-dir:'))
    if path.is_file():
        model = rebuild(read_checkpoint(path))
    else:
        model = timm.create_model(f'local-dir:{path}' if path.is_dir() else name, pretrained=True)
    if num_frames(model) > 1:
        raise ValueError(f'model: {name} takes clips of {num_frames(model)} frames, needs one that takes images')
    return model.eval().to(device)


def class_names(model: nn.Module) -> List[str]:
    """Names of a model's classes: its own, those of its tag's dataset, ImageNet's, or numbers."""
    cfg = model.pretrained_cfg
    names = tag_class_names(cfg.get('tag') or '')
    if cfg.get('label_names'):
        info = CustomDatasetInfo(cfg['label_names'], cfg.get('label_descriptions'))
    elif names and len(names) == model.num_classes:
        return list(names)
    elif subset := infer_imagenet_subset(model):
        info = ImageNetInfo(subset)
    else:
        return [f'class {i}' for i in range(model.num_classes)]
    return [info.index_to_description(i) for i in range(model.num_classes)]


def find_images(sources: List[str]) -> List[str]:
    """Files and URLs as they are, folders as the images in them, in order."""
    suffixes = get_img_extensions()
    found = []
    for source in sources:
        if not source.startswith(('http://', 'https://')) and Path(source).is_dir():
            images = sorted(str(p) for p in Path(source).rglob('*') if p.suffix.lower() in suffixes)
            if not images:
                raise ValueError(f'image: there are no images in {source}')
            found += images
        else:
            found.append(source)
    return found


def open_image(source: str, mode: str = 'RGB') -> Image.Image:
    """An image file or URL in one of Pillow's modes.

    Raises:
        ValueError: It cannot be opened.
    """
    try:
        if source.startswith(('http://', 'https://')):
            request = urllib.request.Request(source, headers={'User-Agent': 'timm-ssm'})
            with urllib.request.urlopen(request, timeout=30) as reply:
                return Image.open(io.BytesIO(reply.read())).convert(mode)
        with Image.open(source) as image:
            return image.convert(mode)
    except Exception as e:  # Pillow's readers raise anything on damaged files
        raise ValueError(f'image: cannot open {source} ({type(e).__name__}: {e})') from e


@torch.inference_mode()
def classify(
        model: nn.Module,
        sources: List[str],
        topk: int = 5,
        batch_size: int = 16,
) -> Iterator[Tuple[str, Any]]:
    """The likeliest classes of each image.

    Args:
        model: Image classifier.
        sources: Files and URLs.
        topk: Classes to give.
        batch_size: Images to run at once.

    Yields:
        The source, and a list of dicts (index, name, probability), the likeliest first; or a ValueError where the image
        cannot be opened.
    """
    config = resolve_data_config(model=model)
    transform = create_transform(**config)
    names, mode = class_names(model), 'L' if config['input_size'][0] == 1 else 'RGB'
    device = next(model.parameters()).device
    with tqdm(total=len(sources), unit='image', disable=None, leave=False) as bar:
        for start in range(0, len(sources), batch_size):
            batch = sources[start:start + batch_size]
            images = [_try_open(source, mode, transform) for source in batch]
            good = [x for x in images if isinstance(x, torch.Tensor)]
            if good:
                top = model(torch.stack(good).to(device)).float().softmax(-1).topk(min(topk, len(names)))
                rows = iter(zip(top.values.tolist(), top.indices.tolist()))
            for source, image in zip(batch, images):
                if isinstance(image, ValueError):
                    yield source, image
                else:
                    yield source, [
                        dict(index=i, name=names[i], probability=round(p, 6)) for p, i in zip(*next(rows))]
            bar.update(len(batch))


def _try_open(source: str, mode: str, transform) -> Any:
    try:
        return transform(open_image(source, mode))
    except ValueError as e:
        return e
