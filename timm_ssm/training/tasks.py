"""What is learned: timm's tasks and their losses."""
import argparse

import torch
from timm import utils
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.task import (
    ClassificationTask,
    FeatureDistillationTask,
    LogitDistillationTask,
    TokenDistillationTask,
    TrainingTask,
)
from torch import nn

from .arguments import uses_soft_targets


def create_loss(args: argparse.Namespace) -> nn.Module:
    """The loss on logits, in float32 whatever the model runs in.

    Mixup and cutmix make soft targets, with the label smoothing in them already.
    """
    if args.bce_loss or args.loss == 'bce':
        loss = BinaryCrossEntropy(
            smoothing=0. if uses_soft_targets(args) else args.smoothing,
            target_threshold=args.bce_target_thresh,
            sum_classes=args.bce_sum,
            pos_weight=args.bce_pos_weight,
        )
    elif uses_soft_targets(args):
        loss = SoftTargetCrossEntropy()
    else:
        loss = LabelSmoothingCrossEntropy(smoothing=args.smoothing) if args.smoothing else nn.CrossEntropyLoss()
    # on the CPU, unlike on CUDA, autocast does not see to this
    loss.register_forward_pre_hook(lambda module, inputs: (inputs[0].float(), *inputs[1:]))
    return loss


def create_task(args: argparse.Namespace, model: nn.Module, device: torch.device) -> TrainingTask:
    """Classification of the labels, or also distillation from the outputs, features or tokens of a teacher."""
    task = _create_task(args, model, device)
    if args.num_frames not in (None, 1):
        for name, buffer in list(task.named_buffers()):
            # by these timm normalises what a teacher sees; of a clip (B, C, T, H, W), as they are, the wrong axis
            owner, _, kind = name.rpartition('.')
            if kind in ('mean_kd', 'std_kd', 'student_mean', 'student_std'):
                setattr(task.get_submodule(owner), kind, buffer.unsqueeze(2))
    return task


def _create_task(args: argparse.Namespace, model: nn.Module, device: torch.device) -> TrainingTask:
    kwargs = dict(criterion=create_loss(args).to(device), device=device, verbose=utils.is_primary(args))
    if args.kd_model_name is None:
        return ClassificationTask(model, **kwargs)
    kwargs.update(distill_loss_weight=args.distill_loss_weight, task_loss_weight=args.task_loss_weight)
    if args.kd_distill_type == 'feature':
        dims = dict(student_feature_dim=args.kd_student_feature_dim, teacher_feature_dim=args.kd_teacher_feature_dim)
        return FeatureDistillationTask(model, args.kd_model_name, **dims, **kwargs)
    kwargs.update(temperature=args.kd_temperature)
    if args.kd_distill_type == 'token':
        return TokenDistillationTask(model, args.kd_model_name, distill_type=args.kd_token_distill_type, **kwargs)
    return LogitDistillationTask(model, args.kd_model_name, loss_type=args.kd_loss_type, **kwargs)


def wrap_task(args: argparse.Namespace, task: TrainingTask, device: torch.device) -> nn.Module:
    """Compile and distribute what the task runs, once optimiser and average hold the parameters themselves.

    Returns:
        The model to validate, which is not distributed.
    """
    if args.torchcompile:
        task.compile(backend=args.torchcompile, mode=args.torchcompile_mode)
        task.compile_ema(backend=args.torchcompile, mode=args.torchcompile_mode)
    eval_model = task.get_eval_model()
    if args.distributed:
        buffers = dict(broadcast_buffers=False) if args.no_ddp_bb else {}
        task.prepare_distributed(device_ids=[device] if device.type == 'cuda' else None, **buffers)
    return eval_model
