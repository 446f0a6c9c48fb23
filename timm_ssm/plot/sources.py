"""What is drawn: the curves of a run's folder, and tables of results, as charts."""
import csv
import math
import os
from collections import Counter
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple

from .charts import Bars, Chart, Lines, Points

# what of monitor.csv is one of many, a curve for each block or mixer
MONITORED = {
    'grad_norm': 'gradient norm of each block', 'update_ratio': 'norm of a step over that of the weights, each block',
    'activation': 'root mean square of the output of each block', 'dt_min': 'lowest dt of each mixer',
    'dt_max': 'highest dt of each mixer', 'decay_min': 'lowest exp(dt A) of each mixer',
    'decay_max': 'highest exp(dt A) of each mixer', 'state_max': 'largest state of each mixer',
}
STEPS = ('epoch', 'update')  # columns that count the steps of a run


class Table(NamedTuple):
    """A CSV file, whose first lines may be comments `# fact: value`."""
    name: str  # the file's, without suffix
    facts: Dict[str, str]
    columns: List[str]
    rows: List[Dict[str, str]]


def read_table(path: str) -> Table:
    """Raises a ValueError where a file is no table."""
    try:
        with open(path, newline='', encoding='utf-8') as f:
            lines = f.read().splitlines()
        comments = [line[1:] for line in lines if line.startswith('#')]
        reader = csv.DictReader(line for line in lines if not line.startswith('#'))
        rows = list(reader)
    except (UnicodeDecodeError, csv.Error) as e:
        raise ValueError(f'input: {path} is no CSV file ({e})') from None
    if not reader.fieldnames or any(None in row or None in row.values() for row in rows):
        raise ValueError(f'input: {path} is no CSV file with a header and rows as long as it')
    facts = dict(tuple(s.strip() for s in c.split(':', 1)) for c in comments if ':' in c)
    return Table(Path(path).stem, facts, list(reader.fieldnames), rows)


def number(text: Optional[str]) -> Optional[float]:
    """A finite number, or None."""
    try:
        value = float(text)
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None


def run_charts(inputs: Sequence[str]) -> List[Chart]:
    """Curves of runs beside each other: of folders with a summary.csv and maybe a monitor.csv, or of such files."""
    charts: Dict[str, Lines] = {}
    for given in inputs:
        files = [given]
        if os.path.isdir(given):
            files = [f for f in (os.path.join(given, name) for name in ('summary.csv', 'monitor.csv')) if
                     os.path.isfile(f)]
            if not files or not files[0].endswith('summary.csv'):
                raise ValueError(f'run: {given} has no summary.csv, needs the folder of a run')
        for table in map(read_table, files):
            x = next(c for c in reversed(STEPS) if c in table.columns)
            for name in table.columns:
                points = _points(table.rows, x, name)
                if name in STEPS or not points:
                    continue
                block, _, kind = name.rpartition('.')
                y = MONITORED.get(kind, kind) if block else name
                chart = charts.setdefault(f'{y}, by {x}', Lines(f'{y}, by {x}', {}, x))
                chart.series.setdefault(given, []).append(points)
    return list(charts.values())


def table_charts(tables: Sequence[Table], columns: Sequence[str] = ()) -> List[Chart]:
    """Tables of results as bars, or as curves where a name has several rows; tables with the same columns together.

    Args:
        tables: Those of `report` in benchmarks/harness.py are compared with their goals, timm's results by accuracy.
        columns: What to draw; all that has numbers if none.
    """
    groups: Dict[Tuple[str, ...], List[Table]] = {}
    for table in tables:
        groups.setdefault(tuple(table.columns), []).append(table)
    for wanted in columns:
        if not any(wanted in group for group in groups):
            raise ValueError(
                f'columns: got {wanted}, needs some of {", ".join(dict.fromkeys(c for g in groups for c in g))}')
    charts = []
    for header, group in groups.items():
        if {'name', 'value', 'goal', 'less'} <= set(header) and not columns:
            charts += _goal_charts(group)
        else:
            wanted = columns or (('top1', 'top5') if 'top1' in header else header)
            charts += _column_charts(group, [c for c in header if c in wanted], bool(columns))
    return charts


