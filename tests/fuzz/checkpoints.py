"""Generators of damaged and odd checkpoint files of one small model."""
import argparse
import gzip
import io
import json
import os
import pickle
import random
import struct
import tarfile
import zipfile
from typing import Any, Callable, Dict, NamedTuple, Tuple

import numpy as np
import timm
import torch
from safetensors.torch import save as to_safetensors

from timm_ssm.models._integrity import save_weights

from ..fixtures.synthesize import synthesize

NAME = 'videomamba_tiny_patch16_224'
ARGS = dict(depth=1, embed_dim=16, img_size=32, patch_size=8, num_classes=5)

StateDict = Dict[str, torch.Tensor]


def small_weights() -> StateDict:
    """A model's weights under the authors' names."""
    names = {'blocks.': 'layers.', 'norm.': 'norm_f.'}
    out = {}
    for k, v in timm.create_model(NAME, **ARGS).state_dict().items():
        old = next((n for n in names if k.startswith(n)), '')
        k = names.get(old, '') + k.removeprefix(old)
        out[k] = synthesize(k, tuple(v.shape))
    return out


def as_ours(name: str) -> str:
    return name.replace('layers.', 'blocks.').replace('norm_f.', 'norm.')


def to_bytes(checkpoint: Any, **kwargs) -> bytes:
    """As torch.save writes it."""
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer, **kwargs)
    return buffer.getvalue()


def training_state(weights: StateDict) -> Dict[str, Any]:
    """What a training script writes."""
    model_kwargs = {k: v for k, v in ARGS.items() if k not in ('img_size', 'num_classes')}
    args = dict(model=NAME, num_classes=5, img_size=32, input_size=[3, 32, 32], model_kwargs=model_kwargs)
    return dict(arch=NAME, epoch=3, args=args, state_dict=weights, optimizer=dict(state={}, param_groups=[]))


def whole_files(weights: StateDict, folder) -> Dict[str, bytes]:
    """Intact files by their suffix: PyTorch's archives, bare and of training, and safetensors with a checksum."""
    ours = {as_ours(k): v for k, v in weights.items()}
    save_weights(weights, folder / 'whole.safetensors')
    return {
        '.pth': to_bytes(weights),
        '.pth.tar': to_bytes(training_state(ours)),
        '.bin': to_bytes(dict(model=weights)),
        '.safetensors': (folder / 'whole.safetensors').read_bytes(),
    }


def damaged(rng: random.Random, files: Dict[str, bytes]) -> Tuple[str, bytes, str]:
    """One damaged file: its suffix and content, and what was done to it."""
    suffix = rng.choice(sorted(files))
    content = bytearray(files[suffix])
    kind = rng.choice(['truncated', 'flipped', 'flipped near the ends', 'renamed', 'overwritten', 'extended'])
    if kind == 'truncated':
        del content[rng.randrange(len(content)):]
    elif kind == 'flipped':
        for _ in range(rng.choice([1, 1, 2, 8])):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif kind == 'flipped near the ends':  # the directories: of safetensors in front, of zip archives at the back
        i = rng.randrange(4000)
        content[rng.choice([i, -i - 1])] ^= 1 << rng.randrange(8)
    elif kind == 'overwritten':
        start, size = rng.randrange(len(content)), rng.randrange(1, 2000)
        content[start:start + size] = bytes(len(content[start:start + size]))
    elif kind == 'extended':
        content += rng.randbytes(rng.randrange(1, 100))
    elif kind == 'renamed':
        suffix = rng.choice(sorted({'.pth', '.safetensors', '.bin', ''} - {suffix}))
    return suffix, bytes(content), kind


class OddFile(NamedTuple):
    """A file that is no damaged checkpoint: another kind of file, or other content in a sound one."""
    content: Callable[[StateDict], bytes]
    loads: bool = False
    suffix: str = '.pth'


class _RunsCode:
    def __reduce__(self):
        return os.getpid, ()


def _cast(dtype: torch.dtype, names: str = '') -> Callable[[StateDict], bytes]:
    return lambda w: to_bytes({k: v.to(dtype) if k.startswith(names) else v for k, v in w.items()})


def _replace(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[StateDict], bytes]:
    return lambda w: to_bytes({**w, name: change(w[name])})


