import json
from pathlib import Path

import pytest
import timm
import yaml
from timm.models import get_pretrained_cfg

from timm_ssm.zoo import cards, registry
from timm_ssm.zoo.published import PUBLISHED

ROOT = Path(__file__).parents[2]
NAME = 'videomamba_tiny_patch16_448.in1k'


def test_hub_configs_are_in_sync():
    """If this fails: python -m timm_ssm.zoo"""
    folder = ROOT / 'hub_configs'
    names = registry.list_names(pretrained=True)
    assert sorted(p.name for p in folder.iterdir()) == sorted(names)
    for name in names:
        assert registry.counted()[name][0] == sum(p.numel() for p in registry.meta_model(name).parameters())
        for path, text in cards.generate(name, folder).items():
            assert path.read_text(encoding='utf-8') == text, path


def test_published_are_tags():
    assert {n for n in PUBLISHED if not n.endswith('.untrained')} == set(registry.list_names(pretrained=True))


def test_config():
    config = cards.model_config(NAME, registry.meta_model(NAME))
    assert list(config) == ['architecture', 'num_classes', 'num_features', 'global_pool', 'pretrained_cfg']
    assert config['architecture'] == 'videomamba_tiny_patch16_448'
    assert (config['num_classes'], config['num_features'], config['global_pool']) == (1000, 192, 'token')
    cfg = json.loads(json.dumps(config))['pretrained_cfg']
    assert cfg['input_size'] == [3, 448, 448] and cfg['tag'] == 'in1k' and cfg['license'] == 'apache-2.0'
    assert not {'url', 'file', 'hf_hub_id', 'hf_hub_filename', 'source', 'architecture'} & set(cfg)


def test_config_says_how_clips_are_sampled():
    for tag, method in (('k400', 'sparse'), ('ssv2', 'ssv2')):
        name = f'videomamba_tiny_patch16_f8_224.{tag}'
        config = cards.model_config(name, registry.meta_model(name))
        assert config['clip_args'] == dict(num_frames=8, clip_sampling=method)
    # of weights of other origin nothing is known
    assert 'clip_args' not in cards.model_config(name.partition('.')[0], registry.meta_model(name))


def test_config_of_an_adapted_model():
    args = dict(num_classes=7, in_chans=1, img_size=96)
    name = 'videomamba_tiny_patch16_224'
    config = cards.model_config(name, registry.meta_model(name, **args), args, [f'class {i}' for i in range(7)])
    assert config['model_args'] == dict(in_chans=1, img_size=96)  # num_classes there breaks transformers
    assert config['num_classes'] == config['pretrained_cfg']['num_classes'] == 7
    assert config['pretrained_cfg']['input_size'] == [1, 96, 96]
    assert 'tag' not in config['pretrained_cfg'] and 'license' not in config['pretrained_cfg']  # not of these weights
    assert len(config['label_names']) == 7


@pytest.mark.parametrize('name', registry.list_names(pretrained=True))
def test_config_is_read_back_by_timm(name):
    """timm's reader of config.json finds the registry's pretrained cfg and no further arguments."""
    from timm.models._hub import load_model_config_from_path

    cfg, architecture, model_args = load_model_config_from_path(ROOT / 'hub_configs' / name)
    assert architecture == name.partition('.')[0] and not model_args
    registered = get_pretrained_cfg(name).to_dict(remove_source=True)
    registered.pop('architecture')
    assert {k: cfg.get(k) for k in registered} == json.loads(json.dumps(registered))


@pytest.mark.parametrize('name', registry.list_names(pretrained=True))
def test_card(name):
    text = (ROOT / 'hub_configs' / name / 'README.md').read_text(encoding='utf-8')
    header = yaml.safe_load(text.split('---\n')[1])
    assert header['library_name'] == 'timm' and header['license'] and header['datasets']
    for wanted in ('https://arxiv.org/abs/', 'Weights and original code:** https://', 'Licence of the weights',
                   'Trained on', 'Parameters', f'**GMACs:** {registry.counted()[name][1]:.2f}, counted',
                   f"timm.create_model('{name}', pretrained=True)", '@inproceedings'):
        assert wanted in text, wanted
    published = PUBLISHED[name]
    if published.gmacs:
        assert f'{published.gmacs:g} as published' in text
    if published.top1:
        assert f'| {published.top1:.1f} % | {published.by}' in text
    usage = text.partition('```python\n')[2].partition('\n```')[0]
    assert len(usage.splitlines()) <= 5
    compile(usage, name, 'exec')


def test_hand_written_text_survives(tmp_path):
    cards_of = cards.generate(NAME, tmp_path)
    config, readme = cards_of
    readme.parent.mkdir()
    fresh = cards_of[readme]
    edited = fresh.replace('# Model card', '# My card').replace('79.3', '12.3')
    edited = edited.replace('---\n\n', 'language: en\n---\n\nBefore.\n\n', 1)
    edited = edited.replace('<!-- generated: usage', 'Between.\n\n<!-- generated: usage') + '\nAfter.\n'
    readme.write_text(edited)
    text = cards.generate(NAME, tmp_path)[readme]
    for hand_written in ('language: en\n', '\nBefore.\n', '\nBetween.\n', '\nAfter.\n'):
        assert hand_written in text
    assert '# Model card' in text and '79.3' in text and '12.3' not in text  # generated sections are generated
    for hand_written in ('language: en\n', 'Before.\n\n', 'Between.\n\n', '\nAfter.\n'):
        text = text.replace(hand_written, '', 1)
    assert text == fresh


def test_a_card_without_markers_is_not_overwritten(tmp_path):
    readme = tmp_path / NAME / 'README.md'
    readme.parent.mkdir()
    readme.write_text('All my own words.\n')
    with pytest.raises(ValueError, match='README.md.*markers'):
        cards.generate(NAME, tmp_path)
    assert readme.read_text() == 'All my own words.\n'


def test_list(cache, hub):
    row = registry.describe('videomamba_tiny_patch16_224.in1k')
    assert row == dict(
        name='videomamba_tiny_patch16_224.in1k', top1=76.9, params=7148008, gmacs=1.56, published_gmacs=1.1,
        input_size=(3, 224, 224), license='apache-2.0', cached=False)
    ours = registry.list_names()
    assert 'videomamba_tiny_patch16_224' in ours and 'vit_tiny_patch16_224' not in ours
    assert set(ours) < set(timm.list_models())
    assert registry.list_names(['*_base_*'], pretrained=True) == [
        n for n in registry.list_names(pretrained=True) if '_base_' in n]
