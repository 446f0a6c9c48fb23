"""Finding the weights file that a pretrained cfg leads to, downloading it from the Hub if need be."""
import contextlib
from pathlib import Path
from typing import Iterator, Optional, Tuple

from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from timm.models import PretrainedCfg
from timm.models._hub import download_cached_file

from ._checkpoints import WEIGHTS_SUFFIXES, CheckpointError, StateDict, read_checkpoint
from ._integrity import hub_sha256, sha256


def fetch_weights(cfg: PretrainedCfg, cache_dir: Optional[str] = None) -> Tuple[StateDict, str]:
    """The parameters that a pretrained cfg leads to, and in words where they are from.

    Raises:
        CheckpointError: A local file is missing, damaged or no checkpoint.
        RuntimeError: The download failed, or a file from the Hub is damaged or no checkpoint: one line with the file
            and the reason. Errors of the Hub that name the file by themselves (a missing file, repository or
            permission) pass unchanged.
    """
    if cfg.state_dict and cfg.source not in ('hf-hub', 'local-dir'):
        return cfg.state_dict, 'the given state dict'
    if cfg.file and cfg.source != 'hf-hub':
        path = _find_in_folder(Path(cfg.file)) if cfg.source == 'local-dir' else Path(cfg.file)
        released = path.name in (cfg.hf_hub_filename, (cfg.url or '').rpartition('/')[2])
        return read_checkpoint(path, use_ema=not released).state_dict, str(path)
    if cfg.hf_hub_id:
        path, origin = _find_on_the_hub(cfg, cache_dir)
    elif cfg.url:
        path, origin = download_url(cfg.url, cache_dir), cfg.url
    else:
        raise RuntimeError('there are no pretrained weights of this model; pretrained=False gives it random ones')
    try:
        # what was released, without looking for averaged weights: as timm loads it, and as the authors evaluate it
        return read_checkpoint(path, use_ema=False).state_dict, origin
    except CheckpointError as e:
        reason = str(e).removeprefix(f'{path}: ')
        raise RuntimeError(
            f'cannot load {origin}: {reason} (the file is {path.resolve()}; if you delete it, it is downloaded anew)'
        ) from e


def _find_on_the_hub(cfg: PretrainedCfg, cache_dir: Optional[str]) -> Tuple[Path, str]:
    repo_id, _, revision = cfg.hf_hub_id.partition('@')
    file = cfg.hf_hub_filename or 'pytorch_model.bin'
    files = [file]
    if file.endswith('.bin'):  # as timm does: better a safetensors file if there is one
        files.insert(0, 'model.safetensors' if file == 'pytorch_model.bin' else file[:-len('bin')] + 'safetensors')
    origin = '{} of ' + repo_id + ' on the Hugging Face Hub'
    for name in files:
        with naming(f'cannot load {origin.format(name)}', repo_id, name):
            try:
                return download(repo_id, name, revision or None, cache_dir), origin.format(name)
            except EntryNotFoundError:
                if name == file:
                    raise


def _find_in_folder(folder: Path) -> Path:
    """A folder's weights, in timm's order of preference."""
    names = ['model.safetensors', 'pytorch_model.bin', 'pytorch_model.pth', 'model.pth']
    names += sorted(p.name for s in ('.safetensors', '.pth', '.pth.tar', '.bin') for p in folder.glob(f'*{s}'))
    for name in names:
        if (folder / name).exists():
            return folder / name
    raise CheckpointError(f'{folder}: there is no weights file in this folder ({", ".join(WEIGHTS_SUFFIXES)})')


def download(repo_id: str, file: str, revision: Optional[str] = None, cache_dir: Optional[str] = None) -> Path:
    """A file from the Hub or its cache, held to the Hub's SHA-256 if it is new; huggingface_hub compares sizes only.

    Raises:
        RuntimeError: It was damaged in the download; it is deleted from the cache.
    """
    before = try_to_load_from_cache(repo_id, file, cache_dir, revision)
    link = Path(hf_hub_download(repo_id, file, revision=revision, cache_dir=cache_dir))
    expected = hub_sha256(link)
    if expected and str(link) != before and sha256(link) != expected:
        link.resolve().unlink(missing_ok=True)
        link.unlink(missing_ok=True)
        raise RuntimeError(
            f'damaged in the download, its SHA-256 is not {expected}, which the Hub gives; it is deleted from the '
            'cache, try again')
    return link


def download_url(url: str, cache_dir: Optional[str] = None) -> Path:
    """A file from elsewhere than the Hub, or from timm's cache of such files.

    Raises:
        RuntimeError: The download failed.
    """
    with naming(f'cannot load {url}', url):
        return Path(download_cached_file(url, cache_dir=cache_dir))


@contextlib.contextmanager
def naming(subject: str, *names: str) -> Iterator[None]:
    """What fails on the way to the Hub in one line that says with which repository and file; not all errors do.

    Raises:
        RuntimeError: The error in one line, after the subject, if it does not hold all the names.
    """
    try:
        yield
    except Exception as e:  # of huggingface_hub, or of the HTTP library that it uses
        if all(name in str(e) for name in names):
            raise
        cause = e.__cause__ if isinstance(e, LocalEntryNotFoundError) else None
        reasons = [' '.join(str(x).split()) or type(x).__name__ for x in (e, cause) if x]
        raise RuntimeError(f'{subject}: {" ".join(reasons)}') from e
