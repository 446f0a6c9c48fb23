"""Time the Triton kernels on a GPU: the scan and the convolution against mamba-ssm's and causal-conv1d's where these
are installed and against the hardware's floors, whole models against timm's DeiT, and memory.

    python benchmarks/scan_gpu.py [scan] [conv] [models] [--dtype bfloat16] [--out benchmarks/results] [--quick]

Implementations are timed in turns, each time with a cold L2 cache, with CUDA events; medians are reported. Writes
gpu.csv and gpu.png. The two directions of a block are one call here; mamba-ssm takes one call each, in its own layout
(B, D, L), and two flips, as its users write it.
"""
import argparse
import csv
import platform
import shutil
import statistics
import subprocess
from pathlib import Path
from typing import Callable, Dict, List, NamedTuple, Tuple

import timm
import torch
import triton

import timm_ssm  # noqa: F401 (registers the models)
from timm_ssm.ops import bidirectional_causal_conv1d, bidirectional_selective_scan, selective_scan

MODELS = [
    ('videomamba_tiny_patch16_224', 'deit_tiny_patch16_224'),
    ('videomamba_small_patch16_224', 'deit_small_patch16_224'),
]
SFU_PER_CLOCK = 16  # special functions a multiprocessor starts in a clock (compute capability 7 to 9)


class Work(NamedTuple):
    """What to measure, and how often."""
    shapes: List[Tuple[int, int, int, int, int]]  # batch, length, channels, d_state, directions
    batch: int  # of images
    model: Dict[str, int]  # arguments of models
    rounds: int


FULL = Work(
    shapes=[
        (128, 197, 384, 16, 2),
        (128, 197, 768, 16, 2),
        (32, 1569, 768, 16, 2),
        (1, 12545, 1152, 16, 2),
        (128, 196, 160, 8, 1),
        (128, 196, 320, 8, 1),
    ],
    batch=128,
    model=dict(img_size=224),
    rounds=30,
)
QUICK = Work([(1, 9, 8, 4, 2), (1, 5, 3, 1, 1)], batch=1, model=dict(img_size=32, depth=1), rounds=1)


def time_in_turns(runs: Dict[str, Callable[[], None]], rounds: int) -> Dict[str, float]:
    """Median milliseconds of each run."""
    flush = torch.empty(256 << 20, dtype=torch.int8, device='cuda')
    for run in runs.values():
        for _ in range(min(3, rounds)):
            run()
    times: Dict[str, List[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end))
    return {name: statistics.median(t) for name, t in times.items()}


def copy_bandwidth(rounds: int) -> float:
    """Bytes a second, read and written, of a large copy."""
    a = torch.empty(1 << 30, dtype=torch.int8, device='cuda')
    b = torch.empty_like(a)
    return 2 * a.numel() / time_in_turns({'copy': lambda: b.copy_(a)}, rounds)['copy'] * 1e3


def sm_clock() -> float:
    """Highest clock of the multiprocessors in Hz; unknown without NVIDIA's driver."""
    if not shutil.which('nvidia-smi'):
        return float('nan')
    out = subprocess.run(
        ['nvidia-smi', '--query-gpu=clocks.max.sm', '--format=csv,noheader,nounits'], capture_output=True, text=True)
    return float(out.stdout.split()[0]) * 1e6 if out.returncode == 0 else float('nan')


def optional(name: str, attribute: str):
    try:
        return getattr(__import__(name, fromlist=[attribute]), attribute)
    except Exception as e:
        print(f'{name}: {e}')
        return None


def with_backward(run: Callable[[], torch.Tensor], leaves: List[torch.Tensor], grad) -> Callable[[], None]:
    return lambda: torch.autograd.grad(run(), leaves, grad) and None


def without_grad(run: Callable[[], torch.Tensor]) -> Callable[[], None]:
    def inference():
        with torch.no_grad():
            run()
    return inference


def channels_first(x: torch.Tensor) -> torch.Tensor:
    """A leaf in the layout of mamba-ssm, (B, D, L)."""
    return x.detach().transpose(1, 2).contiguous().requires_grad_()


