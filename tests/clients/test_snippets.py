"""The snippets of docs/backbones.md, each where what it imports is installed."""
import re
from pathlib import Path

import pytest
import timm

from .test_clients import HIERARCHICAL

DOC = (Path(__file__).parents[2] / 'docs' / 'backbones.md').read_text(encoding='utf-8')
FIRST, *SNIPPETS = re.findall('```python\n(.*?)```', DOC, re.DOTALL)
create_model = timm.create_model


def small(name, *args, **kwargs):
    fewer = HIERARCHICAL.get(name, dict(embed_dim=48, depth=4))
    return create_model(name, *args, **{**fewer, **kwargs})


def packages(snippet):
    return re.findall(r'^(?:from|import) (\w+)', snippet, re.MULTILINE)


@pytest.mark.parametrize('snippet', SNIPPETS, ids=lambda snippet: packages(snippet)[0])
def test_snippet(snippet, monkeypatch):
    for package in packages(snippet):
        pytest.importorskip(package)
    monkeypatch.setattr(timm, 'create_model', small)
    names = {}
    exec(FIRST, names)
    exec(snippet, names)
