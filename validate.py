#!/usr/bin/env python3
"""Measure the accuracy of models on an image dataset.

    python validate.py DATA --model videomamba_tiny_patch16_224 --pretrained
    python validate.py DATA --model 'videomamba_*' vit_tiny_patch16_224      # names, wildcards, files of names
    python validate.py DATA --checkpoint output/train/run/model_best.pth.tar # the checkpoint says which model it is
    python validate.py DATA --checkpoint output/train/run                    # every checkpoint of a folder

DATA holds a folder of images for each class, or the splits of such a dataset; `--dataset` names any other timm reader.
The flags are those of timm's validate.py.
"""
import argparse
import csv
import glob
import json
import logging
import os
import sys
import time
from contextlib import nullcontext
from functools import partial
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm import utils
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.layers import set_fast_norm
from timm.models import create_model, get_pretrained_cfg, is_model, list_models, load_checkpoint, parse_model_name
from tqdm import tqdm

import timm_ssm  # noqa: F401  registers the models

_logger = logging.getLogger('validate')

# Flags of timm's validate.py that this script leaves out.
LEFT_OUT = (
    'torchscript', 'aot-autograd', 'fuser', 'reparam', 'test-pool', 'tf-preprocessing', 'num-gpu', 'model-dtype',
    'real-labels', 'valid-labels', 'metrics-avg', 'naflex-loader', 'naflex-max-seq-len', 'task', 'target-format',
    'multilabel-threshold',
)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        usage='%(prog)s [DATA] [--model NAME ...] [--checkpoint PATH] [flags]',
        description=__doc__.partition('\n')[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )

    group = parser.add_argument_group('Dataset')
    add = group.add_argument
    add('data', nargs='?', metavar='DATA', help='dataset folder or tar file (also as --data-dir)')
    add('--data-dir', metavar='DIR', help='dataset folder or tar file')
    add('--dataset', default='', metavar='NAME', help='reader and name, as hfds/NAME; empty for folders and tar files')
    add('--split', default='validation', metavar='NAME', help='dataset split')
    add('--num-samples', type=int, metavar='N', help='number of images, for iterable datasets that do not know it')
    add('--dataset-download', action='store_true', help='download torch/ and tfds/ datasets')
    add('--dataset-trust-remote-code', action='store_true', help='let a Hugging Face dataset run its own code')
    add('--class-map', default='', metavar='FILE', help='text file that maps class names to indices')
    add('--input-img-mode', metavar='MODE', help='PIL mode of the images (default: RGB for 3 channels, else L)')
    add('--input-key', metavar='KEY', help='dataset key of the images')
    add('--target-key', metavar='KEY', help='dataset key of the labels')

    group = parser.add_argument_group('Model', 'What is not given is taken from the checkpoint, then from the model.')
    add = group.add_argument
    add('--model', '-m', nargs='+', metavar='NAME', help='model names, wildcards, or a text file with a name a line')
    add('--pretrained', action='store_true', help='load the released weights (the default without --checkpoint)')
    add('--checkpoint', default='', metavar='PATH', help='a checkpoint, or a folder of checkpoints')
    add('--use-ema', action='store_true', help='use the averaged weights of the checkpoint')
    add('--num-classes', type=int, metavar='N', help='number of classes')
    add('--img-size', type=int, metavar='N', help='image size')
    add('--in-chans', type=int, metavar='N', help='image channels')
    add('--input-size', nargs=3, type=int, metavar='N', help='image size as channels height width')
    add('--use-train-size', action='store_true', help="the cfg's training size even where it has a test size")
    add('--crop-pct', type=float, metavar='PCT', help='size of the centre crop over that of the resized image')
    add('--crop-mode', metavar='MODE', help='squash, border or center')
    add('--crop-border-pixels', type=int, metavar='N', help='pixels to cut off every border first')
    add('--mean', type=float, nargs='+', metavar='MEAN', help='mean to normalise with')
    add('--std', type=float, nargs='+', metavar='STD', help='standard deviation to normalise with')
    add('--interpolation', metavar='NAME', help='bilinear, bicubic, ...')
    add('--gp', metavar='POOL', help='global pooling')
    add('--model-kwargs', nargs='*', action=utils.ParseKwargs, metavar='K=V', help="the model's constructor arguments")

    group = parser.add_argument_group('Running')
    add = group.add_argument
    add('-b', '--batch-size', type=int, default=256, metavar='N', help='batch size; halved while memory runs out')
    add('-j', '--workers', type=int, default=4, metavar='N', help='data loading processes')
    add('--device', metavar='DEV', help='device (default: cuda where there is one, else cpu)')
    add('--amp', action='store_true', help='run in mixed precision')
    add('--amp-dtype', default='float16', choices=('float16', 'bfloat16'), help='lower precision of --amp')
    add('--channels-last', action='store_true', help='channels-last memory layout')
    add('--fast-norm', action='store_true', help="timm's fast normalisation layers")
    add('--torchcompile', nargs='?', const='inductor', metavar='BACKEND', help='torch.compile the model')
    add('--torchcompile-mode', metavar='MODE', help='mode of torch.compile')
    add('--no-prefetcher', action='store_true', help='normalise images in the loading processes')
    add('--pin-mem', action='store_true', help='pin memory for faster transfer to the GPU')
    add('--log-freq', type=int, default=10, metavar='N', help='batches between two lines of a log')
    add('--results-file', default='', metavar='FILE', help='write the results here')
    add('--results-format', default='csv', choices=('csv', 'json'), help='format of --results-file')
    add('--seed', type=int, default=42, metavar='N', help='random seed')
    # timm retries a single model only when it is told to; running out of memory is always worth another try
    add('--retry', action='store_true', help=argparse.SUPPRESS)
    for flag in LEFT_OUT:
        add(f'--{flag}', nargs='*', default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    return parser


def refuse_left_out(parser: argparse.ArgumentParser, args: argparse.Namespace, flags: Iterable[str]) -> None:
    """End with an error if a flag of timm's script was given that ours leaves out."""
    given = [f'--{flag}' for flag in flags if hasattr(args, flag.replace('-', '_'))]
    if given:
        parser.error(
            f"{', '.join(given)}: left out of this script. timm's script of the same name has it, and runs with these "
            f'models as `python -m timm_ssm /path/to/timm/{os.path.basename(sys.argv[0])} ...`')


def resolve_device(name: Optional[str]) -> str:
    if name is None:
        return 'cuda' if torch.cuda.is_available() else 'cpu'
    if name.startswith('cuda') and not torch.cuda.is_available():
        sys.exit(f'--device {name}: there is no CUDA device here; use --device cpu')
    return name


def resolve_input(args: argparse.Namespace) -> Dict[str, Any]:
    """Constructor arguments that give the model the image size and channels asked for.

    Size and channels may be asked for by `--input-size`, by `--img-size` and `--in-chans`, or in `--model-kwargs`. The
    first two only set the size of the images in timm; a model built for one size needs to know it too, and the images
    need to know the size in `--model-kwargs`. On return `args.input_size`, `img_size` and `in_chans` agree with it.
    """
    kwargs = dict(args.model_kwargs)
    if args.input_size:
        in_chans, *size = args.input_size
    else:
        in_chans, size = args.in_chans or kwargs.get('in_chans'), args.img_size or kwargs.get('img_size')
        size = [size, size] if isinstance(size, int) else size
    if in_chans:
        kwargs['in_chans'] = args.in_chans = in_chans
    if size:
        args.input_size = [in_chans or 3, *size]
        source, name = parse_model_name(args.model)
        cfg = None if source or not is_model(name) else get_pretrained_cfg(args.model, allow_unregistered=True)
        if cfg is not None and cfg.fixed_input_size:
            kwargs.setdefault('img_size', tuple(size))
    return kwargs


def resolve_data(args: argparse.Namespace, model: nn.Module, **kwargs) -> Dict[str, Any]:
    """How to prepare images: timm's data config, with a mean and a deviation for each channel that there is."""
    config = resolve_data_config(vars(args), model=model, **kwargs)
    in_chans = config['input_size'][0]
    for key in ('mean', 'std'):
        values = config[key]
        config[key] = tuple(values) if len(values) == in_chans else (sum(values) / len(values),) * in_chans
    _logger.info('Images: ' + ', '.join(f'{k} {v}' for k, v in config.items()))
    return config


def check_folder(path: Optional[str], dataset: str) -> None:
    if not dataset and not (path and os.path.exists(path)):
        sys.exit(
            f'no dataset at {path!r}: give a folder with one folder of images per class, a tar file of the same, or '
            f'another reader with --dataset')


def show_progress(batches: Iterable, num_batches: int, title: str, log_interval: int) -> Iterator:
    """Pass batches on, with a progress bar on a terminal and a line every `log_interval` batches elsewhere."""
    if sys.stderr.isatty():
        yield from tqdm(batches, total=num_batches, desc=title, leave=False, unit='batch')
        return
    images, start = 0, time.perf_counter()
    for i, batch in enumerate(batches, 1):
        yield batch
        images += len(batch[1])
        if i % log_interval == 0 or i == num_batches:
            _logger.info(f'{title} [{i:>4d}/{num_batches}]  {images / (time.perf_counter() - start):.1f} img/s')


def evaluate(
        model: nn.Module,
        loader: Iterable,
        device: torch.device,
        autocast: Callable = nullcontext,
        channels_last: bool = False,
        num_samples: Optional[int] = None,
        distributed: bool = False,
) -> Dict[str, float]:
    """Mean cross-entropy and accuracy of a model.

    Args:
        model: Returns logits (batch, num_classes); left in eval mode.
        loader: Yields images (batch, channels, height, width) and class indices (batch,).
        device: Where the model is.
        autocast: Makes the context to run the model in.
        channels_last: Give the model channels-last images.
        num_samples: Images to count. A distributed sampler pads the share of each process with images of others; they
            run through the model, to keep the processes in step, but do not count.
        distributed: Sum over the processes of the default group.

    Returns:
        `loss`, and `top1` and `top5` in percent; with fewer than 5 classes top5 is 100.
    """
    model.eval()
    dtype = torch.float32 if device.type == 'mps' else torch.float64
    seen, totals = 0, torch.zeros(3, dtype=dtype, device=device)  # loss, top-1 hits, top-5 hits
    with torch.inference_mode():
        for input, target in loader:
            input, target = input.to(device), target.to(device)
            if channels_last:
                input = input.contiguous(memory_format=torch.channels_last)
            with autocast():
                output = model(input)
            if num_samples is not None:
                output, target = output[:num_samples - seen], target[:num_samples - seen]
            seen += len(target)
            hits = output.topk(min(5, output.shape[1]), dim=1).indices == target[:, None]
            loss = F.cross_entropy(output.float(), target, reduction='sum')
            totals += torch.stack([loss, hits[:, :1].sum(), hits.sum()])
    totals = torch.cat([totals, totals.new_tensor([seen])])
    if distributed:
        torch.distributed.all_reduce(totals)
    loss, top1, top5, count = totals.tolist()
    if not count:
        raise ValueError('there is no image to evaluate on')
    return dict(loss=loss / count, top1=100 * top1 / count, top5=100 * top5 / count)


def checkpoint_args(path: str) -> Dict[str, Any]:
    """The arguments of train.py or timm's train.py that a checkpoint was written under; none for other files."""
    if not path.endswith(('.pth.tar', '.pth', '.pt')):
        return {}
    with torch.serialization.safe_globals([argparse.Namespace]):
        checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    args = checkpoint.get('args') or {}
    return vars(args) if isinstance(args, argparse.Namespace) else args


def validate(args: argparse.Namespace) -> Dict[str, Any]:
    """Measure one model: `args` as parsed, with `model` one name or None and `checkpoint` one file or ''."""
    trained = checkpoint_args(args.checkpoint) if args.checkpoint else {}
    if args.model is None:
        args.model = trained.get('model')
    if args.model is None:
        sys.exit(f'--model is needed: {args.checkpoint or "no --checkpoint"} does not say which model it is')
    if args.model == trained.get('model'):
        if args.img_size is None and args.input_size is None:
            args.input_size = trained.get('input_size')
            args.img_size = trained.get('img_size')
        for key in ('num_classes', 'in_chans', 'crop_pct', 'mean', 'std', 'interpolation', 'gp', 'model_kwargs'):
            if getattr(args, key) is None:
                setattr(args, key, trained.get(key))
    args.model_kwargs = args.model_kwargs or {}
    device = torch.device(args.device)
    utils.random_seed(args.seed)
    if args.fast_norm:
        set_fast_norm()

    model = create_model(
        args.model,
        pretrained=args.pretrained or not args.checkpoint,
        num_classes=args.num_classes,
        global_pool=args.gp,
        **resolve_input(args),
    )
    if args.checkpoint:
        load_checkpoint(model, args.checkpoint, use_ema=args.use_ema)
    param_count = sum(p.numel() for p in model.parameters())
    _logger.info(f'{args.model}: {param_count:,} parameters')
    data_config = resolve_data(args, model, use_test_size=not args.use_train_size)

    model.to(device)
    if args.channels_last:
        model.to(memory_format=torch.channels_last)
    if args.torchcompile:
        model = torch.compile(model, backend=args.torchcompile, mode=args.torchcompile_mode)
    autocast = nullcontext
    if args.amp:
        autocast = partial(torch.autocast, device_type=device.type, dtype=getattr(torch, args.amp_dtype))

    dataset = create_dataset(
        args.dataset,
        root=args.data_dir,
        split=args.split,
        download=args.dataset_download,
        class_map=args.class_map,
        num_samples=args.num_samples,
        input_key=args.input_key,
        input_img_mode=args.input_img_mode or ('RGB' if data_config['input_size'][0] == 3 else 'L'),
        target_key=args.target_key,
        trust_remote_code=args.dataset_trust_remote_code,
    )
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
        device=device,
    )
    metrics = evaluate(
        model,
        show_progress(loader, len(loader), args.model, args.log_freq),
        device,
        autocast,
        channels_last=args.channels_last,
    )
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
        interpolation=data_config['interpolation'],
    )


