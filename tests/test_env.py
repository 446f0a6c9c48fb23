"""`python -m timm_ssm.env`, and the warning before a slow path."""
import warnings

import pytest
import torch

from timm_ssm import env
from timm_ssm.data.decode import DECODERS
from timm_ssm.ops import backends, selective_scan

from .ops.utils import scan_inputs


def test_env_names_versions_and_every_backend(capsys):
    env.main()
    out = capsys.readouterr().out
    assert torch.__version__ in out
    lines = [line.split() for line in out.splitlines()]
    for name in (*backends.BACKENDS, *DECODERS):
        assert any(line[:1] == [name] and line[1].startswith(('available', 'not')) for line in lines), name


def test_env_says_why_torchcodec_does_not_decode(capsys, monkeypatch):
    monkeypatch.setattr(env, 'why_unavailable', {'pyav': None, 'torchcodec': 'Could not load libtorchcodec'}.get)
    env.main()
    lines = capsys.readouterr().out.splitlines()
    assert 'torchcodec     not available: Could not load libtorchcodec' in lines
    assert 'pyav           available: decodes the test clip' in lines


def test_slow_path_warns_once(monkeypatch):
    monkeypatch.setattr(backends, 'FORCED', '')
    monkeypatch.setattr(backends, 'PREFERENCE', {'cpu': ('mamba_ssm', 'eager')})
    monkeypatch.setattr(backends, '_warned', False)
    inputs = scan_inputs(length=3)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        selective_scan(**inputs)  # small
        monkeypatch.setattr(backends, 'SLOW', 1)
        selective_scan(**inputs, backend='naive')  # asked for
    with pytest.warns(UserWarning, match=r'(?s)slow.*mamba_ssm: .*timm_ssm.env'):
        selective_scan(**inputs)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        selective_scan(**inputs)  # once is enough
