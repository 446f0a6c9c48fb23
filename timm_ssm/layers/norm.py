"""Normalisation of a residual stream."""
import torch
from torch import nn
from torch.nn import functional as F

from ..ops.glue import exporting


class RmsNorm(nn.RMSNorm):
    """RMSNorm of a stream that may be more precise than the model: the result has the dtype of the weight."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight.to(x.dtype)
        if torch.jit.is_scripting():
            x = F.rms_norm(x, self.normalized_shape, weight, self.eps)
        elif exporting():  # the TorchScript ONNX exporter knows no rms_norm
            x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * weight
        else:
            x = F.rms_norm(x, self.normalized_shape, weight, self.eps)
        return x.to(self.weight.dtype)


class LayerNorm(nn.LayerNorm):
    """LayerNorm of a stream that may be more precise than the model: the result has the dtype of the weight."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps).to(self.weight.dtype)