def ran_out_of_memory(error: Exception) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def validate_with_less(args: argparse.Namespace) -> Dict[str, Any]:
    """`validate`, again with a smaller batch each time memory runs out."""
    batch_size = args.batch_size
    while True:
        try:
            return validate(argparse.Namespace(**{**vars(args), 'batch_size': batch_size}))
        except (RuntimeError, MemoryError) as e:
            smaller = utils.decay_batch_step(batch_size)
            if not (ran_out_of_memory(e) and smaller):
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
            writer = csv.DictWriter(f, fieldnames=list(dict.fromkeys(key for r in results for key in r)))
            writer.writeheader()
            writer.writerows(results)


def main(argv: Optional[List[str]] = None) -> List[Dict[str, Any]]:
    """Run the script; returns a row of results for each model, best first."""
    logging.basicConfig(level=logging.INFO, format='%(message)s')
    logging.getLogger('httpx').setLevel(logging.WARNING)  # the Hub's client
    parser = make_parser()
    args = parser.parse_args(argv)
    refuse_left_out(parser, args, LEFT_OUT)
    args.data_dir = args.data_dir or args.data
    check_folder(args.data_dir, args.dataset)
    args.device = resolve_device(args.device)

    jobs = find_models(args)
    results, failed = [], []
    for job in jobs:
        try:
            results.append(validate_with_less(argparse.Namespace(**{**vars(args), **job})))
        except Exception as e:
            if len(jobs) == 1:
                raise
            failed.append(dict(job, error=f'{type(e).__name__}: {e}'))
            _logger.error(f'{job}: {type(e).__name__}: {e}')
    results.sort(key=lambda r: r['top1'], reverse=True)
    results += failed
    for r in results:
        if 'error' not in r:
            _logger.info(f" * Acc@1 {r['top1']:.3f} Acc@5 {r['top5']:.3f}  {r.get('checkpoint') or r['model']}")
    if args.results_file:
        write_results(args.results_file, results, args.results_format)
    # as timm's script ends, for the tools that read it there
    print(f'--result\n{json.dumps(results if len(jobs) > 1 else results[0], indent=4)}')
    if failed:
        sys.exit(f'{len(failed)} of {len(jobs)} models failed')
    return results


if __name__ == '__main__':
    main()
