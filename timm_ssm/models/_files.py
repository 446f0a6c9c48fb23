"""Weights files and whether they are whole: torch.load and safetensors compare no checksums, this does."""
import hashlib
import re
import zipfile
import zlib
from pathlib import Path
from typing import Dict, Union

import safetensors
import torch
from safetensors.torch import save_file

__all__ = ['check_download', 'check_file', 'save_weights']


def check_download(link: Path) -> None:
    """Hold a file in the Hub's cache to the SHA-256 that the Hub gave for it; a damaged one is deleted.

    Raises:
        RuntimeError: It was damaged.
    """
    blob = link.resolve()
    # the cache names files by their ETag: the SHA-256 of those in large-file storage, a Git hash of the small ones
    if not re.fullmatch('[0-9a-f]{64}', blob.name):
        return
    digest = hashlib.sha256()
    with open(blob, 'rb') as f:
        while chunk := f.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() != blob.name:
        link.unlink(missing_ok=True)
        blob.unlink(missing_ok=True)
        raise RuntimeError(
            f'damaged in the download, its SHA-256 is {digest.hexdigest()}, not {blob.name}; '
            'it is deleted from the cache, try again')


def check_file(path: Union[str, Path]) -> None:
    """Compare the checksums that a file carries: PyTorch's for each tensor, in safetensors those of `save_weights`.

    Raises:
        ValueError: A checksum is wrong, or the file cannot be read so far.
    """
    path = Path(path)
    try:
        if path.suffix == '.safetensors':
            with safetensors.safe_open(path, 'pt') as f:
                expected = (f.metadata() or {}).get('crc32')
                names = f.keys()
                if expected and expected != _crc32({name: f.get_tensor(name) for name in names}):
                    raise ValueError('the checksum over its tensors is wrong')
        elif zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as f:
                if damaged := f.testzip():
                    raise ValueError(f'the checksum of {damaged} is wrong')
    except OSError:
        raise
    except Exception as e:  # a flipped bit in an archive's directory can raise anything
        reason = str(e) if type(e) is ValueError else f'{type(e).__name__}: {e}'
        raise ValueError(f'{path}: it is no checkpoint, or damaged ({reason})') from e


def save_weights(tensors: Dict[str, torch.Tensor], path: Union[str, Path]) -> None:
    """Write a safetensors file with a checksum over names, types, shapes and values in its metadata."""
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    try:
        save_file(tensors, path, metadata={'format': 'pt', 'crc32': _crc32(tensors)})
    except safetensors.SafetensorError as e:  # a full disk, for one
        raise OSError(f'{path}: {e}') from e


def _crc32(tensors: Dict[str, torch.Tensor]) -> str:
    crc = 0
    for name in sorted(tensors):
        t = tensors[name]
        crc = zlib.crc32(f'{name} {t.dtype} {tuple(t.shape)}'.encode(), crc)
        crc = zlib.crc32(t.reshape(-1).view(torch.uint8).numpy(), crc)
    return f'{crc:08x}'