def _goal_charts(tables: List[Table]) -> List[Chart]:
    """Rows with a goal by how far they are beyond it, whichever way is better; others by their values."""
    rows: Dict[bool, Dict[str, Dict[str, Dict[str, str]]]] = {}  # has a goal, name, table
    for table in tables:
        for row in table.rows:
            if number(row['value']) is not None:
                rows.setdefault(bool(row['goal']), {}).setdefault(row['name'], {})[table.name] = row

    def height(row: Dict[str, str]) -> float:
        value, goal = float(row['value']), number(row['goal'])
        return value if goal is None else goal / value if row['less'] == 'True' else value / goal

    charts = []
    for judged in sorted(rows, reverse=True):
        series, texts = {}, {}
        for name in _unique([t.name for t in tables]):
            found = [by_table.get(name) for by_table in rows[judged].values()]
            if any(found):
                series[name] = [row and height(row) for row in found]
                texts[name] = [f'{float(row["value"]):.3g}' if row else '' for row in found]
        title = 'measured / goal (inverted where less is better)' if judged else 'measured'
        charts.append(Bars(title, list(rows[judged]), series, texts, 1. if judged else None))
    return charts


def _column_charts(tables: List[Table], wanted: Sequence[str], strict: bool) -> List[Chart]:
    """A chart for each wanted column of numbers; where `strict`, each of them has to be one."""
    names = _unique([t.name for t in tables])
    rows = [dict(row, **{'': name}) for name, t in zip(names, tables) for row in t.rows]
    numeric, text = [], []
    for column in tables[0].columns:
        given = [row[column] for row in rows if row[column]]
        if given and all(number(v) is not None for v in given):
            numeric.append(column)
        elif len(set(given)) > 1:
            text.append(column)
    chosen = [c for c in wanted if c in numeric]
    if strict and len(chosen) < len(wanted):
        bad = next(c for c in wanted if c not in numeric)
        raise ValueError(f'columns: got {bad}, needs some with numbers: {", ".join(numeric)}')
    # a row's name: its first text, and as many others as it takes to tell rows apart; the file's if that does not do
    label: List[str] = []
    for column in [*text, *([''] if len(tables) > 1 else [])]:
        label.append(column)
        if _repeats(rows, label) == 1:
            break
    else:
        label = text[:1] + ([''] if len(tables) > 1 or not text else [])
    titles = [', '.join(filter(None, (row[c] for c in label))) for row in rows]
    x = ''
    if _repeats(rows, label) > 1:
        x = _abscissa(rows, titles, [c for c in numeric if c not in chosen] or numeric)
    charts: List[Chart] = []
    for column in (c for c in chosen if c != x):
        if x:
            series = {t: [_points([r for r, u in zip(rows, titles) if u == t], x, column)] for t in titles}
            series = {t: curves for t, curves in series.items() if curves[0]}
            charts.append(Lines(f'{column}, by {x}', series, x, _doubling(series)))
        else:
            bars = {t: float(r[column]) for t, r in zip(titles, rows) if r[column]}
            charts.append(Bars(column, list(bars), {'': [*bars.values()]}, {'': [f'{v:.4g}' for v in bars.values()]}))
    return charts


def _doubling(series: Dict[str, List[Points]]) -> bool:
    """Whether all is positive, at three or more powers of two."""
    xs, ys = zip(*(point for curves in series.values() for points in curves for point in points))
    return min(xs) > 0 < min(ys) and len(set(xs)) > 2 and all(math.frexp(x)[0] == .5 for x in xs)


def _repeats(rows: List[Dict[str, str]], label: List[str]) -> int:
    return max(Counter(tuple(row[c] for c in label) for row in rows).values())


def _abscissa(rows: List[Dict[str, str]], titles: List[str], columns: List[str]) -> str:
    """The first column that tells the rows of one name apart."""
    for column in columns:
        if max(Counter((t, row[column]) for t, row in zip(titles, rows)).values()) == 1:
            return column
    raise ValueError(f'input: nothing tells the rows of {Counter(titles).most_common(1)[0][0]} apart')


def _points(rows: List[Dict[str, str]], x: str, y: str) -> Points:
    pairs = ((number(row[x]), number(row[y])) for row in rows)
    return [(a, b) for a, b in pairs if a is not None and b is not None]


def _unique(names: List[str]) -> List[str]:
    """Names of files, those that repeat with a number."""
    seen: Counter = Counter()
    result = []
    for name in names:
        seen[name] += 1
        result.append(name if seen[name] == 1 else f'{name} ({seen[name]})')
    return result
