import pytest
import timm

from benchmarks import model_table
from timm_ssm.hub.zoo import input_shape, list_names
from timm_ssm.models.counted import COUNTED
from timm_ssm.models.published import PARAMS, PUBLISHED

COMPARABLE = [n for n, p in PUBLISHED.items() if p.gmacs]


@pytest.mark.parametrize('name', COMPARABLE)
def test_counts_agree_with_the_published_ones(name):
    """Parameters within the rounding of the published figure or 2.5 %, GMACs of the same operations within 5 %.

    StableMamba's depth and MLP ratio are a reconstruction that matches its parameters, not its GMACs.
    """
    row = model_table.row(name)
    params = row['published_params']
    assert row['params'] / 1e6 == pytest.approx(params, rel=.025, abs=.5 if params == int(params) else 0)
    assert row['same_gmacs'] == pytest.approx(row['published'].gmacs, rel=.12 if name.startswith('stable') else .05)
    assert row['same_gmacs'] <= row['gmacs']
    assert_written(row)


@pytest.mark.parametrize('name', [
    'videomamba_tiny_patch16_f64_224.breakfast', 'videomambapro_tiny_patch16_224.untrained', 'groupmamba_tiny.in1k',
    'vim_tiny_patch16_stride8_224.in1k', 'stvideomamba_tiny_patch16_f16_224.untrained'])
def test_counts_where_nothing_is_published(name):
    assert_written(model_table.row(name))


def assert_written(row):
    """The document and the module hold the row as it is counted now; if not: python benchmarks/model_table.py"""
    assert f'| {" | ".join(model_table.cells(row))} |\n' in model_table.DOCUMENT.read_text(encoding='utf-8')
    assert COUNTED[row['name']] == model_table.counts(row)


def test_every_model_is_in_the_table():
    text = model_table.DOCUMENT.read_text()
    names = list_names(include_tags=True)
    assert set(PUBLISHED) <= set(names)
    assert all(f'| `{n.partition(".")[0]}` |' in text for n in names)
    assert text.count('\n| `') == len(names)
    assert list(COUNTED) == names
    assert all(timm.list_models(f'{beginning}*') for beginning in PARAMS)


def test_parts_of_the_count():
    """VideoMamba-Ti, counted by hand: 197 tokens, 24 blocks, 384 channels, 16 states, rank 12."""
    params, gmacs = model_table.count('videomamba_tiny_patch16_224', (3, 224, 224))
    per_token = 24 * 384 * 2 / 1e9
    assert params == 7_148_008
    assert gmacs['x_proj'] == pytest.approx(197 * per_token * (12 + 2 * 16))
    assert gmacs['dt_proj'] == pytest.approx(197 * per_token * 12)
    assert gmacs['scan'] == pytest.approx(197 * per_token * (9 * 16 + 1 + .5) / 2)
    assert gmacs['attention'] == 0
    rest = 196 * 3 * 256 * 192 / 1e9 + 197 * 24 * 3 * 384 * 192 / 1e9 + 197 * per_token * 4 + 192_000 / 1e9
    assert gmacs['total'] == pytest.approx(rest + gmacs['x_proj'] + gmacs['dt_proj'] + gmacs['scan'])


def test_names():
    assert model_table.published_params('mambavision_large2') == 241.5
    assert model_table.published_params('videomamba_tiny_patch16_f8_224') == 7
    assert input_shape('vim_base_patch16_224.in1k') == (3, 224, 224)
    assert input_shape('videomamba_tiny_patch16_f8_224') == (3, 8, 224, 224)
