"""An authors' checkpoint to a folder that timm loads: model.safetensors, config.json and README.md."""
import shutil
import tempfile
from pathlib import Path
from typing import List, NamedTuple, Optional, Sequence

import timm
import torch
from torch import nn
from tqdm import tqdm

from ..models._checkpoints import load_weights, read_checkpoint
from ..models._integrity import save_weights
from ..zoo import cards
from ..zoo.registry import num_frames
from .checkpoints import Comparison, apply_training_settings, detect, find


class Conversion(NamedTuple):
    """What `convert` did."""
    folder: Path
    name: str  # pretrained tag if the file is a released one, otherwise the model
    certainty: str  # how the model was recognised, in words
    parameters: int
    difference: float  # largest between the logits before and after, over the largest logit


def convert(
        source: str,
        folder: Path,
        model: Optional[str] = None,
        label_names: Optional[List[str]] = None,
) -> Conversion:
    """Convert a checkpoint and prove the result: it is reloaded strictly and gives the same logits on a fixed input.

    Args:
        source: As `checkpoints.find`.
        folder: Folder to write, which must not exist or be empty; it appears only when everything is proven.
        model: Architecture of the checkpoint; recognised by names and shapes if None.
        label_names: Names of the classes, in order, for models of other data than ImageNet; if None those that the
            training script left in classes.txt beside its checkpoint, or those of the pretrained tag's dataset.

    Raises:
        ValueError: The checkpoint is damaged or of none of this package's models, or the folder is taken.
        RuntimeError: The download failed, or the result is not the same as the original.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f'folder: {folder} exists, needs a new or an empty one')
    with tqdm(total=6, disable=None, leave=False) as bar:
        def step(what: str) -> None:
            bar.update()
            bar.set_description(what)  # redraws, which update() does now and then only

        step('reading')
        found = find(source)
        checkpoint = read_checkpoint(found.path, use_ema=found.name is None)  # of released files, what was released
        step('recognising')
        match, certainty = detect(checkpoint, found, model)
        num_classes = match.kwargs.get('num_classes', timm.get_pretrained_cfg_value(match.name, 'num_classes'))
        name = found.name if _is_tag(found.name, match, num_classes) else match.name
        if label_names and len(label_names) != num_classes:
            raise ValueError(f'labels: got {len(label_names)} names, needs {num_classes}')
        step('building')
        original = timm.create_model(name, **match.kwargs).eval()
        load_weights(original, checkpoint)
        apply_training_settings(original, checkpoint)
        config = cards.model_config(name, original, match.kwargs, label_names)
        del checkpoint
        step('running')
        x = fixed_input(original, config['pretrained_cfg']['input_size'])
        expected = _run(original, x)
        if not torch.isfinite(expected).all():
            raise RuntimeError(f'{found.origin}: the logits are not finite')
        step('writing')
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f'.{folder.name}_', dir=folder.parent))
        try:
            (staging / 'config.json').write_text(cards.to_json(config), encoding='utf-8')
            (staging / 'README.md').write_text(cards.card(name, config, original), encoding='utf-8')
            save_weights(original.state_dict(), staging / 'model.safetensors')
            (staging / 'model.safetensors').chmod((staging / 'config.json').stat().st_mode)  # safetensors' is private
            step('reloading')
            reloaded = timm.create_model(f'local-dir:{staging}', pretrained=True).eval()
            difference = ((_run(reloaded, x) - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()
            if not difference <= 1e-5:
                raise RuntimeError(f'{found.origin}: the logits differ by {difference:.2g} after the conversion')
            staging.chmod(0o755)
            if folder.exists():
                folder.rmdir()
            staging.rename(folder)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    return Conversion(folder, name, certainty, sum(p.numel() for p in original.parameters()), difference)


def _is_tag(name: Optional[str], match: Comparison, num_classes: int) -> bool:
    """Whether the model that was recognised is the one of the pretrained tag that the file is called after."""
    return (
        name is not None and name.partition('.')[0] == match.name and set(match.kwargs) <= {'num_classes'}
        and num_classes == timm.get_pretrained_cfg_value(name, 'num_classes'))


def fixed_input(model: nn.Module, input_size: Sequence[int]) -> torch.Tensor:
    """One image or clip of the size (channels, height, width), always the same."""
    channels, height, width = input_size
    frames = [num_frames(model)] if num_frames(model) > 1 else []
    return torch.randn(1, channels, *frames, height, width, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def _run(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x).float()
