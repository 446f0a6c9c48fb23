"""Write a model to a file, run the file, and keep it only if it computes the same."""
import os
import tempfile
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple, Union

import torch
from timm.layers import set_exportable
from torch import nn

#: The formats and the suffix of their files.
FORMATS = {'onnx': '.onnx', 'torch': '.pt2', 'aoti': '.pt2'}
#: What a format can hold of the scan, its default first.
SCANS = {'onnx': ('loop', 'doubling'), 'torch': ('op', 'doubling'), 'aoti': ('op', 'doubling')}
#: The largest difference of the outputs that passes, relative to the largest output.
TOLERANCE = 1e-3
#: Bytes of parameters above which ONNX, whose files end at 2 GiB, keeps them in a second file.
MAX_INLINE = 2 ** 31 - 2 ** 27


class Exported(NamedTuple):
    """What `export` wrote."""
    path: Path
    size: int  # bytes of all files
    nodes: int  # operators, those inside of loops included
    difference: float  # between the file's outputs and the model's, relative to the largest
    checked: List[Tuple[int, ...]]  # shapes of the inputs of which that was found


def export(
        model: nn.Module,
        path: Union[str, Path],
        *,
        format: Optional[str] = None,
        scan: Optional[str] = None,
        input_size: Optional[Tuple[int, ...]] = None,
        batch_size: Optional[int] = None,
        dynamic_size: bool = False,
) -> Exported:
    """Write a model's inference to a file, which appears once it is found to compute what the model does.

    The file's input is named `input`, its output `output`.

    Args:
        model: Model of one input, (B, C, H, W) or (B, C, T, H, W), and one output, in eval mode.
        path: File to write.
        format: 'onnx', 'torch' (torch.export) or 'aoti' (compiled by AOTInductor for this machine); None for what the
            suffix says, .onnx or .pt2 (torch).
        scan: 'loop' for ONNX's Scan operator; 'op' for the kernels of this package, which a program that loads the file
            has to import; 'doubling' for elementwise operators alone. None for the first of these that the format has.
        input_size: Size of the input without the batch; None for the size that the model is made for.
        batch_size: Batch size of all inputs; None to leave it open.
        dynamic_size: Leave height and width open too, in multiples of what the model takes.

    Raises:
        ValueError: An argument is wrong.
        RuntimeError: The file computes something else.
    """
    path = Path(path)
    format = _format(path, format)
    scan = scan or SCANS[format][0]
    if scan not in SCANS[format]:
        raise ValueError(f'scan: got {scan!r}, needs {" or ".join(map(repr, SCANS[format]))} for format {format!r}')
    if model.training:
        raise ValueError('model: got one in training mode, needs model.eval()')
    dtype = next(model.parameters()).dtype
    if format == 'onnx' and dtype != torch.float32:  # onnxruntime lacks operators of others on CPUs
        raise ValueError(f'model: got parameters of {dtype}, needs torch.float32 for ONNX')
    if not path.parent.is_dir():
        raise ValueError(f'path: there is no folder {str(path.parent)!r}')
    input_size = input_size or model_input_size(model)
    step = _size_step(model) if dynamic_size else 0
    program = _trace(model, _example(model, batch_size or 2, input_size), batch_size is None, step, scan)

    shapes = [(n, *input_size) for n in ([1, 3] if batch_size is None else [batch_size])]
    if dynamic_size:
        *rest, height, width = shapes[-1]
        shapes.append((*rest, height + step, width + 2 * step))
    with tempfile.TemporaryDirectory(dir=path.parent, prefix='.export_') as folder:
        file = Path(folder) / path.name
        nodes = _WRITERS[format](program, file)
        difference = _difference(model, _RUNNERS[format](file), shapes)
        if not difference <= TOLERANCE:
            raise RuntimeError(
                f"{path}: the file's outputs differ from the model's by {difference:.1g} of the largest, "
                f'more than {TOLERANCE}')
        size = sum(f.stat().st_size for f in Path(folder).iterdir())
        for f in sorted(Path(folder).iterdir(), key=lambda f: f == file):  # a second file with parameters first
            os.replace(f, path.parent / f.name)
    return Exported(path, size, nodes, difference, shapes)


def model_input_size(model: nn.Module) -> Tuple[int, ...]:
    """Channels, frames if it takes clips, height and width of what a model is made for."""
    channels, height, width = model.pretrained_cfg['input_size']
    embed = getattr(model, 'patch_embed', None)
    height, width = getattr(embed, 'img_size', None) or getattr(model, 'img_size', (height, width))
    frames = getattr(embed, 'num_frames', 1)
    return (getattr(model, 'in_chans', channels), *((frames,) if frames > 1 else ()), height, width)


