"""The recipes: files, both parsers, and what each comes to against tables computed by hand."""
import csv
import functools
import json
import math
import os
import re
import runpy
import sys
from pathlib import Path

import pytest
import timm
import torch
import yaml
from timm.data import create_transform

from timm_ssm.data import create_train_transform
from timm_ssm.training import train
from timm_ssm.training.arguments import RECIPES, UNSUPPORTED, make_parser, parse_args
from timm_ssm.training.optim import create_optimizer, create_scheduler, global_batch, resolve_learning_rate
from timm_ssm.training.recompute import saved_activations
from timm_ssm.zoo import recipes

FIXTURES = Path(__file__).parents[1] / 'fixtures'
TABLE = list(csv.DictReader((FIXTURES / 'recipes.csv').read_text().splitlines()))
NAMES = sorted(path.stem for path in RECIPES.glob('*.yaml'))
STOCK = json.loads((FIXTURES / 'timm_train_flags.json').read_text())
OURS_ONLY = {
    'decay_a_log', 'layer_decay_mode', 'lr_base_all', 'num_sample', 'clip_sampling', 'sampling_rate', 'no_hflip'}
STOCK_FAMILIES = ('stablemamba', 'groupmamba', 'mambavision')


def resolve(name, *flags, processes=8):
    return parse_args(
        ['--recipe', name, '--dry-run', str(processes), '--train-num-samples', '1', '--device', 'cpu', *flags])


@functools.cache
def model_like(name):
    """A model on meta with the same parameters but for their shapes as others of its family, size and kind of input."""
    clips = re.search(r'_f\d+_', name)
    return _model(next(
        n for n in timm.list_models(re.sub(r'_(f\d+_)?\d+$', '_f*' if clips else '_*', name.partition('.')[0]))
        if bool(re.search(r'_f\d+_', n)) == bool(clips)))


@functools.cache
def _model(name):
    return timm.create_model(name, device='meta')


def test_files_and_document_are_those_of_the_table():
    expected = {r.name: recipes.text(r) for r in recipes.recipes()}
    assert {path.stem: path.read_text(encoding='utf-8') for path in RECIPES.glob('*.yaml')} == expected
    if recipes.DOCUMENT.exists():
        assert recipes.DOCUMENT.read_text(encoding='utf-8') == recipes.document()


def test_each_comes_to_what_the_papers_say():
    assert [row['recipe'] for row in TABLE] == NAMES
    for row in TABLE:
        args = resolve(row['recipe'])
        args.world_size = 8
        optimizer = create_optimizer(args, model_like(args.model))
        found = dict(
            batch=global_batch(args), peak=args.lr, first=args.warmup_lr, lowest=args.min_lr, epochs=args.epochs,
            warmup=args.warmup_epochs, weight_decay=args.weight_decay, drop_path=args.drop_path,
            slowed=min(group.get('lr_scale', 1.) for group in optimizer.param_groups),
            not_decayed=sum(len(g['params']) for g in optimizer.param_groups if not g['weight_decay']))
        expected = {key: float(row[key]) for key in found}
        assert found == pytest.approx(expected, rel=1e-3), row['recipe']
        assert {g['weight_decay'] for g in optimizer.param_groups} == {0., args.weight_decay}
        assert timm.is_model(args.model.partition('.')[0])

        scheduler, num_epochs = create_scheduler(args, optimizer, 10)
        assert num_epochs == args.epochs + args.cooldown_epochs + args.warmup_prefix * args.warmup_epochs
        for epoch in {0, 1, args.warmup_epochs - 1, args.warmup_epochs, args.epochs // 2, args.epochs - 1}:
            scheduler.step(epoch)
            scheduler.step_update(10 * epoch)
            assert optimizer.param_groups[-1]['lr'] == pytest.approx(rate(row, epoch)), row['recipe']

        if 'clip_sampling' in yaml.safe_load((RECIPES / f'{row["recipe"]}.yaml').read_text()):
            create_train_transform((224, 224), interpolation=args.train_interpolation, auto_augment_config=args.aa)
        else:
            transform = create_transform((3, 224, 224), is_training=True, auto_augment=args.aa, re_prob=args.reprob)
            assert 'RandAugment' in str(transform) or args.aa == 'v0'


def test_learning_rates_follow_the_batch():
    for name in (*NAMES[::10], 'vmamba_tiny_in1k', 'videomamba_tiny_k400_f8'):
        rates = []
        for processes in (8, 2):
            args = resolve(name)
            args.world_size = processes
            resolve_learning_rate(args)
            rates.append((args.lr, args.min_lr, args.warmup_lr))
        # the lowest and the first rate follow it where the papers' code says so
        factors = [4 if i == 0 or args.lr_base_all else 1 for i in range(3)]
        assert rates[0] == pytest.approx([f * r for f, r in zip(factors, rates[1])]), name


def rate(row, epoch):
    """The learning rate at the start of an epoch, of 10 steps for clips."""
    peak, first, lowest = (float(row[key]) for key in ('peak', 'first', 'lowest'))
    epochs, warmup = int(row['epochs']), int(row['warmup'])
    if re.search(r'_f\d+', row['recipe']):
        if epoch < warmup:
            return first + (peak - first) * 10 * epoch / (10 * warmup - 1)
        return lowest + (peak - lowest) * (1 + math.cos(math.pi * (epoch - warmup) / (epochs - warmup))) / 2
    if epoch < warmup:
        return first + (peak - first) * epoch / warmup
    if row['recipe'].startswith(('vmamba', 'spatialmamba')):  # the cosine begins after the warm-up
        epoch -= warmup
    return lowest + (peak - lowest) * (1 + math.cos(math.pi * epoch / epochs)) / 2


@pytest.mark.parametrize('index', range(2))
def test_groups_equal_those_of_the_released_code(index):
    expected = json.loads((FIXTURES / 'video_optim.json').read_text())['groups'][index]
    name = ('videomamba_small_k400_f8', 'videomamba_middle_k400_f16_mask')[index]
    args = resolve(name)
    args.world_size = 8
    assert (args.layer_decay, args.weight_decay) == (expected['layer_decay'], expected['weight_decay'])
    optimizer = create_optimizer(args, timm.create_model(args.model, device='meta', num_classes=400))

    def rows(groups, count):
        return sorted((g['lr_scale'], g['weight_decay'], *count(g)) for g in groups)

    found = rows(optimizer.param_groups, lambda g: (len(g['params']), sum(p.numel() for p in g['params'])))
    wanted = rows(expected['groups'], lambda g: (sum(g['params'].values()), g['numel']))
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted):
        assert one == pytest.approx(other, rel=1e-9)


