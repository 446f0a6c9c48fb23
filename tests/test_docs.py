"""The README and the pages of docs/: snippets run, commands and links exist, error texts are those of the code.

docs/video.md, docs/weights.md, docs/adding-a-model.md, docs/kernels.md, docs/backbones.md and docs/export.md have tests
of their own.
"""
import argparse
import contextlib
import re
import shlex
from pathlib import Path
from unittest import mock

import pytest
import timm
import torch
from PIL import Image
from timm.models import get_pretrained_cfg

from timm_ssm import cli
from timm_ssm.training import scaling, train, validate

from .hub.utils import released, to_bytes

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))]
TEXTS = {path.name: path.read_text(encoding='utf-8') for path in PAGES}
VIDEOS = re.compile('^## Videos\n.*?(?=^## )', re.DOTALL | re.MULTILINE)  # of the README, tested with docs/video.md


def blocks(text, language):
    return re.findall(rf'^```{language}\n(.*?)^```', text, re.DOTALL | re.MULTILINE)


create_model = timm.create_model


def small(name, **kwargs):
    """A model of fewer blocks than its name says, for speed."""
    fewer = dict(depths=(1, 1, 2, 2)) if re.match('mamba_?vision', name) else dict(depth=2)
    return create_model(name, **fewer, **kwargs)


def serve(hub, code):
    """The weights that a snippet asks for."""
    repos = {}
    for name in set(re.findall(r"create_model\(\s*'([\w.]+)', pretrained=True", code)):
        cfg = get_pretrained_cfg(name)
        weights = small(name).state_dict()
        repos.setdefault(cfg.hf_hub_id, {})[cfg.hf_hub_filename] = to_bytes(weights)
    for repo, files in repos.items():
        hub.add(repo, files)


@pytest.mark.parametrize('page', ['README.md', 'index.md', 'images.md', 'analysis.md', 'migrating.md'])
def test_snippets(page, hub, cache, tmp_path, monkeypatch):
    """Those of a page run one after another, with the weights on the tests' Hub."""
    if 'from peft' in TEXTS[page]:
        pytest.importorskip('peft')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(timm, 'create_model', small)
    Image.new('RGB', (320, 240), 'teal').save('photo.jpg')
    (tmp_path / 'videomamba_t16_in1k_res224.pth').write_bytes(to_bytes(released(depth=2)))
    snippets = blocks(VIDEOS.sub('', TEXTS[page]), 'python')
    serve(hub, '\n'.join(snippets))
    namespace = dict(loader=[(torch.randn(2, 3, 224, 224), torch.tensor([1, 2]))])
    for snippet in snippets:
        exec(snippet, namespace)


def flags_of(main, prog):
    """The flags of train.py or validate.py."""
    found = []
    parse = argparse.ArgumentParser.parse_known_args

    def stop(self, *args, **kwargs):
        found.append(set(self._option_string_actions))
        return parse(self, *args, **kwargs)
    with mock.patch.object(argparse.ArgumentParser, 'parse_known_args', stop), contextlib.suppress(SystemExit):
        main(['--help'], prog=prog)
    return set().union(*found)


def flags_in(parser):
    """The flags of a parser and of its subcommands."""
    nested = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    return set(parser._option_string_actions).union(*(flags_in(p) for a in nested for p in a.choices.values()))


def commands(text):
    for block in blocks(text, 'sh'):
        for line in block.replace('\\\n', ' ').split('\n'):
            words = shlex.split(line, comments=True)
            while words and ('=' in words[0] or words[0] in ('torchrun', '--nproc-per-node', '2', '8')):
                words = words[1:]
            if words[:2] == ['-m', 'timm_ssm.cli']:
                words = ['timm-ssm', *words[2:]]
            if words:
                yield words[1:] if words[0] == 'python' else words


@pytest.mark.parametrize('page', TEXTS)
def test_commands(page, capsys):
    """Scripts, targets, subcommands and flags in shell snippets exist."""
    subcommands = next(a for a in cli.parser()._actions if isinstance(a, argparse._SubParsersAction)).choices
    makefile = (ROOT / 'Makefile').read_text()
    known = {name: flags_in(p) for name, p in subcommands.items()}
    for name, script in (('train', train), ('validate', validate), ('plan', scaling)):
        known[name] = flags_of(script.main, name)
    for words in commands(TEXTS[page]):
        name = words[0]
        if name == 'timm-ssm':
            name, words = words[1], words[1:]
            assert name in known, name
        elif name.endswith('.py') and name != 'SCRIPT':
            assert (ROOT / name).exists(), name
            name = name.removesuffix('.py')
        elif name == 'make':
            for target in words[1:]:
                assert '=' in target or re.search(rf'^{target}:', makefile, re.MULTILINE), target
        if name in known:
            for flag in words:
                assert not re.match('--?[a-z]', flag) or flag.split('=')[0] in known[name], f'{name} {flag}'


def test_links_of_the_readme():
    for link in re.findall(r'\]\(([^)#]+)[^)]*\)', TEXTS['README.md']):
        assert link.startswith('https://') or (ROOT / link).exists(), link
    assert len(TEXTS['README.md'].split('\n')) <= 150


def test_the_site_is_whole():
    """What `mkdocs build --strict` asks for: pages in the navigation, and links that stay within docs/."""
    navigation = (ROOT / 'mkdocs.yml').read_text()
    for path in PAGES[1:]:
        assert f': {path.name}\n' in navigation, f'mkdocs.yml lacks {path.name}'
        for link in re.findall(r'\]\(([^)#\s]+)', TEXTS[path.name]):
            inside = not link.startswith('../') and (path.parent / link).exists()
            assert link.startswith('https://') or inside, f'{path.name}: {link}'


#: Texts in docs/troubleshooting.md that other software prints.
FOREIGN = (
    'undefined symbol', 'selective_scan_cuda', "No module named 'selective_scan_cuda'", 'bare_metal_version',
    'nvcc was not found', 'Expected u.is_cuda', 'Missing key(s)', 'Unexpected key(s)', 'bits must be between')


def test_error_texts():
    """Each piece of an error in docs/troubleshooting.md stands in the code that raises it."""
    files = [*(ROOT / 'timm_ssm').rglob('*.py')]
    code = re.sub(r"'\s*\n\s*f?'", '', '\n'.join(path.read_text(encoding='utf-8') for path in files))
    rows = re.findall(r'^\| (`.*?) \|', TEXTS['troubleshooting.md'], re.MULTILINE)
    assert len(rows) > 15
    for text in (t for row in rows for t in re.findall('`([^`]+)`', row) if not t.startswith(FOREIGN)):
        for piece in re.split(r'…|\d+|\bnan\b|\bheight\b|\bGroupMamba\b|torch\.int', text):
            for words in re.split(r'native +|timm-ssm env', piece):
                assert words.strip(' :,') in code, f'{text}: {words}'
