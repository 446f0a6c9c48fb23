"""Charts as data, and drawing them below each other in one figure."""
import html
import io
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple, Union

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from .style import COLOURS, DASHES, HATCHES, MARKERS, save, style

Points = List[Tuple[float, float]]
FORMATS = ('.html', '.png', '.svg', '.pdf')
WIDTH = 9.  # inches


class Lines(NamedTuple):
    """Curves of several series, such as runs; a series may have many, such as its blocks."""
    title: str
    series: Dict[str, List[Points]]
    x: str
    doubling: bool = False  # both axes in powers of two, on which linear growth is straight


class Bars(NamedTuple):
    """Bars under a name each, one a series; `None` where a series lacks it."""
    title: str
    names: List[str]
    series: Dict[str, List[Optional[float]]]
    texts: Dict[str, List[str]]  # beside the bars
    line: Optional[float] = None  # from where the bars start, instead of 0


Chart = Union[Lines, Bars]


@style()
def draw(charts: Sequence[Chart], path: str, caption: str = '') -> str:
    """Draw charts to a file of one of FORMATS, and return its path.

    Curves are logarithmic where values are positive and span more than two decades.
    """
    suffix = Path(path).suffix
    if suffix not in FORMATS:
        raise ValueError(f'output: got {path}, needs a name in {", ".join(FORMATS)}')
    rows: List[List[Chart]] = []
    for chart in charts:
        if isinstance(chart, Lines) and rows and isinstance(rows[-1][0], Lines) and len(rows[-1]) < 2:
            rows[-1].append(chart)
        else:
            rows.append([chart])
    heights = [_height(row[0]) for row in rows]
    names = list(dict.fromkeys(name for c in charts if isinstance(c, Lines) for name in c.series))
    fig = Figure(figsize=(WIDTH, sum(heights) + .3 * (bool(caption) + (len(names) > 1))), layout='constrained')
    grid = fig.add_gridspec(len(rows), 2, height_ratios=heights)
    for i, row in enumerate(rows):
        for j, chart in enumerate(row):
            if isinstance(chart, Lines):
                _draw_lines(fig.add_subplot(grid[i, j]), chart, names)
            else:
                _draw_bars(fig.add_subplot(grid[i, :]), chart)
    if len(names) > 1:
        found = {label: handle for ax in fig.axes for handle, label in zip(*ax.get_legend_handles_labels())}
        fig.legend(
            [found[name] for name in names], names, loc='outside upper left', ncols=min(len(names), 3), handlelength=4)
    if caption:
        fig.supxlabel(caption, fontsize=7, color='0.35')
    if suffix != '.html':
        save(fig, path)
        return path
    picture = io.StringIO()
    fig.savefig(picture, format='svg', metadata={'Date': None})
    svg = picture.getvalue()
    title = html.escape(caption) or 'Curves'
    Path(path).write_text(
        f'<!doctype html><meta charset="utf-8"><title>{title}</title>{svg[svg.index("<svg"):]}', encoding='utf-8')
    return path


def _height(chart: Chart) -> float:
    if isinstance(chart, Lines):
        return 2.8
    return .8 + .26 * len(chart.names) * max(1., .7 * len(chart.series))


def _draw_lines(ax: Axes, chart: Lines, names: List[str]) -> None:
    for name, curves in chart.series.items():
        i = names.index(name) % len(COLOURS)
        for k, points in enumerate(curves):
            ax.plot(
                *zip(*points), color=COLOURS[i], linestyle=DASHES[i], marker=MARKERS[i],
                markevery=max(1, len(points) // 8), alpha=1 - .8 * k / len(curves), label=name if k == 0 else None)
    xs, ys = zip(*(point for curves in chart.series.values() for points in curves for point in points))
    if chart.doubling:
        ax.set_xscale('log', base=2)
        ax.set_yscale('log', base=2)
        ax.xaxis.set_major_formatter('{x:g}')
        ax.yaxis.set_major_formatter('{x:g}')
    else:
        if min(ys) > 0 and max(ys) > 100 * min(ys):
            ax.set_yscale('log')
        if all(float(x).is_integer() for x in xs):
            ax.xaxis.get_major_locator().set_params(integer=True)
    ax.set(title=chart.title, xlabel=chart.x)


def _draw_bars(ax: Axes, chart: Bars) -> None:
    count = len(chart.series)
    values = [v for vs in chart.series.values() for v in vs if v is not None]
    for k, (name, vs) in enumerate(chart.series.items()):
        places = [i + .8 * ((k + .5) / count - .5) for i, v in enumerate(vs) if v is not None]
        start = chart.line or 0.
        bars = ax.barh(
            places, [v - start for v in vs if v is not None], .8 / count, start, color=COLOURS[k % len(COLOURS)],
            hatch=HATCHES[k % len(HATCHES)], label=name)
        texts = [text for text, v in zip(chart.texts[name], vs) if v is not None]
        ax.bar_label(bars, texts, padding=3, fontsize=8)
    ax.set_yticks(range(len(chart.names)), chart.names, fontsize=8)
    ax.invert_yaxis()
    ax.grid(axis='y', visible=False)
    if chart.line is not None:
        ax.axvline(chart.line, color='black', linewidth=.8)
    if min(values) > 0 and (chart.line is not None or max(values) > 100 * min(values)):
        ax.set_xscale('log')
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.xaxis.set_major_formatter('{x:g}')
        ax.xaxis.set_minor_formatter(NullFormatter())
    ax.margins(x=.15, y=.01)
    ax.set_title(chart.title)
    if count > 1:
        ax.legend(fontsize=8)
