"""Reading the reference numbers, and what every family's tests check alike."""
import json
from pathlib import Path
from typing import Callable, Dict, List, Tuple

import torch
from safetensors import safe_open
from torch import nn

from timm_ssm.layers import ScanInputs, ScanMixer, scan_mixers
from timm_ssm.ops.naive import selective_scan_naive

from ..fixtures.synthesize import image, synthesize

FIXTURES = Path(__file__).parents[1] / 'fixtures'


def check_train_step(make: Callable[..., nn.Module], x: torch.Tensor) -> nn.Module:
    """Train the model that `make` makes for a step with drop_path; its state loads into another one that agrees.

    Returns the trained model of five classes, in evaluation mode.
    """
    model = make(drop_path_rate=.2).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    nn.functional.cross_entropy(model(x), torch.tensor([0, 1])).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    optimizer.step()
    again = make().eval()
    assert not torch.equal(again.head.weight, model.head.weight)
    again.load_state_dict(model.state_dict(), strict=True)
    with torch.no_grad():
        logits = model.eval()(x)
        assert logits.shape == (2, 5) and torch.equal(again(x), logits)
        torch.testing.assert_close(model.forward_head(model.forward_features(x)), logits)
    return model


def mixer_calls(model: nn.Module, x: torch.Tensor) -> List[Tuple[ScanMixer, torch.Tensor, torch.Tensor]]:
    """Each mixer with its input and output in a pass of the model."""
    calls = []
    handles = [
        m.register_forward_hook(lambda m, args, out: calls.append((m, args[0], out)))
        for m in scan_mixers(model).values()]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return calls


def check_mixers(
        model: nn.Module,
        x: torch.Tensor,
        count: int,
        flags: List[Tuple[bool, bool, bool]],
        finish: Callable,
        adapt: Callable[[ScanInputs], ScanInputs] = lambda inputs: inputs,
) -> None:
    """Compare every mixer with its two steps: `project`, then a scan of each direction by the executable specification.

    Args:
        model: Model in float64; its parameters become random.
        x: What it takes.
        count: Mixers that it has.
        flags: reverse, residual and mask_diagonal of each direction.
        finish: The mixer, the restored results of its scans and their inputs to the mixer's output, as its paper says.
        adapt: What `project` returns to what the mixer scans, where these differ.
    """
    def naive(inputs: ScanInputs) -> torch.Tensor:
        u, delta, A, B, C, D, z, delta_bias, reverse, residual, mask_diagonal, _ = inputs
        return selective_scan_naive(
            u, delta, A, B, C, D, z, delta_bias, reverse=reverse, residual=residual, mask_diagonal=mask_diagonal)

    for p in model.parameters():
        nn.init.normal_(p, std=.3)
    calls = mixer_calls(model, x)
    assert len(calls) == count == len(scan_mixers(model))
    assert [(s.reverse, s.residual, s.mask_diagonal) for s in calls[0][0].project(calls[0][1])] == flags
    with torch.no_grad():
        for mixer, tokens, out in calls:
            inputs = mixer.project(tokens)
            scanned = [mixer.restore(naive(adapt(s)), i, tokens.shape) for i, s in enumerate(inputs)]
            assert all(y.shape[:-1] == tokens.shape[:-1] for y in scanned)
            torch.testing.assert_close(finish(mixer, scanned, inputs), out)


def load_reference(name: str) -> Tuple[Dict, Dict[str, torch.Tensor], Dict[str, torch.Tensor]]:
    """Constructor arguments, released parameters by the authors' names, and the input, output and activations."""
    with safe_open(str(FIXTURES / f'{name}.safetensors'), 'pt') as f:
        tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118  not a dict
        config = json.loads(f.metadata()['config'])
    weights = {k[2:]: v for k, v in tensors.items() if k.startswith('w/')}
    return config, weights, {k: v for k, v in tensors.items() if not k.startswith('w/')}


def released_shapes() -> Dict[str, Dict[str, Tuple[int, ...]]]:
    """Names and shapes of the released full-size checkpoints, by model."""
    checkpoints = json.loads((FIXTURES / 'checkpoints.json').read_text())
    return {m: {k: tuple(s) for k, s in shapes.items()} for m, shapes in checkpoints.items()}


def synthetic_checkpoint(model: str) -> Dict[str, torch.Tensor]:
    """A released checkpoint's names and shapes with values made from the names."""
    return {k: synthesize(k, s) for k, s in released_shapes()[model].items()}


def record_blocks(model: torch.nn.Module) -> Dict[str, torch.Tensor]:
    """What `mid/layers.*` names in an isotropic model's reference, filled by the next forward pass."""
    got = {}
    for i, block in enumerate(model.blocks):
        block.mixer.register_forward_hook(lambda m, a, out, k=f'mid/layers.{i}.0': got.__setitem__(k, out))
        block.register_forward_pre_hook(lambda m, a, k=f'mid/layers.{i}.1': got.__setitem__(k, a[0]))
    return got


def record_stages(model: torch.nn.Module, mixer: str, channels_last: bool = False) -> Dict[str, torch.Tensor]:
    """What `mid/patch_embed` and `mid/layers.*` name in VMamba's or Spatial-Mamba's reference, filled by the next pass.

    Args:
        model: Hierarchical model.
        mixer: What the authors call the mixer of a block.
        channels_last: The reference's maps are (B, H, W, C).
    """
    got = {}

    def record(module: torch.nn.Module, name: str, last: bool) -> None:
        def hook(m, a, out):
            if last != channels_last:
                out = out.permute(0, 3, 1, 2) if last else out.permute(0, 2, 3, 1)
            got[f'mid/{name}'] = out
        module.register_forward_hook(hook)

    for i, stage in enumerate(model.stages):
        record(stage.downsample, f'layers.{i - 1}' if i else 'patch_embed', True)
        for j, block in enumerate(stage.blocks):
            record(block, f'layers.{i}.blocks.{j}', True)
            record(block.mixer, f'layers.{i}.blocks.{j}.{mixer}', True)
    record(stage, f'layers.{i}', False)
    return got


def check_fullsize(name: str, model: torch.nn.Module) -> None:
    """Compare a full-size model that holds `synthetic_checkpoint(name)` with the authors' code on the same values."""
    want = json.loads((FIXTURES / 'fullsize.json').read_text())[name]
    assert sum(p.numel() for p in model.parameters()) == want['params']
    with torch.no_grad():
        logits = model.eval()(image(want['input_shape'], want['input_seed']))[0]
    scale = max(map(abs, want['logits_first8']))
    torch.testing.assert_close(logits[:8], torch.tensor(want['logits_first8']), rtol=0, atol=1e-3 * scale)
    assert abs(logits.sum().item() - want['logits_sum']) < 1e-3 * want['logits_abs_sum']
    assert abs(logits.abs().sum().item() - want['logits_abs_sum']) < 1e-3 * want['logits_abs_sum']


def assert_close(got: torch.Tensor, want: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Equal to within tolerance times the largest value."""
    assert got.shape == want.shape
    assert (got - want).abs().max() <= tolerance * want.abs().max()
