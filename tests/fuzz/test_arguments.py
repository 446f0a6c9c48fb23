"""Command lines and YAML files at random: each gives arguments, or one clear error."""
import argparse
import math
import random

import pytest
import yaml

from timm_ssm.training import arguments, validate

WORDS = [
    '', '0', '1', '-1', '3', '1e-3', '-0.5', '1e999', 'nan', 'inf', '-', '--', 'true', 'False', 'None', 'null', 'adamw',
    'cosine', 'auto', 'cpu', 'a=1', 'a=', '=1', 'a=b=c', 'a=[1,', "a='", 'ünïcode', '日本', 'two words', '{}', '[1, 2]',
    '../x', '/', '*', '%s', '%(prog)s', '\\', '\n', 'x' * 300, '99999999999999999999',
]


def flags_of(parser):
    return [action for action in parser._actions if action.option_strings and action.dest != 'help']


def random_word(rng):
    return rng.choice(WORDS) if rng.random() < 0.8 else str(rng.uniform(-10, 10))


def random_line(rng, parser, data):
    """A folder, and flags that exist with values that often fit."""
    line = [data] if rng.random() < 0.9 else []
    for action in rng.sample(flags_of(parser), rng.randrange(6)):
        line.append(rng.choice(action.option_strings))
        if action.nargs != 0 and rng.random() < 0.95:
            count = {None: 1, 2: 2, 3: 3}.get(action.nargs, rng.randrange(4))
            count = rng.randrange(5) if rng.random() < 0.1 else count
            choices = list(action.choices or ()) or [str(action.default)]
            line += [str(rng.choice(choices)) if rng.random() < 0.3 else random_word(rng) for _ in range(count)]
    if rng.random() < 0.1:
        line.append(random_word(rng))
    return line


def random_value(rng, depth=0):
    """What YAML may hold."""
    kind = rng.randrange(9 if depth < 3 else 6)
    if kind < 6:
        return rng.choice([
            None, True, False, rng.randrange(-3, 300), rng.uniform(-1, 1), math.inf, math.nan, 10 ** 30, b'bytes',
            random_word(rng), '2020-01-01'])
    if kind == 6:
        return [random_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {rng.choice(['depth', 'a b', 1, None, True]): random_value(rng, depth + 1) for _ in range(rng.randrange(3))}


def assert_clear(capsys, function, *args):
    """Arguments come back, or the program ends with one message, and not a traceback."""
    try:
        return function(*args)
    except SystemExit as e:
        printed = capsys.readouterr()
        message = printed.err if e.code == 2 else e.code
        assert isinstance(message, str) and message.strip(), args
        assert 'Traceback' not in message and message.count('error:') == (e.code == 2), message
    except BaseException as e:
        raise AssertionError(f'{args}: {type(e).__name__}: {e}') from e
    finally:
        capsys.readouterr()


@pytest.mark.parametrize('module', [arguments, validate], ids=['train', 'validate'])
def test_command_line(cases, capsys, tmp_path, module):
    parsed = total = 0
    for rng in cases(150):
        line = random_line(rng, module.make_parser(), str(tmp_path))
        args = assert_clear(capsys, module.parse_args, line)
        assert args is None or isinstance(args, argparse.Namespace)
        parsed, total = parsed + (args is not None), total + 1
    assert total < 100 or parsed > 10  # else the lines are too odd to test anything


def test_yaml(cases, capsys, tmp_path):
    names = [action.option_strings[-1][2:] for action in flags_of(arguments.make_parser())]
    path = tmp_path / 'config.yaml'
    for rng in cases(100):
        config = {rng.choice(names).replace('-', rng.choice('-_')): random_value(rng) for _ in range(rng.randrange(6))}
        if rng.random() < 0.1:
            config[random_value(rng, 3)] = random_value(rng)
        if rng.random() < 0.1:
            config = random_value(rng)
        text = yaml.dump(config, allow_unicode=rng.random() < 0.5).encode()
        if rng.random() < 0.2:
            text = broken(rng, text)
        path.write_bytes(text)
        assert_clear(capsys, arguments.parse_args, [str(tmp_path), '--config', str(path)])


def broken(rng: random.Random, text: bytes) -> bytes:
    text = bytearray(text)
    for _ in range(rng.randrange(1, 4)):
        text[rng.randrange(len(text))] = rng.choice(b'{}[]:&*!|>%@`"\'\x00\xff\t\n- ')
    return bytes(text)
