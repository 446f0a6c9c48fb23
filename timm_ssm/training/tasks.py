"""Training tasks: timm's tasks and their losses, and the alignment of tokens."""
import argparse
from typing import Any, Dict, Tuple, Union

import torch
import torch.nn.functional as F
from timm import utils
from timm.layers import RmsNorm
from timm.loss import BinaryCrossEntropy, JsdCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.task import (
    ClassificationTask,
    DistillationTeacher,
    FeatureDistillationTask,
    LogitDistillationTask,
    TokenDistillationTask,
    TrainingTask,
)
from timm.task.distillation import FeatureDistillationTrainableModule
from torch import nn

from ..zoo.registry import num_frames
from .arguments import errors_of, uses_soft_targets


class JensenShannon(JsdCrossEntropy):
    """timm's, of float32; it calls no hooks."""

    def __call__(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return super().__call__(output.float(), target)


def create_loss(args: argparse.Namespace) -> nn.Module:
    """The loss on logits, in float32 whatever the model runs in.

    Mixup and cutmix make soft targets, with the label smoothing in them already.
    """
    if args.jsd_loss:
        loss = JensenShannon(args.aug_splits, smoothing=args.smoothing)
    elif args.bce_loss or args.loss == 'bce':
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


class TeacherTokens(nn.Module):
    """A teacher whose features are all its final tokens, at the positions of a student's.

    Images or clips are resized to the teacher's size, and its tokens, but for the class token, resampled to the
    student's grid, where these differ. Both are models of tokens, as ViT, Vim or VideoMamba, with as many class tokens
    and frames.
    """

    def __init__(self, teacher: nn.Module, student: nn.Module):
        super().__init__()
        for name, model in dict(teacher=teacher, student=student).items():
            if not (hasattr(model, 'num_prefix_tokens') and hasattr(model, 'patch_embed')):
                raise ValueError(f'{name}: a {type(model).__name__} has no tokens to align, needs one like VideoMamba')
        frames, prefix = ([get(m) for m in (teacher, student)] for get in (num_frames, lambda m: m.num_prefix_tokens))
        if frames[0] != frames[1] or prefix[0] != prefix[1]:
            raise ValueError(
                f'teacher: takes {frames[0]} frames and has {prefix[0]} class tokens, needs {frames[1]} and '
                f'{prefix[1]}')
        self.model = teacher
        self.pretrained_cfg = teacher.pretrained_cfg
        self.num_features = teacher.num_features
        self.num_prefix_tokens = teacher.num_prefix_tokens
        self.size = tuple(teacher.patch_embed.img_size)
        self.grid, self.student_grid = (tuple(m.patch_embed.grid_size[-2:]) for m in (teacher, student))

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens (B, 1 + T H W, C)."""
        if x.shape[-2:] != self.size:
            images = x if x.ndim == 4 else x.transpose(1, 2).flatten(0, 1)
            images = F.interpolate(images, self.size, mode='bilinear', antialias=True)
            x = images if x.ndim == 4 else images.unflatten(0, (len(x), -1)).transpose(1, 2)
        x = self.model.forward_features(x)
        if self.grid == self.student_grid:
            return x
        prefix, tokens = x.tensor_split([self.num_prefix_tokens], dim=1)
        batch_size, _, dim = tokens.shape
        maps = tokens.reshape(-1, *self.grid, dim).permute(0, 3, 1, 2)
        maps = F.interpolate(maps.float(), self.student_grid, mode='bilinear').to(x.dtype)
        return torch.cat([prefix, maps.permute(0, 2, 3, 1).reshape(batch_size, -1, dim)], dim=1)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = True) -> torch.Tensor:
        return x


class TokenAlignmentModule(FeatureDistillationTrainableModule):
    """A student, and what turns its final tokens into a teacher's."""

    def forward(self, input: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        tokens = self.student.forward_features(input)
        return self.student.forward_head(tokens), self.projection(tokens)


class TokenAlignmentTask(FeatureDistillationTask):
    """VideoMamba's self-distillation: a frozen, smaller model of the family teaches a larger one its final tokens.

    The loss is that of the labels plus the mean over all tokens of 2 - 2 cos(student's, teacher's), the student's after
    an RMSNorm and a linear layer to the teacher's width. Arguments are those of FeatureDistillationTask.
    """

    def __init__(self, student_model: nn.Module, teacher_model: Union[str, nn.Module], **kwargs: Any):
        device, dtype = kwargs.get('device'), kwargs.get('dtype')
        if isinstance(teacher_model, str):
            teacher_model = DistillationTeacher(
                teacher_model, student_model.num_classes, student_model.in_chans, device=device, dtype=dtype).model
        teacher = DistillationTeacher(TeacherTokens(teacher_model, student_model), device=device, dtype=dtype)
        super().__init__(student_model, teacher, student_feature_dim=1, teacher_feature_dim=1, **kwargs)
        dim = student_model.num_features
        self.trainable_module = TokenAlignmentModule(student_model, nn.Sequential(
            RmsNorm(dim), nn.Linear(dim, teacher.model.num_features)).to(self.device, self.dtype))

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> Dict[str, torch.Tensor]:
        logits, tokens = self.trainable_module(input)
        with torch.no_grad():
            input = self.teacher.normalize_input(input, self.student_mean, self.student_std)
            wanted = self.teacher(input, return_features=True)
        task_loss = self.criterion(logits, target)
        kd_loss = (2 - 2 * F.cosine_similarity(tokens.float(), wanted.float(), dim=-1)).mean()
        loss = self.task_loss_weight * task_loss + self.distill_loss_weight * kd_loss
        return dict(loss=loss, output=logits, task_loss=task_loss, kd_loss=kd_loss)


def create_task(args: argparse.Namespace, model: nn.Module, device: torch.device) -> TrainingTask:
    """Classification of the labels, or also distillation from the outputs, features or tokens of a teacher.

    The task has the average of the weights too, if there is to be one.
    """
    with errors_of('--kd-model-name', args.kd_model_name):
        task = _create_task(args, model, device)
    if args.num_frames not in (None, 1):
        for name, buffer in list(task.named_buffers()):
            # by these timm normalises what a teacher sees; of a clip (B, C, T, H, W), as they are, the wrong axis
            owner, _, kind = name.rpartition('.')
            if kind in ('mean_kd', 'std_kd', 'student_mean', 'student_std'):
                setattr(task.get_submodule(owner), kind, buffer.unsqueeze(2))
    if args.model_ema:
        task.setup_ema(
            decay=args.model_ema_decay,
            use_warmup=args.model_ema_warmup,
            device='cpu' if args.model_ema_force_cpu else None,
        )
    return task


def _create_task(args: argparse.Namespace, model: nn.Module, device: torch.device) -> TrainingTask:
    dtype = next(model.parameters()).dtype
    kwargs = dict(criterion=create_loss(args).to(device), device=device, dtype=dtype, verbose=utils.is_primary(args))
    if args.kd_model_name is None:
        return ClassificationTask(model, **kwargs)
    kwargs.update(distill_loss_weight=args.distill_loss_weight, task_loss_weight=args.task_loss_weight)
    if args.kd_distill_type == 'alignment':
        return TokenAlignmentTask(model, args.kd_model_name, **kwargs)
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
    if args.distributed and not args.fsdp:
        buffers = dict(broadcast_buffers=False) if args.no_ddp_bb else {}
        task.prepare_distributed(device_ids=[device] if device.type == 'cuda' else None, **buffers)
    return eval_model
