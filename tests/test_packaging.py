"""What the package says of itself agrees with what it is."""
import ast
import re
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest

import timm_ssm

ROOT = Path(__file__).parents[1]
# modules that are named otherwise than the distributions that bring them
DISTRIBUTIONS = dict(PIL='pillow', yaml='pyyaml', onnx_ir='onnx-ir', skimage='scikit-image')
# used where they are found: Triton comes with PyTorch, torchcodec needs FFmpeg; wandb and datasets as in timm
OPTIONAL = {'triton', 'torchcodec', 'wandb', 'datasets'}

# modules and packages that are imported inside functions, and may import extras as soon as they are
INSIDE = {'onnx_ops.py', 'app', 'command.py', 'encode.py', 'figures.py', 'plot'}


def names(requirements):
    return {re.match('[A-Za-z0-9_-]+', line).group().lower() for line in requirements.split('\n') if line}


@pytest.fixture(scope='module')
def config():
    config = ConfigParser()
    config.read(ROOT / 'setup.cfg')
    return config


def imports(path):
    """Distributions imported by a file, with whether this happens as soon as the file is imported."""
    tree = ast.parse(path.read_text())
    inner = {id(node) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for node in ast.walk(f)}
    for node in ast.walk(tree):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            modules = [node.module]
        for module in modules:
            name = module.partition('.')[0]
            if name not in sys.stdlib_module_names and name != 'timm_ssm':
                yield DISTRIBUTIONS.get(name, name), id(node) not in inner


def test_every_import_is_declared(config):
    required = names(config['options']['install_requires'])
    extra = set().union(*(names(v) for k, v in config['options.extras_require'].items() if not k.startswith('test')))
    used = set()
    for path in sorted((ROOT / 'timm_ssm').rglob('*.py')):
        for name, at_once in imports(path):
            used.add(name)
            at_once &= not INSIDE & {path.name, path.parent.name}
            assert name in required or name in OPTIONAL or name in extra and not at_once, f'{path} imports {name}'
    assert required - used == set(), 'declared and not imported'


def test_public_modules():
    assert timm_ssm.__all__ == ['__version__', 'models', 'ops']
    assert all(hasattr(timm_ssm, name) for name in timm_ssm.__all__)
    assert (ROOT / 'timm_ssm' / 'py.typed').exists()
