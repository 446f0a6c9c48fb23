"""Does a small student gain from a teacher? VideoMambas on handwritten digits, 3 seeds, minutes on a CPU.

    python benchmarks/distillation.py [FOLDER]

The teacher is that of `make demo`. Students half as wide train on the labels alone, and on labels and teacher, by the
alignment of tokens and by the outputs. The table goes to benchmarks/results/distillation.csv.
"""
import argparse
import csv
import statistics
import subprocess
import sys
from pathlib import Path

import timm
import torch
from timm.models import save_for_hf

from timm_ssm.training import train

ROOT = Path(__file__).parents[1]
STUDENT = ['--model-kwargs', 'patch_size=7', 'embed_dim=32', 'depth=2', 'd_state=4']
TEACHER = dict(patch_size=7, embed_dim=64, depth=3, d_state=4)
KINDS = {
    'labels alone': [],
    'alignment of tokens': ['--kd-distill-type', 'alignment'],
    'outputs (temperature 4)': ['--kd-distill-type', 'logit', '--kd-temperature', '4'],
}


def run(folder: Path, name: str, seed: int, *flags: str) -> float:
    """The accuracy after training, per cent."""
    if not (folder / name / 'summary.csv').exists():
        train.main([
            str(folder / 'digits'), '--config', str(ROOT / 'demo' / 'digits.yaml'), '--seed', str(seed),
            '--workers', '0', '--device', 'cpu', '--output', str(folder), '--experiment', name, *flags])
    with open(folder / name / 'summary.csv', newline='') as f:
        return float(list(csv.DictReader(f))[-1]['eval_top1'])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('folder', nargs='?', default='output/distillation', help='folder of the runs')
    parser.add_argument('--seeds', type=int, default=3, metavar='N', help='number of seeds (default: 3)')
    parser.add_argument('--epochs', type=int, default=8, metavar='N', help="students' epochs (default: 8)")
    args = parser.parse_args()
    folder = Path(args.folder)
    torch.set_num_threads(1)  # models this small lose by more
    if not (folder / 'digits').exists():
        subprocess.run([sys.executable, ROOT / 'demo' / 'make_digits.py', folder / 'digits'], check=True)
    accuracy = run(folder, 'teacher', 0)
    if not (folder / 'saved').exists():
        kwargs = dict(TEACHER, img_size=28, in_chans=1, num_classes=10, global_pool='avg')
        teacher = timm.create_model('videomamba_tiny_patch16_224', **kwargs)
        state = torch.load(folder / 'teacher' / 'last.pth.tar', weights_only=True)
        teacher.load_state_dict(state['state_dict'])
        teacher.pretrained_cfg.update(mean=(0.5,), std=(0.5,))
        save_for_hf(teacher, str(folder / 'saved'), model_args=kwargs)

    rows = [dict(training='the teacher, on labels', runs=1, top1=f'{accuracy:.2f}', spread='', each='')]
    for i, (kind, flags) in enumerate(KINDS.items()):
        taught = [*flags, '--kd-model-name', f'local-dir:{folder / "saved"}'] if flags else []
        found = [
            run(folder, f'student-{i}-{seed}', seed, *STUDENT, '--epochs', str(args.epochs), *taught)
            for seed in range(args.seeds)]
        rows.append(dict(
            training=kind, runs=len(found), top1=f'{statistics.mean(found):.2f}',
            spread=f'{statistics.stdev(found):.2f}' if len(found) > 1 else '',
            each=' '.join(f'{x:.1f}' for x in found)))
        print(rows[-1], flush=True)
    with open(ROOT / 'benchmarks' / 'results' / 'distillation.csv', 'w', newline='') as f:
        writer = csv.DictWriter(f, rows[0])
        writer.writeheader()
        writer.writerows(rows)


if __name__ == '__main__':
    main()
