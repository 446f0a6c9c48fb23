"""Accuracy on corrupted images and clips: what `validate --imagenet-c` and `--corruptions` do."""
import argparse
import csv
import logging
import os
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

from timm.data.transforms import MaybePILToTensor, MaybeToTensor
from torch.utils.data import Dataset

from ..data.corruptions import CORRUPTIONS, EXTRA_CORRUPTIONS, SEVERITIES, Corrupt, corruptions_of
from .arguments import UsageError
from .checkpoints import atomic_write
from .log import write_rows

_logger = logging.getLogger(__name__)

#: AlexNet's errors in per cent, averaged over severities (https://arxiv.org/abs/1903.12261).
ALEXNET = dict(
    gaussian_noise=88.6, shot_noise=89.4, impulse_noise=92.3, defocus_blur=82.0, glass_blur=82.6, motion_blur=78.6,
    zoom_blur=79.8, snow=86.7, frost=82.7, fog=81.9, brightness=56.5, contrast=85.3, elastic_transform=64.6,
    pixelate=71.8, jpeg_compression=60.7, speckle_noise=84.5, gaussian_blur=78.7, spatter=71.8, saturate=65.8)
CLEAN = 'none'  # in place of a corruption's name
# arguments that change no result, or are in columns of their own
NOT_SETTINGS = (
    'model', 'checkpoint', 'data', 'corruptions', 'results_file', 'results_format', 'workers', 'batch_size',
    'log_freq', 'pin_mem', 'device', 'retry', 'pretrained', 'no_prefetcher', 'rank', 'world_size', 'local_rank',
    'distributed', 'primary')

Row = Dict[str, Any]


def add_corruption_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags for corrupted data."""
    add = parser.add_argument_group(
        'Corruptions', 'Rows of results for each corruption and severity. With --results-file those that are there '
        'are not measured again, and a figure of all is beside it.').add_argument
    add('--imagenet-c', metavar='DIR', help='ImageNet-C, or a data set of its folders CORRUPTION/SEVERITY/CLASS')
    add('--corruptions', nargs='+', metavar='NAME', help="corrupt DATA on the fly, in these ways or in 'all'")


def check_corruption_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with an error for what does not go together; note what the results depend on."""
    if args.imagenet_c and args.corruptions:
        parser.error('--corruptions: --imagenet-c has corrupted images, give one of the two')
    if args.imagenet_c and not os.path.isdir(args.imagenet_c):
        parser.error(f'--imagenet-c {args.imagenet_c}: no such folder')
    if (args.imagenet_c or args.corruptions) and args.results_format != 'csv':
        parser.error(f'--results-format {args.results_format}: results of corruptions are resumed from csv')
    args.settings = ' '.join(
        f'{k}={v}' for k, v in sorted(vars(args).items())
        if k not in NOT_SETTINGS and v != parser.get_default(k)) if args.imagenet_c or args.corruptions else ''


def insert_corruption(dataset: Dataset, corrupt: Corrupt) -> None:
    """Corrupt the images of a dataset of timm's after they are resized and cropped."""
    steps = dataset.transform.transforms
    at = next(i for i, step in enumerate(steps) if isinstance(step, (MaybePILToTensor, MaybeToTensor)))
    steps.insert(at, corrupt)


def conditions(args: argparse.Namespace, clips: bool) -> Iterator[Tuple[str, int, Dict[str, Any]]]:
    """Corruptions, severities, and what arguments they replace; first nothing, if there are data as they are."""
    if args.data_dir:
        yield CLEAN, 0, {}
    for name in corruptions_of(args.corruptions or ['all'], clips):
        folder = imagenet_c_folder(args.imagenet_c, name) if args.imagenet_c else None
        for severity in SEVERITIES:
            if not args.imagenet_c:
                yield name, severity, {}
            elif folder:
                yield name, severity, dict(data_dir=os.path.join(folder, str(severity)), dataset='')


def imagenet_c_folder(root: str, name: str) -> Optional[str]:
    """The folder of a corruption, which may be in that of its kind (noise, blur, ...).

    Raises:
        UsageError: One of the fifteen is not there, or not in all severities.
    """
    found = [p for p in (Path(root) / name, *sorted(Path(root).glob(f'*/{name}'))) if p.is_dir()]
    if not found and name in EXTRA_CORRUPTIONS:  # which are a download of their own
        return None
    for severity in SEVERITIES:
        if not found or not (found[0] / str(severity)).is_dir():
            raise UsageError(f'--imagenet-c {root}: there is no folder {name}/{severity}')
    return str(found[0])


def measure_corrupted(args: argparse.Namespace, load: Callable, measure: Callable) -> None:
    """Measure one model under all conditions that the results do not have yet, writing each as it is there.

    Args:
        args: As of `validate`.
        load: Makes the model.
        measure: Measures it on data that are corrupted first.
    """
    subject = load(args)
    if args.imagenet_c and subject.clips:
        raise UsageError(f'--imagenet-c: {args.model} takes clips, give videos and --corruptions')
    done = {key(row) for row in args.results}
    try:
        todo = [c for c in conditions(args, subject.clips) if key(describe(args, *c[:2])) not in done]
    except ValueError as e:
        raise UsageError(f'--{e}') from None
    for name, severity, changed in todo:
        config = dict(subject.data_config)
        if changed:  # ImageNet-C is cropped already
            config['crop_pct'] = args.crop_pct or 1.
        corrupt = None if changed or name == CLEAN else Corrupt(name, severity, args.seed)
        result = measure(
            argparse.Namespace(**{**vars(args), **changed}), subject._replace(data_config=config), corrupt)
        args.results.append({**result, **describe(args, name, severity)})
        _logger.info(f'{name} {severity}: top-1 {result["top1"]:.3f}')
        if args.results_file and args.primary:
            write_results(args.results_file, args.results)


