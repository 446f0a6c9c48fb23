"""A page to try the models in: `timm-ssm app`, and the Hugging Face Space in app/."""
try:
    import av  # noqa: F401
    import gradio  # noqa: F401
    import matplotlib  # noqa: F401
    import skimage  # noqa: F401
except ImportError as e:
    raise RuntimeError(f"the page needs {e.name}: pip install 'timm-ssm[app]'") from e
from .page import create_page, serve

__all__ = ['create_page', 'serve']
