from pathlib import Path

import pytest
import timm

import timm_ssm
from timm_ssm.zoo import model_table
from timm_ssm.zoo.__main__ import COUNTED, TABLE
from timm_ssm.zoo.published import PARAMS, PUBLISHED
from timm_ssm.zoo.registry import input_shape, list_names

COMPARABLE = [n for n, p in PUBLISHED.items() if p.gmacs]


@pytest.fixture(scope='module')
def rows():
    """Every model with every tag, built on the meta device and counted."""
    return {n: model_table.row(n) for n in list_names(include_tags=True)}


def test_what_is_written_is_what_is_counted(rows):
    """If not: python -m timm_ssm.zoo"""
    assert model_table.document(list(rows.values())) == TABLE.read_text(encoding='utf-8')
    assert model_table.counted(list(rows.values())) == COUNTED.read_text(encoding='utf-8')


def test_every_model_is_in_the_table(rows):
    modules = [p.stem for p in Path(timm_ssm.models.__file__).parent.glob('[!_]*.py')]
    assert {r['architecture'] for r in rows.values()} == set(timm.list_models(module=modules)) and len(modules) >= 7
    assert set(PUBLISHED) <= set(rows)
    assert all(timm.list_models(f'{beginning}*') for beginning in PARAMS)


def test_parameters_agree_with_the_published_ones(rows):
    """To within the rounding of the published figure or 2.5 %; one model has none."""
    assert [n for n, r in rows.items() if not r['published_params']] == ['stvideomamba_tiny_patch16_f16_224.untrained']
    for name, r in rows.items():
        if published := r['published_params']:
            rounding = .5 if published == int(published) else 0
            assert r['params'] / 1e6 == pytest.approx(published, rel=.025, abs=rounding), name


@pytest.mark.parametrize('name', COMPARABLE)
def test_gmacs_agree_with_the_published_ones(name, rows):
    """Within 5 %, counting the same operations; StableMamba's layout is a reconstruction that fits its parameters."""
    r = rows[name]
    tolerance = .115 if name.startswith('stablemamba') else .05
    assert r['same_gmacs'] == pytest.approx(r['published'].gmacs, rel=tolerance)
    assert r['same_gmacs'] <= r['gmacs']


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
