"""docs/adding-a-model.md and docs/weights.md say what is so."""
import re
from pathlib import Path

import pytest
import timm

import timm_ssm
from timm_ssm.models._checkpoints import CheckpointError

from ..fuzz.checkpoints import ARGS, NAME, small_weights, to_bytes

ROOT = Path(__file__).parents[2]
ADDING, WEIGHTS = ((ROOT / 'docs' / f'{name}.md').read_text(encoding='utf-8') for name in ('adding-a-model', 'weights'))


def snippets(text):
    return re.findall('```python\n(.*?)```', text, re.DOTALL)


def test_snippets_are_in_the_files_of_the_example():
    """Each is a literal piece of the file that its section is about."""
    files = ['timm_ssm/models/vim.py'] * 4 + ['timm_ssm/models/__init__.py', 'timm_ssm/zoo/published.py']
    assert len(snippets(ADDING)) == len(files)
    for file, snippet in zip(files, snippets(ADDING)):
        assert snippet in (ROOT / file).read_text(encoding='utf-8'), snippet


def test_files_exist():
    paths = re.findall(r'`((?:timm_ssm|tests|docs|hub_configs)/[^` ]+)`', ADDING)
    assert len(paths) >= 10
    for path in paths:
        assert list(ROOT.glob(path.rstrip('/'))) or 'NAME' in path, path


@pytest.mark.parametrize('family', list(timm_ssm.models.__all__))
def test_a_family_is_named_in_its_files_only(family):
    """The package knows it through timm's registry, but for its file, import, table row, and what names models."""
    module = getattr(timm_ssm.models, family).__module__.rpartition('.')[2]
    names = timm.list_models(module=module)
    pattern = re.compile('|'.join([rf'import {family}\b', *(rf"['\"]{n}\b" for n in names)]))
    code = {  # without the examples in docstrings
        str(path.relative_to(ROOT)): re.sub(r'"""[\s\S]*?"""', '', path.read_text(encoding='utf-8'))
        for path in (ROOT / 'timm_ssm').rglob('*.py')}
    recipes_and_defaults = {'timm_ssm/zoo/recipes.py', 'timm_ssm/app/page.py'}
    found = {path for path, text in code.items() if pattern.search(text)} - recipes_and_defaults
    assert found == {f'timm_ssm/models/{module}.py', 'timm_ssm/models/__init__.py', 'timm_ssm/zoo/published.py'}


def test_checkpoint_path_and_its_alternative(tmp_path):
    """timm's own way does not see a flipped bit in a tensor; the line in docs/weights.md does."""
    from_docs = next(s for s in snippets(WEIGHTS) if 'FILE)' in s and 'NAME,' in s)
    weights = {k.replace('layers.', 'blocks.').replace('norm_f.', 'norm.'): v for k, v in small_weights().items()}
    content = bytearray(to_bytes(weights))
    content[content.index(weights['pos_embed'].numpy().tobytes()) + 2] ^= 1
    (tmp_path / 'x.pth').write_bytes(content)
    timm.create_model(NAME, checkpoint_path=str(tmp_path / 'x.pth'), **ARGS)
    call = from_docs.replace('FILE)', 'FILE, num_classes=5), **ARGS')
    with pytest.raises(CheckpointError, match='x.pth: .*checksum'):
        exec(call, dict(timm=timm, NAME=NAME, FILE=str(tmp_path / 'x.pth'), ARGS=ARGS))


def test_class_names_snippet():
    exec(next(s for s in snippets(WEIGHTS) if 'class_names' in s), {})