def _format(path: Path, format: Optional[str]) -> str:
    if format is None:
        format = {'.onnx': 'onnx', '.pt2': 'torch'}.get(path.suffix)
        if format is None:
            raise ValueError(f'path: got {str(path)!r}, needs the suffix .onnx or .pt2')
    if format not in FORMATS:
        raise ValueError(f'format: got {format!r}, needs one of {", ".join(map(repr, FORMATS))}')
    if path.suffix != FORMATS[format]:
        raise ValueError(f'path: got {str(path)!r}, needs the suffix {FORMATS[format]} for format {format!r}')
    return format


def _size_step(model: nn.Module) -> int:
    """What height and width are to be multiples of where they are left open."""
    embed = getattr(model, 'patch_embed', None)
    if getattr(embed, 'strict_img_size', False):
        raise ValueError('dynamic_size: the model takes one size, needs model.set_input_size(dynamic_img_size=True)')
    return max(info['reduction'] for info in model.feature_info)


def _example(model: nn.Module, batch_size: int, input_size: Tuple[int, ...]) -> torch.Tensor:
    like = next(model.parameters())
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch_size, *input_size, generator=generator).to(like.device, like.dtype)


def _trace(
        model: nn.Module,
        x: torch.Tensor,
        dynamic_batch: bool,
        step: int,
        scan: str,
) -> torch.export.ExportedProgram:
    dims: Dict[int, Any] = {0: torch.export.Dim('batch')} if dynamic_batch else {}
    if step:
        dims.update({
            x.ndim - 2: step * torch.export.Dim('rows', max=4096 // step),
            x.ndim - 1: step * torch.export.Dim('cols', max=4096 // step)})
    with torch.no_grad(), set_exportable(scan == 'doubling'):
        return torch.export.export(model, (x,), dynamic_shapes=(dims,))


def _write_onnx(program: torch.export.ExportedProgram, file: Path) -> int:
    try:
        import onnx_ir
        import onnxruntime  # noqa: F401  to run the file
        import onnxscript  # noqa: F401
    except ImportError as e:
        raise RuntimeError(f'ONNX needs {e.name}: pip install timm-ssm[export]') from None
    from . import onnx_ops

    onnx = torch.onnx.export(
        program, (), custom_translation_table=onnx_ops.TABLE, dynamo=True, opset_version=18, verbose=False,
        input_names=['input'], output_names=['output'],
        optimize=False)  # takes time with the square of the model's size, for what runtimes do themselves
    onnx_ops.simplify(onnx.model)
    parameters = sum(p.nbytes for p in program.state_dict.values())
    onnx.save(str(file), external_data=parameters > MAX_INLINE)
    return sum(1 for _ in onnx_ir.traversal.RecursiveGraphIterator(onnx.model.graph))


def _write_torch(program: torch.export.ExportedProgram, file: Path) -> int:
    torch.export.save(program, file)
    return sum(node.op == 'call_function' for node in program.graph.nodes)


def _write_aoti(program: torch.export.ExportedProgram, file: Path) -> int:
    torch._inductor.aoti_compile_and_package(program, package_path=str(file))
    return sum(node.op == 'call_function' for node in program.graph.nodes)


def _run_onnx(file: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=['CPUExecutionProvider'])
    return lambda x: torch.from_numpy(session.run(['output'], {'input': x.cpu().numpy()})[0])


def _run_torch(file: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    return torch.export.load(file).module()


def _run_aoti(file: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    return torch._inductor.aoti_load_package(str(file))


_WRITERS = {'onnx': _write_onnx, 'torch': _write_torch, 'aoti': _write_aoti}
_RUNNERS = {'onnx': _run_onnx, 'torch': _run_torch, 'aoti': _run_aoti}


def _difference(
        model: nn.Module,
        run: Callable[[torch.Tensor], torch.Tensor],
        shapes: List[Tuple[int, ...]],
) -> float:
    """The largest difference of outputs, relative to the largest output."""
    worst = 0.
    with torch.no_grad():
        for shape in shapes:
            x = _example(model, shape[0], shape[1:])
            expected = model(x)
            error = (run(x).to(expected) - expected).abs().max() / expected.abs().max()
            worst = max(worst, float(error.nan_to_num(torch.inf)))
    return worst
