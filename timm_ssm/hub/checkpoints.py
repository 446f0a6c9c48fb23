"""Finding checkpoints of any origin, telling which model they are of, and rebuilding it."""
import json
import math
import re
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import timm
import torch
from huggingface_hub import HfApi, try_to_load_from_cache
from timm.layers import to_2tuple
from timm.models import get_pretrained_cfg, is_model, model_entrypoint, parse_model_name
from torch import nn
from tqdm import tqdm

from ..data.sampling import SAMPLING_ARGS
from ..models._checkpoints import (
    FLOATS,
    WEIGHTS_SUFFIXES,
    Checkpoint,
    CheckpointMismatch,
    StateDict,
    UnsupportedModel,
    load_weights,
    map_names,
)
from ..models._fetch import download, download_url, naming
from ..zoo.registry import list_names, meta_model, table


class Source(NamedTuple):
    """A checkpoint file: where it lies, where it is from (in words), the pretrained tag that it is if that is known."""
    path: Path
    origin: str
    name: Optional[str] = None


def find(source: str) -> Source:
    """A file, or one on the Hub, which is downloaded.

    Args:
        source: Path, pretrained tag ('videomamba_tiny_patch16_224.in1k'), or repository on the Hub with or without a
            file ('owner/name', 'owner/name/file.pth', 'owner/name@revision/file.pth').
    """
    path = Path(source)
    if path.is_file():
        return Source(path, path.name, _known_name('', path.name))
    if path.is_dir():
        raise ValueError(f'source: {source} is a folder, needs one of its files')
    repo = re.fullmatch(r'(?:hf-hub:)?([\w.-]+/[\w.-]+)(?:@([\w.-]+))?(?:/(.+))?', source)
    if '/' not in source and is_model(source):
        cfg = get_pretrained_cfg(source)
        if cfg is not None and cfg.url:
            return Source(download_url(cfg.url), cfg.url, source)
        if cfg is None or not cfg.hf_hub_id:
            raise ValueError(f'source: {source} has no pretrained weights')
        repo_id, revision, file = cfg.hf_hub_id, None, cfg.hf_hub_filename
    elif repo and not source.startswith(('/', '.')):
        repo_id, revision, file = repo.groups()
    else:
        raise ValueError(f'source: there is no file {source}, nor is that a pretrained tag or a repository on the Hub')
    file = file or _only_weights(repo_id, revision)
    with naming(f'{repo_id}/{file}', repo_id, file):
        return Source(download(repo_id, file, revision), f'{repo_id}/{file}', _known_name(repo_id, file))


def _only_weights(repo_id: str, revision: Optional[str]) -> str:
    with naming(repo_id, repo_id):
        files = [f for f in HfApi().list_repo_files(repo_id, revision=revision) if f.endswith(WEIGHTS_SUFFIXES)]
    files = [f for f in files if f == 'model.safetensors'] or files
    if len(files) != 1:
        raise ValueError(f'source: {repo_id} holds {", ".join(files) or "no weights"}; needs one, as {repo_id}/FILE')
    return files[0]


def _known_name(repo_id: str, file: str) -> Optional[str]:
    """The pretrained tag whose weights are in that file."""
    for name in list_names(pretrained=True):
        cfg = get_pretrained_cfg(name)
        if cfg.url:
            if cfg.url.endswith(f'/{file}') and not repo_id:
                return name
        elif cfg.hf_hub_filename:
            if cfg.hf_hub_filename == file and repo_id in ('', cfg.hf_hub_id):
                return name
        elif repo_id == cfg.hf_hub_id:
            return name
    return None


class Comparison(NamedTuple):
    """The names and shapes of a checkpoint beside those of a model."""
    name: str
    kwargs: Dict[str, Any]  # the model's, in which it differs from the defaults
    missing: List[str]  # names of the model
    unexpected: List[str]  # names of the checkpoint, under the model's naming where that is known
    wrong_shape: List[str]
    wrong_type: List[str]
    resampled: bool  # the model's filter changed the number of values

    @property
    def complete(self) -> bool:
        return self.problems() == 0

    def problems(self) -> int:
        return sum(map(len, (self.missing, self.unexpected, self.wrong_shape, self.wrong_type)))


def compare(name: str, kwargs: Dict[str, Any], state_dict: StateDict) -> Comparison:
    """Compare names and shapes of a checkpoint with those of a model.

    Raises:
        UnsupportedModel: The model's family knows the checkpoint by name, and that it is of no model here.
    """
    model = meta_model(name, **kwargs)
    shapes = {k: torch.empty(v.shape, dtype=v.dtype, device='meta') for k, v in state_dict.items()}
    try:
        mapped = map_names(shapes, model)
    except UnsupportedModel:
        raise
    except CheckpointMismatch as e:
        mapped = shapes if e.state_dict is None else e.state_dict
    except Exception:  # the filter met something that its family knows nothing of
        mapped = shapes
    wanted = model.state_dict()
    return Comparison(
        name,
        kwargs,
        missing=[k for k in wanted if k not in mapped],
        unexpected=[k for k in mapped if k not in wanted],
        wrong_shape=[
            f'{k}: {list(v.shape)}, needs {list(wanted[k].shape)}'
            for k, v in mapped.items() if k in wanted and v.shape != wanted[k].shape],
        wrong_type=[
            f'{k}: {v.dtype}, needs floating point numbers'
            for k, v in mapped.items() if k in wanted and wanted[k].is_floating_point() and v.dtype not in FLOATS],
        resampled=sum(v.numel() for v in shapes.values()) != sum(v.numel() for v in mapped.values()),
    )