@pytest.mark.parametrize('index', range(3))
def test_schedule_equals_that_of_the_released_code(index):
    expected = json.loads((FIXTURES / 'video_optim.json').read_text())['schedule'][index]
    args = parse_args([
        '--dry-run', '--train-num-samples', '1', '--device', 'cpu', '--opt', 'adamw', '--lr-base-all',
        '--sched', 'cosine_per_step', '--lr-base', str(expected['lr']), '--lr-base-size', '256',
        '--lr-base-scale', 'linear', '--num-sample', '2',
        '--batch-size', str(expected['samples_per_step'] // 2), '--min-lr', str(expected['min_lr']),
        '--warmup-lr', str(expected['warmup_lr']), '--epochs', str(expected['epochs']),
        '--warmup-epochs', str(expected['warmup_epochs'])])
    args.world_size = 1
    optimizer = create_optimizer(args, torch.nn.Linear(2, 2))
    scheduler, _ = create_scheduler(args, optimizer, expected['steps_per_epoch'])
    for step, lr in expected['values']:
        if step:
            scheduler.step_update(step)
        assert optimizer.param_groups[0]['lr'] == pytest.approx(lr, rel=1e-8)


@pytest.mark.parametrize('mode, scales', [
    ('released', {0.5 ** 25, 1.}), ('proper', {0.5 ** i for i in range(26)}), ('none', {1.})])
def test_layer_decay_modes(mode, scales):
    args = resolve('videomamba_tiny_k400_f8', '--layer-decay', '0.5', '--layer-decay-mode', mode)
    args.world_size = 8
    model = model_like(args.model)
    groups = create_optimizer(args, model).param_groups
    assert {group.get('lr_scale', 1.) for group in groups} == scales
    names = {id(p): name for name, p in model.named_parameters()}
    for group in groups:
        for p in group['params']:
            block = re.match(r'blocks\.(\d+)', names[id(p)])
            if block and mode == 'proper':
                assert group['lr_scale'] == 0.5 ** (24 - int(block[1])), names[id(p)]


def test_a_log_is_decayed_or_not():
    for flags in ([], ['--layer-decay-mode', 'none'], ['--layer-decay-mode', 'proper']):
        args = resolve('videomamba_tiny_k400_f8', *flags)
        args.world_size = 8
        model = model_like(args.model)
        ids = {id(p) for g in create_optimizer(args, model).param_groups if g['weight_decay'] for p in g['params']}
        for name, p in model.named_parameters():
            assert (id(p) in ids) == (p.ndim > 1 and 'pos_embed' not in name and name != 'cls_token'), name
    args.decay_a_log = False
    ids = {id(p) for g in create_optimizer(args, model).param_groups if g['weight_decay'] for p in g['params']}
    assert not any(id(p) in ids for name, p in model.named_parameters() if name.endswith(('A_log', 'A_b_log')))


def test_flags_win_over_a_config_and_that_over_the_recipe(tmp_path):
    (tmp_path / 'config.yaml').write_text('epochs: 7\nmin_lr: 2.0e-6\nrecipe: videomamba_tiny_in1k\n')
    args = parse_args([str(tmp_path), '--config', str(tmp_path / 'config.yaml'), '--epochs', '9'])
    assert (args.epochs, args.min_lr, args.weight_decay) == (9, 2e-6, 0.1)
    with pytest.raises(SystemExit, match='--recipe: got videomamba_tiny, .*videomamba_tiny_in1k'):
        parse_args([str(tmp_path), '--recipe', 'videomamba_tiny'])


def test_stock_timm_takes_those_that_need_no_flags_of_ours():
    for name in NAMES:
        config = yaml.safe_load((RECIPES / f'{name}.yaml').read_text())
        unknown = {
            key for key, value in config.items()
            if key not in STOCK['flags'] or value not in (STOCK['flags'][key]['choices'] or [value])}
        unknown -= {'sched'} if config.get('sched') == 'cosine_per_step' else set()
        assert unknown <= OURS_ONLY | {'kd_distill_type'}, name
        if name.startswith(STOCK_FAMILIES) and name.endswith('_in1k'):
            assert not unknown, name


def test_every_flag_of_stock_timm_is_here_or_left_out():
    ours = {action.dest for action in make_parser()._actions}
    assert set(STOCK['flags']) - {'config'} <= ours
    assert len(ours & set(STOCK['flags']) - {flag.replace('-', '_') for flag in UNSUPPORTED}) > 120


@pytest.mark.skipif('TIMM_SOURCE' not in os.environ, reason='TIMM_SOURCE: a checkout of timm')
@pytest.mark.parametrize('name', [n for n in NAMES if n.startswith(STOCK_FAMILIES) and n.endswith('_in1k')])
def test_stock_parser(name, monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['train.py', 'DATA', '--config', str(RECIPES / f'{name}.yaml')])
    args, _ = runpy.run_path(os.path.join(os.environ['TIMM_SOURCE'], 'train.py'))['_parse_args']()
    args_here = resolve(name)
    for key in yaml.safe_load((RECIPES / f'{name}.yaml').read_text()):
        assert getattr(args, key) == getattr(args_here, key), key


def test_dry_run(digits, tmp_path, capsys):
    flags = [
        '--model', 'videomamba_tiny_patch16_224', '--model-kwargs', 'embed_dim=16', 'depth=2', 'patch_size=4',
        '--img-size', '8', '--num-classes', '10', '--device', 'cpu', '--output', str(tmp_path)]
    assert train.main([str(digits), *flags, '--recipe', 'videomamba_small_in1k', '--batch-size', '8', '--dry-run', '2',
                       '--drop-path', '0', '--epochs', '30']) is None
    out = capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    model = timm.create_model(
        'videomamba_tiny_patch16_224', embed_dim=16, depth=2, patch_size=4, img_size=8, num_classes=10)
    parameters = f'{sum(p.numel() for p in model.parameters()):,} parameters, from scratch'
    (curve,) = re.findall('^learning rate  ([▁▂▃▄▅▆▇█]+)$', out, re.M)
    assert len(curve) == 30 and (curve[0], curve[5]) == ('▁', '█')
    assert list(curve[5:]) == sorted(curve[5:], reverse=True)
    for text in (
            f'model          videomamba_tiny_patch16_224, {parameters}', 'GiB for weights, gradients, optimiser state',
            '160 to train on, 41 to validate on, 10 classes', '3 × 8 × 8', 'global batch   16: 2 processes of 8',
            'steps          10 an epoch, 300 in 30 epochs', 'learning rate 1.563e-05', 'weight decay 0.05',
            '1e-06 at first', 'in epoch 5', 'GiB for the activations of 8 samples'):
        assert text in out, (text, out)


def test_activations_of_a_plan():
    """Inputs of the linear layers and of GELU, in float32, of one sample."""
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 5), torch.nn.GELU(), torch.nn.Linear(5, 2))
    assert saved_activations(model.to('meta').train(), (3, 2, 2)).total == 4 * (12 + 5 + 5)
