"""Run a script with the models of this package registered, and mamba-ssm's functions available.

    python -m timm_ssm SCRIPT [ARGS]
    torchrun --nproc-per-node 2 -m timm_ssm SCRIPT [ARGS]

SCRIPT is any Python file that makes timm models, such as timm's own train.py, validate.py or benchmark.py. It runs as
`python SCRIPT [ARGS]` would run it. Where the CUDA extensions of mamba-ssm and causal-conv1d are not installed, imports
from these packages find this package's equivalents (timm_ssm.compat).
"""
import os
import runpy
import sys

import timm_ssm  # noqa: F401  registers the models
from timm_ssm import compat
from timm_ssm._compat import mend_device_ids


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] in ('-h', '--help'):
        print(__doc__)
        sys.exit(len(sys.argv) < 2)
    script = sys.argv[1]
    if not os.path.isfile(script):
        sys.exit(f'python -m timm_ssm: there is no script {script!r}')
    sys.argv = sys.argv[1:]
    if not getattr(sys.flags, 'safe_path', False):  # Python 3.11's -P leaves both folders out
        sys.path[0] = os.path.dirname(os.path.abspath(script))
    compat.install()
    mend_device_ids()
    runpy.run_path(script, run_name='__main__')


if __name__ == '__main__':
    main()
