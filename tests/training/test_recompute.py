"""Activations of a model on paper against those of a real forward pass, and blocks that are recomputed."""
import pytest
import timm
import torch
from torch.profiler import ProfilerActivity, profile

from timm_ssm.training.arguments import parse_args
from timm_ssm.training.recompute import GIB, plan_recomputation, recompute_blocks, saved_activations

from .utils import BUSY, VIDEOMAMBA, assert_same_run, run

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
    """The count is what is measured, within two per cent, and what is measured fits a budget that takes recomputing."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, **MODELS[name]).train()
    samples, shape = 4, (3, 64, 64)
    input = torch.randn(samples, *shape)
    model(input)  # whatever is allocated once
    names, counted = plan_recomputation(args_of(tmp_path, samples), model, shape)
    whole = measured(model, input)
    assert not names and counted == pytest.approx(whole, rel=0.02)

    args = args_of(tmp_path, samples, '--activation-budget', 0.9 * counted / GIB)
    names, less = plan_recomputation(args, model, shape)
    assert names and less <= 0.9 * counted
    recompute_blocks(args, model, shape)
    assert measured(model, input) <= min(less, 0.98 * whole)


def test_same_result(digits, tmp_path):
    """A run that recomputes some of its blocks is bit for bit the one that keeps them all."""
    flags = [*VIDEOMAMBA, *BUSY, '--epochs', 1]
    kept = run(digits, tmp_path / 'kept', *flags)
    model = timm.create_model(
        VIDEOMAMBA[1], embed_dim=16, depth=2, patch_size=4, img_size=8, in_chans=1, num_classes=10)
    activations = saved_activations(model.to('meta').train(), (1, 8, 8))
    assert_same_run(kept, run(
        digits, tmp_path / 'some', *flags, '--activation-budget', 16 * activations.total * 0.95 / GIB))


def test_too_small_a_budget(digits, tmp_path):
    with pytest.raises(SystemExit, match=r'--activation-budget: got 1e-06 GiB, needs .* with every block recomputed'):
        run(digits, tmp_path, *VIDEOMAMBA, '--activation-budget', '1e-6')
