"""The flags of training: timm's names, meanings and defaults, on the command line or in a YAML file."""
import argparse
import ast
import difflib
import os
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional

import torch
import yaml
from timm import utils

from ..models._checkpoints import CheckpointError, explain
from .clips import add_clip_flags
from .sizes import add_size_flags, check_sizes

# Flags of timm's train.py that are not supported here, with timm's defaults: a config file may hold these.
UNSUPPORTED = {
    'task': 'classification', 'target-format': None, 'multilabel-threshold': 0.5, 'class-stats': None,
    'loss-class-weight': None, 'loss-pos-weight': None, 'loss-weight-power': None, 'poly-epsilon': 2., 'poly-gamma': 0.,
    'torchscript': False, 'fuser': '', 'synchronize-step': False, 'local-rank': 0,
    'amp-impl': 'native', 'apex-amp': False, 'native-amp': False, 'aot-autograd': False, 'tta': 0,
    'use-multi-epochs-loader': False, 'persistent-workers': True,
    'naflex-loader': False, 'naflex-train-seq-lens': [128, 256, 576, 784, 1024], 'naflex-max-seq-len': 576,
    'naflex-patch-sizes': None, 'naflex-patch-size-probs': None, 'naflex-loss-scale': 'linear',
    'naflex-patchify-channels-first': False,
}


RECIPES = Path(__file__).parents[1] / 'recipes'


class UsageError(ValueError):
    """What the user asked for cannot be had; the message is all that there is to say."""

    def __str__(self) -> str:
        # DataLoader puts the traceback of a loading process before it
        return super().__str__().rpartition('UsageError: ')[2].strip()


@contextmanager
def errors_of(flag: str, value: str) -> Iterator[None]:
    """Turn what is raised over a model or checkpoint that the user named into a UsageError."""
    try:
        yield
    except CheckpointError as e:  # names the file
        raise UsageError(f'{flag} {e}') from e
    except (KeyError, OSError, RuntimeError, TypeError, ValueError) as e:
        raise UsageError(f'{flag} {value}: {explain(e)}') from e


def at_least(minimum: int) -> Callable[[str], int]:
    """A type of argument."""
    def parse(text: str) -> int:
        value = int(text)
        if value < minimum:
            raise argparse.ArgumentTypeError(f'got {value}, needs {minimum} or more')
        return value

    parse.__name__ = 'int'  # in argparse's own message
    return parse


class ParseKwargs(argparse.Action):
    """NAME=VALUE pairs, the values as Python writes them or else text; timm's takes no text with an = in it."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        kwargs = {}
        for item in values:
            name, equals, text = item.partition('=')
            if not (name and equals):
                raise argparse.ArgumentError(self, f'got {item!r}, needs NAME=VALUE')
            try:
                kwargs[name] = ast.literal_eval(text)
            except (MemoryError, RecursionError, SyntaxError, TypeError, ValueError):
                kwargs[name] = text
        setattr(namespace, self.dest, kwargs)


def add_dataset_flags(add: Callable) -> None:
    """Add the flags of where samples come from, for training and validation."""
    add('--dataset', default='', metavar='NAME', help='reader and name, as hfds/NAME; empty for folders and tar files')
    add('--dataset-download', action='store_true', help='download torch/ and tfds/ datasets')
    add('--dataset-trust-remote-code', action='store_true', help='let a Hugging Face dataset run its own code')
    add('--class-map', default='', metavar='FILE', help='text file that maps class names to indices')
    add('--input-img-mode', metavar='MODE', help='PIL mode of the images (default: RGB for 3 channels, else L)')
    add('--input-key', metavar='KEY', help='dataset key of the images')
    add('--target-key', metavar='KEY', help='dataset key of the labels')


def add_input_flags(add: Callable) -> None:
    """Add the flags of a model's input."""
    add('--img-size', type=at_least(1), metavar='N', help='image size')
    add('--in-chans', type=at_least(1), metavar='N', help='image channels')
    add('--input-size', nargs=3, type=at_least(1), metavar='N', help='image size as channels height width')
    add('--mean', type=float, nargs='+', metavar='MEAN', help='mean to normalise with')
    add('--std', type=float, nargs='+', metavar='STD', help='standard deviation to normalise with')


