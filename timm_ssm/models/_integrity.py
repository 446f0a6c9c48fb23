"""Integrity of weights files: torch.load and safetensors do not verify checksums, this module does.

What is verified at every read, whoever downloaded the file: the checksums that it carries (a CRC-32 of each record in
PyTorch's zip archives, one over all tensors in safetensors files of `save_weights`), which takes about as long as
loading it. Files without any in the Hub's cache are verified against the SHA-256 that the cache names them by, which
takes about twice that. A download is verified against it in any case. Results are not remembered between reads: a
failing disk changes a file's content without changing its time stamps.
"""
import hashlib
import re
import zipfile
import zlib
from pathlib import Path
from typing import Callable, Dict, Iterable, Optional, Union

import safetensors
import torch
from safetensors.torch import save_file


class CheckpointError(ValueError):
    """A file that weights cannot be taken from; the message names the file and says why."""


def verify_file(path: Union[str, Path]) -> None:
    """Compare a file's checksums: its own, or else the one that the Hub's cache names it by.

    Raises:
        CheckpointError: A checksum is wrong, or the file cannot be read so far.
    """
    path = Path(path)
    try:
        if path.suffix == '.safetensors':
            has_own = _verify_safetensors(path)
        else:
            has_own = zipfile.is_zipfile(path)
            if has_own:
                with zipfile.ZipFile(path) as f:
                    if damaged := f.testzip():
                        raise ValueError(f'the checksum of {damaged} is wrong')
        expected = None if has_own else hub_sha256(path)
        if expected and sha256(path) != expected:
            raise ValueError('its SHA-256 is not the one that the Hub gave for it')
    except OSError:
        raise
    except Exception as e:  # a flipped bit in an archive's directory can raise anything
        reason = str(e) if type(e) is ValueError else f'{type(e).__name__}: {e}'
        raise CheckpointError(f'{path}: it is no checkpoint, or damaged ({reason})') from e


def _verify_safetensors(path: Path) -> bool:
    """Compare the checksum of `save_weights`; whether there is one."""
    with safetensors.safe_open(path, 'pt') as f:
        expected = (f.metadata() or {}).get('crc32')
        if expected and expected != _crc32(f.keys(), f.get_tensor):
            raise ValueError('the checksum over its tensors is wrong')
    return bool(expected)


def hub_sha256(path: Path) -> Optional[str]:
    """The SHA-256 of a file in the Hub's cache, which is its name there; None for other files.

    The cache names files by their ETag: the SHA-256 of those in large-file storage, a Git hash of the small ones.
    """
    blob = path.resolve()
    return blob.name if blob.parent.name == 'blobs' and re.fullmatch('[0-9a-f]{64}', blob.name) else None


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, 'rb') as f:
        while chunk := f.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def save_weights(tensors: Dict[str, torch.Tensor], path: Union[str, Path]) -> None:
    """Write a safetensors file with a checksum over names, types, shapes and values in its metadata."""
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    try:
        save_file(tensors, path, metadata={'format': 'pt', 'crc32': _crc32(tensors, tensors.get)})
    except safetensors.SafetensorError as e:  # a full disk, for one
        raise OSError(f'{path}: {e}') from e


def _crc32(names: Iterable[str], get: Callable[[str], torch.Tensor]) -> str:
    crc = 0
    for name in sorted(names):
        t = get(name)
        crc = zlib.crc32(f'{name} {t.dtype} {tuple(t.shape)}'.encode(), crc)
        crc = zlib.crc32(t.reshape(-1).view(torch.uint8).numpy(), crc)
    return f'{crc:08x}'
