"""Draw the learning curves in a summary.csv of train.py.

    python demo/plot_summary.py FOLDER/summary.csv curve.png
"""
import argparse
import csv

from timm_ssm.plot.style import figure, save, style


@style()
def main():
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('summary', help='summary.csv')
    parser.add_argument('output', help='picture to write')
    args = parser.parse_args()

    with open(args.summary, newline='') as f:
        rows = list(csv.DictReader(f))
    curves = {
        key: [(int(row['epoch']) + 1, float(row[key])) for row in rows if row.get(key)]
        for key in ('train_loss', 'eval_loss', 'eval_top1')}
    fig, (left, right) = figure(columns=2)
    for axes, key, label in (
            (left, 'train_loss', 'training'), (left, 'eval_loss', 'validation'), (right, 'eval_top1', 'validation')):
        axes.plot(*zip(*curves[key]), label=label)
    left.set(xlabel='epochs', ylabel='loss')
    right.set(xlabel='epochs', ylabel='top-1 accuracy in %', ylim=(None, 100))
    for axes in (left, right):
        axes.xaxis.get_major_locator().set_params(integer=True)
    left.legend()
    save(fig, args.output)
    print(f'learning curve drawn to {args.output}')


if __name__ == '__main__':
    main()
