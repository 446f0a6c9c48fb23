"""Images and videos to class names and probabilities."""
import io
import urllib.request
from pathlib import Path
from typing import Any, Callable, Iterator, List, Tuple

import numpy as np
import torch
from PIL import Image
from timm.data import CustomDatasetInfo, ImageNetInfo, create_transform, infer_imagenet_subset, resolve_data_config
from timm.data.readers.img_extensions import get_img_extensions
from torch import nn
from tqdm import tqdm

import timm_ssm  # noqa: F401  registers the models

from ..data import ClipError, EvalTransform, FrameSampler, Video
from ..data.decode import check_decoder
from ..data.readers import VIDEO_SUFFIXES
from ..models._checkpoints import read_checkpoint
from ..zoo.datasets import tag_class_names
from ..zoo.registry import clip_args, num_frames
from .checkpoints import create_model, rebuild


def load_model(name: str, device: str = 'cpu') -> nn.Module:
    """A model for images or clips, with its weights.

    Args:
        name: Pretrained tag, 'hf-hub:owner/name', a folder that `timm-ssm convert` wrote, or a checkpoint of training.
        device: Where to put it.
    """
    path = Path(name.removeprefix('local-dir:'))
    if path.is_file():
        model = rebuild(read_checkpoint(path))
    else:
        model = create_model(f'local-dir:{path}' if path.is_dir() else name, pretrained=True)
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


def takes(model: nn.Module) -> str:
    """What a model classifies, 'image' or 'video'."""
    return 'video' if num_frames(model) > 1 else 'image'


def find_files(model: nn.Module, sources: List[str]) -> List[str]:
    """Files and URLs as they are, folders as the images or videos in them, in order."""
    kind = takes(model)
    suffixes = get_img_extensions() if kind == 'image' else VIDEO_SUFFIXES
    found = []
    for source in sources:
        if not source.startswith(('http://', 'https://')) and Path(source).is_dir():
            files = sorted(str(p) for p in Path(source).rglob('*') if p.suffix.lower() in suffixes)
            if not files:
                raise ValueError(f'{kind}: there are no {kind}s in {source}')
            found += files
        else:
            found.append(source)
    return found


def fetch(url: str) -> bytes:
    request = urllib.request.Request(url, headers={'User-Agent': 'timm-ssm'})
    with urllib.request.urlopen(request, timeout=30) as reply:
        return reply.read()


def open_image(source: str, mode: str = 'RGB') -> Image.Image:
    """An image file or URL in one of Pillow's modes.

    Raises:
        ValueError: It cannot be opened.
    """
    try:
        if source.startswith(('http://', 'https://')):
            return to_mode(Image.open(io.BytesIO(fetch(source))), mode)
        with Image.open(source) as image:
            return to_mode(image, mode)
    except Exception as e:  # Pillow's readers raise anything on damaged files
        raise ValueError(f'image: cannot open {source} ({type(e).__name__}: {e})') from e


def to_mode(image: Image.Image, mode: str) -> Image.Image:
    """An image in one of Pillow's modes; of 16 bits a pixel the upper 8 are kept, where Pillow clips."""
    if image.mode.startswith('I') and image.getextrema()[1] > 255:
        image = Image.fromarray((np.asarray(image) / 257).clip(0, 255).round().astype('uint8'))
    return image.convert(mode)


def open_clip(source: str, sampler: FrameSampler, transform: EvalTransform) -> torch.Tensor:
    """The one clip (C, T, H, W) that a video file or URL is validated on, uint8.

    Raises:
        ValueError: It cannot be opened.
    """
    try:
        video = Video(fetch(source) if source.startswith(('http://', 'https://')) else source, cache='')
        frames = sampler.val(video.num_frames, video.times)
        return transform(video.read(frames, transform.resize))[0].transpose(0, 1)
    except (ClipError, OSError) as e:
        raise ValueError(f'video: cannot open {source} ({e})') from e


def create_opener(model: nn.Module) -> Callable[[str], torch.Tensor]:
    """What turns a file or URL into a model's input; a ValueError where it cannot."""
    config = resolve_data_config(model=model)
    if takes(model) == 'image':
        transform, mode = create_transform(**config), 'L' if config['input_size'][0] == 1 else 'RGB'
        return lambda source: transform(open_image(source, mode))
    check_decoder('pyav')
    sampler = FrameSampler.from_args(clip_args(model))
    transform = EvalTransform(config['input_size'][-1], crop_pct=config['crop_pct'])
    mean, std = (torch.tensor(config[name]).view(-1, 1, 1, 1) for name in ('mean', 'std'))
    return lambda source: (open_clip(source, sampler, transform) / 255 - mean) / std


@torch.inference_mode()
def classify(model: nn.Module, sources: List[str], topk: int = 5, batch_size: int = 16) -> Iterator[Tuple[str, Any]]:
    """The likeliest classes of each image or video.

    Args:
        model: Classifier of images or clips.
        sources: Files and URLs.
        topk: Classes to give.
        batch_size: Images or clips to run at once.

    Yields:
        The source, and a list of dicts (index, name, probability), the likeliest first; or a ValueError where it cannot
        be opened.
    """
    opener, names = create_opener(model), class_names(model)
    device = next(model.parameters()).device
    with tqdm(total=len(sources), unit=takes(model), disable=None, leave=False) as bar:
        for start in range(0, len(sources), batch_size):
            batch = sources[start:start + batch_size]
            images = [_try_open(opener, source) for source in batch]
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


def _try_open(opener: Callable[[str], torch.Tensor], source: str) -> Any:
    try:
        return opener(source)
    except ValueError as e:
        return e
