"""Run timm's own model tests on our models.

    python tests/timm_suite.py ['videomamba_tiny_patch16_224' ...] [-- pytest arguments]

Fetches the source distribution of the installed timm from the package index (once, into .timm/), points its
tests/test_models.py at the models whose names match the patterns, and runs it. Without patterns: the smaller models.
Models that are isotropic (NLC features, no levels) join timm's list of non-standard models, as its ViTs do.
"""
import fnmatch
import re
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DEFAULT_PATTERNS = ['*_tiny', '*_tiny_patch*', '*_small_patch*', 'stable_groupmamba_small']
# timm's tests feed images; models that take clips have tests of their own
CLIPS = re.compile(r'_f\d+_')
# these need weights from the Hub; tests/test_pretrained.py does that against a server on this machine
NEEDS_HUB = ('test_model_load_pretrained', 'test_model_features_pretrained', 'test_model_inference')


def fetch(version: str) -> Path:
    """timm's tests/test_models.py of the given version."""
    cache = ROOT / '.timm'
    source = cache / f'timm-{version}' / 'tests' / 'test_models.py'
    if not source.exists():
        cache.mkdir(exist_ok=True)
        subprocess.check_call([
            sys.executable, '-m', 'pip', 'download', '--quiet', '--no-deps', '--no-binary', 'timm',
            '--dest', str(cache), f'timm=={version}'])
        with tarfile.open(cache / f'timm-{version}.tar.gz') as archive:
            archive.extractall(cache, filter='data')
    return source


def patch(source: str, non_std: list, modules: list) -> str:
    """Add our names to timm's lists of non-standard models and of modules with forward_intermediates."""
    for name, extra in (('NON_STD_FILTERS', non_std), ('FEAT_INTER_FILTERS', modules)):
        source, n = re.subn(rf'^{name} = \[$', f'{name} = [\n    *{extra!r},', source, flags=re.M)
        if n != 1:
            raise SystemExit(f'timm_suite: no list {name} in this version of tests/test_models.py')
    return source


class OnlyOurs:
    """pytest plugin: timm's registry shrinks to `names`; tests of timm's own models are left out."""

    def __init__(self, names) -> None:
        import timm
        self.names = set(names)
        list_models = timm.list_models

        def ours(*args, **kwargs):
            return [n for n in list_models(*args, **kwargs) if n.partition('.')[0] in self.names]

        timm.list_models = ours

    def pytest_collection_modifyitems(self, config, items) -> None:
        def is_ours(item) -> bool:
            name = getattr(item, 'callspec', None) and item.callspec.params.get('model_name', '')
            return isinstance(name, str) and name.partition('.')[0] in self.names and item.originalname not in NEEDS_HUB

        config.hook.pytest_deselected(items=[i for i in items if not is_ours(i)])
        items[:] = [i for i in items if is_ours(i)]


def main(argv) -> int:
    import pytest
    import timm

    sys.path.insert(0, str(ROOT))
    import timm_ssm  # noqa: F401  registers the models

    if '--' in argv:
        split = argv.index('--')
        argv, pytest_args = argv[:split], argv[split + 1:]
    else:
        pytest_args = []
    modules = sorted({m.__name__.rpartition('.')[2] for m in vars(timm_ssm.models).values() if hasattr(m, '__file__')})
    every = timm.list_models(module=modules)
    names = [n for n in every if not CLIPS.search(n) and any(fnmatch.fnmatch(n, p) for p in argv or DEFAULT_PATTERNS)]
    if not names:
        raise SystemExit(f'timm_suite: no model matches {argv}; there are {", ".join(every)}')

    # their models are held to test_model_default_cfgs_non_std instead of the standard one
    isotropic = [n for n in every if timm.get_pretrained_cfg(n).pool_size is None]
    test_file = fetch(timm.__version__)
    target = test_file.with_name('test_models_timm_ssm.py')
    target.write_text(patch(test_file.read_text(), isotropic, modules))
    return pytest.main(
        [str(target), '-q', '-p', 'no:cacheprovider', f'--rootdir={target.parent}', '-c', '/dev/null',
         '-W', 'ignore', *pytest_args],
        plugins=[OnlyOurs(names)])


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
