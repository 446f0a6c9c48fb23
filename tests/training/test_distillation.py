"""Distillation: the alignment of tokens, and DeiT's hard distillation for models of two heads."""
import json
import os
import subprocess

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models import save_for_hf
from timm.task import TokenDistillationTask
from torch import nn

from timm_ssm.training.tasks import TeacherTokens, TokenAlignmentTask

from .utils import BUSY, MODEL, ROOT, VIDEOMAMBA, assert_same_run, crash_at_step, load, run, summary, torchrun

STUDENT = dict(embed_dim=16, depth=2, patch_size=4, img_size=8, in_chans=1, num_classes=10)
TEACHER = dict(STUDENT, embed_dim=24, depth=1)
CLIPS = dict(embed_dim=16, depth=1, num_frames=2, img_size=32, num_classes=3)
VIT = dict(img_size=8, in_chans=1, num_classes=10, embed_dim=16, depth=1, num_heads=1, patch_size=4)
GROUPMAMBA = dict(stem_dim=8, embed_dims=(8, 8, 8, 8), depths=(1, 1, 1, 1))
AMP = ['--amp', '--amp-dtype', 'bfloat16']
ALIGNED = [*VIDEOMAMBA, '--kd-distill-type', 'alignment']
HARD = [
    '--model', 'groupmamba_tiny', '--model-kwargs', *(f'{k}={v}' for k, v in GROUPMAMBA.items()), '--img-size', '8',
    '--kd-distill-type', 'token', '--kd-token-distill-type', 'hard', '--task-loss-weight', '0.5']


def videomamba(**kwargs):
    return timm.create_model('videomamba_tiny_patch16_224', **kwargs)


def save_teacher(path, model, **kwargs):
    model.pretrained_cfg.update(mean=(0.3,), std=(0.7,))
    save_for_hf(model, str(path), model_args=kwargs)
    return f'local-dir:{path}'


@pytest.fixture
def teacher(tmp_path):
    """VideoMamba of another width and depth, which takes larger images of another normalisation."""
    kwargs = dict(TEACHER, img_size=12)
    return save_teacher(tmp_path / 'teacher', videomamba(**kwargs), **kwargs)


@pytest.fixture
def vit_teacher(tmp_path):
    """A model of another kind and normalisation."""
    return save_teacher(tmp_path / 'vit_teacher', timm.create_model('vit_tiny_patch16_224', **VIT), **VIT)


def assert_resumes(digits, tmp_path, monkeypatch, task, epochs, *flags):
    """A run that crashes within its last epoch and goes on is that which does not; returns the folders of both."""
    flags = [*BUSY, '--epochs', epochs, *flags]
    whole = run(digits, tmp_path / 'a', *flags)
    assert float(summary(whole)[-1]['train_loss']) > 0
    crash_at_step(monkeypatch, 10 * epochs - 7, task)
    with pytest.raises(RuntimeError, match='power cut'):
        run(digits, tmp_path / 'b', *flags, '--resume', 'auto', '--recovery-interval', 1)
    monkeypatch.undo()
    parts = run(digits, tmp_path / 'b', *flags, '--resume', 'auto')
    assert_same_run(whole, parts)
    return whole, parts


