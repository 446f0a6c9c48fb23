"""Print and draw what the runs of `make demo-video` say.

    python demo/plot_motion.py FOLDER

FOLDER has the results of validate.py on motions, and the runs from_scratch and from_images of train.py on photographs.
"""
import argparse
import csv
import textwrap
from pathlib import Path

from timm_ssm.plot.style import figure, save, style

RESULTS = {'8 frames in order': 'in_order', '8 frames, shuffled': 'shuffled', 'one frame': 'one_frame'}
RUNS = {'from scratch': 'from_scratch', 'from an image model': 'from_images'}


def read(path: Path, key: str) -> list:
    with open(path, newline='') as f:
        return [float(row[key]) for row in csv.DictReader(f)]


@style()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('folder', type=Path)
    folder = parser.parse_args().folder
    top1 = {name: read(folder / f'{file}.csv', 'top1')[0] for name, file in RESULTS.items()}
    curves = {name: read(folder / run / 'summary.csv', 'eval_loss') for name, run in RUNS.items()}
    print('top-1 in % on motions of new photographs (chance: 50)')
    for name, value in top1.items():
        print(f'  {name:<20}{value:8.1f}')
    print('validation loss on photographs, by epoch of the clip model')
    for name, values in curves.items():
        print(f'  {name:<20}' + ''.join(f'{value:8.2f}' for value in values))

    fig, (left, right) = figure(columns=2)
    left.bar_label(left.bar([textwrap.fill(name, 10) for name in top1], list(top1.values())), fmt='%.1f')
    left.axhline(50, color='black', linewidth=.8)
    left.set(ylabel='top-1 accuracy in %', ylim=(0, 109), title='the motion, in clips of new photographs')
    for name, values in curves.items():
        right.plot(range(1, len(values) + 1), values, label=name)
    right.set(xlabel='epochs', ylabel='validation loss', ylim=(0, None), title='the photograph, in new clips')
    right.xaxis.get_major_locator().set_params(integer=True)
    right.legend()
    save(fig, folder / 'motion.png')
    print(f'drawn to {folder / "motion.png"}')


if __name__ == '__main__':
    main()
