"""--fsdp against DistributedDataParallel, on two processes."""
import pytest
import torch
from safetensors.torch import load_file

from timm_ssm.hub.convert import convert
from timm_ssm.training.arguments import parse_args

from .utils import VIDEOMAMBA, assert_same_run, load, run, run_worker, tensors

WORKER = '''
from pathlib import Path

import pytest
import torch

from tests.training import utils
from timm_ssm.training import train

digits, tmp_path = map(Path, utils.begin_worker())


def run(name, *flags):
    train.main([
        str(digits), *utils.MODEL, *utils.VIDEOMAMBA, *utils.PLAIN, '--batch-size', '8', '--opt', 'adamw',
        '--lr', '1e-3', '--epochs', '2', '--output', str(tmp_path), '--experiment', name, *flags])


'''


def launch(digits, tmp_path, script):
    """Run the end of a script in two processes."""
    done = run_worker(WORKER + script, tmp_path, digits, tmp_path)
    assert done.returncode == 0, done.stderr[-5000:]


def assert_close(a, b, **tolerance):
    """Two runs have the same weights, averages and moments up to rounding."""
    a, b = (load(folder / 'last.pth.tar') for folder in (a, b))
    for key in ('state_dict', 'state_dict_ema', 'optimizer'):
        assert (key in a) == (key in b)
        pairs = list(zip(tensors(a.get(key)), tensors(b.get(key)), strict=True))
        for x, y in pairs:
            assert x.dtype == y.dtype
            torch.testing.assert_close(x, y, **tolerance)
    assert a['optimizer']['param_groups'] == b['optimizer']['param_groups']


def test_fsdp(digits, tmp_path):
    """20 steps end as with DistributedDataParallel; a crashed run goes on bit for bit; its files are the usual ones."""
    launch(digits, tmp_path, '''
flags = ['--model-ema', '--model-ema-decay', '0.9', '--clip-grad', '1', '--drop-path', '0.2']
run('ddp', *flags)
flags += ['--fsdp', '--recovery-interval', '1', '--resume', 'auto']
run('fsdp', *flags, '--monitor', '--monitor-interval', '5')
with pytest.MonkeyPatch.context() as monkeypatch:
    utils.crash_at_step(monkeypatch, 14)
    with pytest.raises(RuntimeError, match='power cut'):
        run('parts', *flags)
run('parts', *flags)
''')
    assert_close(tmp_path / 'ddp', tmp_path / 'fsdp', atol=1e-6, rtol=1e-5)
    assert_same_run(tmp_path / 'fsdp', tmp_path / 'parts')
    rows = (tmp_path / 'fsdp' / 'monitor.csv').read_text().splitlines()
    assert len(rows) == 1 + 4 and ',,' not in rows[1]

    # and it goes on without shards, in one process
    resumed = run(
        digits, tmp_path / 'one', *VIDEOMAMBA, '--opt', 'adamw', '--lr', '1e-3', '--epochs', 2,
        '--resume', tmp_path / 'fsdp' / 'checkpoint-0.pth.tar')
    assert load(resumed / 'last.pth.tar')['epoch'] == 1

    done = convert(str(tmp_path / 'fsdp' / 'last.pth.tar'), str(tmp_path / 'converted'))
    assert done.parameters
    weights = load_file(tmp_path / 'converted' / 'model.safetensors')
    averaged = load(tmp_path / 'fsdp' / 'last.pth.tar')['state_dict_ema']
    assert weights.keys() == averaged.keys() and all(torch.equal(weights[k], averaged[k]) for k in weights)


FLAGS = {
    'amp': ['--amp', '--amp-dtype', 'bfloat16'],
    'scaled': ['--amp', '--amp-dtype', 'float16', '--clip-grad', '1'],
    'accumulated': ['--grad-accum-steps', '3'],
    'recomputed': ['--grad-checkpointing', '--clip-grad', '0.1', '--clip-mode', 'value'],
    'partly': ['--activation-budget', '0.00014'],
    'wholly': ['--activation-budget', '0.0001'],
    'amp-partly': ['--amp', '--amp-dtype', 'bfloat16', '--activation-budget', '0.00011'],
    'lamb': ['--opt', 'lamb'],
    'stateless': ['--opt', 'momentum', '--momentum', '0', '--layer-decay', '0.7'],
}