def scan_runs(theirs, dtype, batch, length, channels, d_state, directions) -> Dict[str, Dict[str, Callable]]:
    """What to time at one shape, by kind and implementation."""
    def act(*shape):
        return torch.randn(*shape, device='cuda', dtype=dtype)

    dt_rank = max(16, channels // 2 // 16)
    ours = []
    for _ in range(directions):
        x_dbl = act(batch, length, dt_rank + 2 * d_state)  # B and C are slices of a projection, as in a model
        one = dict(
            u=act(batch, length, channels), delta=act(batch, length, channels) - 2,
            A=-torch.arange(1., d_state + 1, device='cuda').repeat(channels, 1),
            B=x_dbl[..., dt_rank:-d_state], C=x_dbl[..., -d_state:],
            D=torch.ones(channels, device='cuda'), delta_bias=torch.zeros(channels, device='cuda'))
        ours.append({k: v.detach().requires_grad_() for k, v in one.items()})
    z = act(batch, length, 2 * channels)[..., channels:].detach().requires_grad_()
    grad = act(batch, length, channels)

    def scan_ours():
        if directions == 1:
            return selective_scan(**ours[0], z=z, backend='triton')
        return bidirectional_selective_scan(**{k: (ours[0][k], ours[1][k]) for k in ours[0]}, z=z, backend='triton')

    leaves = [v for one in ours for v in one.values()] + [z]
    runs = {'forward': {'triton': without_grad(scan_ours)},
            'forward+backward': {'triton': with_backward(scan_ours, leaves, grad)}}
    if theirs is not None:
        mine = [{k: channels_first(v) if v.ndim == 3 else v for k, v in one.items()} for one in ours]
        z_first = channels_first(z)

        def scan_theirs():
            out = theirs(**mine[0], z=z_first, delta_softplus=True)
            if directions == 2:
                flipped = {k: v.flip(-1) if v.ndim == 3 else v for k, v in mine[1].items()}
                out = out + theirs(**flipped, z=z_first.flip(-1), delta_softplus=True).flip(-1)
            return out

        leaves = [v for one in mine for v in one.values()] + [z_first]
        runs['forward']['mamba-ssm'] = without_grad(scan_theirs)
        runs['forward+backward']['mamba-ssm'] = with_backward(scan_theirs, leaves, grad.mT.contiguous())
    return runs


def scan_floors(bandwidth, sfus, dtype, batch, length, channels, d_state, directions) -> Dict[str, Dict[str, float]]:
    """Milliseconds that the hardware needs for the memory traffic, and for the exponentials, at the least."""
    tokens = batch * length * channels * torch.finfo(dtype).bits // 8  # bytes of one activation
    forward = (2 * directions + 2) * tokens  # u, delta; z; out
    backward = (4 * directions + 4) * tokens  # u, delta and their gradients; z, y, the output's gradient, z's
    exps = directions * batch * length * channels * d_state / sfus * 1e3
    return {
        'forward': {'floor: memory': forward / bandwidth * 1e3, 'floor: exps': exps},
        'forward+backward': {'floor: memory': (forward + tokens + backward) / bandwidth * 1e3, 'floor: exps': 2 * exps},
    }


def scan_table(dtype: torch.dtype, work: Work) -> List[dict]:
    theirs = optional('mamba_ssm.ops.selective_scan_interface', 'selective_scan_fn')
    sfus = SFU_PER_CLOCK * torch.cuda.get_device_properties(0).multi_processor_count * sm_clock()
    bandwidth = copy_bandwidth(work.rounds)
    rows = []
    for shape in work.shapes:
        batch, length, channels, d_state, directions = shape
        floors = scan_floors(bandwidth, sfus, dtype, *shape)
        for kind, runs in scan_runs(theirs, dtype, *shape).items():
            for name, ms in {**time_in_turns(runs, work.rounds), **floors[kind]}.items():
                rows.append(dict(
                    table='scan', case=f'B{batch} L{length} D{channels} N{d_state} x{directions}', kind=kind,
                    implementation=name, value=ms * 1e3, unit='us'))
    return rows


def conv_runs(theirs, dtype, batch, length, channels) -> Dict[str, Dict[str, Callable]]:
    x = torch.randn(batch, length, 2 * channels, device='cuda', dtype=dtype)[..., :channels].requires_grad_()
    weight = tuple(torch.randn(channels, 4, device='cuda', requires_grad=True) for _ in range(2))
    bias = tuple(torch.randn(channels, device='cuda', requires_grad=True) for _ in range(2))
    grad = torch.randn(batch, length, channels, device='cuda', dtype=dtype)

    def conv_ours():
        return bidirectional_causal_conv1d(x, weight, bias, backend='triton')

    runs = {'forward': {'triton': without_grad(conv_ours)},
            'forward+backward': {'triton': with_backward(conv_ours, [x, *weight, *bias], (grad, grad))}}
    if theirs is not None:
        x_first, grad_first = channels_first(x), grad.mT.contiguous()

        def conv_theirs():
            return (theirs(x_first, weight[0], bias[0], activation='silu'),
                    theirs(x_first.flip(-1), weight[1], bias[1], activation='silu'))

        runs['forward']['causal-conv1d'] = without_grad(conv_theirs)
        runs['forward+backward']['causal-conv1d'] = with_backward(
            conv_theirs, [x_first, *weight, *bias], (grad_first, grad_first))
    return runs


def conv_table(dtype: torch.dtype, work: Work) -> List[dict]:
    theirs = optional('causal_conv1d', 'causal_conv1d_fn')
    rows = []
    for batch, length, channels, _, directions in work.shapes:
        if directions == 2:
            for kind, runs in conv_runs(theirs, dtype, batch, length, channels).items():
                for name, ms in time_in_turns(runs, work.rounds).items():
                    rows.append(dict(
                        table='conv', case=f'B{batch} L{length} D{channels} x2', kind=kind, implementation=name,
                        value=ms * 1e3, unit='us'))
    return rows


def models_table(dtype: torch.dtype, work: Work) -> List[dict]:
    rows, batch, size = [], work.batch, work.model['img_size']
    for pair in MODELS:
        for compiled in (False, True):
            runs = {'inference': {}, 'training': {}}
            for name in pair:
                model = timm.create_model(name, **work.model).cuda()
                x = torch.randn(batch, 3, size, size, device='cuda')
                call = torch.compile(model, fullgraph=True) if compiled else model

                def inference(model=model, call=call, x=x):
                    model.eval()
                    with torch.no_grad(), torch.autocast('cuda', dtype):
                        call(x)

                def training(model=model, call=call, x=x):
                    model.train()
                    with torch.autocast('cuda', dtype):
                        loss = call(x).float().square().mean()
                    loss.backward()
                    model.zero_grad()

                runs['inference'][name], runs['training'][name] = inference, training
            for kind, by_name in runs.items():
                for name, ms in time_in_turns(by_name, max(1, work.rounds // 3)).items():
                    label = f'{name} {"compiled" if compiled else "eager"}'
                    rows.append(dict(table='models', case=f'{pair[0]} B{batch}', kind=kind, implementation=label,
                                     value=batch / ms * 1e3, unit='images/s'))
                for name, run in by_name.items():
                    torch.cuda.reset_peak_memory_stats()
                    before = torch.cuda.memory_allocated()
                    run()
                    torch.cuda.synchronize()
                    rows.append(dict(
                        table='memory', case=f'{pair[0]} B{batch}', kind=kind,
                        implementation=f'{name} {"compiled" if compiled else "eager"}',
                        value=(torch.cuda.max_memory_allocated() - before) / 2**20, unit='MiB'))
    return rows


def plot(rows: List[dict], path: Path) -> None:
    from timm_ssm.plot.style import figure, save, style

    groups: Dict[tuple, List[dict]] = {}
    for row in rows:
        groups.setdefault((row['table'], row['case'], row['kind']), []).append(row)
    with style():
        fig, axes = figure(rows=len(groups), size=(9, 1.1 * len(groups) + 1), squeeze=False)
        for ax, (key, group) in zip(axes[:, 0], groups.items()):
            bars = ax.barh([row['implementation'] for row in group], [row['value'] for row in group])
            ax.bar_label(bars, fmt='%.0f', padding=3, fontsize=7)
            ax.set_title(f'{" · ".join(key)} ({group[0]["unit"]})')
            ax.grid(axis='y', visible=False)
            ax.margins(x=.1)
        save(fig, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n\n')[0])
    parser.add_argument('tables', nargs='*', help='scan, conv, models; all without a name')
    parser.add_argument('--dtype', default='bfloat16')
    parser.add_argument('--out', type=Path, default=Path(__file__).parent / 'results')
    parser.add_argument('--quick', action='store_true', help='small shapes and models, once: to see that all runs')
    args = parser.parse_args()
    tables = {'scan': scan_table, 'conv': conv_table, 'models': models_table}
    unknown = set(args.tables) - set(tables)
    if unknown:
        parser.error(f'tables: got {", ".join(sorted(unknown))}, needs {", ".join(tables)}')
    if not torch.cuda.is_available():
        parser.error('needs a GPU')
    setting = dict(
        gpu=torch.cuda.get_device_name(), torch=torch.__version__, triton=triton.__version__,
        timm=timm.__version__, python=platform.python_version(), dtype=args.dtype)
    print(setting)
    rows = []
    for name in args.tables or tables:
        for row in tables[name](getattr(torch, args.dtype), QUICK if args.quick else FULL):
            rows.append({**setting, **row})
            print(f'{row["table"]:<7} {row["case"]:<36} {row["kind"]:<17} {row["implementation"]:<40} '
                  f'{row["value"]:10.1f} {row["unit"]}', flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    with open(args.out / 'gpu.csv', 'w', newline='') as f:
        writer = csv.DictWriter(f, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    plot(rows, args.out / 'gpu.png')


if __name__ == '__main__':
    main()
