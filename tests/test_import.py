"""`import timm_ssm` registers the models with timm and does nothing else; what else is there comes when it is used."""
import subprocess
import sys


def test_import_is_light():
    """It says nothing, starts nothing on a GPU, and loads little: the models, and none of what is built on them.

    Nor does the zoo load the Hub and training, or a scan the kernels of a backend that it does not take.
    """
    code = '''
import sys, timm, torch
before = set(sys.modules)
import timm_ssm
new = set(sys.modules) - before
ours = {m.split('.')[1] for m in new if m.startswith('timm_ssm.')}
others = {m for m in new if not m.startswith('timm_ssm')}
assert ours <= {'_compat', 'layers', 'models', 'ops', 'version'}, ours
assert len(others) <= 5 and not [m for m in others if m.startswith(('triton', 'mamba_ssm', 'PIL', 'numpy'))], others
assert not torch.cuda.is_initialized()
assert 'videomamba_tiny_patch16_224' in timm.list_models()
assert set(timm_ssm.__all__) == {'__version__', 'models', 'ops'}

import timm_ssm.zoo.cards, timm_ssm.zoo.model_table
assert not [m for m in sys.modules if m.startswith(('timm_ssm.hub', 'timm_ssm.training'))]

x = torch.ones(1, 2, 3)
timm_ssm.ops.selective_scan(x, x, -torch.ones(3, 1), x[..., :1], x[..., :1], backend='naive')
assert 'timm_ssm.ops.backends.triton.forward' not in sys.modules and not torch.cuda.is_initialized()
'''
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout == '' and result.stderr == ''
