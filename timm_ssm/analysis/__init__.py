"""Looking inside models: what they attend to, remember and withstand. `timm-ssm analyse` runs each from the shell."""
from .attention import channel_attention, hidden_attention, mean_attention
from .faithfulness import Curves, deletion_insertion, grad_cam
from .field import field_sizes, receptive_field
from .frequency import amplify_high_frequencies, frequency_sensitivity
from .overlay import overlay, to_pixels
from .rollout import rollout
from .steps import Steps, delta_maps, half_lives

__all__ = [
    'Curves', 'Steps', 'amplify_high_frequencies', 'channel_attention', 'deletion_insertion', 'delta_maps',
    'field_sizes', 'frequency_sensitivity', 'grad_cam', 'half_lives', 'hidden_attention', 'mean_attention', 'overlay',
    'receptive_field', 'rollout', 'to_pixels',
]
