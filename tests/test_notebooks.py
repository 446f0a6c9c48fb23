"""The notebook runs in Jupyter, with -m slow, and what its text says of the results is what it has stored."""
import json
import re
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[1] / 'docs' / 'notebooks' / 'images.ipynb'


def assert_claims(notebook):
    outputs = [output for cell in notebook['cells'] for output in cell.get('outputs', ())]
    assert not [output for output in outputs if output['output_type'] == 'error' or output.get('name') == 'stderr']
    assert sum('image/png' in output.get('data', ()) for output in outputs) == 2
    printed = ''.join(''.join(output['text']) for output in outputs if output.get('name') == 'stdout')
    scratch, tuned = (int(re.search(rf'^{run}: (\d+) % right', printed, re.M)[1]) for run in ('scratch', 'tuned'))
    assert tuned > scratch + 10
    share = re.search(r'^on the digit: (\d+)% of the rollout, (\d+)% of the area', printed, re.M)
    assert int(share[1]) > int(share[2])


def test_results():
    assert_claims(json.loads(NOTEBOOK.read_text(encoding='utf-8')))


@pytest.mark.slow
def test_in_jupyter(tmp_path, monkeypatch):
    nbformat, nbclient = pytest.importorskip('nbformat'), pytest.importorskip('nbclient')
    monkeypatch.setenv('PYTHONWARNINGS', 'ignore')  # of tqdm where there are no widgets
    notebook = nbformat.read(NOTEBOOK, 4)
    nbclient.NotebookClient(notebook, timeout=600, resources=dict(metadata=dict(path=str(tmp_path)))).execute()
    assert_claims(notebook)