def arguments(name: str, state_dict: StateDict) -> Dict[str, Any]:
    """The arguments in which a checkpoint's model differs from the architecture's defaults, as far as shapes tell."""
    cfg = get_pretrained_cfg(name, allow_unregistered=True) or meta_model(name).default_cfg
    cfg = cfg if isinstance(cfg, dict) else cfg.to_dict()
    kwargs = {}
    classifier = cfg.get('classifier') or 'head'
    classifier = classifier if isinstance(classifier, str) else classifier[0]
    # wherever the authors put it
    head = next((v for k, v in state_dict.items() if f'.{k}'.endswith(f'.{classifier}.weight')), None)
    num_classes = head.shape[0] if head is not None else 0
    if num_classes != cfg['num_classes']:
        kwargs['num_classes'] = num_classes
    first_conv = cfg.get('first_conv')
    conv = state_dict.get(f'{first_conv}.weight') if isinstance(first_conv, str) else None
    if conv is not None and conv.ndim >= 4 and conv.shape[1] != cfg['input_size'][0]:
        kwargs['in_chans'] = conv.shape[1]
    return kwargs


def image_size(name: str, kwargs: Dict[str, Any], state_dict: StateDict) -> Dict[str, Any]:
    """As `arguments`, for the square image size that the number of position embeddings speaks of."""
    model = meta_model(name, **kwargs)
    pos_embed, patch_embed = state_dict.get('pos_embed'), getattr(model, 'patch_embed', None)
    if pos_embed is None or pos_embed.ndim != 3 or not hasattr(patch_embed, 'grid_size'):
        return {}
    tokens = pos_embed.shape[1] - model.num_prefix_tokens
    side = math.isqrt(max(tokens, 0))
    if side ** 2 != tokens or tuple(patch_embed.grid_size) == (side, side):
        return {}
    patch = patch_embed.patch_size[0]
    stride = getattr(patch_embed, 'stride', None) or patch
    stride = stride if isinstance(stride, int) else stride[0]
    return dict(img_size=(side - 1) * stride + patch)


def detect(checkpoint: Checkpoint, source: Source, model: Optional[str] = None) -> Tuple[Comparison, str]:
    """The model that a checkpoint is of, complete, and in words how certain that is.

    Args:
        checkpoint: What the file holds.
        source: Where it is from.
        model: Its architecture, if that is known.

    Raises:
        ValueError: It is of none of this package's models, not of `model`, or of several alike; with a short table of
            the names that do not fit.
    """
    if model and not is_model(model):
        raise ValueError(f'model: there is no {model}, see `timm-ssm list --all`')
    state_dict = checkpoint.state_dict
    for name, why in (
            (model, 'as told'),
            (source.name, (
                f'certain, {source.origin} is the released file' if '/' in source.origin else
                f'likely, all names and shapes fit and the released file is called {source.origin} too')),
            (checkpoint.arch, 'certain, the checkpoint names it')):
        if name and is_model(name):
            found = _compare_with_arguments(name.partition('.')[0], state_dict, checkpoint.model_args())
            if found.complete:
                return found, why
            if name == model:
                raise ValueError(f'{source.origin} is not of {found.name}:\n{_misfits(found)}')

    # first the families that name their parameters so, by a small model of each, then the models of these
    found = {n: _shared_names(compare(n, arguments(n, state_dict), state_dict)) for n in _representatives()}
    alike = [n for n, shared in found.items() if shared >= min(.5, max(found.values()))]
    modules = {model_entrypoint(n).__module__ for n in alike}
    candidates = [n for n in list_names() if model_entrypoint(n).__module__ in modules]
    compared = [
        _compare_with_arguments(n, state_dict)
        for n in tqdm(candidates, desc='comparing names and shapes', leave=False, disable=None)]
    complete = sorted((c for c in compared if c.complete), key=_rank)
    if not complete:
        nearest = min(compared, key=Comparison.problems)
        raise ValueError(f'{source.origin} is of none of the models here; {nearest.name} is the nearest:\n'
                         f'{_misfits(nearest)}')
    best = [c for c in complete if _rank(c) == _rank(complete[0])]
    n = len(state_dict)
    if len(best) == 1:
        how = 'its position embedding is resampled' if best[0].resampled else 'no other model has them'
        sure = 'likely' if best[0].resampled else 'certain'
        return best[0], f'{sure}, all {n} names and shapes fit and {how}'
    words = set(re.split('[^a-z0-9]+', source.origin.lower()))
    named = [c for c in best if c.name.partition('_')[0] in words]
    others = ', '.join(c.name for c in best)
    if len(named) == 1:
        return named[0], f'likely, names and shapes fit {others} alike and the file is called {source.origin}'
    raise ValueError(f'{source.origin} fits {others} alike; say which it is with --model')


