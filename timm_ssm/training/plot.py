"""The curves of runs as one page, without anything to install or to load: `timm-ssm plot`."""
import csv
import html
import math
import os
from pathlib import Path
from typing import Dict, List, Tuple

Points = List[Tuple[float, float]]

COLOURS = ('#1f77b4', '#d62728', '#2ca02c', '#9467bd', '#ff7f0e', '#17becf', '#8c564b', '#e377c2')
WIDTH, HEIGHT, LEFT, BOTTOM = 420, 220, 60, 24
STYLE = '''body { font: 14px sans-serif; margin: 2em } svg { margin: 0 1em 1em 0; background: #fafafa }
text { font: 11px sans-serif; fill: #444 } h2 { font-size: 16px } .key { margin-right: 1.5em }'''
# what of monitor.csv is one of many, a curve for each block or mixer
SERIES = {
    'grad_norm': 'gradient norm of each block', 'update_ratio': 'norm of a step over that of the weights, each block',
    'activation': 'root mean square of the output of each block', 'dt_min': 'lowest dt of each mixer',
    'dt_max': 'highest dt of each mixer', 'decay_min': 'lowest exp(dt A) of each mixer',
    'decay_max': 'highest exp(dt A) of each mixer', 'state_max': 'largest state of each mixer',
}


def plot(folders: List[str], output: str) -> str:
    """Draw summary.csv and, where there is one, monitor.csv of each run; returns the page's path.

    Raises:
        ValueError: A folder has no summary.csv.
    """
    charts: Dict[str, Dict[str, List[Points]]] = {}  # title to run to curves
    for folder in folders:
        if not os.path.isfile(os.path.join(folder, 'summary.csv')):
            raise ValueError(f'run: {folder} has no summary.csv, needs the folder of a run')
        for file, x in (('summary.csv', 'epoch'), ('monitor.csv', 'update')):
            for name, points in read_columns(os.path.join(folder, file), x).items():
                block, _, kind = name.rpartition('.')
                title = f'{SERIES[kind]}, by update' if block else f'{name}, by {x}'
                charts.setdefault(title, {}).setdefault(folder, []).append(points)
    colours = dict(zip(folders, COLOURS * len(folders)))
    keys = ''.join(
        f'<span class="key" style="color:{colour}">■ {html.escape(folder)}</span>'
        for folder, colour in colours.items())
    body = ''.join(draw(title, curves, colours) for title, curves in charts.items())
    head = f'<!doctype html><meta charset="utf-8"><title>Runs</title><style>{STYLE}</style>'
    Path(output).write_text(f'{head}<h2>Runs</h2><p>{keys}</p>{body}', encoding='utf-8')
    return output


def read_columns(path: str, x: str) -> Dict[str, Points]:
    """The finite numbers of each column of a file, with those of column `x`; nothing of a file that is not there."""
    columns: Dict[str, Points] = {}
    if os.path.isfile(path):
        with open(path, newline='', encoding='utf-8') as f:
            for row in csv.DictReader(f):
                for name, text in row.items():
                    if name not in ('epoch', 'update') and text and math.isfinite(float(text)):
                        columns.setdefault(name, []).append((float(row[x]), float(text)))
    return columns


def draw(title: str, runs: Dict[str, List[Points]], colours: Dict[str, str]) -> str:
    """A chart; logarithmic where values are positive and span more than two decades. Later curves are paler."""
    xs, ys = zip(*(point for curves in runs.values() for points in curves for point in points))
    log = min(ys) > 0 and max(ys) > 100 * min(ys)
    scale = math.log10 if log else float
    low, high = scale(min(ys)), scale(max(ys))
    left, right = min(xs), max(xs)

    def place(x: float, y: float) -> str:
        across = (x - left) / (right - left or 1) * (WIDTH - LEFT - 10)
        up = (scale(y) - low) / (high - low or 1) * (HEIGHT - BOTTOM - 30)
        return f'{LEFT + across:.1f},{HEIGHT - BOTTOM - up:.1f}'

    lines = ''
    for run, curves in runs.items():
        for i, points in enumerate(curves):
            lines += (
                f'<polyline fill="none" stroke="{colours[run]}" stroke-opacity="{1 - 0.8 * i / len(curves):.2f}" '
                f'points="{" ".join(place(*point) for point in points)}"/>')
            if len(points) == 1:
                x, y = place(*points[0]).split(',')
                lines += f'<circle cx="{x}" cy="{y}" r="2.5" fill="{colours[run]}"/>'
    labels = ''.join(
        f'<text x="{LEFT - 6}" y="{y}" text-anchor="end">{value:.3g}</text>'
        for value, y in ((max(ys), 34), (min(ys), HEIGHT - BOTTOM)))
    labels += ''.join(
        f'<text x="{x}" y="{HEIGHT - 6}" text-anchor="middle">{value:g}</text>'
        for value, x in ((left, LEFT), (right, WIDTH - 20)))
    return (
        f'<svg width="{WIDTH}" height="{HEIGHT}"><text x="{LEFT}" y="16">{html.escape(title)}'
        f'{" (logarithmic)" if log else ""}</text>{lines}{labels}</svg>')
