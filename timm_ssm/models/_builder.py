"""timm's model builder, and what it leaves open about weights: damaged downloads are noticed, errors say which file."""
import hashlib
import pickle
import re
import traceback
from pathlib import Path
from typing import Dict, Optional

from huggingface_hub import try_to_load_from_cache
from timm.models import build_model_with_cfg as timm_build_model_with_cfg
from timm.models import load_pretrained, resolve_pretrained_cfg
from torch import nn

__all__ = ['build_model_with_cfg']


def build_model_with_cfg(model_cls, variant: str, pretrained: bool, **kwargs) -> nn.Module:
    """timm's function of this name.

    Files that this call downloads from the Hub are held to the SHA-256 that the Hub gives for them (huggingface_hub
    compares sizes only, and torch.load does not look at checksums); a damaged one is deleted from the cache.

    Raises:
        RuntimeError: The weights cannot be fetched or read: one line that names the model, the file and the reason.
            Errors that name the file by themselves (a missing file, repository or permission) pass unchanged.
        ValueError: They are of another model.
    """
    if not pretrained:
        return timm_build_model_with_cfg(model_cls, variant, pretrained, **kwargs)
    cfg = resolve_pretrained_cfg(variant, kwargs.get('pretrained_cfg'), kwargs.get('pretrained_cfg_overlay'))
    weights = _Weights(cfg, kwargs.get('cache_dir'))
    cached_before = weights.cached()
    try:
        model = timm_build_model_with_cfg(model_cls, variant, pretrained, **kwargs)
    except Exception as e:
        weights.check_downloads(cached_before)
        if not _came_from_loading(e) or weights.name in str(e):
            raise
        kind = ValueError if type(e) is ValueError else RuntimeError
        raise kind(f'{variant}: cannot load {weights.describe()}: {weights.explain(e)}') from e
    weights.check_downloads(cached_before)
    return model


class _Weights:
    """The file that a pretrained cfg leads to."""

    def __init__(self, cfg, cache_dir: Optional[str]) -> None:
        self.cache_dir = cache_dir
        self.repo_id, self.filenames = '', []
        local = cfg.file if cfg.source in (None, '', 'timm', 'local-dir') else None
        if cfg.hf_hub_id and not local and not cfg.state_dict:
            self.repo_id, _, revision = cfg.hf_hub_id.partition('@')
            self.revision = revision or None
            # without a file name timm takes the first of these that there is
            default = ['model.safetensors', 'pytorch_model.bin']
            self.filenames = [cfg.hf_hub_filename] if cfg.hf_hub_filename else default
            self.name = f'{self.repo_id}/resolve/{revision or "main"}/{self.filenames[0]}'  # as in the errors' URLs
        else:
            self.name = str(local or cfg.url or 'the given state dict')

    def cached(self) -> Dict[str, Path]:
        """Which of the files the Hub's cache holds."""
        paths = {n: try_to_load_from_cache(self.repo_id, n, self.cache_dir, self.revision) for n in self.filenames}
        return {n: Path(p) for n, p in paths.items() if isinstance(p, str)}

    def check_downloads(self, cached_before: Dict[str, Path]) -> None:
        """Delete what came with another hash than the Hub said, and raise."""
        for name, link in self.cached().items():
            blob = link.resolve()
            # the cache names a file by its ETag: the SHA-256 for those in large-file storage
            if cached_before.get(name) == link or not re.fullmatch('[0-9a-f]{64}', blob.name):
                continue
            digest = hashlib.sha256()
            with open(blob, 'rb') as f:
                while chunk := f.read(1 << 20):
                    digest.update(chunk)
            if digest.hexdigest() != blob.name:
                link.unlink(missing_ok=True)
                blob.unlink(missing_ok=True)
                raise RuntimeError(
                    f'{name} of {self.repo_id} on the Hugging Face Hub: damaged in the download, its SHA-256 is '
                    f'{digest.hexdigest()}, not {blob.name}; it is deleted from the cache, try again')

    def describe(self) -> str:
        """The source in words."""
        return f'{self.filenames[0]} of {self.repo_id} on the Hugging Face Hub' if self.repo_id else self.name

    def explain(self, error: Exception) -> str:
        """The error in one line; for a file in the cache, where it lies."""
        reason = (str(error).strip().splitlines() or [''])[0]
        if isinstance(error.__cause__, pickle.UnpicklingError) and 'Unsupported globals' not in reason:
            reason = 'it is no checkpoint, or damaged'  # timm takes any failure of unpickling for unsafe content
        elif type(error) not in (RuntimeError, ValueError):
            reason = f'{type(error).__name__} {reason}'.strip()
            if not self.repo_id or self.cached():
                reason = f'it is no checkpoint, or damaged ({reason})'
        for link in self.cached().values():
            reason += f' (the file is {link.resolve()}; if you delete it, it is downloaded anew)'
        return reason


def _came_from_loading(error: Exception) -> bool:
    return any(f.f_code is load_pretrained.__code__ for f, _ in traceback.walk_tb(error.__traceback__))

