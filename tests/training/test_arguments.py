"""The flags of train.py and their YAML files."""
import re
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
import yaml

from timm_ssm.training import train
from timm_ssm.training.arguments import UNSUPPORTED, make_parser, parse_args, parse_config

TIMM_ARGS = Path(__file__).parents[1] / 'fixtures' / 'timm_args.yaml'


def write(tmp_path, **config):
    path = tmp_path / 'config.yaml'
    path.write_text(yaml.safe_dump(config))
    return str(path)


def error_of(capsys, function, *args):
    with pytest.raises(SystemExit) as error:
        function(*args)
    assert error.value.code  # not 0
    return capsys.readouterr().err if error.value.code == 2 else str(error.value)


def test_flags_and_defaults_are_those_of_timm():
    """Every flag that timm's script writes down is here or known to be left out, with timm's default."""
    timm_args = yaml.safe_load(TIMM_ARGS.read_text())
    given = (
        'aa', 'batch_size', 'device', 'epochs', 'img_size', 'in_chans', 'lr', 'mean', 'mixup', 'model', 'model_ema',
        'model_kwargs', 'num_classes', 'opt', 'reprob', 'std', 'warmup_epochs', 'workers')
    # that differ: timm leaves these empty and fills them in later
    filled = dict(eval_metric='top1', output='./output/train', smoothing=0.1, interpolation=None)
    parser = make_parser()
    left_out = {flag.replace('-', '_'): default for flag, default in UNSUPPORTED.items()}
    for key, value in timm_args.items():
        if key in left_out:
            assert left_out[key] == value, key
        elif key not in given:
            assert key in vars(parser.parse_args([])), key
            assert parser.get_default(key) == filled.get(key, value), key


def test_a_config_of_timm_trains(digits, tmp_path):
    train.main(['--config', str(TIMM_ARGS), '--data-dir', str(digits), '--output', str(tmp_path), '--experiment', 'a'])
    state = torch.load(tmp_path / 'a' / 'last.pth.tar', weights_only=True)
    assert state['args']['opt'] == 'adamw' and state['args']['reprob'] == 0.25 and 'state_dict_ema' in state
    assert state['optimizer']['param_groups'][0]['initial_lr'] == 3e-3

    # what the run wrote down starts the same run again
    train.main(['-c', str(tmp_path / 'a' / 'args.yaml'), '--experiment', 'b'])
    again = torch.load(tmp_path / 'b' / 'last.pth.tar', weights_only=True)
    assert all(torch.equal(state['state_dict'][k], again['state_dict'][k]) for k in state['state_dict'])


def test_values_from_the_file_and_the_command_line(tmp_path):
    config = dict(
        lr='3e-4', epochs='7', scale=[0.5, '1'], amp=True, model_ema=False, color_jitter=None, torchcompile='inductor',
        model_kwargs=dict(depth=3, name='a b', sizes=[1, 2]), data=str(tmp_path))
    path = write(tmp_path, **config, **{'weight-decay': 0.1})
    args = parse_args(['--config', path, '--epochs', '9', '--min-lr', '1e-6'])
    assert (args.lr, args.epochs, args.weight_decay, args.scale) == (3e-4, 9, 0.1, [0.5, 1.])
    assert args.amp and not args.model_ema and args.torchcompile == 'inductor'
    assert args.model_kwargs == dict(depth=3, name='a b', sizes=[1, 2]) and args.color_jitter is None
    assert args.data_dir == str(tmp_path) and args.min_lr == 1e-6


@pytest.mark.parametrize('config, message', [
    (dict(wieght_decay=0.1, no_such_thing=1), r'unknown keys: .*wieght_decay \(did you mean weight_decay\?\)'),
    (dict(wieght_decay=0.1, no_such_thing=1), 'no_such_thing'),
    (dict(lr='fast'), "argument --lr: invalid float value: 'fast'"),
    (dict(amp='maybe'), "--amp: ignored explicit argument 'maybe'"),
    (dict(mixup=True), "argument --mixup: invalid float value: 'True'"),
    (dict(amp_dtype='float8'), 'argument --amp-dtype: invalid choice'),
    (dict(input_size=224), 'argument --input-size: expected 3 arguments'),
    (dict(decay_milestones=[1, 'x']), "argument --decay-milestones: invalid int value: 'x'"),
    (dict(torchscript=True), '--torchscript: left out of this script.*python -m timm_ssm'),
    (dict(naflex_patch_sizes=[16, 32]), '--naflex-patch-sizes: left out'),
])
def test_mistakes_in_the_file(tmp_path, capsys, config, message):
    path = write(tmp_path, **config)
    error = error_of(capsys, parse_config, path)
    assert re.search(message, error) and path in error


def test_a_file_that_is_no_mapping(tmp_path, capsys):
    (tmp_path / 'list.yaml').write_text('- lr\n- 0.1\n')
    assert 'must hold a mapping' in error_of(capsys, parse_config, str(tmp_path / 'list.yaml'))
    assert 'nowhere.yaml' in error_of(capsys, parse_args, ['--config', 'nowhere.yaml'])


@pytest.mark.parametrize('flags, message', [
    (['--naflex-loader'], '--naflex-loader: left out of this script'),
    (['--local-rank=1'], '--local-rank: left out'),
    (['--sync-bn', '--device', 'cpu'], '--sync-bn: PyTorch synchronises batch norms on GPUs only, got --device cpu'),
    (['--aug-splits', '1'], '--aug-splits: got 1, needs 0 or at least 2'),
    (['--aug-splits', '2', '--mixup', '0.2'], 'neither with mixup and cutmix'),
    (['--jsd-loss'], 'needs --aug-splits'),
    (['--split-bn'], 'needs --aug-splits or --resplit'),
    (['--amp', '--model-dtype', 'bfloat16'], 'needs weights of float32, got --model-dtype bfloat16'),
    (['--sched', 'cosine_per_step', '--epochs', '4'], '--warmup-epochs: got 5, needs fewer than --epochs 4'),
    (['--layer-decay-mode', 'released'], 'needs --layer-decay'),
    (['--sched', 'none', '--layer-decay', '0.7'], 'the schedule that applies --layer-decay'),
    (['--resume', 'auto'], 'needs --experiment'),
    (['--mixup', '0.8', '--batch-size', '5'], 'mixup and cutmix need an even batch'),
    (['--aug-repeats', '3'], 'needs torchrun'),
    (['--device', 'cuda'], 'there is no CUDA device here'),
    (['--no-such-flag'], 'unrecognized arguments: --no-such-flag'),
])
def test_flags_that_make_no_sense(tmp_path, capsys, monkeypatch, flags, message):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    assert message in error_of(capsys, parse_args, [str(tmp_path), *flags])


def test_what_is_left_out_is_documented():
    document = Path(__file__).parents[2] / 'docs' / 'training.md'
    rows = document.read_text().partition('### Flags that are left out')[2].partition('## Recipes')[0].splitlines()
    named = [pattern for row in rows for pattern in re.findall(r'`--([^`]+)`', row[1:].partition(' |')[0])]
    for flag in UNSUPPORTED:
        assert any(fnmatch(flag, pattern) for pattern in named), flag
    for pattern in named:
        assert any(fnmatch(flag, pattern) for flag in UNSUPPORTED), pattern


def test_help(capsys):
    with pytest.raises(SystemExit):
        parse_args(['--help'])
    text = capsys.readouterr().out
    assert '--recovery-interval' in text and '(default: 300)' in text and 'naflex' not in text