class TestTokenAlignment:

    @pytest.mark.parametrize('name, student, teacher, shape', [
        ('videomamba_tiny_patch16_224', STUDENT, TEACHER, (2, 1, 8, 8)),
        ('videomamba_tiny_patch16_f8_224', CLIPS, dict(CLIPS, embed_dim=24), (2, 3, 2, 32, 32)),
    ])
    def test_loss(self, name, student, teacher, shape):
        torch.manual_seed(0)
        student, teacher = (timm.create_model(name, **kwargs).eval() for kwargs in (student, teacher))
        mean, std = torch.full((shape[1],), 0.3), torch.full((shape[1],), 0.7)
        student.pretrained_cfg.update(mean=[0.5] * shape[1], std=[0.25] * shape[1])
        teacher.pretrained_cfg.update(mean=mean.tolist(), std=std.tolist())
        task = TokenAlignmentTask(student, teacher, criterion=nn.CrossEntropyLoss(), verbose=False).eval()
        if len(shape) == 5:
            for module, key in ((task, 'student_mean'), (task, 'student_std'), (task.teacher, 'mean_kd'),
                                (task.teacher, 'std_kd')):
                setattr(module, key, getattr(module, key).unsqueeze(2))
        x, target = torch.randn(shape), torch.tensor([0, 1])
        found = task(x, target)
        tokens = task.trainable_module.projection(student.forward_features(x))
        view = (1, -1) + (1,) * (len(shape) - 2)
        wanted = teacher.forward_features((x * 0.25 + 0.5 - mean.view(view)) / std.view(view))
        assert tokens.shape == wanted.shape
        tokens, wanted = (t / t.norm(dim=-1, keepdim=True) for t in (tokens, wanted))
        distance = (tokens - wanted).square().sum(-1).mean()  # of unit vectors: 2 - 2 cos
        expected = F.cross_entropy(student(x), target) + distance
        assert torch.allclose(found['loss'], expected, rtol=1e-5)
        found['loss'].backward()
        assert all(p.grad is None for p in teacher.parameters())
        assert all(p.grad is not None for p in task.trainable_module.parameters())

    def test_other_sizes_meet_at_the_students_positions(self):
        """A token of the student is compared with the teacher's at its place: a gradient in the image says which."""
        teacher = videomamba(**dict(TEACHER, img_size=16)).eval()
        teacher.forward_features = lambda x: torch.cat(  # each token is the mean of its patch
            [x.new_zeros(len(x), 1, 1), F.avg_pool2d(x, 4).flatten(2).transpose(1, 2)], dim=1)
        tokens = TeacherTokens(teacher, videomamba(**STUDENT))
        ramp = torch.arange(8.).view(1, 1, 8, 1).expand(1, 1, 8, 8)
        assert torch.allclose(tokens.forward_features(ramp).flatten(), torch.tensor([0, 1.5, 1.5, 5.5, 5.5]), atol=.3)

    @pytest.mark.parametrize('name, kwargs, message', [
        ('mambavision_tiny', {}, 'a MambaVision has no tokens'),
        ('videomamba_tiny_patch16_f8_224', dict(embed_dim=16, depth=1), 'takes 8 frames and has 1 .*, needs 1'),
    ])
    def test_teachers_that_do_not_fit(self, name, kwargs, message):
        with pytest.raises(ValueError, match=message):
            TeacherTokens(timm.create_model(name, device='meta', **kwargs), videomamba(**STUDENT))

    def test_compiled(self):
        x, target = torch.randn(4, 1, 8, 8), torch.arange(4)
        task = TokenAlignmentTask(
            videomamba(**STUDENT), videomamba(**dict(TEACHER, img_size=12)), criterion=nn.CrossEntropyLoss())
        expected = task(x, target)['loss']
        task.compile(backend='eager')
        assert torch.allclose(task(x, target)['loss'], expected, rtol=1e-5)
        assert task.get_eval_model()(x).shape == (4, 10)

    @pytest.mark.parametrize('flags', [
        [], AMP, pytest.param([*AMP, '--torchcompile', 'aot_eager'], marks=pytest.mark.slow)],
        ids=['float32', 'bfloat16', 'compiled'])
    def test_resumes_bit_for_bit(self, digits, tmp_path, monkeypatch, teacher, flags):
        whole, parts = assert_resumes(
            digits, tmp_path, monkeypatch, TokenAlignmentTask, 2, *ALIGNED, '--kd-model-name', teacher, *flags)
        states = [load(folder / 'last.pth.tar') for folder in (whole, parts)]
        for key in ('task_state', 'task_state_ema'):
            one, other = (state[key]['projection'] for state in states)
            assert one.keys() == {'0.weight', '1.weight', '1.bias'}
            assert all(torch.equal(one[k], other[k]) for k in one)
        assert states[0]['state_dict'].keys() == videomamba(**STUDENT).state_dict().keys()

    def test_distributed(self):
        """Under DDP the gradients are those without; every parameter has its part in the loss."""
        torch.manual_seed(0)
        student, teacher = videomamba(**STUDENT), videomamba(**TEACHER)
        x, target = torch.randn(4, 1, 8, 8), torch.arange(4)
        grads = []
        torch.distributed.init_process_group('gloo', store=torch.distributed.HashStore(), rank=0, world_size=1)
        try:
            for distributed in (False, True):
                torch.manual_seed(1)
                task = TokenAlignmentTask(student, teacher, criterion=nn.CrossEntropyLoss(), verbose=False)
                if distributed:
                    task.prepare_distributed()
                for _ in range(2):  # DDP complains the second time of what got no gradient
                    student.zero_grad()
                    task(x, target)['loss'].backward()
                grads.append([p.grad.clone() for p in student.parameters()])
        finally:
            torch.distributed.destroy_process_group()
        assert all(torch.equal(a, b) for a, b in zip(*grads))


