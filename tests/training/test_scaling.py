"""Training steps on paper."""
import pytest

from timm_ssm import cli
from timm_ssm.training.scaling import Counts, Hardware, plan_step

MODEL = Counts(params=10 ** 9, macs=1e12, activations=10 ** 9, blocks=9)
HARDWARE = Hardware(
    tflops=100., utilisation=0.5, memory_gbs=1000., link_gbs=100., network_gbs=10., latency_us=1000., gpus_per_node=4)


def test_formulas():
    """Numbers worked out by hand from docs/scaling.md."""
    one = plan_step(MODEL, HARDWARE, gpus=1, samples=5)
    assert one.compute == pytest.approx(6 * 1e12 * 5 / 50e12) and one.communication == 0
    assert one.traffic == pytest.approx((2 * 5 + 28) / 1000) and one.memory == (16 + 5) * 10 ** 9
    assert one.seconds(True) == one.seconds(False) == one.compute

    # two nodes of four: 8 GB over three quarters of the links, then half of a quarter over the network
    ddp = plan_step(MODEL, HARDWARE, gpus=8, samples=5)
    buckets = 153  # 4 GB in 25 MiB
    assert ddp.communication == pytest.approx(8 * .75 / 100 + 8 * .5 / 4 / 10 + buckets * 3 * 1e-3)
    assert ddp.memory == one.memory and ddp.seconds(False) == ddp.compute + ddp.communication

    fsdp = plan_step(MODEL, HARDWARE, gpus=8, samples=5, fsdp=True)
    assert fsdp.communication == pytest.approx(8 * .75 / 100 + 8 * .5 / 4 / 10 + 3 * 10 * 3 * 1e-3)
    assert fsdp.memory == (2 + 5) * 10 ** 9


def test_command(capsys):
    assert cli.main(['plan', 'vit_tiny_patch16_224', '--gpus', '1', '16', '--batch-size', '4096', '--fsdp']) == 0
    out = capsys.readouterr().out
    for text in ('on paper, not measured: 5.7 M parameters, 1.', '12 blocks', 'FSDP', '65536', 'Too large'):
        assert text in out, (text, out)
    with pytest.raises(SystemExit):
        cli.main(['plan', 'vit_tiny_patch16_224', '--tflops', '0'])
    assert '--tflops: got 0, needs more than 0' in capsys.readouterr().err
