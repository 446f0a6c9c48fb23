"""The one style of this package's pictures, which can be read in grey and at the width of a README.

    from timm_ssm.plot.style import figure, save, style

    with style():
        fig, (left, right) = figure(columns=2)
        left.plot(...)
        save(fig, 'picture.png')

Lines differ in lightness, dash and marker at once, bars in lightness and hatching; heat maps are lighter where values
are higher.
"""
import os
from pathlib import Path
from typing import Any, Tuple, Union

try:
    import matplotlib
except ImportError as e:
    raise RuntimeError("plots need matplotlib: pip install 'timm-ssm[plot]'") from e
from matplotlib import cycler
from matplotlib.figure import Figure

#: From dark to light for the first four, which most pictures do with; told apart with the common colour blindnesses.
COLOURS = ('#0b3c7d', '#c44e00', '#00a87e', '#f0b030', '#7b3294', '#d98cb3')
DASHES = ('-', (0, (5, 1.5)), (0, (1.5, 1.5)), (0, (6, 1.5, 1.5, 1.5)), (0, (3, 1, 1, 1, 1, 1)), (0, (9, 3)))
MARKERS = ('o', 's', '^', 'D', 'v', 'P')
HATCHES = ('', '///', '...', 'xxx', '\\\\\\', '+++')
#: Colour map of heat maps and overlays; its lightness grows evenly with the value.
HEAT = 'inferno'

RC = {
    'axes.axisbelow': True,
    'axes.grid': True,
    'axes.prop_cycle': cycler(color=COLOURS, linestyle=DASHES, marker=MARKERS),
    'axes.spines.right': False,
    'axes.spines.top': False,
    'axes.titlelocation': 'left',
    'axes.titlesize': 'medium',
    'font.size': 9,
    'grid.alpha': .3,
    'hatch.color': 'white',
    'image.cmap': HEAT,
    'legend.frameon': False,
    'lines.linewidth': 1.5,
    'lines.markersize': 4.5,
    'savefig.dpi': 150,
    'svg.fonttype': 'none',  # text stays text
    'svg.hashsalt': 'timm-ssm',  # the same picture is the same file
}


def style() -> Any:
    """A context (or decorator) in which matplotlib draws in this style."""
    return matplotlib.rc_context(RC)


def figure(rows: int = 1, columns: int = 1, size: Tuple[float, float] = (9., 3.5), **kwargs: Any) -> Tuple[Figure, Any]:
    """A figure that no window or global state knows of, and its axes as `Figure.subplots` returns them.

    Args:
        rows: Rows of axes.
        columns: Columns of axes.
        size: Width and height of the figure in inches; a README shows about 9.
        **kwargs: For `Figure.subplots`.
    """
    fig = Figure(figsize=size, layout='constrained')
    return fig, fig.subplots(rows, columns, **kwargs)


def save(fig: Figure, path: Union[str, os.PathLike]) -> None:
    """Write a figure in the format that the suffix names; the same figure gives the same bytes."""
    dated = Path(path).suffix in ('.svg', '.pdf')
    fig.savefig(path, metadata={'Date' if Path(path).suffix == '.svg' else 'CreationDate': None} if dated else None)
