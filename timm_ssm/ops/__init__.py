"""The selective scan and the short convolution: reference semantics with several backends."""
from .backends import backend_report
from .causal_conv1d import bidirectional_causal_conv1d, causal_conv1d
from .selective_scan import bidirectional_selective_scan, selective_scan

__all__ = [
    'backend_report',
    'bidirectional_causal_conv1d',
    'bidirectional_selective_scan',
    'causal_conv1d',
    'selective_scan',
]
