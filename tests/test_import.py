"""`import timm_ssm` registers the models with timm and does nothing else."""
import subprocess
import sys


def test_import_is_light():
    """It says nothing, starts nothing on a GPU, and loads little: the models, and none of what is built on them."""
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
'''
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout == '' and result.stderr == ''
