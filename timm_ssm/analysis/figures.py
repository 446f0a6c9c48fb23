"""Pictures of what the analyses find."""
from typing import Dict, List, NamedTuple, Sequence, Tuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from ..plot.style import COLOURS, HATCHES, figure, style
from .faithfulness import Curves
from .steps import Steps

MAX_FRAMES = 8  # of a clip that are shown


class Panel(NamedTuple):
    """A picture (H, W, 3), or (T, H, W, 3) of a clip, and what it is."""
    title: str
    pixels: np.ndarray


def _join(frames: np.ndarray) -> np.ndarray:
    """Frames of a clip (T, H, W, ...) beside each other, of many only some."""
    shown = np.linspace(0, len(frames) - 1, min(len(frames), MAX_FRAMES)).round().astype(int)
    return np.concatenate(list(frames[shown]), axis=1)


def _show(ax: Axes, panel: Panel) -> None:
    ax.imshow(_join(panel.pixels) if panel.pixels.ndim == 4 else panel.pixels)
    ax.set_title(panel.title)
    ax.set_axis_off()


@style()
def draw_attribution(rows: Sequence[Sequence[Panel]], curves: Dict[str, Curves]) -> Figure:
    """Pictures in rows, those of clips below each other, and below them the mean curves by their names."""
    if rows[0][0].pixels.ndim == 4:
        rows = [[panel] for row in rows for panel in row]
    columns = len(rows[0])
    height, width = rows[0][0].pixels.shape[-3:-1]
    frames = min(len(rows[0][0].pixels), MAX_FRAMES) if rows[0][0].pixels.ndim == 4 else 1
    shown = 9 / columns / frames * height / width + .3  # inches
    fig = Figure(figsize=(9, len(rows) * shown + 3.2), layout='constrained')
    pictures, charts = fig.subfigures(2, 1, height_ratios=[len(rows) * shown, 3.2])
    for ax, panel in zip(pictures.subplots(len(rows), columns, squeeze=False).flat, [p for row in rows for p in row]):
        _show(ax, panel)
    deletion, insertion = charts.subplots(1, 2, sharey=True)
    for name, c in curves.items():
        for ax, values, area in (
                (deletion, c.deletion, c.deletion_area), (insertion, c.insertion, c.insertion_area)):
            ax.plot(c.share.cpu(), values.mean(0).cpu(), label=f'{name}: {area.mean():.3f}', markevery=4)
    deletion.set(title='deletion: the lower, the better', xlabel='share of pixels', ylabel='probability of the class')
    insertion.set(title='insertion: the higher, the better', xlabel='share of pixels')
    for ax in deletion, insertion:
        ax.legend(title='mean height')
    return fig


@style()
def draw_attention(pixels: np.ndarray, panels: Sequence[Panel], title: str) -> Figure:
    """An image or clip, and maps over it beside it, or of a clip below it."""
    panels = [Panel('input', pixels), *panels]
    clip = pixels.ndim == 4
    rows, columns = (len(panels), 1) if clip else (1, len(panels))
    fig, axes = figure(rows, columns, size=(9, 1.5 * rows if clip else 9 / columns + .6), squeeze=False)
    for ax, panel in zip(axes.flat, panels):
        _show(ax, panel)
    fig.suptitle(title)
    return fig


#: Half-lives of the slowest state (A = -1) at the steps that models begin with.
STARTS = {
    "zero biases: dt = ln 2": (1., 1.), "Mamba's biases: dt from 0.001 to 0.1": (np.log(2) / .1, np.log(2) / .001)}


@style()
def draw_memory(models: Dict[str, Dict[str, torch.Tensor]], tokens: Dict[str, int]) -> Figure:
    """Half-lives by layer, models beside each other.

    Args:
        models: Half-lives of each model, as of `half_lives`.
        tokens: Length of the longest scan of each.
    """
    fig, axes = figure(1, len(models), size=(9, 3.6), sharey=True, squeeze=False)
    for ax, (name, lives) in zip(axes.flat, models.items()):
        values = [v.flatten().cpu() for v in lives.values()]
        layers = np.arange(len(values))
        quantiles = np.stack([np.quantile(v, [0, .05, .25, .5, .75, .95, 1]) for v in values])
        for low, high, grey, label in ((1, 5, '.85', '5 to 95 %'), (2, 4, '.65', '25 to 75 %')):
            ax.fill_between(layers, quantiles[:, low], quantiles[:, high], color=grey, label=label, linewidth=0)
        ax.plot(layers, quantiles[:, 3], label='median')
        ax.plot(layers, quantiles[:, 6], label='longest')
        for (label, (low, high)), colour, dash in zip(STARTS.items(), COLOURS[2:], (':', '-.')):
            for i, value in enumerate(sorted({low, high})):
                ax.axhline(value, color=colour, linestyle=dash, linewidth=1, label=label if i == 0 else None, marker='')
        ax.axhline(tokens[name], color='black', linewidth=1, linestyle='--', marker='', label='tokens of a scan')
        ax.set(title=name, xlabel='mixer', yscale='log')
        ax.xaxis.get_major_locator().set_params(integer=True)
    axes[0, 0].set_ylabel('half-life in tokens')
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc='outside lower center', ncols=3)
    return fig


