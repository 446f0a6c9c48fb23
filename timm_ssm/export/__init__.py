"""Models as files that run elsewhere: ONNX, torch.export, AOTInductor."""
from .writer import FORMATS, SCANS, Exported, export, model_input_size

__all__ = ['FORMATS', 'SCANS', 'Exported', 'export', 'model_input_size']
