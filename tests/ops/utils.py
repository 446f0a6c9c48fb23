"""Random calls of the ops for tests, and what watches calls."""
from importlib.metadata import PackageNotFoundError, version
from typing import Dict, Optional

import torch
from packaging.version import Version


def too_old_to_interpret() -> str:
    """Why the Triton kernels cannot run in Triton's interpreter, empty if they can or need not."""
    try:
        old = not torch.cuda.is_available() and Version(version('triton')) < Version('3.3')
    except PackageNotFoundError:
        return 'there is no Triton'
    return 'the interpreter of Triton 3.2 cannot run the backward kernels, its compiler can' if old else ''


def scan_inputs(
        batch: int = 2,
        length: int = 37,
        channels: int = 12,
        d_state: int = 16,
        groups: Optional[int] = None,
        dtype: torch.dtype = torch.float32,
        device: str = 'cpu',
        optional: bool = True,
        seed: int = 0,
) -> Dict[str, torch.Tensor]:
    """Arguments of `selective_scan`: activations in `dtype`, parameters in float32 (float64 for float64)."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape, to=dtype):
        return torch.randn(shape, generator=g, dtype=torch.float64).to(device=device, dtype=to)

    acc = torch.float64 if dtype == torch.float64 else torch.float32
    bc_shape = (batch, length, d_state) if groups is None else (batch, length, groups, d_state)
    inputs = {
        'u': randn(batch, length, channels),
        'delta': randn(batch, length, channels),
        'A': -torch.exp(randn(channels, d_state, to=acc)),
        'B': randn(*bc_shape),
        'C': randn(*bc_shape),
    }
    if optional:
        inputs['D'] = randn(channels, to=acc)
        inputs['z'] = randn(batch, length, channels)
        inputs['delta_bias'] = randn(channels, to=acc)
    return inputs


def pairs(first: Dict[str, torch.Tensor], second: Dict[str, torch.Tensor]) -> Dict:
    """Arguments of `bidirectional_selective_scan` from those of its two directions; the gate is the first's."""
    return {k: v if k == 'z' else (v, second[k]) for k, v in first.items()}


def grads(fn, inputs: Dict, grad_out: Optional[torch.Tensor] = None, **kwargs):
    """fn's output for a copy of the inputs (tensors or pairs of them), and its gradients by name (`B`, `B_b`, ...)."""
    def leaf(x):
        return x.detach().clone(memory_format=torch.preserve_format).requires_grad_()

    args = {k: tuple(leaf(x) for x in v) if isinstance(v, tuple) else leaf(v) for k, v in inputs.items()}
    out = fn(**args, **kwargs)
    outs = out if isinstance(out, tuple) else (out,)
    if grad_out is None:
        g = torch.Generator().manual_seed(1)
        grad_out = [torch.randn(o.shape, generator=g, dtype=torch.float64).to(o) for o in outs]
    torch.autograd.backward(outs, grad_out)
    named = {}
    for k, v in args.items():
        for suffix, x in zip(('', '_b'), v if isinstance(v, tuple) else (v,)):
            named[k + suffix] = torch.zeros_like(x) if x.grad is None else x.grad  # None: an empty loop over tokens
    return out, named


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """max |got - want| / max |want|, in float64."""
    if want.numel() == 0:
        return 0.
    got, want = got.double(), want.double()
    return ((got - want).abs().max() / want.abs().max().clamp_min(1e-12)).item()


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """A context in which `size` is the number of elements of the largest tensor that was made."""
    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                self.size = max(self.size, x.numel())
        return out