@style()
def draw_deltas(pixels: np.ndarray, steps: Dict[str, Steps], shown: int = 6) -> Figure:
    """Maps of one input by layer and direction, some layers of many, and the range of dt of all layers below."""
    names = list(steps)
    chosen = [names[i] for i in np.unique(np.linspace(0, len(names) - 1, min(shown, len(names))).round().astype(int))]
    clip = pixels.ndim == 4
    directions = max(s.maps.shape[1] for s in steps.values())
    rows, columns = (1 + len(chosen) * directions, 1) if clip else (directions, 1 + len(chosen))
    frames = min(len(pixels), MAX_FRAMES) if clip else 1
    shown_height = (9 / frames if clip else 9 / columns) + .25
    fig = Figure(figsize=(9, rows * shown_height + 2.6), layout='constrained')
    pictures, chart = fig.subfigures(2, 1, height_ratios=[rows * shown_height, 2.6])
    axes = pictures.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.set_axis_off()
    _show(axes[0, 0], Panel('input', pixels))
    for i, name in enumerate(chosen):
        for d in range(steps[name].maps.shape[1]):
            ax = axes[1 + i * directions + d, 0] if clip else axes[d, 1 + i]
            values = steps[name].maps[0, d].cpu().numpy()
            ax.imshow(_join(values) if clip else values)
            ax.set_title(f'mixer {names.index(name)}, direction {d}', fontsize='small')
    ax = chart.subplots()
    x = np.arange(len(names))
    low, high = [s.low.min().item() for s in steps.values()], [s.high.max().item() for s in steps.values()]
    ax.fill_between(x, low, high, color='.8', label='range')
    ax.plot(x, [s.maps.mean().item() for s in steps.values()], label='mean')
    ax.set(xlabel='mixer', ylabel='dt', yscale='log')
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.legend()
    return fig


@style()
def draw_fields(fields: Dict[Tuple[str, int], torch.Tensor], sizes: Dict[Tuple[str, int], List[int]]) -> Figure:
    """Fields (H, W) of models at input sizes, in decades of their highest value, and squares that hold shares."""
    models, inputs = (list(dict.fromkeys(key[i] for key in fields)) for i in (0, 1))
    fig, axes = figure(len(inputs), len(models), size=(9, 9 / max(3, len(models)) * len(inputs) + .7), squeeze=False)
    for row, size in zip(axes, inputs):
        for ax, model in zip(row, models):
            field = fields[model, size].cpu()
            picture = ax.imshow((field / field.max()).clamp_min(1e-4).log10().numpy(), vmin=-4, vmax=0)
            height, width = field.shape
            for side, dash in zip(sizes[model, size], ('-', '--')):
                corner = (width - side) / 2 - .5, (height - side) / 2 - .5
                ax.add_patch(Rectangle(corner, side, side, fill=False, edgecolor='white', linestyle=dash))
            ax.set_title(f'{model}, {size} pixels', fontsize='small')
            ax.set_axis_off()
    fig.colorbar(picture, ax=axes, label='gradient over its highest, log10', shrink=.8)
    return fig


@style()
def draw_frequency(models: Dict[str, torch.Tensor], factors: Sequence[float], shown: int = 5) -> Figure:
    """Similarities (factors, depths) of models beside each other, a curve for each of some depths."""
    fig, axes = figure(1, len(models), size=(9, 3.4), sharey=True, squeeze=False)
    for ax, (name, values) in zip(axes.flat, models.items()):
        depths = values.shape[1]
        for i in np.unique(np.linspace(0, depths - 1, min(shown, depths)).round().astype(int)):
            ax.plot(factors, values[:, i].cpu(), label=f'{i + 1} of {depths}')
        ax.set_title(name)
        ax.legend(title='depth')
    axes[0, 0].set_ylabel('cosine similarity of tokens')
    fig.supxlabel('factor of the high frequencies', fontsize='medium')
    return fig


@style()
def draw_orders(models: Dict[str, Dict[str, float]]) -> Figure:
    """Accuracy by the order of frames, a group of bars for each order."""
    orders = list(next(iter(models.values())))
    fig, ax = figure(size=(9, 3.2))
    width = .8 / len(models)
    for i, (name, accuracy) in enumerate(models.items()):
        x = np.arange(len(orders)) + (i - (len(models) - 1) / 2) * width
        bars = ax.bar(x, [accuracy[o] for o in orders], width, label=name, color=COLOURS[i], hatch=HATCHES[i])
        ax.bar_label(bars, fmt='%.1f')
    ax.set_xticks(range(len(orders)), orders)
    ax.set(ylabel='top-1 accuracy in %', ylim=(0, 110))
    ax.legend(loc='upper right')
    return fig
