"""The model that the arguments of training or validation describe."""
import argparse
import logging
import os
from pathlib import Path
from typing import Any, Dict

import torch
from timm.layers import convert_splitbn_model, convert_sync_batchnorm, set_fast_norm
from timm.models import get_pretrained_cfg, is_model, parse_model_name
from torch import nn

from ..hub.checkpoints import create_model
from ..models._checkpoints import Checkpoint, CheckpointError, frames_in_name, load_weights, read_checkpoint
from .arguments import errors_of
from .sizes import check_model

_logger = logging.getLogger(__name__)


def resolve_input(args: argparse.Namespace) -> Dict[str, Any]:
    """Constructor arguments that give the model the image size, channels and frames asked for.

    Size and channels may be asked for by `--input-size`, by `--img-size` and `--in-chans`, or in `--model-kwargs`. The
    first two only set the size of the images in timm; a model built for one size needs to know it too, and the images
    need to know the size in `--model-kwargs`. On return `args.input_size`, `img_size` and `in_chans` agree with it.
    """
    kwargs = dict(args.model_kwargs or {})
    if args.num_frames is not None and (args.num_frames, frames_in_name(args.model)) != (1, 1):
        kwargs['num_frames'] = args.num_frames
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


def model_dtype(args: argparse.Namespace) -> torch.dtype:
    """Type of the weights and of what the model is given."""
    return getattr(torch, args.model_dtype or 'float32')


def to_channels_last(model: nn.Module) -> None:
    """Put the weights of a model of images or clips into the channels-last memory layout."""
    clips = any(p.ndim == 5 for p in model.parameters())
    model.to(memory_format=torch.channels_last_3d if clips else torch.channels_last)


def load_initial(model: nn.Module, source: str) -> None:
    """Load a checkpoint, pretrained tag or 'hf-hub:owner/name' into a finished model; that of images into clips too."""
    with errors_of('--initial-checkpoint', source):
        if os.path.exists(source):
            checkpoint = read_checkpoint(source)
        elif parse_model_name(source)[0] or is_model(source):
            checkpoint = Checkpoint(create_model(source, pretrained=True).state_dict(), Path(source))
        else:
            raise CheckpointError(f'{source}: no such file, and no model of this name')
        try:
            load_weights(model, checkpoint)
        except CheckpointError as e:
            raise CheckpointError(f'{e}; --pretrained-path gives the model a new head') from e


def build_model(args: argparse.Namespace, device: torch.device, load_weights: bool = True) -> nn.Module:
    """The model to train, with the weights asked for unless a resumed run has its own; sets `args.num_classes`.

    Raises:
        UsageError: There is no such model, or not with these arguments or weights.
    """
    if args.fast_norm:
        set_fast_norm()
    overlay = dict(args.pretrained_cfg_overlay)
    if args.pretrained_path:
        overlay.update(file=args.pretrained_path, num_classes=-1)  # -1: fit the head
    with errors_of('--model', args.model):
        model = create_model(
            args.model,
            pretrained=load_weights and bool(args.pretrained or args.pretrained_path),
            pretrained_cfg_overlay=overlay or None,
            num_classes=args.num_classes,
            global_pool=args.gp,
            drop_rate=args.drop,
            drop_path_rate=args.drop_connect if args.drop_path is None else args.drop_path,
            drop_block_rate=args.drop_block,
            bn_momentum=args.bn_momentum,
            bn_eps=args.bn_eps,
            **resolve_input(args),
        )
    if load_weights and args.initial_checkpoint:
        load_initial(model, args.initial_checkpoint)
    if args.train_img_sizes:
        with errors_of('--train-img-sizes', args.train_img_sizes):
            check_model(args, model)
    args.num_classes = model.num_classes
    with torch.no_grad():
        if args.head_init_scale is not None:
            for p in model.get_classifier().parameters():
                p.mul_(args.head_init_scale)
        if args.head_init_bias is not None:
            model.get_classifier().bias.fill_(args.head_init_bias)
    if args.grad_checkpointing:
        model.set_grad_checkpointing()
    if args.split_bn:
        model = convert_splitbn_model(model, max(args.aug_splits, 2))
    model.to(device, model_dtype(args))
    if args.channels_last and not args.fsdp:  # whose shards are contiguous
        to_channels_last(model)
    if args.distributed and args.sync_bn:
        model = convert_sync_batchnorm(model)
    _logger.info(f'{args.model}: {sum(p.numel() for p in model.parameters()):,} parameters')
    return model
