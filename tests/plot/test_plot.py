"""`timm-ssm plot`: what is drawn of which file, and that pictures can be read in grey."""
import csv
import re
from itertools import combinations
from pathlib import Path

import pytest
from PIL import Image, ImageColor

pytest.importorskip('matplotlib')

from timm_ssm import cli
from timm_ssm.plot import plot, style
from timm_ssm.plot.charts import Bars, Lines
from timm_ssm.plot.sources import read_table, run_charts, table_charts

ROOT = Path(__file__).parents[2]
RESULTS, PICTURES = ROOT / 'benchmarks' / 'results', ROOT / 'docs' / 'pictures'


def write(path, header, *rows, facts=()):
    with open(path, 'w', newline='') as f:
        f.writelines(f'# {fact}\n' for fact in facts)
        csv.writer(f).writerows([header, *rows])
    return str(path)


def charts_of(*paths, columns=()):
    return table_charts([read_table(str(path)) for path in paths], columns)


def lightness(colour):
    """L* of CIELAB."""
    rgb = [int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5)]
    r, g, b = (c / 12.92 if c <= .04045 else ((c + .055) / 1.055) ** 2.4 for c in rgb)
    return 116 * (.2126 * r + .7152 * g + .0722 * b) ** (1 / 3) - 16


def test_grey():
    """Lines and bars are told apart without colour; four of them by lightness alone."""
    kinds = list(zip(style.DASHES, style.MARKERS, style.HATCHES))
    assert len(kinds) == len(style.COLOURS)
    for a, b in combinations(kinds, 2):
        assert all(x != y for x, y in zip(a, b))
    first = [lightness(c) for c in style.COLOURS[:4]]
    assert first == sorted(first) and min(b - a for a, b in zip(first, first[1:])) > 10
    assert max(map(lightness, style.COLOURS)) < 80  # on white


@pytest.mark.parametrize('path', sorted(RESULTS.glob('*.csv')), ids=lambda path: path.stem)
def test_benchmarks(path, tmp_path):
    """Each table of benchmarks/results is drawn, every row with a number in it."""
    table = read_table(str(path))
    charts = table_charts([table])
    if 'goal' in table.columns:
        names = [name for chart in charts for name in chart.names]
        assert sorted(names) == sorted(row['name'] for row in table.rows)
    page = Path(plot([str(path)], str(tmp_path / 'page.html'))).read_text()
    for chart in charts:
        for name in chart.names if isinstance(chart, Bars) else chart.series:
            assert f'>{name.replace(">", "&gt;")}</text>' in page
    assert table.facts.get('cpu', '') in page


DRAWN = [*RESULTS.glob('*.png'), *(PICTURES / f'{name}.png' for name in (
    'analysis_corruptions', 'analysis_frequency', 'frames_growth', 'stability'))]


@pytest.mark.parametrize('path', sorted(DRAWN), ids=lambda path: path.stem)
def test_pictures_of_the_repository(path):
    """They are in this style: its width, its first colour, and not the first of matplotlib's own."""
    with Image.open(path) as image:
        colours = {colour for _, colour in image.convert('RGB').getcolors(2 ** 24)}
        assert image.width == 1350
    assert ImageColor.getrgb(style.COLOURS[0]) in colours and ImageColor.getrgb('#1f77b4') not in colours


def test_goals(tmp_path):
    """Bars are how far beyond a goal a value is, whichever way is better, labelled with the value."""
    header = ['name', 'value', 'goal', 'less']
    paths = [
        write(tmp_path / 'before.csv', header, ['speed', 2, 4, False], ['time', 30, 15, True]),
        write(tmp_path / 'after.csv', header, ['time', 10, 15, True], ['share', .5, '', False])]
    judged, others = charts_of(*paths)
    assert judged.names == ['speed', 'time'] and judged.line == 1
    assert judged.series == dict(before=[.5, .5], after=[None, 1.5])
    assert judged.texts == dict(before=['2', '30'], after=['', '10'])
    assert others.names == ['share'] and others.series == dict(after=[.5]) and others.line is None


def test_curves_of_a_table():
    """A name with several rows is a curve, by the column that tells these apart."""
    charts = charts_of(RESULTS / 'frames_growth.csv', columns=['seconds', 'memory_mib'])
    assert [(c.title, c.x, c.doubling) for c in charts] == [
        ('seconds, by frames', 'frames', True), ('memory_mib, by frames', 'frames', True)]
    lines = (RESULTS / 'frames_growth.csv').read_text().splitlines()
    rows = [line.split(',') for line in lines if line.startswith('videomamba_tiny')]
    assert [row[1] for row in rows] == ['8', '16', '32', '64']
    assert charts[0].series['videomamba_tiny'] == [[(float(row[1]), float(row[3])) for row in rows]]