class TestHardDistillation:

    def test_loss(self):
        """Half of it the labels', half that of the teacher's classes, which sees images of its own normalisation."""
        torch.manual_seed(0)
        student = timm.create_model('groupmamba_tiny', in_chans=1, num_classes=10, distillation=True, **GROUPMAMBA)
        teacher = timm.create_model('vit_tiny_patch16_224', **VIT).eval()
        student.pretrained_cfg.update(mean=[0.5], std=[0.25])
        teacher.pretrained_cfg.update(mean=[0.3], std=[0.7])
        task = TokenDistillationTask(
            student, teacher, criterion=nn.CrossEntropyLoss(), distill_type='hard', task_loss_weight=0.5,
            verbose=False).train()
        x, target = torch.randn(8, 1, 8, 8), torch.arange(8)
        classes = teacher((x * 0.25 + 0.5 - 0.3) / 0.7).argmax(1)
        assert not torch.equal(classes, teacher(x).argmax(1))
        one, other = student(x)
        expected = (F.cross_entropy(one, target) + F.cross_entropy(other, classes)) / 2
        assert torch.allclose(task(x, target)['loss'], expected, rtol=1e-5)

    @pytest.mark.parametrize('flags', [
        [], pytest.param(AMP, marks=pytest.mark.slow),
        pytest.param(['--torchcompile', 'aot_eager'], marks=pytest.mark.slow)], ids=['float32', 'bfloat16', 'compiled'])
    def test_groupmamba_learns_from_any_teacher(self, digits, tmp_path, monkeypatch, vit_teacher, flags):
        assert_resumes(
            digits, tmp_path, monkeypatch, TokenDistillationTask, 1, *HARD, '--kd-model-name', vit_teacher, *flags)

    def test_a_model_of_one_head_is_refused(self, digits, tmp_path, teacher):
        with pytest.raises(SystemExit, match=r"--kd-model-name .*set_distilled_training"):
            run(digits, tmp_path, *MODEL, '--kd-model-name', teacher, '--kd-distill-type', 'token')


# Run by torchrun in each of two processes, with a list of flags for each kind of distillation.
WORKER = '''
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from timm.task import TokenDistillationTask

from tests.training import utils
from timm_ssm.training.tasks import TokenAlignmentTask

digits, tmp_path = map(Path, sys.argv[1:3])
torch.set_num_threads(1)
# one process group for all the runs below: the store of torchrun takes no second one
init = torch.distributed.init_process_group
torch.distributed.init_process_group = lambda **kwargs: torch.distributed.is_initialized() or init(**kwargs)
torch.distributed.destroy_process_group = lambda: None
for name, flags in json.loads(sys.argv[3]).items():
    flags = [*utils.BUSY, '--epochs', '2', '--recovery-interval', '1', '--resume', 'auto', *flags]
    folder = utils.run(digits, tmp_path / name / 'whole', *flags)
    task = TokenAlignmentTask if 'alignment' in flags else TokenDistillationTask
    with pytest.MonkeyPatch.context() as monkeypatch:
        utils.crash_at_step(monkeypatch, 7, task)
        with pytest.raises(RuntimeError, match='power cut'):
            utils.run(digits, tmp_path / name / 'parts', *flags)
    seen, forward = {}, task.forward
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(task, 'forward', lambda self, *args: seen.update(task=self) or forward(self, *args))
        utils.run(digits, tmp_path / name / 'parts', *flags)
    torch.save(seen['task'].trainable_module.state_dict(), tmp_path / name / f'rank{os.environ["RANK"]}.pth')
'''


@pytest.mark.slow
@pytest.mark.parametrize('flags', [ALIGNED, HARD], ids=['alignment', 'hard'])
def test_two_processes(digits, tmp_path, request, flags):
    """In float32, and compiled in mixed precision: resumed bit for bit, and the processes agree."""
    flags = [*flags, '--kd-model-name', request.getfixturevalue('teacher' if flags is ALIGNED else 'vit_teacher')]
    kinds = dict(float32=flags, compiled=[*flags, *AMP, '--torchcompile', 'aot_eager'])
    (tmp_path / 'worker.py').write_text(WORKER)
    subprocess.run(
        [*torchrun(), str(tmp_path / 'worker.py'), str(digits), str(tmp_path), json.dumps(kinds)],
        env={**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}, check=True, timeout=900)
    for name in kinds:
        assert_same_run(tmp_path / name / 'whole' / 'run', tmp_path / name / 'parts' / 'run')
        one, other = (load(tmp_path / name / f'rank{rank}.pth') for rank in (0, 1))
        parameters = {k for k in one if 'running_' not in k and 'num_batches' not in k}  # each counts its own
        assert all(torch.equal(one[k], other[k]) for k in parameters)