def _fill(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def fill(x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        x.view(-1)[-1] = value
        return x
    return fill


def _zip(names: Dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, 'w') as f:
        for name, content in names.items():
            f.writestr(name, content)
    return buffer.getvalue()


def _tar(content: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode='w') as f:
        info = tarfile.TarInfo('x.pth')
        info.size = len(content)
        f.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def _numpy(save: Callable, *args, **kwargs) -> bytes:
    buffer = io.BytesIO()
    save(buffer, *args, **kwargs)
    return buffer.getvalue()


def _prefixed(prefix: str) -> Callable[[StateDict], bytes]:
    return lambda w: to_bytes({prefix + k: v for k, v in w.items()})


ODD_FILES: Dict[str, OddFile] = {
    # other kinds of files
    'empty': OddFile(lambda w: b''),
    'one byte': OddFile(lambda w: b'\x80'),
    'zeros': OddFile(lambda w: bytes(10_000)),
    'a web page': OddFile(lambda w: b'<html>Please log in</html>'),
    'Git LFS pointer': OddFile(lambda w: b'version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9'),
    'Git LFS pointer, safetensors': OddFile(
        lambda w: b'version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9', suffix='.safetensors'),
    'JSON': OddFile(lambda w: json.dumps({'model': [1., 2.]}).encode()),
    'zip of others': OddFile(lambda w: _zip({'readme.txt': b'hello'})),
    'zip of nothing': OddFile(lambda w: _zip({})),
    'gzip': OddFile(lambda w: gzip.compress(to_bytes(w))),
    'tar': OddFile(lambda w: _tar(to_bytes(w)), suffix='.pth.tar'),
    'NumPy array': OddFile(lambda w: _numpy(np.save, np.zeros(3))),
    'NumPy archive': OddFile(lambda w: _numpy(np.savez, **{k: v.numpy() for k, v in w.items()})),
    'plain pickle': OddFile(lambda w: pickle.dumps({'model': [1, 2]})),
    'safetensors called .pth': OddFile(lambda w: to_safetensors(w)),
    '.pth called safetensors': OddFile(to_bytes, suffix='.safetensors'),
    'safetensors with a huge header': OddFile(
        lambda w: struct.pack('<Q', 2 ** 60) + b'{}', suffix='.safetensors'),
    'safetensors with overlaps': OddFile(lambda w: _overlapping(), suffix='.safetensors'),
    # sound files of other content
    'code': OddFile(lambda w: to_bytes({'model': _RunsCode()})),
    'a whole model': OddFile(lambda w: to_bytes(timm.create_model(NAME, **ARGS))),
    'list': OddFile(lambda w: to_bytes(list(w.values()))),
    'tensor': OddFile(lambda w: to_bytes(torch.ones(3))),
    'nothing': OddFile(lambda w: to_bytes(None)),
    'no parameters': OddFile(lambda w: to_bytes({})),
    'an epoch only': OddFile(lambda w: to_bytes({'epoch': 3})),
    'optimiser only': OddFile(lambda w: to_bytes({'optimizer': dict(state={0: torch.ones(3)})})),
    'numbered': OddFile(lambda w: to_bytes(dict(enumerate(w.values())))),
    'another model': OddFile(
        lambda w: to_bytes(timm.create_model('vit_tiny_patch16_224', depth=1, embed_dim=24, num_heads=3).state_dict())),
    'another prefix': OddFile(_prefixed('backbone.')),
    'half of it': OddFile(lambda w: to_bytes(dict(list(w.items())[::2]))),
    'one missing': OddFile(lambda w: to_bytes({k: v for k, v in w.items() if k != 'layers.0.mixer.D'})),
    'one more': OddFile(lambda w: to_bytes({**w, 'layers.0.mixer.E': torch.ones(3)})),
    'a layer more': OddFile(lambda w: to_bytes({**w, **{k.replace('.0.', '.1.'): v for k, v in w.items()}})),
    'transposed': OddFile(_replace('layers.0.mixer.in_proj.weight', lambda x: x.T.contiguous())),
    'flattened': OddFile(_replace('layers.0.mixer.in_proj.weight', torch.flatten)),
    'scalar': OddFile(_replace('norm_f.weight', lambda x: x[0])),
    # values that would be cast without a word, or are none
    'integers': OddFile(_cast(torch.int32)),
    'one of integers': OddFile(_cast(torch.int64, 'norm_f')),
    'bytes': OddFile(_cast(torch.uint8, 'layers.0.mixer.in_proj')),
    'booleans': OddFile(_cast(torch.bool, 'layers.0.mixer.D')),
    'float8': OddFile(_cast(torch.float8_e4m3fn, 'layers.0.mixer.out_proj')),
    'complex': OddFile(_cast(torch.complex64, 'head')),
    'quantised': OddFile(_replace(
        'layers.0.mixer.in_proj.weight', lambda x: torch.quantize_per_tensor(x, .1, 0, torch.qint8))),
    'sparse': OddFile(_replace('layers.0.mixer.in_proj.weight', torch.Tensor.to_sparse)),
    'on no device': OddFile(_replace('layers.0.mixer.in_proj.weight', lambda x: x.to('meta'))),
    'not a number': OddFile(_replace('layers.0.mixer.A_log', _fill(float('nan')))),
    'infinite': OddFile(_replace('head.bias', _fill(float('inf')))),
    # what there is no reason to refuse
    'float16': OddFile(_cast(torch.float16), loads=True),
    'bfloat16': OddFile(_cast(torch.bfloat16), loads=True),
    'float64': OddFile(_cast(torch.float64), loads=True),
    'huge values': OddFile(_replace('pos_embed', lambda x: torch.full_like(x, 3e38)), loads=True),
    'in a wrapper': OddFile(lambda w: to_bytes({'state_dict': w, 'args': argparse.Namespace(lr=1.)}), loads=True),
    'distributed': OddFile(_prefixed('module.'), loads=True),
    'compiled': OddFile(_prefixed('_orig_mod.'), loads=True),
    'not contiguous': OddFile(_replace('head.weight', lambda x: x.T.contiguous().T), loads=True),
    'old format': OddFile(lambda w: to_bytes(w, _use_new_zipfile_serialization=False), loads=True),
    'of others, safetensors': OddFile(lambda w: to_safetensors(w), loads=True, suffix='.safetensors'),
}


def _overlapping() -> bytes:
    header = json.dumps({
        name: dict(dtype='F32', shape=[2], data_offsets=[0, 8]) for name in ('a', 'b')}).encode()
    return struct.pack('<Q', len(header)) + header + bytes(8)
