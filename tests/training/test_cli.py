"""The ways to start: scripts of a checkout, `timm-ssm` and `python -m` of an installed package."""
import os
import subprocess
import sys

import pytest

from timm_ssm import cli

from .utils import MODEL, PLAIN, ROOT, assert_same_run, torchrun

WAYS = {
    'script': [str(ROOT / 'train.py')],
    'command': ['-m', 'timm_ssm.cli', 'train'],
    'module': ['-m', 'timm_ssm.training.train'],
}


def start(command, *flags, cwd):
    env = {**os.environ, 'PYTHONPATH': str(ROOT)}
    return subprocess.run([*command, *map(str, flags)], cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_ways_to_train_and_validate(digits, tmp_path):
    flags = [digits, *MODEL, *PLAIN, '--epochs', 1, '--output', tmp_path, '--experiment']
    for name, way in WAYS.items():
        done = start([sys.executable, *way], *flags, name, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    for name in ('command', 'module'):
        assert_same_run(tmp_path / 'script', tmp_path / name)
    results = set()
    for way in ([ROOT / 'validate.py'], ['-m', 'timm_ssm.cli', 'validate'], ['-m', 'timm_ssm.training.validate']):
        done = start(
            [sys.executable, *way], digits, '--workers', 0, '--checkpoint', tmp_path / 'script' / 'last.pth.tar',
            cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        results.add(done.stdout)
    assert len(results) == 1 and '"top1"' in results.pop()


@pytest.mark.slow
def test_torchrun_of_an_installed_package(digits, tmp_path):
    flags = [digits, *MODEL, *PLAIN, '--epochs', 1, '--output', tmp_path, '--experiment', 'run']
    done = start([*torchrun(), '-m', 'timm_ssm.cli', 'train'], *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert 'Process 0 of 2 on cpu' in done.stderr and (tmp_path / 'run' / 'last.pth.tar').exists()


@pytest.mark.parametrize('command', ['train', 'validate'])
def test_help_and_usage_errors(capsys, command):
    with pytest.raises(SystemExit) as done:
        cli.main([command, '--help'])
    assert done.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f'usage: timm-ssm {command} [DATA]') and '--channels-last' in text
    with pytest.raises(SystemExit) as done:
        cli.main([command, '--no-such-flag'])
    assert done.value.code == 2 and f'timm-ssm {command}: error: unrecognized' in capsys.readouterr().err


def test_errors_keep_their_exit_code(tmp_path):
    """Python writes a text to the standard error and exits with 1."""
    for command in ('train', 'validate'):
        with pytest.raises(SystemExit) as done:
            cli.main([command, str(tmp_path / 'nowhere')])
        assert isinstance(done.value.code, str) and done.value.code.startswith('no dataset at')
