"""timm's model builder, and what it leaves open about weights: damaged files are noticed, errors say which file."""
import pickle
import traceback
from functools import partial
from pathlib import Path
from typing import Callable, Dict, Optional, Sequence

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import LocalEntryNotFoundError
from timm.models import build_model_with_cfg as timm_build_model_with_cfg
from timm.models import load_pretrained, resolve_pretrained_cfg
from torch import nn

from ._files import check_download, check_file

__all__ = ['build_isotropic', 'build_model_with_cfg']


def build_model_with_cfg(model_cls, variant: str, pretrained: bool, **kwargs) -> nn.Module:
    """timm's function of this name.

    Files that this call downloads from the Hub are held to the SHA-256 that the Hub gives for them (huggingface_hub
    compares sizes only) and deleted from the cache if they are damaged; local files to the checksums they carry.

    Raises:
        RuntimeError: The weights cannot be fetched or read: one line that names the model, the file and the reason.
            Errors that name the file by themselves (a missing file, repository or permission) pass unchanged.
        ValueError: They are damaged or of another model.
    """
    if not pretrained:
        return timm_build_model_with_cfg(model_cls, variant, pretrained, **kwargs)
    cfg = resolve_pretrained_cfg(variant, kwargs.get('pretrained_cfg'), kwargs.get('pretrained_cfg_overlay'))
    weights = _Weights(cfg, kwargs.get('cache_dir'))
    try:
        weights.check_local()
        cached_before = weights.cached()
        try:
            return timm_build_model_with_cfg(model_cls, variant, pretrained, **kwargs)
        finally:
            for name, link in weights.cached().items():
                if cached_before.get(name) != link:
                    check_download(link)
    except Exception as e:
        if weights.name in str(e) or not _is_about_weights(e):
            raise
        kind = ValueError if _is_of_a_filter(e) else RuntimeError
        raise kind(f'{variant}: cannot load {weights.describe()}: {weights.explain(e)}') from e


class _Weights:
    """The file that a pretrained cfg leads to."""

    def __init__(self, cfg, cache_dir: Optional[str]) -> None:
        self.cache_dir = cache_dir
        self.local = cfg.file if cfg.source != 'hf-hub' else None
        self.repo_id, self.filenames = '', []
        if cfg.hf_hub_id and not self.local and not cfg.state_dict:
            self.repo_id, _, revision = cfg.hf_hub_id.partition('@')
            self.revision = revision or None
            # without a file name timm takes the first of these that there is
            default = ['model.safetensors', 'pytorch_model.bin']
            self.filenames = [cfg.hf_hub_filename] if cfg.hf_hub_filename else default
            self.name = f'{self.repo_id}/resolve/{revision or "main"}/{self.filenames[0]}'  # as in the errors' URLs
        else:
            self.name = str(self.local or cfg.url or 'the given state dict')

    def check_local(self) -> None:
        """Compare the checksums of a local file, or of a folder's model.safetensors (timm's first choice)."""
        path = Path(self.local or '')
        if self.local and path.is_dir():
            path = path / 'model.safetensors'
        if path.is_file():
            check_file(path)

    def cached(self) -> Dict[str, Path]:
        """Which of the files the Hub's cache holds."""
        paths = {n: try_to_load_from_cache(self.repo_id, n, self.cache_dir, self.revision) for n in self.filenames}
        return {n: Path(p) for n, p in paths.items() if isinstance(p, str)}

    def describe(self) -> str:
        """The source in words."""
        return f'{self.filenames[0]} of {self.repo_id} on the Hugging Face Hub' if self.repo_id else self.name

    def explain(self, error: Exception) -> str:
        """The error in one line; for a file in the cache, where it lies."""
        lines = str(error).strip().splitlines() or ['']
        if lines[0].startswith('Error(s) in loading state_dict'):
            lines = lines[1:]  # the first of them
        reason = lines[0].strip()
        if isinstance(error.__cause__, pickle.UnpicklingError) and 'Unsupported globals' not in reason:
            reason = 'it is no checkpoint, or damaged'  # timm takes any failure of unpickling for unsafe content
        elif type(error) is not RuntimeError and not _is_of_a_filter(error):
            reason = f'{type(error).__name__} {reason}'.strip()
            if not self.repo_id or self.cached():
                reason = f'it is no checkpoint, or damaged ({reason})'
        if isinstance(error, LocalEntryNotFoundError) and error.__cause__:
            reason += f' ({(str(error.__cause__).strip().splitlines() or [""])[0]})'
        for link in self.cached().values():
            reason += f' (the file is {link.resolve()}; if you delete it, it is downloaded anew)'
        return reason


def build_isotropic(
        model_cls,
        variant: str,
        pretrained: bool,
        filter_fn: Callable,
        filter_args: Sequence[str] = (),
        **kwargs,
) -> nn.Module:
    """`build_model_with_cfg` for models whose features are those of single blocks, the last three by default.

    Args:
        model_cls: Class of the model.
        variant: Its registered name.
        pretrained: Load weights.
        filter_fn: Fits a checkpoint to the model.
        filter_args: Names of keyword arguments that are for filter_fn and not for the model.
    """
    out_indices = kwargs.pop('out_indices', 3)
    filter_kwargs = {name: kwargs.pop(name) for name in filter_args if name in kwargs}
    return build_model_with_cfg(
        model_cls,
        variant,
        pretrained,
        pretrained_filter_fn=partial(filter_fn, **filter_kwargs),
        feature_cfg=dict(out_indices=out_indices, feature_cls='getter'),
        **kwargs,
    )


def _is_of_a_filter(error: Exception) -> bool:
    """Whether a checkpoint filter of this package refused the checkpoint, or an argument, in words of its own."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return isinstance(error, ValueError) and frame.f_globals['__name__'].startswith(__package__)


def _is_about_weights(error: Exception) -> bool:
    ours = {f.__code__ for f in (load_pretrained, check_download, check_file)}
    return any(frame.f_code in ours for frame, _ in traceback.walk_tb(error.__traceback__))