def add_running_flags(add: Callable) -> None:
    """Add the flags of how a model runs."""
    add('--device', metavar='DEV', help='device (default: cuda where there is one, else cpu)')
    add('--amp-dtype', default='float16', choices=('float16', 'bfloat16'), help='lower precision of --amp')
    add('--channels-last', action='store_true', help='channels-last memory layout')
    add('--fast-norm', action='store_true', help="timm's fast normalisation layers")
    add('--torchcompile', nargs='?', const='inductor', metavar='BACKEND', help='torch.compile the model')
    add('--torchcompile-mode', metavar='MODE', help='mode of torch.compile')


def make_parser(prog: Optional[str] = None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        usage='%(prog)s [DATA] [--config FILE] [flags]',
        description='Train an image classifier.',
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    kwargs = dict(nargs='*', action=ParseKwargs, default={}, metavar='K=V')
    parser.add_argument('-c', '--config', metavar='FILE', help='YAML file of flags; those on the command line win')
    parser.add_argument('--recipe', metavar='NAME', help="a paper's flags (docs/recipes.md); --config and flags win")
    parser.add_argument('--dry-run', nargs='?', type=at_least(1), const=0, metavar='N',
        help='print the plan of the run, in N processes instead of those that there are, and stop')

    add = parser.add_argument_group('Dataset').add_argument
    add('data', nargs='?', metavar='DATA', help='dataset folder (also as --data-dir)')
    add('--data-dir', metavar='DIR', help='dataset folder')
    add_dataset_flags(add)
    add('--train-split', default='train', metavar='NAME', help='split to train on')
    add('--val-split', default='validation', metavar='NAME', help='split to validate on; empty for none')
    add('--train-num-samples', type=int, metavar='N', help='training images, for iterable datasets')
    add('--val-num-samples', type=int, metavar='N', help='validation images, for iterable datasets')
    add('--epoch-repeats', type=float, default=0., metavar='N', help='passes in an epoch, for iterable datasets')

    add = parser.add_argument_group('Model').add_argument
    add('--model', default='resnet50', metavar='NAME', help='model')
    add('--model-kwargs', help="the model's constructor arguments", **kwargs)
    add('--pretrained', action='store_true', help='start from the released weights')
    add('--pretrained-path', metavar='FILE', help='start from this file as if it held the released weights')
    add('--pretrained-cfg-overlay', help='changes to the pretrained cfg', **kwargs)
    add('--initial-checkpoint', default='', metavar='FILE',
        help='load this file, pretrained tag or hf-hub:owner/name into the finished model; images to clips too')
    add('--num-classes', type=at_least(0), metavar='N', help="number of classes (default: the model's)")
    add('--gp', metavar='POOL', help='global pooling')
    add_input_flags(add)
    add('--crop-pct', type=float, metavar='PCT', help='in validation, size of the centre crop over that of the image')
    add('--interpolation', metavar='NAME', help='interpolation in validation')
    add('--head-init-scale', type=float, metavar='SCALE', help="scale the classifier's initial weights")
    add('--head-init-bias', type=float, metavar='BIAS', help="initial value of the classifier's bias")
    add('--drop', type=float, default=0., metavar='RATE', help='dropout')
    add('--drop-path', type=float, metavar='RATE', help='stochastic depth')
    add('--drop-connect', type=float, metavar='RATE', help='old name of --drop-path')
    add('--drop-block', type=float, metavar='RATE', help='drop block')
    add('--bn-momentum', type=float, metavar='M', help='momentum of batch norms')
    add('--bn-eps', type=float, metavar='EPS', help='epsilon of batch norms')
    add('--sync-bn', action='store_true', help='synchronise batch norms over processes')
    add('--split-bn', action='store_true', help='batch norms of their own for each augmentation split')
    add('--dist-bn', default='reduce', choices=('broadcast', 'reduce', ''), help='share batch norm statistics')
    add('--grad-checkpointing', action='store_true', help='recompute activations in the backward pass to save memory')
    add('--activation-budget', type=float, metavar='GIB',
        help='recompute as little as it takes to keep the activations of a process within GIB')

    add = parser.add_argument_group('Device').add_argument
    add_running_flags(add)
    add('--amp', action='store_true', help='mixed precision')
    add('--model-dtype', choices=('float32', 'bfloat16'), help='type of the weights and images; without --amp')
    add('--device-modules', nargs='+', metavar='MODULE', help='import these first, for devices that they bring')
    add('--fsdp', action='store_true',
        help='shard weights, gradients and optimiser state over the processes, block by block (FSDP2)')
    add('--no-ddp-bb', action='store_true', help='do not broadcast buffers in distributed training')

    add = parser.add_argument_group('Optimiser').add_argument
    add('-b', '--batch-size', type=at_least(1), default=128, metavar='N', help='images in a batch of one process')
    add('-vb', '--validation-batch-size', type=at_least(1), metavar='N', help='batch size in validation')
    add('--grad-accum-steps', type=int, default=1, metavar='N', help='batches accumulated per optimiser step')
    add('--opt', default='sgd', metavar='NAME', help='optimiser')
    add('--opt-eps', type=float, metavar='EPS', help='epsilon')
    add('--opt-betas', type=float, nargs='+', metavar='BETA', help='betas')
    add('--opt-kwargs', help='more arguments for the optimiser', **kwargs)
    add('--momentum', type=float, default=0.9, metavar='M', help='momentum')
    add('--weight-decay', type=float, default=2e-5, metavar='WD', help='weight decay')
    add('--decay-a-log', action='store_true',
        help="decay the state matrices' A_log too, which Mamba exempts and VideoMamba's code decays")
    add('--clip-grad', type=float, metavar='NORM', help='clip gradients to this')
    add('--clip-mode', default='norm', choices=('norm', 'value', 'agc'), help='what --clip-grad limits')
    add('--layer-decay', type=float, metavar='RATE', help='factor of the learning rate from a layer to the one below')
    add('--layer-decay-mode', default='proper', choices=('proper', 'released', 'none'),
        help="released: as VideoMamba's code, whose blocks escape it: it slows the embeddings alone; none: not at all")
    add('--layer-decay-min-scale', type=float, default=0., metavar='S', help='lower bound of the product of factors')
    add('--layer-decay-no-opt-scale', type=float, metavar='S', help='freeze layers with a product below this')
    add('--model-ema', action='store_true', help='keep an exponential moving average of the weights')
    add('--model-ema-decay', type=float, default=0.9998, metavar='RATE', help='its decay')
    add('--model-ema-warmup', action='store_true', help='start its decay low')
    add('--model-ema-force-cpu', action='store_true', help='keep it on the CPU, without validating it')

    add = parser.add_argument_group('Learning rate').add_argument
    add('--lr', type=float, metavar='LR', help='learning rate; by --lr-base if not given')
    add('--lr-base', type=float, default=0.1, metavar='LR', help='learning rate at a global batch of --lr-base-size')
    add('--lr-base-size', type=int, default=256, metavar='N', help='global batch size of --lr-base')
    add('--lr-base-scale', default='', choices=('', 'linear', 'sqrt'), help='how it scales; empty: by optimiser')
    add('--lr-base-all', action='store_true', help='scale --min-lr and --warmup-lr like --lr-base')
    add('--sched', default='cosine', metavar='NAME',
        help="timm's schedules, or cosine_per_step: with both ends of the warm-up, as VideoMamba's code for clips")
    add('--sched-on-updates', action='store_true', help='step the schedule every update, not every epoch')
    add('--epochs', type=int, default=300, metavar='N', help='epochs, without cool-down')
    add('--stop-epoch', type=at_least(1), metavar='N', help='stop after N epochs of the schedule')
    add('--start-epoch', type=at_least(0), metavar='N', help='start at this epoch of the schedule')
    add('--warmup-epochs', type=int, default=5, metavar='N', help='epochs of warm-up')
    add('--warmup-lr', type=float, default=1e-5, metavar='LR', help='learning rate warm-up starts at')
    add('--warmup-prefix', action='store_true', help='add the warm-up to --epochs')
    add('--cooldown-epochs', type=int, default=0, metavar='N', help='epochs at --min-lr after the schedule')
    add('--min-lr', type=float, default=0., metavar='LR', help='lowest learning rate')
    add('--decay-epochs', type=float, default=90, metavar='N', help='epochs between decays, or of decay (wsd, rsqrt)')
    add('--decay-milestones', type=int, nargs='+', default=[90, 180, 270], metavar='N', help='epochs to decay at')
    add('--decay-rate', '--dr', type=float, default=0.1, metavar='RATE', help='factor of a decay')
    add('--lr-decay-fn', metavar='NAME', help='shape of the decay (wsd, rsqrt)')
    add('--lr-stable-timescale', type=float, metavar='N', help='time scale in epochs (rsqrt)')
    add('--lr-cycle-mul', type=float, default=1., metavar='MULT', help='growth of cycles')
    add('--lr-cycle-decay', type=float, default=0.5, metavar='MULT', help='decay from cycle to cycle')
    add('--lr-cycle-limit', type=int, default=1, metavar='N', help='number of cycles')
    add('--lr-k-decay', type=float, default=1., metavar='K', help='k-decay for cosine and poly')
    add('--lr-noise', type=float, nargs='+', metavar='PCT', help='share of the schedule where noise is on')
    add('--lr-noise-pct', type=float, default=0.67, metavar='PCT', help='limit of the noise')
    add('--lr-noise-std', type=float, default=1., metavar='STD', help='standard deviation of the noise')
    add('--patience-epochs', type=int, default=10, metavar='N', help='epochs without progress to decay after (plateau)')

    add_size_flags(parser.add_argument_group('Image sizes').add_argument)

    add = parser.add_argument_group('Augmentation and loss').add_argument
    add('--no-aug', action='store_true', help='no augmentation at all')
    add('--train-crop-mode', metavar='MODE', help='crop mode')
    add('--scale', type=float, nargs='+', default=[0.08, 1.], metavar='PCT', help='area of random crops')
    add('--ratio', type=float, nargs='+', default=[3 / 4, 4 / 3], metavar='RATIO', help='aspect ratio of random crops')
    add('--hflip', type=float, default=0.5, metavar='P', help='probability of a horizontal flip')
    add('--vflip', type=float, default=0., metavar='P', help='probability of a vertical flip')
    add('--color-jitter', type=float, default=0.4, metavar='PCT', help='strength of colour jitter')
    add('--color-jitter-prob', type=float, metavar='P', help='probability of colour jitter')
    add('--grayscale-prob', type=float, metavar='P', help='probability of greyscale')
    add('--gaussian-blur-prob', type=float, metavar='P', help='probability of blur')
    add('--aa', metavar='POLICY', help='AutoAugment, RandAugment or AugMix policy')
    add('--aug-splits', type=int, default=0, metavar='N', help='a clean and N - 1 augmented copies of each image, or 0')
    add('--jsd-loss', action='store_true', help='make the outputs for them alike (Jensen-Shannon divergence)')
    add('--aug-repeats', type=float, default=0, metavar='N', help='repeats of an image in a distributed batch')
    add('--train-interpolation', default='random', metavar='NAME', help='interpolation')
    add('--reprob', type=float, default=0., metavar='P', help='probability of random erasing')
    add('--remode', default='pixel', metavar='MODE', help='random erasing with const, rand or pixel')
    add('--recount', type=int, default=1, metavar='N', help='areas to erase')
    add('--resplit', action='store_true', help='erase in the second half of a batch only')
    add('--mixup', type=float, default=0., metavar='ALPHA', help='alpha of mixup')
    add('--cutmix', type=float, default=0., metavar='ALPHA', help='alpha of cutmix')
    add('--cutmix-minmax', type=float, nargs='+', metavar='PCT', help='least and largest share for cutmix')
    add('--mixup-prob', type=float, default=1., metavar='P', help='probability of mixup or cutmix')
    add('--mixup-switch-prob', type=float, default=0.5, metavar='P', help='probability of cutmix when both are on')
    add('--mixup-mode', default='batch', choices=('batch', 'pair', 'elem', 'half'), help='what shares mixup parameters')
    add('--mixup-off-epoch', type=int, default=0, metavar='N', help='epoch to turn mixup off at; 0 for never')
    add('--smoothing', type=float, default=0.1, metavar='EPS', help='label smoothing')
    add('--loss', choices=('ce', 'bce'), help='cross-entropy or binary cross-entropy')
    add('--bce-loss', action='store_true', help='the same as --loss bce')
    add('--bce-sum', action='store_true', help='sum it over classes')
    add('--bce-target-thresh', type=float, metavar='T', help='threshold of soft targets')
    add('--bce-pos-weight', type=float, metavar='W', help='weight of positives')

    add_clip_flags(parser, training=True)

    add = parser.add_argument_group('Distillation').add_argument
    add('--kd-model-name', metavar='NAME', help='teacher, loaded with its released weights')
    add('--kd-distill-type', default='logit', choices=('logit', 'feature', 'token', 'alignment'),
        help="what of it to match; alignment: every final token, as VideoMamba's self-distillation")
    add('--kd-loss-type', default='kl', choices=('kl',), help='loss on logits')
    add('--kd-token-distill-type', default='soft', choices=('soft', 'hard'), help='loss on the distillation token')
    add('--kd-temperature', type=float, default=4., metavar='T', help='temperature')
    add('--kd-student-feature-dim', type=int, metavar='N', help='width of the student')
    add('--kd-teacher-feature-dim', type=int, metavar='N', help='width of the teacher')
    add('--distill-loss-weight', type=float, metavar='W', help='weight of the distillation loss')
    add('--task-loss-weight', type=float, metavar='W', help='weight of the classification loss')

    add = parser.add_argument_group('Running').add_argument
    add('--output', default='./output/train', metavar='DIR', help='folder of runs')
    add('--experiment', default='', metavar='NAME', help='name of the run, its folder in --output')
    add('--resume', default='', metavar='FILE', help="checkpoint to resume from, or `auto`: the run's latest, if any")
    add('--no-resume-opt', action='store_true', help='resume without the state of the optimiser')
    add('--seed', type=at_least(0), default=42, metavar='N', help='random seed')
    add('--worker-seeding', default='all', choices=('all', 'part'), help='seed NumPy in loading processes too, or not')
    add('-j', '--workers', type=at_least(0), default=4, metavar='N', help='data loading processes')
    # timm can keep these alive over epochs; here they start anew each time, from the seed of the epoch
    add('--no-persistent-workers', action='store_true', help=argparse.SUPPRESS)
    add('--pin-mem', action='store_true', help='pin memory for faster transfer to the GPU')
    add('--no-prefetcher', action='store_true', help='normalise and mix images outside of the prefetcher')
    add('--log-interval', type=at_least(1), default=50, metavar='N', help='batches between two lines of a log')
    add('--val-interval', type=at_least(1), default=1, metavar='N', help='epochs between two validations')
    add('--eval-metric', default='top1', choices=('top1', 'top5', 'loss'),
        help='metric that selects the best checkpoint')
    add('--checkpoint-hist', type=at_least(0), default=10, metavar='N', help='epochs to keep checkpoints of')
    add('--save-epochs', type=int, nargs='+', default=[], metavar='N', help='keep the state after N epochs for good')
    add('--recovery-interval', type=at_least(0), default=0, metavar='N',
        help='optimiser steps between checkpoints within an epoch')
    add('--monitor', action='store_true',
        help='write statistics of gradients, steps, activations and scans to monitor.csv, for timm-ssm plot')
    add('--monitor-interval', type=at_least(1), default=50, metavar='N', help='optimiser steps between two rows of it')
    add('--on-spike', choices=('skip', 'rollback', 'stop'),
        help='what to do about a batch whose loss is far above those before: leave it out, also go back to the latest '
        'checkpoint, or end the run')
    add('--spike-threshold', type=float, default=8., metavar='Z',
        help='how far, in robust standard deviations of the latest 100 losses')
    add('--max-spikes', type=at_least(0), default=20, metavar='N', help='largest number of spikes in a run')
    add('--save-images', action='store_true', help='save the batches that are logged, as pictures')
    add('--log-wandb', action='store_true', help='log to Weights & Biases')
    add('--wandb-project', metavar='NAME', help='its project')
    add('--wandb-tags', nargs='+', default=[], metavar='TAG', help='tags of the run')
    add('--wandb-resume-id', default='', metavar='ID', help='id of the run to resume')
    for flag in UNSUPPORTED:
        add(f'--{flag}', nargs='*', default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    return parser


def refuse_unsupported(
        parser: argparse.ArgumentParser,
        args: argparse.Namespace,
        flags: Iterable[str],
        script: str,
) -> None:
    """End with an error if a flag was given that only timm's script of this name supports."""
    given = [f'--{flag}' for flag in flags if hasattr(args, flag.replace('-', '_'))]
    if given:
        parser.error(
            f"{', '.join(given)}: left out of this script. timm's {script} has it, and runs with these "
            f'models as `python -m timm_ssm /path/to/timm/{script} ...`')


def resolve_device(name: Optional[str]) -> str:
    if name is None:
        return 'cuda' if torch.cuda.is_available() else 'cpu'
    if name.startswith('cuda') and not torch.cuda.is_available():
        sys.exit(f'--device {name}: there is no CUDA device here; use --device cpu')
    return name


def uses_soft_targets(args: argparse.Namespace) -> bool:
    """Whether mixup or cutmix turns class indices into a share for each class."""
    return bool(args.mixup or args.cutmix or args.cutmix_minmax)


def check_folder(path: Optional[str], dataset: str) -> None:
    if not dataset and not (path and os.path.exists(path)):
        sys.exit(
            f'no dataset at {path!r}: give a folder with one folder of images per class, a tar file of the same, or '
            f'another reader with --dataset')


def parse_config(path: str) -> Dict[str, Any]:
    """Flags in a YAML file, checked and converted as on a command line."""
    parser = make_parser(prog=path)
    options = [flag for action in parser._actions for flag in action.option_strings]
    flags = {flag[2:].replace('-', '_') for flag in options if flag.startswith('--')} - {'help'}
    try:
        with open(path) as f:
            config = yaml.safe_load(f) or {}
    except (OSError, RecursionError, ValueError, yaml.YAMLError) as e:
        parser.error(f'cannot be read: {e}')
    if not isinstance(config, dict):
        parser.error('the file must hold a mapping of flags to values')
    config = {str(key).replace('-', '_'): value for key, value in config.items()}
    config = {'data_dir': config.pop('data', None), **config}
    unknown = [key for key in config if key not in flags]
    if unknown:
        hints = [f'{key} (did you mean {close[0]}?)' if (close := difflib.get_close_matches(key, flags)) else key
                 for key in unknown]
        parser.error(f"unknown keys: {', '.join(hints)}")

    unsupported = {flag.replace('-', '_'): default for flag, default in UNSUPPORTED.items()}
    nulls, line = {}, []
    for key, value in config.items():
        flag = '--' + key.replace('_', '-')
        if value is False or key in unsupported and value == unsupported[key]:
            continue  # off, as every flag is that is not given
        elif value is None:  # off for these, elsewhere as if the key was not there
            nulls.update({key: None} if key in ('color_jitter', 'dist_bn', 'train_interpolation') else {})
        elif value is True and key not in unsupported and parser.get_default(key) is False:
            line.append(flag)
        elif isinstance(value, dict):
            line += [flag, *(f'{k}={v!r}' for k, v in value.items())]
        elif isinstance(value, (list, tuple)):
            line += [flag, *map(str, value)] if value else []
        else:
            line.append(f'{flag}={value}')
    args = parser.parse_args(line)
    refuse_unsupported(parser, args, UNSUPPORTED, 'train.py')
    return {**{key: getattr(args, key) for key in config if hasattr(args, key)}, **nulls}


def find_recipe(name: str) -> str:
    """The file of a packaged recipe."""
    files = {path.stem: str(path) for path in RECIPES.glob('*.yaml')}
    if name not in files:
        close = difflib.get_close_matches(name, files, 5, 0.4) or sorted(files)
        sys.exit(f'--recipe: got {name}, needs one of docs/recipes.md, such as {", ".join(close)}')
    return files[name]


def check_fsdp(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse what does not go with sharded parameters."""
    reasons = dict(
        torchcompile='whole while they are compiled', model_ema_force_cpu='with their average on the CPU')
    for name, reason in reasons.items():
        if getattr(args, name):
            parser.error(f'--{name.replace("_", "-")}: does not go with --fsdp, needs weights {reason}')
    if args.kd_model_name and args.kd_distill_type in ('alignment', 'feature'):
        parser.error(
            f'--kd-distill-type {args.kd_distill_type}: trains a projection besides the model, which --fsdp does not '
            f'shard; needs logit or token')
    if args.clip_grad and args.clip_mode == 'agc':
        parser.error('--clip-mode agc: does not go with --fsdp, takes norms of parts of weights; needs norm or value')
    if args.dry_run is None and not utils.is_distributed_env():
        parser.error('--fsdp: got one process, needs several by torchrun')


def parse_args(argv: Optional[List[str]] = None, prog: Optional[str] = None) -> argparse.Namespace:
    """The arguments of a training run, checked as far as that goes without its data and model."""
    parser = make_parser(prog)
    args = parser.parse_args(argv)
    config = parse_config(args.config) if args.config else {}
    if recipe := args.recipe or config.get('recipe'):
        config = {**parse_config(find_recipe(recipe)), **config}
    if config:
        parser.set_defaults(**config)
        args = parser.parse_args(argv)
    refuse_unsupported(parser, args, UNSUPPORTED, 'train.py')
    args.data_dir = args.data or args.data_dir
    if not (args.dry_run is not None and args.data_dir is None and args.train_num_samples):
        check_folder(args.data_dir, args.dataset)
    args.device = resolve_device(args.device)
    args.grad_accum_steps = max(1, args.grad_accum_steps)
    if not args.val_split:
        args.eval_metric = 'loss'  # of training
    if args.sync_bn and args.device.startswith('cpu'):
        parser.error(f'--sync-bn: PyTorch synchronises batch norms on GPUs only, got --device {args.device}')
    if args.aug_splits == 1 or args.aug_splits < 0:
        parser.error(f'--aug-splits: got {args.aug_splits}, needs 0 or at least 2')
    if args.aug_splits and (uses_soft_targets(args) or args.no_prefetcher):
        parser.error('--aug-splits goes neither with mixup and cutmix nor with --no-prefetcher')
    if args.jsd_loss and not args.aug_splits:
        parser.error('--jsd-loss needs --aug-splits')
    if args.split_bn and not (args.aug_splits or args.resplit):
        parser.error('--split-bn needs --aug-splits or --resplit')
    if args.amp and args.model_dtype not in (None, 'float32'):
        parser.error(f'--amp needs weights of float32, got --model-dtype {args.model_dtype}')
    if args.sched == 'cosine_per_step' and args.warmup_epochs >= args.epochs:
        parser.error(f'--warmup-epochs: got {args.warmup_epochs}, needs fewer than --epochs {args.epochs}')
    if args.layer_decay_mode == 'released' and args.layer_decay is None:
        parser.error('--layer-decay-mode released needs --layer-decay')
    if args.sched == 'none' and args.layer_decay is not None:
        parser.error('--sched none: it is the schedule that applies --layer-decay')
    if args.resume == 'auto' and not args.experiment:
        parser.error('--resume auto needs --experiment, the run to look for')
    if uses_soft_targets(args) and args.batch_size * args.num_sample % 2:
        parser.error(f'--batch-size {args.batch_size}: mixup and cutmix need an even batch')
    check_sizes(parser, args)
    if args.activation_budget is not None and not args.activation_budget > 0:
        parser.error(f'--activation-budget: got {args.activation_budget:g}, needs more than 0')
    if args.activation_budget and args.grad_checkpointing:
        parser.error('--activation-budget: chooses among blocks, all of which --grad-checkpointing recomputes')
    if args.fsdp:
        check_fsdp(parser, args)
    if args.aug_repeats and args.dry_run is None and not utils.is_distributed_env():
        parser.error('--aug-repeats spreads an image over processes: it needs torchrun, or 0 to do without')
    return args
