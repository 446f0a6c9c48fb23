"""Looking inside models: what they attend to, remember and withstand."""
from .attention import channel_attention, hidden_attention, mean_attention
from .faithfulness import Curves, deletion_insertion, grad_cam
from .overlay import overlay, to_pixels
from .rollout import rollout

__all__ = [
    'Curves', 'channel_attention', 'deletion_insertion', 'grad_cam', 'hidden_attention', 'mean_attention', 'overlay',
    'rollout', 'to_pixels',
]