def describe(args: argparse.Namespace, name: str, severity: int) -> Row:
    """What tells a row of results from others."""
    return dict(
        model=args.model, checkpoint=args.checkpoint, corruption=name, severity=severity, settings=args.settings)


def key(row: Row) -> Tuple[str, ...]:
    return tuple(str(row[k]) for k in ('model', 'checkpoint', 'corruption', 'severity', 'settings'))


def read_results(path: str) -> List[Row]:
    """The results that a file has, none if it is not there.

    Raises:
        UsageError: It has something else.
    """
    if not os.path.exists(path):
        return []
    with open(path, newline='', encoding='utf-8') as f:
        rows = list(csv.DictReader(f))
    if not rows or not {'model', 'checkpoint', 'corruption', 'severity', 'settings', 'top1'} <= set(rows[0]):
        raise UsageError(f'--results-file {path}: is there and has no results of corruptions, give another')
    for row in rows:
        row['severity'] = int(row['severity'])
        row.update({k: float(row[k]) for k in ('top1', 'top1_err', 'top5', 'top5_err', 'loss')})
    return rows


def write_results(path: str, rows: List[Row]) -> None:
    with atomic_write(path, 'w', newline='', encoding='utf-8') as f:
        write_rows(f, rows)


def corruption_errors(rows: List[Row]) -> Dict[str, float]:
    """Mean error in per cent over the severities of each corruption that has all of them."""
    found: Dict[str, List[float]] = {}
    for row in rows:
        if row['corruption'] != CLEAN:
            found.setdefault(row['corruption'], []).append(row['top1_err'])
    return {name: sum(errors) / len(errors) for name, errors in found.items() if len(errors) == len(SEVERITIES)}


def mean_corruption_error(rows: List[Row]) -> Optional[float]:
    """mCE of one model in per cent: the mean over ImageNet-C's fifteen corruptions of its error over AlexNet's.

    None if a corruption is missing.
    """
    errors = corruption_errors(rows)
    if not set(CORRUPTIONS) <= set(errors):
        return None
    return sum(100 * errors[name] / ALEXNET[name] for name in CORRUPTIONS) / len(CORRUPTIONS)


def report(args: argparse.Namespace) -> List[Row]:
    """Print a summary of the results of each model, and draw them beside the file; returns the rows."""
    models: Dict[str, List[Row]] = {}
    names = {(row['checkpoint'] or row['model'], row['settings']) for row in args.results}
    for row in args.results:
        name = row['checkpoint'] or row['model']
        if sum(n == name for n, _ in names) > 1:
            name = f'{name} ({row["settings"]})'
        models.setdefault(name, []).append(row)
    for name, rows in models.items():
        errors = corruption_errors(rows)
        clean = [f'clean {row["top1_err"]:.2f}' for row in rows if row['corruption'] == CLEAN]
        parts = [*clean, f'mean over {len(errors)} corruptions {sum(errors.values()) / max(1, len(errors)):.2f}']
        mce = mean_corruption_error(rows)
        if args.imagenet_c and mce is not None:  # AlexNet's errors are those on these images
            parts.append(f'mCE {mce:.2f}')
        _logger.info(f' * top-1 error in %: {", ".join(parts)}  {name}')
    if args.results_file and args.primary:
        draw(models, str(Path(args.results_file).with_suffix('.png')))
    return args.results


def draw(models: Dict[str, List[Row]], path: str) -> None:
    """Errors by corruption, models side by side, a bar from the lowest to the highest severity's and the mean on it."""
    try:
        from ..plot.style import COLOURS, MARKERS, figure, save, style
    except RuntimeError as e:
        _logger.info(f'No figure: {e}')
        return
    names = list(dict.fromkeys(row['corruption'] for rows in models.values() for row in rows))
    with style():
        fig, ax = figure(size=(9., 4.5))
        for i, (model, rows) in enumerate(models.items()):
            errors = {name: [row['top1_err'] for row in rows if row['corruption'] == name] for name in names}
            there = [name for name in names if errors[name]]
            x = [names.index(name) + .7 * ((i + .5) / len(models) - .5) for name in there]
            style_of = dict(color=COLOURS[i % len(COLOURS)])
            ax.vlines(
                x, [min(errors[n]) for n in there], [max(errors[n]) for n in there], linewidth=3, alpha=.4, **style_of)
            ax.plot(
                x, [sum(errors[n]) / len(errors[n]) for n in there], marker=MARKERS[i % len(MARKERS)], linestyle='',
                label=model, **style_of)
        ax.set_xticks(range(len(names)), [name.replace('_', ' ') for name in names], rotation=45, ha='right')
        ax.set(ylabel='top-1 error in %', ylim=(0, 101), title='range and mean over five severities')
        fig.legend(loc='outside lower center')
        save(fig, path)
