"""Activations of a model on paper against those of a real forward pass, and blocks that are recomputed."""
import copy

import pytest
import timm
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from timm_ssm.training.arguments import parse_args
from timm_ssm.training.recompute import (
    GIB,
    choose_blocks,
    keep_costly,
    plan_recomputation,
    recompute,
    recompute_blocks,
    saved_activations,
)
from timm_ssm.training.sharding import named_blocks

from .utils import BUSY, VIDEOMAMBA, assert_same_run, run, summary

MODELS = {
    'videomamba_tiny_patch16_224': dict(embed_dim=48, depth=4, patch_size=8, img_size=64),
    'mambavision_tiny': dict(embed_dim=16, stem_dim=8, depths=(1, 1, 2, 2), img_size=64),
}


def measured(model, input):
    """Bytes of the input, and that PyTorch's allocator has handed out in a forward pass and not got back by its end."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        output = model(input)
    assert output.requires_grad
    return input.nbytes + sum(event.self_cpu_memory_usage for event in prof.key_averages())


def args_of(tmp_path, samples, *flags):
    return parse_args([str(tmp_path), '--device', 'cpu', '--batch-size', str(samples), *map(str, flags)])


@pytest.mark.parametrize('name', MODELS)
def test_paper_and_measurement(tmp_path, name):
    """The count is what is measured, within two per cent of the whole, also of blocks recomputed partly and wholly."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, **MODELS[name]).train()
    samples, shape = 4, (3, 64, 64)
    input = torch.randn(samples, *shape)
    model(input)  # whatever is allocated once
    partly, wholly, counted = plan_recomputation(args_of(tmp_path, samples), model, shape)
    whole = measured(model, input)
    assert not partly and not wholly and counted == pytest.approx(whole, rel=0.02)

    on_paper = saved_activations(copy.deepcopy(model).to('meta'), shape)
    blocks = dict(named_blocks(model))
    for share in (0.9, 0.6):
        args = args_of(tmp_path, samples, '--activation-budget', share * counted / GIB)
        partly, wholly, less = plan_recomputation(args, model, shape)
        assert less <= share * counted and (wholly if share < 0.9 else partly)
        recompute_blocks(args, model, shape)
        kept = counted - samples * sum(
            on_paper.blocks[n] - on_paper.inputs[n] - (on_paper.costly[n] if n in partly else 0)
            for n in partly + wholly)
        assert measured(model, input) == pytest.approx(kept, abs=0.02 * whole) and kept <= less
        for n in partly + wholly:
            del blocks[n].forward


def test_costly_results_are_not_computed_again():
    """Of a block that is recomputed partly: its scans, and products but those of a few ranks."""
    model = timm.create_model('videomamba_tiny_patch16_224', img_size=32, depth=1, num_classes=10).train()
    input = torch.randn(2, 3, 32, 32)
    computed = {}
    for how in ('kept', 'partly', 'wholly'):
        if how != 'kept':
            recompute(model.blocks[0], keep_costly if how == 'partly' else None)
        with FlopCounterMode(display=False) as counter:
            model(input).sum().backward()
        computed[how] = {
            str(op): flops - computed.get('kept', {}).get(str(op), 0)
            for op, flops in counter.get_flop_counts()['Global'].items()}
        vars(model.blocks[0]).pop('forward', None)
    scan, product = 'timm_ssm.selective_scan', 'aten.mm'
    assert computed['partly'][scan] == 0 and computed['wholly'][scan] == computed['kept'][scan]
    assert 0 < computed['partly'][product] < 0.1 * computed['wholly'][product]


def test_same_result(digits, tmp_path):
    """A run that recomputes some of its blocks, partly or wholly, is bit for bit the one that keeps them all."""
    flags = [*VIDEOMAMBA, *BUSY, '--epochs', 1]
    kept = run(digits, tmp_path / 'kept', *flags)
    model = timm.create_model(
        VIDEOMAMBA[1], embed_dim=16, depth=2, patch_size=4, img_size=8, in_chans=1, num_classes=10)
    activations = saved_activations(model.to('meta').train(), (1, 8, 8))
    for share, how in ((0.95, 'partly'), (0.7, 'wholly')):
        budget = 16 * activations.total * share
        assert getattr(choose_blocks(activations, 16, budget), how)
        assert_same_run(kept, run(digits, tmp_path / str(share), *flags, '--activation-budget', budget / GIB))


@pytest.mark.slow
def test_compiled(digits, tmp_path):
    flags = [*VIDEOMAMBA, '--epochs', 1, '--torchcompile', 'aot_eager']
    losses = [
        float(summary(run(digits, tmp_path / budget, *flags, '--activation-budget', budget))[0]['train_loss'])
        for budget in ('1', '0.0003', '0.0002')]
    assert losses[1:] == pytest.approx(losses[:1] * 2, rel=1e-4)


def test_too_small_a_budget(digits, tmp_path):
    with pytest.raises(SystemExit, match=r'--activation-budget: got 1e-06 GiB, needs .* with every block recomputed'):
        run(digits, tmp_path, *VIDEOMAMBA, '--activation-budget', '1e-6')