@pytest.mark.slow
def test_everything_else_of_a_run(digits, tmp_path):
    """Mixed precision, accumulation, clipping, recomputing blocks and other optimisers, as without shards."""
    launch(digits, tmp_path, f'''
for name, flags in {FLAGS}.items():
    run(name, *flags, '--epochs', '1')
    run(name + '-fsdp', *flags, '--epochs', '1', '--fsdp')
run('stateless-fsdp', *flags, '--epochs', '1', '--fsdp', '--resume', 'auto')
''')
    for name in FLAGS:
        loose = dict(atol=2e-3, rtol=0.1) if name in ('amp', 'scaled', 'amp-partly') else dict(atol=1e-5, rtol=1e-4)
        assert_close(tmp_path / name, tmp_path / f'{name}-fsdp', **loose)


@pytest.mark.slow
def test_families(digits, tmp_path):
    """Every family runs sharded, with its matrices in lower precision too, and has the gradients of the whole model."""
    launch(digits, tmp_path, '''
import copy
from types import SimpleNamespace

import timm
from timm.task import ClassificationTask
from torch.distributed.tensor import DTensor

from timm_ssm.training.sharding import shard
from timm_ssm.training.processes import setup_process

args = SimpleNamespace(device='cpu', amp=False, amp_dtype='bfloat16')
setup_process(args)
small = {
    'videomamba_tiny_patch16_224': dict(embed_dim=32, depth=2, img_size=32),
    'vim_tiny_patch16_224': dict(embed_dim=32, depth=2, img_size=32),
    'videomambapro_tiny_patch16_224': dict(embed_dim=32, depth=2, img_size=32),
    'stablemamba_tiny_patch16_224': dict(embed_dim=32, img_size=32),
    'mambavision_tiny': dict(embed_dim=16, stem_dim=8, depths=(1, 1, 2, 2), img_size=32),
    'groupmamba_tiny': dict(), 'vmamba_tiny': dict(), 'spatialmamba_tiny': dict(),
    'vit_tiny_patch16_224': dict(img_size=32),
}
for name, kwargs in small.items():
    names = timm.list_models(name + '*')
    torch.manual_seed(0)
    whole = timm.create_model(name if name in names else names[0], num_classes=4, **kwargs).eval()
    input = torch.randn(2, 3, 32, 32)
    whole(input).square().sum().backward()
    for args.amp in (False, True):
        model = copy.deepcopy(whole)
        model.zero_grad()
        shard(args, ClassificationTask(model, verbose=False))
        with torch.autocast('cpu', torch.bfloat16, enabled=args.amp):
            model(input).float().square().sum().backward()
        for (key, p), q in zip(model.named_parameters(), whole.parameters(), strict=True):
            if q.grad is None:
                continue
            assert isinstance(p.grad, DTensor) and p.grad.dtype == torch.float32, key
            found, scale = p.grad.full_tensor(), q.grad.abs().max()
            assert (found - q.grad).abs().max() <= (0.2 if args.amp else 1e-4) * scale, (name, key, args.amp)
''')


@pytest.mark.parametrize('flags, message', [
    ([], '--fsdp: got one process, needs several by torchrun'),
    (['--torchcompile'], '--torchcompile: does not go with --fsdp'),
    (['--clip-grad', '1', '--clip-mode', 'agc'], '--clip-mode agc: does not go with --fsdp'),
    (['--model-ema', '--model-ema-force-cpu'], '--model-ema-force-cpu: does not go with --fsdp'),
    (['--kd-model-name', 'test_vit', '--kd-distill-type', 'alignment'], '--kd-distill-type alignment: trains a projec'),
])
def test_what_does_not_go_with_it(digits, capsys, flags, message):
    with pytest.raises(SystemExit):
        parse_args([str(digits), '--fsdp', *flags])
    assert message in capsys.readouterr().err

