"""Every family through every exporter: the table of docs/export.md, whose cells are these tests."""
import re
from pathlib import Path

import pytest
import timm
import torch
from timm.layers import set_exportable

import timm_ssm
from timm_ssm.export import export

DOC = (Path(__file__).parents[2] / 'docs' / 'export.md').read_text(encoding='utf-8')
ISOTROPIC = dict(embed_dim=48, depth=2, img_size=32)
#: A small model of each family, and the size of its input.
FAMILIES = {
    'videomamba': ('videomamba_tiny_patch16_224', ISOTROPIC, (3, 32, 32)),
    'videomamba, clips': ('videomamba_tiny_patch16_f8_224', ISOTROPIC, (3, 8, 32, 32)),
    'vim': ('vim_tiny_patch16_224', ISOTROPIC, (3, 32, 32)),
    'videomambapro': ('videomambapro_tiny_patch16_224', ISOTROPIC, (3, 32, 32)),
    'stablemamba': ('stablemamba_tiny_patch16_224', ISOTROPIC, (3, 32, 32)),
    'stvideomamba': ('stvideomamba_tiny_patch16_f16_224', dict(ISOTROPIC, num_frames=4), (3, 4, 32, 32)),
    'mambavision': (
        'mambavision_tiny', dict(stem_dim=8, embed_dim=16, depths=(1, 1, 3, 2), num_heads=(1, 1, 2, 4), img_size=64),
        (3, 64, 64)),
    'groupmamba': (
        'groupmamba_tiny', dict(stem_dim=8, embed_dims=(16, 32, 48, 64), depths=(1, 1, 1, 1)), (3, 64, 64)),
    'vmamba': ('vmamba_tiny', dict(embed_dims=(16, 24, 32, 48), depths=(1, 1, 2, 1)), (3, 64, 64)),
    'spatialmamba': ('spatialmamba_tiny', dict(embed_dim=8, depths=(1, 1, 2, 1)), (3, 64, 64)),
}


def build(family):
    name, kwargs, input_size = FAMILIES[family]
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=5, **kwargs).eval(), input_size


def torch_export(strict):
    def run(model, x, folder):
        batch = ({0: torch.export.Dim('batch')},)
        return torch.export.export(model, (x,), dynamic_shapes=batch, strict=strict).module()
    return run


def exported(file, **kwargs):
    """`export` itself runs the file and compares."""
    def run(model, x, folder):
        export(model, folder / file, input_size=x.shape[1:], **kwargs)
    return run


def onnx_of_any_size(model, x, folder):
    """`export` compares on a size of its own, which is not square, too."""
    if hasattr(model, 'dynamic_img_size'):
        model.set_input_size(dynamic_img_size=True)
    export(model, folder / 'model.onnx', input_size=x.shape[1:], dynamic_size=True)


def openvino(model, x, folder):
    """Whose release 2026.4 does not compile ONNX's Scan."""
    openvino = pytest.importorskip('openvino')
    export(model, folder / 'model.onnx', input_size=x.shape[1:], scan='doubling')
    compiled = openvino.Core().compile_model(folder / 'model.onnx', 'CPU')
    return lambda x: torch.from_numpy(compiled(x.numpy())[0])


def trace(model, x, folder):
    torch.jit.trace(model, x).save(folder / 'model.pt')
    return torch.jit.load(folder / 'model.pt')


def plain_program(model, x):
    """What converters take that know PyTorch's operators alone, as `--scan doubling` writes it, of one batch size."""
    with set_exportable(True):
        return torch.export.export(model, (x,))


def executorch(model, x, folder):
    """With its portable kernels."""
    exir = pytest.importorskip('executorch.exir')
    from executorch.runtime import Runtime

    program = exir.to_edge_transform_and_lower(plain_program(model, x)).to_executorch()
    (folder / 'model.pte').write_bytes(program.buffer)
    method = Runtime.get().load_program(folder / 'model.pte').load_method('forward')
    torch.testing.assert_close(method.execute([x])[0], model(x), rtol=1e-3, atol=1e-4)


def coreml(model, x, folder):
    """Converts; runs on Apple's systems only."""
    coremltools = pytest.importorskip('coremltools')
    program = plain_program(model, x).run_decompositions({})
    coremltools.convert(program, skip_model_load=True).save(folder / 'model.mlpackage')


EXPORTERS = {
    'torch.export': torch_export(strict=False),
    'strict': torch_export(strict=True),
    'AOTInductor': exported('model.pt2', format='aoti'),
    'ONNX in onnxruntime': exported('model.onnx'),
    'of any size': onnx_of_any_size,
    'ONNX in OpenVINO': openvino,
    'TorchScript trace': trace,
    'ExecuTorch': executorch,
    'CoreML': coreml,
}
#: What the table leaves open: by exporter, the families that it was not run on.
UNTRIED = {
    'AOTInductor': set(FAMILIES),
    'of any size': {'mambavision'},  # torch.export takes minutes of MambaVision's windows
    'ONNX in OpenVINO': {'groupmamba', 'vmamba', 'spatialmamba'},
    'ExecuTorch': {'groupmamba', 'spatialmamba'},
    'CoreML': {'groupmamba', 'vmamba', 'spatialmamba'},
}
#: What the table says of those that are not run here.
WORKS = {'CoreML': 'converts'}
#: What does not work: by exporter, the families and what it says.
FAILS = {
    'ExecuTorch': dict.fromkeys(('videomamba, clips', 'stvideomamba'), 'failed with error 0x12'),  # no Conv3d
    'CoreML': {'mambavision': 'Unsupported fx node alias'},
}


@pytest.mark.slow
@pytest.mark.parametrize('exporter', EXPORTERS)
@pytest.mark.parametrize('family', FAMILIES)
def test_exporter(family, exporter, tmp_path):
    """With another batch size than that of the example."""
    model, input_size = build(family)
    x, y = (torch.randn(batch, *input_size) for batch in (2, 3))
    with torch.no_grad():
        if family in FAILS.get(exporter, ()):
            with pytest.raises(RuntimeError, match=FAILS[exporter][family]):
                EXPORTERS[exporter](model, x, tmp_path)
            return
        run = EXPORTERS[exporter](model, x, tmp_path)
        if run is not None:
            torch.testing.assert_close(run(y), model(y), rtol=1e-3, atol=1e-4)


def test_table():
    rows = [[c.strip() for c in line.strip('|').split('|')] for line in DOC.splitlines() if line.startswith('|')]
    head = next(i for i, row in enumerate(rows) if row[0] == 'family')
    assert rows[head][1:] == list(EXPORTERS)
    for row, family in zip(rows[head + 2:], FAMILIES):
        assert row == [family, *(cell(family, name) for name in EXPORTERS)]


def cell(family, exporter):
    if family in UNTRIED.get(exporter, ()):
        return '–'
    return 'fails' if family in FAILS.get(exporter, ()) else WORKS.get(exporter, 'works')


def test_all_families():
    classes = {type(build(family)[0]).__name__ for family in FAMILIES}
    assert classes == {re.sub('^Stable(?=Group)', '', name) for name in timm_ssm.models.__all__}
