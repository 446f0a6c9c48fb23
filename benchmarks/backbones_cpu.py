"""VMamba and Spatial-Mamba against Swin and ConvNeXt of the same size on the CPU, and where their time goes.

    python benchmarks/backbones_cpu.py [--seconds 20] [--only forward | step | scan | profile]

Ratios of median images/s of all four models, timed in turns, and of their scans to the specification, a loop over the
tokens in PyTorch. The machine should be idle.
"""
import argparse
from typing import Callable, Dict, Iterator, List

import timm
import torch
from harness import Row, report, time_in_turns
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from timm_ssm.layers import ScanInputs, scan, scan_mixers
from timm_ssm.ops.naive import selective_scan_naive

OURS = ['vmamba_tiny', 'spatialmamba_tiny']
OTHERS = ['swin_tiny_patch4_window7_224', 'convnext_tiny']
BATCH = 4
#: operators of the profile, by the beginning of their names
KINDS = {
    'linear layers': ('aten::addmm', 'aten::mm', 'aten::bmm'),
    'convolutions': ('aten::mkldnn_convolution', 'aten::convolution', 'aten::_slow_conv', 'aten::thnn_conv'),
    'scan': ('timm_ssm::',),
    'activations': ('aten::gelu', 'aten::silu', 'aten::relu', 'aten::threshold', 'aten::clamp'),
    'norms': ('aten::native_',),
    'copies': ('aten::copy_', 'aten::replication_pad', 'aten::cat'),
}


def forward(model: torch.nn.Module, x: torch.Tensor) -> Callable[[], object]:
    def run() -> None:
        with torch.inference_mode():
            model.eval()(x)
    return run


def step(model: torch.nn.Module, x: torch.Tensor) -> Callable[[], object]:
    """Forward and backward pass."""
    labels = torch.zeros(len(x), dtype=torch.long)

    def run() -> None:
        model.zero_grad()
        F.cross_entropy(model.train()(x), labels).backward()
    return run


def model_rows(what: str, seconds: float) -> Iterator[Row]:
    x = torch.randn(BATCH, 3, 224, 224)
    make = dict(forward=forward, step=step)[what]
    times = time_in_turns({n: make(timm.create_model(n), x) for n in OURS + OTHERS}, seconds)
    for ours in OURS:
        for other in OTHERS:
            yield Row(
                f'{ours} / {other.partition("_patch")[0]}, {what}', times[other] / times[ours],
                .5 if what == 'forward' and other.startswith('swin') else None,
                detail=f'{BATCH / times[ours]:.2f} against {BATCH / times[other]:.2f} images/s')


def scan_inputs(name: str) -> List[ScanInputs]:
    """What the scans of each stage's first mixer are given for an image, each direction for itself."""
    model, inputs = timm.create_model(name).eval(), []
    for mixer in [m for n, m in scan_mixers(model).items() if '.blocks.0.' in n]:
        mixer.register_forward_hook(lambda m, args, out: inputs.extend(m.project(args[0])))
    with torch.no_grad():
        model(torch.randn(1, 3, 224, 224))
    return [ScanInputs(*(v.requires_grad_() if isinstance(v, torch.Tensor) else v for v in s)) for s in inputs]


def naive(s: ScanInputs) -> torch.Tensor:
    return selective_scan_naive(s.u, s.delta, s.A, s.B, s.C, s.D, s.z, s.delta_bias, reverse=s.reverse)


def native(s: ScanInputs) -> torch.Tensor:
    return scan([s])


def all_scans(one: Callable[[ScanInputs], torch.Tensor], inputs: List[ScanInputs], what: str) -> Callable[[], object]:
    def run() -> None:
        with torch.set_grad_enabled(what == 'step'):
            for s in inputs:
                y = one(s)
                if what == 'step':
                    y.sum().backward()
    return run


def scan_rows(seconds: float) -> Iterator[Row]:
    """One mixer of each stage, forward and with gradients."""
    for name in OURS:
        inputs = scan_inputs(name)
        for what in ('forward', 'step'):
            times = time_in_turns({f.__name__: all_scans(f, inputs, what) for f in (native, naive)}, seconds)
            yield Row(
                f'scans of {name}, {what}: native / a loop in PyTorch', times['naive'] / times['native'], 20.,
                detail=f'{times["native"] * 1e3:.1f} against {times["naive"] * 1e3:.0f} ms')


def time_by_kind(run: Callable[[], object]) -> Dict[str, float]:
    """The part of the time that each kind of operator takes."""
    run()
    with profile(activities=[ProfilerActivity.CPU]) as p:
        run()
    times: Dict[str, float] = dict.fromkeys([*KINDS, 'other'], 0.)
    for event in p.key_averages():
        kind = next((k for k, names in KINDS.items() if event.key.startswith(names)), 'other')
        times['scan' if 'selective_scan' in event.key else kind] += event.self_cpu_time_total
    total = sum(times.values())
    return {k: t / total for k, t in times.items()}


def profile_rows() -> Iterator[Row]:
    x = torch.randn(BATCH, 3, 224, 224)
    for name in OURS:
        for what, make in (('forward', forward), ('step', step)):
            for kind, part in time_by_kind(make(timm.create_model(name), x)).items():
                yield Row(f'{name}, {what}: part of the time in {kind}', part)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--seconds', type=float, default=20., help='time to spend on each comparison')
    parser.add_argument('--only', choices=('forward', 'step', 'scan', 'profile'))
    args = parser.parse_args()
    parts = dict(
        forward=lambda: model_rows('forward', args.seconds), step=lambda: model_rows('step', args.seconds),
        scan=lambda: scan_rows(args.seconds), profile=profile_rows)
    for part in [args.only] if args.only else parts:
        report(f'backbones_cpu_{part}', list(parts[part]()))


if __name__ == '__main__':
    main()
