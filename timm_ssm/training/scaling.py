"""A training step on many GPUs, on paper: `timm-ssm plan`. Nothing of it is measured; formulas in docs/scaling.md."""
import argparse
import math
from typing import List, NamedTuple, Optional, Sequence

import timm
import torch

from ..zoo.model_table import count
from ..zoo.registry import input_shape, table
from .arguments import at_least, errors_of
from .recompute import saved_activations
from .sharding import named_blocks


class Hardware(NamedTuple):
    """A GPU, its links and its node. Defaults: an H100 SXM in a node of eight, by its data sheet unless assumed."""
    tflops: float = 989.  # 10^12 operations a second in bfloat16, dense
    utilisation: float = 0.3  # assumed: share of them that training reaches
    memory_gib: float = 80.
    memory_gbs: float = 3350.  # GB/s to its own memory
    link_gbs: float = 450.  # GB/s to the GPUs of its node, in each direction
    network_gbs: float = 50.  # GB/s to other nodes, in each direction: 400 Gbit/s for each GPU
    latency_us: float = 10.  # assumed: of one hop of a collective
    gpus_per_node: int = 8
    cores_per_gpu: int = 14
    images_per_core: float = 100.  # assumed: images a second that a core decodes and augments
    kb_per_image: float = 115.  # of ImageNet's training set


class Counts(NamedTuple):
    """What a model comes to."""
    params: int
    macs: float  # of a forward pass of one sample
    activations: int  # bytes that it keeps of one sample for the backward pass, in bfloat16
    blocks: int


class Step(NamedTuple):
    """A training step of one of the GPUs, in seconds and bytes."""
    gpus: int
    compute: float
    traffic: float  # seconds of reading and writing the GPU's own memory, at least
    communication: float
    memory: float  # bytes held at the peak
    samples: int  # of one GPU

    def seconds(self, overlap: bool) -> float:
        """With communication wholly hidden behind computing, or not at all."""
        work = max(self.compute, self.traffic)
        return max(work, self.communication) if overlap else work + self.communication


def count_model(name: str) -> Counts:
    """Counts of a model as it is built here, without storage for its parameters."""
    shape = input_shape(name)
    params, gmacs = count(name, shape)
    with torch.device('meta'):
        model = timm.create_model(name).to(torch.bfloat16).train()
    return Counts(params, gmacs['total'] * 1e9, saved_activations(model, shape).total, len(named_blocks(model)))


def plan_step(model: Counts, hardware: Hardware, gpus: int, samples: int, fsdp: bool = False) -> Step:
    """A training step of AdamW in mixed precision.

    Args:
        model: Counts of the model.
        hardware: What it runs on.
        gpus: GPUs.
        samples: Samples of one of them.
        fsdp: Shard weights, gradients and optimiser state.
    """
    shards = gpus if fsdp else 1
    held = 16 * model.params / shards  # float32: weights, gradients, two moments
    activations = samples * model.activations
    compute = 6 * model.macs * samples / (hardware.tflops * 1e12 * hardware.utilisation)
    # activations are written and read; the optimiser reads all that is held and writes all but the gradients
    traffic = (2 * activations + 28 * model.params / shards) / (hardware.memory_gbs * 1e9)

    # of each parameter: float32 gradients twice; or bfloat16 weights gathered twice and float32 gradients once
    volume = (2 * 2 + 4 if fsdp else 2 * 4) * model.params
    inside = min(gpus, hardware.gpus_per_node)
    nodes = math.ceil(gpus / hardware.gpus_per_node)
    collectives = 3 * (model.blocks + 1) if fsdp else math.ceil(4 * model.params / (25 << 20))
    communication = (
        volume * (inside - 1) / inside / (hardware.link_gbs * 1e9)
        + volume * (nodes - 1) / nodes / (inside * hardware.network_gbs * 1e9)
        + collectives * math.log2(gpus) * hardware.latency_us * 1e-6)
    return Step(gpus, compute, traffic, communication, held + activations, samples)


