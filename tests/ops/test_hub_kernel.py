"""The folder that .ci/hub-kernel writes: what the Hub's `kernels` asks of it, and that it computes the same."""
import ast
import base64
import hashlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from timm_ssm.ops.naive import selective_scan_naive

SCRIPT = Path(__file__).parents[2] / '.ci' / 'hub-kernel'


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('hub') / 'kernel'
    subprocess.run([sys.executable, SCRIPT, folder], check=True)
    return folder


def test_format(folder):
    """Digests of all files; imports of the standard library, PyTorch and Triton, and relative ones."""
    allowed = {*sys.stdlib_module_names, 'torch', 'triton'}
    variants = list((folder / 'build').iterdir())
    assert {v.name for v in variants} == {'torch-cpu', 'torch-cuda', 'torch-rocm'}
    for variant in variants:
        metadata = json.loads((variant / 'metadata.json').read_text())
        assert metadata['id'].isidentifier() and variant.name == f'torch-{metadata["backend"]["type"]}'
        files = {p.relative_to(variant).as_posix(): p for p in variant.rglob('*.py')}
        assert metadata['digest']['files'] == {
            name: base64.b64encode(hashlib.sha256(p.read_bytes()).digest()).decode() for name, p in files.items()}
        for path in files.values():
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    assert {alias.name.partition('.')[0] for alias in node.names} <= allowed, path
                elif isinstance(node, ast.ImportFrom) and node.level == 0:
                    assert node.module.partition('.')[0] in allowed, path
    assert len({json.loads((v / 'metadata.json').read_text())['id'] for v in variants}) == 3


def load(path, name):
    """As `kernels` does: under a name of its own, from anywhere."""
    spec = importlib.util.spec_from_file_location(name, path / '__init__.py')
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize('variant', ['torch-cpu', 'torch-cuda', 'torch-rocm/timm_ssm'])
def test_equals_the_specification(folder, variant):
    """Forward and backward, beside the package's own ops in one process."""
    ops = load(folder / 'build' / variant, f'kernel_{variant.replace("-", "_").replace("/", "_")}')
    backend, device = 'eager' if variant == 'torch-cpu' else 'triton', 'cuda' if torch.cuda.is_available() else 'cpu'
    torch.manual_seed(0)
    args = torch.randn(2, 9, 8), torch.randn(2, 9, 8), -torch.rand(8, 4), torch.randn(2, 9, 4), torch.randn(2, 9, 4)
    results = []
    for scan in (lambda *args: ops.selective_scan(*args, backend=backend), selective_scan_naive):
        leaves = [x.to(device, copy=True).requires_grad_() for x in args]
        out = scan(*leaves)
        out.square().sum().backward()
        results.append([out.detach(), *(x.grad for x in leaves)])
    for got, expected in zip(*results):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


PROGRAM = """
import pathlib, sys, kernels, torch
ops = kernels.get_local_kernel(pathlib.Path(sys.argv[1]), backend='cpu')
u, A, B = torch.ones(1, 5, 4), -torch.ones(4, 2), torch.ones(1, 5, 2)
print(ops.selective_scan(u, u, A, B, B).shape)
"""


def test_kernels_loads_it(folder):
    """The package that reads the format."""
    pytest.importorskip('kernels')
    run = subprocess.run([sys.executable, '-c', PROGRAM, folder], stdout=subprocess.PIPE, text=True, check=True)
    assert run.stdout == 'torch.Size([1, 5, 4])\n'
