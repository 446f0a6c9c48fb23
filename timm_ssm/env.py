"""What timm-ssm finds on this machine: versions, devices, which kernels serve them, and what decodes videos.

    python -m timm_ssm.env
"""
import importlib.metadata
import platform
from typing import Dict

import torch

from .data.decode import DECODERS, why_unavailable
from .ops.backends import FORCED, backend_report
from .version import __version__

PACKAGES = ('timm', 'triton', 'mamba_ssm', 'causal_conv1d', 'av', 'torchcodec')


def versions() -> Dict[str, str]:
    """Versions of everything that matters for a bug report."""
    found = {
        'timm_ssm': __version__,
        'python': f'{platform.python_version()} on {platform.platform()}',
        'torch': f'{torch.__version__} (CUDA {torch.version.cuda}, HIP {torch.version.hip}), '
                 f'{torch.get_num_threads()} threads',
    }
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package.replace('_', '-'))
        except importlib.metadata.PackageNotFoundError:
            found[package] = 'not installed'
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(i)
            found[f'cuda:{i}'] = f'{p.name}, {p.total_memory / 2**30:.0f} GiB, {p.multi_processor_count} processors'
    else:
        found['cuda'] = 'no GPU that PyTorch can use'
    return found


def main() -> None:
    for name, version in versions().items():
        print(f'{name:<14} {version}')
    print('\nbackends of the selective scan and the convolution')
    for name, entry in backend_report().items():
        serves = ', '.join(d for d in entry['serves'] if d != 'cuda' or torch.cuda.is_available())
        print(f'{name:<14} {"available" if entry["available"] == "yes" else "not available: " + entry["available"]}'
              f'{"; serves " + serves if serves else ""}')
    if FORCED:
        print(f'TIMM_SSM_BACKEND={FORCED} takes the choice from them')
    print('\ndecoders of videos, the first by default')
    for name in DECODERS:
        reason = why_unavailable(name)
        print(f'{name:<14} {"not available: " + reason if reason else "available: decodes the test clip"}')


if __name__ == '__main__':
    main()
