"""`timm-ssm plot`: training curves, comparisons and tables of benchmarks as pictures in one style."""
import os
from typing import List, Sequence

from .charts import draw
from .sources import STEPS, read_table, run_charts, table_charts

FACTS = ('cpu', 'gpu', 'threads', 'torch', 'timm', 'timm_ssm', 'date')  # of a table, below the picture


def plot(inputs: Sequence[str], output: str, columns: Sequence[str] = ()) -> str:
    """Draw runs and tables, and return the picture's path.

    Args:
        inputs: Folders of runs, with summary.csv and maybe monitor.csv, and CSV files: of runs, of `validate
            --results-file`, or of benchmarks.
        output: File to write: .html, .png, .svg or .pdf.
        columns: Columns of tables to draw; all if none.

    Raises:
        ValueError: There is nothing to draw in an input.
    """
    runs: List[str] = []
    tables = []
    for given in inputs:
        if os.path.isdir(given):
            runs.append(given)
            continue
        table = read_table(given)
        if not table.rows:
            raise ValueError(f'input: {given} has no rows')
        if set(STEPS) & set(table.columns):
            runs.append(given)
        else:
            tables.append(table)
    if columns and runs:
        raise ValueError(f'columns: got some for {runs[0]}, needs tables; of a run all is drawn')
    charts = [*run_charts(runs), *table_charts(tables, columns)]
    if not charts:
        raise ValueError(f'input: there are no numbers in {", ".join(inputs)}')
    facts = [' · '.join(f'{k} {t.facts[k]}' for k in FACTS if t.facts.get(k, 'none') != 'none') for t in tables]
    return draw(charts, output, '\n'.join(filter(None, dict.fromkeys(facts))))
