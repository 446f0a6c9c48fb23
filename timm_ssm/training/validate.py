"""Validation of models on images or videos, with the flags of timm's validate.py."""
import argparse
import glob
import json
import logging
import os
import sys
from typing import Any, Callable, Dict, List, NamedTuple, Optional

import torch
from timm import utils
from timm.data import create_loader
from timm.layers import set_fast_norm
from timm.models import is_model, list_models, parse_model_name
from torch import nn

import timm_ssm  # noqa: F401  registers the models

from ..data import score_videos, score_views
from ..data.corruptions import Corrupt
from ..hub.checkpoints import create_model, rebuild
from ..models._checkpoints import read_checkpoint
from ..zoo.registry import clip_args
from .arguments import (
    ParseKwargs,
    UsageError,
    add_dataset_flags,
    add_input_flags,
    add_running_flags,
    at_least,
    check_folder,
    errors_of,
    refuse_unsupported,
    resolve_device,
)
from .clips import (
    add_clip_flags,
    check_classes,
    create_eval_loader,
    create_reader,
    known_classes,
    resolve_clips,
)
from .data import channels_last, open_dataset, resolve_data
from .evaluation import evaluate
from .log import setup_logging, show_progress, write_rows
from .model import resolve_input, to_channels_last
from .optim import create_autocast
from .robustness import (
    add_corruption_flags,
    check_corruption_flags,
    insert_corruption,
    measure_corrupted,
    read_results,
    report,
)

_logger = logging.getLogger(__name__)

# Flags of timm's validate.py that are not supported here.
UNSUPPORTED = (
    'torchscript', 'aot-autograd', 'fuser', 'reparam', 'test-pool', 'tf-preprocessing', 'num-gpu', 'model-dtype',
    'real-labels', 'valid-labels', 'metrics-avg', 'naflex-loader', 'naflex-max-seq-len', 'task', 'target-format',
    'multilabel-threshold',
)


