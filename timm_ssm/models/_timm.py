"""Parts of timm that its older versions lack."""
try:
    from timm.models._input import update_model_input_size
except ImportError:  # timm < 1.0.31 keeps no record of a model's current input size
    def update_model_input_size(model, img_size, **model_args) -> None:
        """Do nothing."""

__all__ = ['update_model_input_size']
