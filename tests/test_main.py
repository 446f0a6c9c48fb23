"""`python -m timm_ssm SCRIPT` runs a script as Python would, with the models registered."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.training.utils import torchrun
from timm_ssm.__main__ import main

ROOT = Path(__file__).parents[1]
SCRIPT = '''
"""A script that knows nothing of timm_ssm, nor of timm."""
import json
import os
import sys

import neighbour

if __name__ == '__main__':
    facts = dict(argv=sys.argv, path=sys.path[0], file=__file__, neighbour=neighbour.VALUE, rank=os.environ.get('RANK'))
    timm = sys.modules.get('timm')
    facts['has_model'] = timm is not None and timm.is_model('videomamba_tiny_patch16_224')
    with open(f'facts{os.environ.get("RANK", "")}.json', 'w') as f:
        json.dump(facts, f)
    sys.exit(int(sys.argv[1]))
'''


@pytest.fixture
def script(tmp_path):
    folder = tmp_path / 'scripts'
    folder.mkdir()
    (folder / 'neighbour.py').write_text('VALUE = 42')
    (folder / 'script.py').write_text(SCRIPT)
    return folder / 'script.py'


def run(tmp_path, *command):
    env = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}
    return subprocess.run(
        [sys.executable, *map(str, command)], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)


def test_runs_a_script_as_python_does(tmp_path, script):
    facts = []
    for command in ([script, 3, '--flag'], ['-m', 'timm_ssm', script, 3, '--flag']):
        assert run(tmp_path, *command).returncode == 3
        facts.append(json.loads((tmp_path / 'facts.json').read_text()))
    assert [f.pop('has_model') for f in facts] == [False, True]
    assert facts[0] == facts[1]
    assert facts[1]['argv'] == [str(script), '3', '--flag'] and facts[1]['path'] == str(script.parent)


@pytest.mark.slow
def test_runs_under_torchrun(tmp_path, script):
    done = run(tmp_path, *torchrun()[1:], '-m', 'timm_ssm', script, 0)
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        facts = json.loads((tmp_path / f'facts{rank}.json').read_text())
        assert facts['has_model'] and facts['rank'] == str(rank)


def test_missing_script(monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['timm_ssm', 'nowhere.py', '--flag'])
    with pytest.raises(SystemExit, match="^python -m timm_ssm: there is no script 'nowhere.py'$"):
        main()


@pytest.mark.parametrize('flags, status', [([], 1), (['--help'], 0)])
def test_usage(monkeypatch, capsys, flags, status):
    monkeypatch.setattr(sys, 'argv', ['timm_ssm', *flags])
    with pytest.raises(SystemExit) as error:
        main()
    assert error.value.code == status and 'python -m timm_ssm SCRIPT' in capsys.readouterr().out
