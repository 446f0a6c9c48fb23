"""The notebooks run in Jupyter, with -m slow, and what their text says of the results is what they have stored."""
import json
import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / 'docs' / 'notebooks'
NAMES = ('images', 'video')


def assert_claims(name, notebook):
    outputs = [output for cell in notebook['cells'] for output in cell.get('outputs', ())]
    assert not [output for output in outputs if output['output_type'] == 'error' or output.get('name') == 'stderr']
    assert sum('image/png' in output.get('data', ()) for output in outputs) == 2
    printed = ''.join(''.join(output['text']) for output in outputs if output.get('name') == 'stdout')
    right = {what: int(percent) for what, percent in re.findall(r'^(\w+): (\d+) % right', printed, re.M)}
    if name == 'images':
        assert right['tuned'] > right['scratch'] + 10
        share = re.search(r'^on the digit: (\d+)% of the rollout, (\d+)% of the area', printed, re.M)
        assert int(share[1]) > int(share[2])
    else:
        assert right['sequential'] > 90 and right['reversed'] < 10 and 30 < right['shuffled'] < 70
        assert 'cut.mp4' in printed


@pytest.mark.parametrize('name', NAMES)
def test_results(name):
    assert_claims(name, json.loads((FOLDER / f'{name}.ipynb').read_text(encoding='utf-8')))


@pytest.mark.slow
@pytest.mark.parametrize('name', NAMES)
def test_in_jupyter(name, tmp_path, monkeypatch):
    nbformat, nbclient = pytest.importorskip('nbformat'), pytest.importorskip('nbclient')
    monkeypatch.setenv('PYTHONWARNINGS', 'ignore')  # of tqdm where there are no widgets
    notebook = nbformat.read(FOLDER / f'{name}.ipynb', 4)
    nbclient.NotebookClient(notebook, timeout=600, resources=dict(metadata=dict(path=str(tmp_path)))).execute()
    assert_claims(name, notebook)
