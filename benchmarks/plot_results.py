"""Draw images/s against published ImageNet-1k top-1, this package's models beside timm's.

    python benchmarks/plot_results.py results/benchmark-infer-*.csv [--metric infer_samples_per_sec]

The CSV files are what timm's own benchmark.py writes (results/README.md has the command). Top-1 is as published: of
this package's models in `timm_ssm.zoo.published`, of timm's in results/published-imagenet.csv. The picture is written
beside each CSV file.
"""
import argparse
import csv
from pathlib import Path
from typing import Dict, List, Tuple

from timm_ssm.plot.style import COLOURS, DASHES, MARKERS, figure, save, style
from timm_ssm.zoo.published import PUBLISHED

# models of a family are named by its beginning, smallest first where they have the same images/s
OURS = ('videomamba', 'vim', 'stablemamba', 'videomambapro', 'mambavision', 'groupmamba', 'vmamba', 'spatialmamba')
TIMMS = ('deit', 'swin', 'convnext', 'mambaout', 'pvt_v2', 'caformer', 'resnet')
METRICS = dict(infer_samples_per_sec='images/s', train_samples_per_sec='images/s of training steps')


def published_top1() -> Dict[str, float]:
    """Top-1 in per cent by the model's name without its tag: trained on ImageNet-1k alone, at 224 pixels."""
    found = {}
    for name, published in PUBLISHED.items():
        model, _, tag = name.partition('.')
        if published.top1 is not None and tag in ('in1k', 'untrained'):
            found[model] = published.top1
    with open(Path(__file__).parent.parent / 'results' / 'published-imagenet.csv', newline='') as f:
        found.update((row['model'].partition('.')[0], float(row['top1'])) for row in csv.DictReader(f))
    return found


def read_families(path: Path, metric: str) -> Dict[str, List[Tuple[float, float]]]:
    """(value of the metric, top-1) of the models of each family, by value."""
    top1, families = published_top1(), {}
    with open(path, newline='') as f:
        for row in csv.DictReader(f):
            name = row['model'].removeprefix('stable_')
            family = max((p for p in OURS + TIMMS if name.startswith(p)), key=len)
            if row.get(metric) and not row['model'].startswith('stable_'):
                families.setdefault(family, []).append((float(row[metric]), top1[row['model']]))
    return {family: sorted(families[family]) for family in OURS + TIMMS if family in families}


@style()
def draw(path: Path, metric: str) -> Path:
    fig, axes = figure(size=(9., 5.))
    families = read_families(path, metric)
    for family, points in families.items():
        ours = family in OURS
        index = OURS.index(family) if ours else TIMMS.index(family)
        x, y = zip(*points)
        axes.plot(
            x, y, label=family if ours else f'{family} (timm)',
            color=COLOURS[index % len(COLOURS)] if ours else '0.6',
            linestyle=DASHES[0] if ours else DASHES[1],
            marker=MARKERS[index % len(MARKERS)],
            markerfacecolor=None if ours and index < len(MARKERS) else 'white',
        )
    axes.set(xscale='log', xlabel=METRICS[metric], ylabel='published ImageNet-1k top-1, %', title=path.stem)
    axes.legend(loc='center left', bbox_to_anchor=(1, .5))
    out = path.with_suffix('.png')
    save(fig, out)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('files', nargs='+', type=Path, metavar='FILE')
    parser.add_argument('--metric', choices=METRICS, default='infer_samples_per_sec')
    args = parser.parse_args()
    for path in args.files:
        print(draw(path, args.metric))


if __name__ == '__main__':
    main()