def test_results_of_models(tmp_path):
    """Of timm's results accuracy is drawn, under what tells the rows apart; failed models have none."""
    header = ['model', 'checkpoint', 'top1', 'top5', 'param_count', 'img_size', 'interpolation', 'error']
    path = write(
        tmp_path / 'r.csv', header, ['vim', 'a.pth', 71.25, 90, 7, 224, 'bicubic', ''],
        ['vim', 'b.pth', 70, 89, 7, 224, 'bicubic', ''], ['mamba', 'c.pth', '', '', '', '', '', 'out of memory'])
    top1, top5 = charts_of(path)
    assert top1 == Bars('top1', ['vim, a.pth', 'vim, b.pth'], {'': [71.25, 70]}, {'': ['71.25', '70']})
    assert top5.title == 'top5'
    header = ['model', 'top1', 'img_size']
    path = write(tmp_path / 's.csv', header, ['vim', 70, 224], ['vim', 72, 448], ['mamba', 71, 224])
    assert charts_of(path) == [
        Lines('top1, by img_size', dict(vim=[[(224, 70), (448, 72)]], mamba=[[(224, 71)]]), 'img_size')]


def test_runs(tmp_path):
    for name in 'ab':
        (tmp_path / name).mkdir()
        write(tmp_path / name / 'summary.csv', ['epoch', 'loss'], [0, 2], [1, 'nan'], [2, 1])
        write(tmp_path / name / 'monitor.csv', ['epoch', 'update', 'blocks.0.grad_norm', 'blocks.1.grad_norm'])
    folders = [str(tmp_path / name) for name in 'ab']
    assert run_charts(folders) == [Lines('loss, by epoch', {f: [[(0, 2), (2, 1)]] for f in folders}, 'epoch')]
    write(tmp_path / 'a' / 'monitor.csv', ['epoch', 'update', 'blocks.0.grad_norm', 'blocks.1.grad_norm'], [0, 4, 1, 2])
    assert run_charts(folders)[1].series == {folders[0]: [[(4, 1)], [(4, 2)]]}
    assert run_charts([str(tmp_path / 'a' / 'summary.csv')])[0].series.keys() == {str(tmp_path / 'a' / 'summary.csv')}


@pytest.mark.parametrize('suffix', ('png', 'svg', 'pdf'))
def test_formats(suffix, tmp_path, capsys):
    """The same input gives the same bytes, on a canvas as wide as every other."""
    paths = [tmp_path / f'{i}.{suffix}' for i in (1, 2)]
    for path in paths:
        assert cli.main(['plot', str(RESULTS / 'scan_cpu_overhead.csv'), '--output', str(path)]) == 0
        assert capsys.readouterr().out == f'{path}\n'
    assert paths[0].read_bytes() == paths[1].read_bytes()
    if suffix == 'png':
        assert Image.open(paths[0]).width == 1350


@pytest.mark.parametrize('content, flags, message', [
    ('', '', r'input: .* is no CSV file with a header'),
    ('a,b\n1,2,3\n', '', r'input: .* is no CSV file with a header'),
    ('\x00\xff', '', 'input: .* is no CSV file'),
    ('a,b\n', '', 'input: .* has no rows'),
    ('a,b\nx,y\n', '', 'input: there are no numbers in'),
    ('a,b\nx,1\n', '--columns c', 'columns: got c, needs some of a, b'),
    ('a,b\nx,1\ny,2\n', '--columns a', 'columns: got a, needs some with numbers: b'),
    ('a,b\nx,1\nx,1\n', '', 'input: nothing tells the rows of x apart'),
    ('epoch,b\n0,1\n', '--columns b', 'columns: got some for .*, needs tables'),
    ('a,b\nx,1\n', '--output page.txt', r'output: got page.txt, needs a name in \.html'),
])
def test_errors(content, flags, message, tmp_path, capsys):
    (tmp_path / 'x.csv').write_text(content, encoding='latin-1')
    assert cli.main(['plot', str(tmp_path / 'x.csv'), '--output', str(tmp_path / 'p.html'), *flags.split()]) == 1
    assert re.search(f'timm-ssm plot: {message}', capsys.readouterr().err)
    assert not (tmp_path / 'p.html').exists()
