"""`export` and `timm-ssm export`: files run as what wrote them does, or are not kept."""
import re
from pathlib import Path

import pytest
import timm
import torch

from timm_ssm.cli import main, parser
from timm_ssm.export import export, writer

from ..hub.test_cli import save_model

onnxruntime = pytest.importorskip('onnxruntime')
pytest.importorskip('onnxscript')
DOC = (Path(__file__).parents[2] / 'docs' / 'export.md').read_text(encoding='utf-8')


def small(name='videomamba_tiny_patch16_224', **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, **{**dict(depth=1, embed_dim=48, img_size=32, num_classes=5), **kwargs}).eval()


def run_onnx(path, x):
    return torch.from_numpy(onnxruntime.InferenceSession(path).run(['output'], {'input': x.numpy()})[0])


def test_command_writes_onnx_of_a_folder(tmp_path, capsys):
    """Of any batch and size, beginning at another size than the model's own."""
    model = save_model(tmp_path / 'model', num_classes=7)
    path = tmp_path / 'model.onnx'
    assert main(['export', str(tmp_path / 'model'), str(path), '--img-size', '48', '--dynamic-size']) == 0
    out = capsys.readouterr().out
    assert re.fullmatch(
        rf'{path}: \d\.\d MB, \d+ operators\n'
        r'run on inputs of 1×3×48×48 and 3×3×48×48 and 3×3×64×80: outputs equal to \S+ of the largest\n', out), out
    model.set_input_size(48)
    model.set_input_size(dynamic_img_size=True)
    for shape in ((2, 3, 48, 48), (1, 3, 32, 64)):
        x = torch.randn(shape)
        torch.testing.assert_close(run_onnx(path, x), model(x), rtol=1e-3, atol=1e-4)


def test_command_writes_torch_export_of_a_folder(tmp_path):
    model = save_model(tmp_path / 'model', num_classes=7)
    assert main(['export', str(tmp_path / 'model'), str(tmp_path / 'model.pt2'), '--batch-size', '2']) == 0
    program = torch.export.load(tmp_path / 'model.pt2')
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(program.module()(x), model(x))
    assert any(node.target is torch.ops.timm_ssm.selective_scan.default for node in program.graph.nodes)


def test_plain_operators(tmp_path):
    """With scan='doubling' a program needs nothing of this package."""
    model, x = small(), torch.randn(4, 3, 32, 32)
    export(model, tmp_path / 'model.pt2', scan='doubling')
    program = torch.export.load(tmp_path / 'model.pt2')
    assert not any('timm_ssm' in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_onnx_of_plain_operators(tmp_path):
    onnx = pytest.importorskip('onnx')
    model, x = small(), torch.randn(4, 3, 32, 32)
    done = export(model, tmp_path / 'model.onnx', scan='doubling')
    assert {'Scan', 'Loop'}.isdisjoint(node.op_type for node in onnx.load(done.path).graph.node)
    torch.testing.assert_close(run_onnx(done.path, x), model(x), rtol=1e-3, atol=1e-4)


def test_documentation(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = dict(timm=timm, images=torch.randn(2, 3, 32, 64).numpy())
    for snippet in re.findall(r'```python\n(.*?)```', DOC, re.DOTALL):
        exec(snippet.replace('_224\',', '_224\', depth=1, embed_dim=48, img_size=32,'), names)
    assert names['logits'].shape == (2, 1000)
    commands = re.findall(r'^timm-ssm (export .*)$', DOC, re.MULTILINE)
    assert len(commands) == 4 and all(parser().parse_args(command.split()).file for command in commands)


@pytest.mark.slow  # compiles for a minute
@pytest.mark.parametrize('scan', writer.SCANS['aoti'])
def test_aoti(tmp_path, scan):
    model, x = small(), torch.randn(4, 3, 32, 32)
    export(model, tmp_path / 'model.pt2', format='aoti', scan=scan)
    run = torch._inductor.aoti_load_package(str(tmp_path / 'model.pt2'))
    torch.testing.assert_close(run(x), model(x), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_operators_of_the_full_size(tmp_path):
    done = export(timm.create_model('videomamba_tiny_patch16_224').eval(), tmp_path / 'model.onnx')
    assert done.nodes <= 2000


def test_a_file_that_computes_something_else_is_not_kept(tmp_path, monkeypatch):
    path = tmp_path / 'model.pt2'
    path.write_text('what was there')
    load = writer._RUNNERS['torch']
    monkeypatch.setitem(writer._RUNNERS, 'torch', lambda file: lambda x: load(file)(x) * 1.01)
    with pytest.raises(RuntimeError, match="the file's outputs differ from the model's by 0.01 of the largest"):
        export(small(), path)
    assert path.read_text() == 'what was there' and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize('change, message', [
    (dict(path='model.pt'), "^path: got '.*model.pt', needs the suffix .onnx or .pt2$"),
    (dict(path='model.onnx', format='torch'), "^path: got '.*model.onnx', needs the suffix .pt2 for format 'torch'$"),
    (dict(path='none/model.onnx'), "^path: there is no folder '.*none'$"),
    (dict(format='tensorrt'), "^format: got 'tensorrt', needs one of 'onnx', 'torch', 'aoti'$"),
    (dict(scan='op'), "^scan: got 'op', needs 'loop' or 'doubling' for format 'onnx'$"),
    (dict(train=True), '^model: got one in training mode, needs model.eval'),
    (dict(dtype=torch.bfloat16), '^model: got parameters of torch.bfloat16, needs torch.float32 for ONNX$'),
    (dict(dynamic_size=True), r'^dynamic_size: the model takes one size, needs model.set_input_size\('),
])
def test_errors(tmp_path, change, message):
    change = dict(change)
    model, path = small(dtype=change.pop('dtype', None)), tmp_path / change.pop('path', 'model.onnx')
    model.train(change.pop('train', False))
    with pytest.raises(ValueError, match=message):
        export(model, path, **change)
    assert not any(tmp_path.iterdir())