def make_parser(prog: Optional[str] = None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        usage='%(prog)s [DATA] [--model NAME ...] [--checkpoint PATH] [flags]',
        description='Measure the accuracy of models on images or videos.',
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )

    add = parser.add_argument_group('Dataset').add_argument
    add('data', nargs='?', metavar='DATA', help='dataset folder or tar file (also as --data-dir)')
    add('--data-dir', metavar='DIR', help='dataset folder or tar file')
    add_dataset_flags(add)
    add('--split', default='validation', metavar='NAME', help='dataset split')
    add('--num-samples', type=int, metavar='N', help='number of images, for iterable datasets that do not know it')

    add = parser.add_argument_group(
        'Model', 'What is not given is taken from the checkpoint, then from the model.').add_argument
    add('--model', '-m', nargs='+', metavar='NAME', help='model names, wildcards, or a text file with a name a line')
    add('--pretrained', action='store_true', help='load the released weights (the default without --checkpoint)')
    add('--checkpoint', default='', metavar='PATH', help='a checkpoint, or a folder of checkpoints')
    add('--use-ema', action='store_true', help='use the averaged weights of the checkpoint')
    add('--num-classes', type=at_least(0), metavar='N', help='number of classes')
    add_input_flags(add)
    add('--use-train-size', action='store_true', help="the cfg's training size even where it has a test size")
    add('--crop-pct', type=float, metavar='PCT', help='size of the centre crop over that of the resized image')
    add('--crop-mode', metavar='MODE', help='squash, border or center')
    add('--crop-border-pixels', type=int, metavar='N', help='pixels to cut off every border first')
    add('--interpolation', metavar='NAME', help='bilinear, bicubic, ...')
    add('--gp', metavar='POOL', help='global pooling')
    add('--model-kwargs', nargs='*', action=ParseKwargs, metavar='K=V', help="the model's constructor arguments")

    add_clip_flags(parser, training=False)
    add_corruption_flags(parser)

    add = parser.add_argument_group('Running').add_argument
    add('-b', '--batch-size', type=at_least(1), default=256, metavar='N',
        help='batch size; halved while memory runs out')
    add('-j', '--workers', type=at_least(0), default=4, metavar='N', help='data loading processes')
    add_running_flags(add)
    add('--amp', action='store_true', help='run in mixed precision')
    add('--no-prefetcher', action='store_true', help='normalise images in the loading processes')
    add('--pin-mem', action='store_true', help='pin memory for faster transfer to the GPU')
    add('--log-freq', type=at_least(1), default=10, metavar='N', help='batches between two lines of a log')
    add('--results-file', default='', metavar='FILE', help='write the results here')
    add('--results-format', default='csv', choices=('csv', 'json'), help='format of --results-file')
    add('--seed', type=at_least(0), default=42, metavar='N', help='random seed')
    # timm retries a single model only when it is told to; running out of memory is always worth another try
    add('--retry', action='store_true', help=argparse.SUPPRESS)
    for flag in UNSUPPORTED:
        add(f'--{flag}', nargs='*', default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    return parser


def parse_args(argv: Optional[List[str]] = None, prog: Optional[str] = None) -> argparse.Namespace:
    """The arguments of a validation, checked as far as that goes without its data and models."""
    parser = make_parser(prog)
    args = parser.parse_args(argv)
    refuse_unsupported(parser, args, UNSUPPORTED, 'validate.py')
    args.data_dir = args.data_dir or args.data
    if args.data_dir or not args.imagenet_c:
        check_folder(args.data_dir, args.dataset)
    check_corruption_flags(parser, args)
    args.device = resolve_device(args.device)
    return args


class Subject(NamedTuple):
    """A model to measure, on its device, and how to prepare its input."""
    model: nn.Module
    param_count: int
    data_config: Dict[str, Any]
    device: torch.device
    clips: bool  # it is measured on videos


def validate(args: argparse.Namespace) -> Dict[str, Any]:
    """Measure one model: `args` as parsed, with `model` one name or None and `checkpoint` one file or ''."""
    return measure(args, load(args))


def load(args: argparse.Namespace) -> Subject:
    """Make the model, and set what the arguments leave open."""
    checkpoint = None
    if args.checkpoint:
        with errors_of('--checkpoint', args.checkpoint):
            checkpoint = read_checkpoint(args.checkpoint, args.use_ema)
    args.model = args.model or (checkpoint and checkpoint.arch)
    if args.model is None:
        sys.exit(f'--model is needed: {args.checkpoint or "no --checkpoint"} does not say which model it is')
    if checkpoint is not None and args.model == checkpoint.arch:  # images as in training
        if args.img_size is None and args.input_size is None:
            args.input_size, args.img_size = checkpoint.args.get('input_size'), checkpoint.args.get('img_size')
        for key in ('in_chans', 'crop_pct', 'mean', 'std', 'interpolation'):
            if getattr(args, key) is None:
                setattr(args, key, checkpoint.args.get(key))
    device = torch.device(args.device)
    utils.random_seed(args.seed)
    if args.fast_norm:
        set_fast_norm()

    kwargs = dict(num_classes=args.num_classes, global_pool=args.gp, **resolve_input(args))
    with errors_of(*(('--checkpoint', args.checkpoint) if checkpoint else ('--model', args.model))):
        if checkpoint:
            model = rebuild(checkpoint, args.model, **kwargs)
        else:
            model = create_model(args.model, pretrained=True, **kwargs)
    param_count = sum(p.numel() for p in model.parameters())
    _logger.info(f'{args.model}: {param_count:,} parameters')
    data_config = resolve_data(args, model, use_test_size=not args.use_train_size)

    model.to(device)
    if args.channels_last:
        to_channels_last(model)
    if args.torchcompile:
        model = torch.compile(model, backend=args.torchcompile, mode=args.torchcompile_mode)

    clips = resolve_clips(args, model)
    if clips and args.clip_sampling == 'sparse':
        args.clip_windows = args.clip_windows or clip_args(model).get('clip_windows')
    return Subject(model, param_count, data_config, device, clips)


def measure(args: argparse.Namespace, subject: Subject, corrupt: Optional[Corrupt] = None) -> Dict[str, Any]:
    """A row of results, on data that are corrupted first."""
    model, param_count, data_config, device, clips = subject
    if clips:
        return validate_clips(args, model, param_count, data_config, device, corrupt)
    dataset = open_dataset(args, args.split, data_config['input_size'][0], num_samples=args.num_samples)
    loader = create_loader(
        dataset,
        input_size=data_config['input_size'],
        batch_size=args.batch_size,
        interpolation=data_config['interpolation'],
        mean=data_config['mean'],
        std=data_config['std'],
        crop_pct=data_config['crop_pct'],
        crop_mode=data_config['crop_mode'],
        crop_border_pixels=args.crop_border_pixels,
        num_workers=args.workers,
        persistent_workers=False,
        pin_memory=args.pin_mem,
        use_prefetcher=not args.no_prefetcher,
        distributed=args.distributed,
        device=device,
    )
    if corrupt is not None:
        insert_corruption(dataset, corrupt)
    metrics = evaluate(
        model,
        show_progress(loader, len(loader), args.model, args.log_freq),
        device,
        create_autocast(args),
        channels_last=args.channels_last,
        num_samples=len(range(args.rank, len(dataset), args.world_size)) if args.distributed else None,
        distributed=args.distributed,
    )
    return describe(args, param_count, data_config, metrics, interpolation=data_config['interpolation'])


def describe(
        args: argparse.Namespace,
        param_count: int,
        data_config: Dict[str, Any],
        metrics: Dict[str, Any],
        **kwargs,
) -> Dict[str, Any]:
    """A row of results, in timm's columns."""
    return dict(
        model=args.model,
        **({'checkpoint': args.checkpoint} if args.checkpoint else {}),
        top1=round(metrics['top1'], 4),
        top1_err=round(100 - metrics['top1'], 4),
        top5=round(metrics['top5'], 4),
        top5_err=round(100 - metrics['top5'], 4),
        loss=round(metrics['loss'], 6),
        param_count=round(param_count / 1e6, 2),
        img_size=data_config['input_size'][-1],
        crop_pct=data_config['crop_pct'],
        **kwargs,
    )


def validate_clips(
        args: argparse.Namespace,
        model: nn.Module,
        param_count: int,
        data_config: Dict[str, Any],
        device: torch.device,
        corrupt: Optional[Corrupt],
) -> Dict[str, Any]:
    """`measure` on videos."""
    reader = create_reader(args, args.split, known_classes(args, model))
    check_classes(reader, model.num_classes)
    loader = create_eval_loader(args, reader, data_config, device, args.batch_size)
    loader.dataset.corrupt = corrupt
    batches = show_progress(loader, len(loader), args.model, args.log_freq, 'clips')
    if args.channels_last:
        batches = ((channels_last(input), tags) for input, tags in batches)
    views = score_views(model, batches, device, create_autocast(args), args.batch_size, args.distributed)
    videos = score_videos(views, reader, by_name=args.merge_by == 'name')
    metrics = videos.metrics()
    if args.primary:
        if args.scores_file:
            videos.save(args.scores_file)
        for view, (top1, top5) in enumerate(zip(metrics['view_top1'], metrics['view_top5'])):
            clip, crop = divmod(view, loader.dataset.transform.crops or 1)
            _logger.info(f'Clip {clip}, crop {crop}: top-1 {top1:.3f}  top-5 {top5:.3f}')
        if metrics['missing']:
            _logger.warning(
                f'{metrics["missing"]} of {metrics["videos"]} videos could not be read and count as wrong; of the '
                f'others top-1 {metrics["top1_read"]:.3f}, top-5 {metrics["top5_read"]:.3f}')
    return describe(
        args, param_count, data_config, metrics,
        num_frames=args.num_frames,
        clip_sampling=args.clip_sampling,
        views=loader.dataset.num_views,
        top1_view=round(sum(metrics['view_top1']) / len(metrics['view_top1']), 4),
        top5_view=round(sum(metrics['view_top5']) / len(metrics['view_top5']), 4),
        videos=metrics['videos'],
        missing=metrics['missing'],
        top1_read=round(metrics['top1_read'], 4),
        top5_read=round(metrics['top5_read'], 4),
    )


def ran_out_of_memory(error: Exception) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def validate_within_memory(args: argparse.Namespace, validate: Callable = validate) -> Any:
    """`validate`, again with a smaller batch each time memory runs out."""
    batch_size = args.batch_size
    while True:
        try:
            return validate(argparse.Namespace(**{**vars(args), 'batch_size': batch_size}))
        except (RuntimeError, MemoryError) as e:
            smaller = utils.decay_batch_step(batch_size)
            if not (ran_out_of_memory(e) and smaller) or args.distributed:
                raise
            _logger.warning(f'Out of memory with batches of {batch_size}; trying {smaller}.')
            batch_size = smaller
        if args.device.startswith('cuda'):
            torch.cuda.empty_cache()  # here, where the error and with it the tensors of its frames are gone


def find_models(args: argparse.Namespace) -> List[Dict[str, str]]:
    """What to measure: a model or a checkpoint, or several of one of them."""
    if os.path.isdir(args.checkpoint):
        if args.model and len(args.model) > 1:
            sys.exit('--checkpoint with a folder goes with one --model')
        files = [f for kind in ('pth.tar', 'pth', 'safetensors') for f in glob.glob(f'{args.checkpoint}/*.{kind}')]
        if not files:
            sys.exit(f'--checkpoint {args.checkpoint}: no .pth.tar, .pth or .safetensors file in this folder')
        return [dict(model=args.model and args.model[0], checkpoint=f) for f in sorted(files, key=utils.natural_key)]
    if args.checkpoint and not os.path.isfile(args.checkpoint):
        sys.exit(f'--checkpoint {args.checkpoint}: no such file or folder')
    names = []
    for name in args.model or []:
        if os.path.isfile(name):
            with open(name) as f:
                names += f.read().split()
        elif parse_model_name(name)[0] or is_model(name):
            names.append(name)
        else:
            found = list_models(name, pretrained=True)
            if not found:
                sys.exit(f'--model {name}: no model of this name, and none with released weights that it matches')
            names += found
    if args.checkpoint and len(names) > 1:
        sys.exit('--checkpoint with a file goes with one --model')
    return [dict(model=name, checkpoint=args.checkpoint) for name in names or [None]]


def write_results(path: str, results: List[Dict[str, Any]], format: str) -> None:
    with open(path, 'w', newline='') as f:
        if format == 'json':
            json.dump(results, f, indent=4)
        else:
            write_rows(f, results)


def finish(args: argparse.Namespace, results: List[Dict[str, Any]]) -> List[Dict[str, Any]]:
    """End as timm's script ends, for the tools that read it there."""
    if args.primary:
        print(f'--result\n{json.dumps(results if len(results) > 1 else results[0], indent=4)}')
    if args.distributed:
        torch.distributed.destroy_process_group()
    return results


def validate_corrupted(args: argparse.Namespace, jobs: List[Dict[str, str]]) -> List[Dict[str, Any]]:
    """Measure models on corrupted data; returns a row of results for each model, corruption and severity."""
    try:
        args.results = read_results(args.results_file)
        for job in jobs:
            validate_within_memory(
                argparse.Namespace(**{**vars(args), **job}), lambda args: measure_corrupted(args, load, measure))
    except UsageError as e:
        sys.exit(str(e))
    return report(args)


def main(argv: Optional[List[str]] = None, prog: Optional[str] = None) -> List[Dict[str, Any]]:
    """Validate as the command line says; returns a row of results for each model, best first."""
    setup_logging()
    args = parse_args(argv, prog)
    args.device = str(utils.init_distributed_device(args))
    args.primary = utils.is_primary(args)
    setup_logging(args.primary)

    jobs = find_models(args)
    if args.scores_file and len(jobs) > 1:
        sys.exit(f'--scores-file: got {len(jobs)} models, needs one')
    if args.imagenet_c or args.corruptions:
        return finish(args, validate_corrupted(args, jobs))
    results, failed = [], []
    for job in jobs:
        try:
            results.append(validate_within_memory(argparse.Namespace(**{**vars(args), **job})))
        except Exception as e:
            if len(jobs) == 1:
                if isinstance(e, UsageError):
                    sys.exit(str(e))
                raise
            failed.append(dict(job, error=f'{type(e).__name__}: {e}'))
            _logger.error(f'{job}: {type(e).__name__}: {e}')
    results.sort(key=lambda r: r['top1'], reverse=True)
    results += failed
    for r in results:
        if 'error' not in r:
            _logger.info(f" * Acc@1 {r['top1']:.3f} Acc@5 {r['top5']:.3f}  {r.get('checkpoint') or r['model']}")
    if args.results_file and args.primary:
        write_results(args.results_file, results, args.results_format)
    finish(args, results)
    if failed:
        sys.exit(f'{len(failed)} of {len(jobs)} models failed')
    return results


if __name__ == '__main__':
    main()