def create_model(name: str, **kwargs) -> nn.Module:
    """timm's function of this name, which takes from a config.json how clips were sampled, too."""
    model = timm.create_model(name, **kwargs)
    source, where = parse_model_name(name)
    if source == 'local-dir':
        path = Path(where, 'config.json')
    elif source == 'hf-hub':  # where timm has just put it
        repo_id, _, revision = where.partition('@')
        path = try_to_load_from_cache(repo_id, 'config.json', kwargs.get('cache_dir'), revision or None)
    else:
        return model
    if sampling := json.loads(Path(path).read_text(encoding='utf-8')).get('clip_args'):
        model.clip_args = sampling
    return model


def rebuild(checkpoint: Checkpoint, model: Optional[str] = None, **kwargs) -> nn.Module:
    """The model that a training script saved, with its weights; its pretrained_cfg describes its images and classes.

    Another architecture than the checkpoint names gets none of the script's arguments; kwargs that are not None win.

    Raises:
        ValueError: No architecture is known, or the weights are not of it.
    """
    name = model or checkpoint.arch
    if name is None:
        raise ValueError(f'{checkpoint.path}: it does not say which model it is of')
    told = checkpoint.model_args() if name == checkpoint.arch else {}
    rebuilt = timm.create_model(name, **{**told, **{k: v for k, v in kwargs.items() if v is not None}})
    load_weights(rebuilt, checkpoint)
    apply_training_settings(rebuilt, checkpoint)
    return rebuilt


def apply_training_settings(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Record in a model how its training script prepared images, sampled clips and called the classes.

    The names of the classes are in the file classes.txt that the script leaves beside its checkpoints.
    """
    if not checkpoint.args:
        return
    args, img_size = dict(checkpoint.args), checkpoint.model_args().get('img_size')
    if img_size:
        args['input_size'] = (model.in_chans, *to_2tuple(img_size))
    settings = timm.data.resolve_data_config(args, model=model)
    if args.get('clip_sampling'):
        model.clip_args = {key: args.get(key) for key in (*SAMPLING_ARGS, 'clip_windows')}
    classes = checkpoint.path.parent / 'classes.txt' if checkpoint.path else None
    if classes and classes.exists():
        settings['label_names'] = read_lines(classes)
        if len(settings['label_names']) != model.num_classes:
            raise ValueError(f'{classes}: got {len(settings["label_names"])} names, needs {model.num_classes}')
    model.pretrained_cfg = {**model.pretrained_cfg, **settings, 'num_classes': model.num_classes}
    model.pretrained_cfg.pop('tag', None)  # it is of other weights


def read_lines(path: Path) -> List[str]:
    """The lines of a text file, but for empty ones."""
    return [line.strip() for line in Path(path).read_text(encoding='utf-8').splitlines() if line.strip()]


def _rank(c: Comparison) -> Tuple[bool, int, int]:
    """The less a model has to be changed to take the checkpoint, the likelier it is."""
    size = get_pretrained_cfg(c.name).input_size[1]
    return c.resampled, len(c.kwargs), abs(c.kwargs.get('img_size', size) - size)


def _compare_with_arguments(
        name: str,
        state_dict: StateDict,
        model_args: Optional[Dict[str, Any]] = None,
) -> Comparison:
    kwargs = {**arguments(name, state_dict), **(model_args or {})}
    plain = compare(name, kwargs, state_dict)
    size = image_size(name, kwargs, state_dict) if plain.resampled or not plain.complete else {}
    sized = compare(name, {**kwargs, **size}, state_dict) if size else plain
    return sized if sized.complete and not sized.resampled else plain


def _representatives() -> List[str]:
    """One small model of each family."""
    first: Dict[str, str] = {}
    for name in sorted(list_names(), key=lambda n: 'tiny' not in n):
        first.setdefault(model_entrypoint(name).__module__, name)
    return list(first.values())


def _shared_names(c: Comparison) -> float:
    """How much of a model's names the checkpoint has, whatever the number of layers and their shapes."""
    def patterns(names) -> set:
        return {re.sub(r'\d+', '#', n) for n in names}

    wanted = meta_model(c.name, **c.kwargs).state_dict()
    return len(patterns(set(wanted) - set(c.missing))) / len(patterns(wanted))


def _misfits(c: Comparison, rows: int = 4) -> str:
    """A short table of the names that do not fit; those that differ by numbers only are counted together."""
    lines = []
    for what, names in (
            ('missing', c.missing), ('unknown', c.unexpected), ('of another shape', c.wrong_shape),
            ('of another type', c.wrong_type)):
        groups: Dict[str, List[str]] = {}
        for name in names:
            groups.setdefault(re.sub(r'\d+', '#', name.partition(':')[0]), []).append(name)
        lines += [[what, str(len(group)), group[0]] for group in list(groups.values())[:rows]]
        if rest := list(groups.values())[rows:]:
            lines.append([what, str(sum(map(len, rest))), 'others'])
    return table(lines, ['parameters', 'number', 'such as'], right=(1,))