def describe_scaling(
        name: str,
        model: Counts,
        hardware: Hardware,
        gpus: Sequence[int],
        samples: int,
        fsdp: bool = False,
) -> str:
    """The steps of a model on these numbers of GPUs as text."""
    fed = hardware.cores_per_gpu * hardware.images_per_core
    rows: List[List[str]] = []
    for n in gpus:
        step = plan_step(model, hardware, n, samples, fsdp)
        slow, fast = (step.seconds(overlap) for overlap in (False, True))
        alone = max(step.compute, step.traffic)
        rate = samples / slow
        rows.append([
            str(n), str(n * samples), f'{1e3 * step.compute:.1f}', f'{1e3 * step.traffic:.1f}',
            f'{1e3 * step.communication:.1f}', f'{1e3 * fast:.1f} to {1e3 * slow:.1f}',
            f'{alone / slow:.0%} to {alone / fast:.0%}', f'{step.memory / 2 ** 30:.1f}', f'{n * rate:,.0f}',
            f'{rate / hardware.images_per_core:.0f}', f'{n * rate * hardware.kb_per_image / 1e6:.1f}'])
    header = [
        'GPUs', 'batch', 'compute ms', 'memory ms', 'network ms', 'step ms', 'efficiency', 'GiB', 'images/s',
        'cores a GPU', 'GB/s read']
    gib = 2 ** 30
    full = plan_step(model, hardware, max(gpus), samples, fsdp)
    notes = [
        f'{name}, on paper, not measured: {model.params / 1e6:.1f} M parameters, {model.macs / 1e9:.2f} GMACs and '
        f'{model.activations / 2 ** 20:.0f} MiB of activations in bfloat16 a sample, {model.blocks} blocks',
        f'{"FSDP" if fsdp else "DDP"}, AdamW, {samples} samples a GPU, {hardware.utilisation:.0%} of '
        f'{hardware.tflops:g} TFLOPS', '', table(rows, header, right=range(len(header))), '',
        f'Data loading is the limit where a GPU takes more than {fed:,.0f} images/s, of {hardware.cores_per_gpu} cores '
        f'at {hardware.images_per_core:g} images/s each.']
    if full.memory > hardware.memory_gib * gib:
        notes.append(
            f'Too large: {full.memory / gib:.0f} GiB of {hardware.memory_gib:g}; a smaller --batch-size, '
            f'--fsdp or gradient checkpointing.')
    return '\n'.join(notes)


HELP = dict(
    tflops='10^12 operations a second of a GPU in bfloat16, dense',
    utilisation='share of them that training reaches (assumed)',
    memory_gib='GiB of its memory',
    memory_gbs='GB/s to its memory',
    link_gbs='GB/s to a GPU of its node, in each direction',
    network_gbs='GB/s of each GPU to other nodes, in each direction',
    latency_us='microseconds of a hop of a collective (assumed)',
    gpus_per_node='GPUs of a node',
    cores_per_gpu='processor cores for each GPU',
    images_per_core='images/s that a core decodes and augments (assumed)',
    kb_per_image='kB of an image file',
)


def main(argv: Optional[List[str]] = None, prog: Optional[str] = None) -> None:
    """Print the plan that the command line asks for."""
    parser = argparse.ArgumentParser(
        prog=prog, formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description='Estimate training steps of a model on many GPUs, on paper: formulas in docs/scaling.md.')
    parser.add_argument('model', help='name of a model, or a tag')
    parser.add_argument(
        '--gpus', type=at_least(1), nargs='+', default=[8, 64, 512], metavar='N', help='numbers of GPUs')
    parser.add_argument('-b', '--batch-size', type=at_least(1), default=128, metavar='N', help='samples of one GPU')
    parser.add_argument('--fsdp', action='store_true', help='shard weights, gradients and optimiser state')
    add = parser.add_argument_group('Hardware', 'An H100 SXM in a node of eight, unless given.').add_argument
    for name, default in Hardware()._asdict().items():
        add(f'--{name.replace("_", "-")}', type=type(default), default=default, metavar='X', help=HELP[name])
    args = parser.parse_args(argv)
    hardware = Hardware(**{name: getattr(args, name) for name in Hardware._fields})
    for name, value in hardware._asdict().items():
        if not value > 0:
            parser.error(f'--{name.replace("_", "-")}: got {value:g}, needs more than 0')
    with errors_of('MODEL', args.model):
        model = count_model(args.model)
    print(describe_scaling(args.model, model, hardware, args.gpus, args.batch_size, args.fsdp))
