"""The page: an upload, one or two models, and what each says."""
import os
import signal
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, List, Optional, Sequence, Set

import gradio as gr

from ..hub.classify import takes
from ..zoo.registry import input_shape, list_names
from .examples import write_examples
from .predict import get_model, predict
from .uploads import MAX_BYTES, kind_of

DEFAULT = dict(image='videomamba_tiny_patch16_224.in1k', video='videomamba_tiny_patch16_f8_224.k400')
KEEP, LOOK = 600, 60  # seconds: uploads and pictures older than that go, and how often that is looked after
MAX_QUEUE = 20
INTRODUCTION = '''# Vision state-space models
Drop an image or a clip, and choose one or two models: each names the five likeliest classes, and its rollout shows how
much of each patch reached them. [timm-ssm](https://pypi.org/project/timm-ssm/) runs the models on {where}.'''


def create_page(examples: Sequence[str], models: Sequence[str] = (), device: str = 'cpu') -> gr.Blocks:
    """The page as Gradio blocks.

    Args:
        examples: Files to begin with.
        models: To offer first, as for `load_model`; they are loaded at once. All pretrained tags are offered, too.
        device: Where models run.
    """
    choices = {name: takes(get_model(name, device)) for name in models}
    for name in list_names(pretrained=True):
        choices.setdefault(name, 'video' if len(input_shape(name)) == 4 else 'image')
    first = {kind: next((n for n in models if choices[n] == kind), DEFAULT[kind]) for kind in DEFAULT}

    def offer(path: Optional[str], names: List[str]) -> Any:
        """The models for an upload; those that are chosen stay, if they are among them."""
        if path is None:
            return gr.skip()
        kind = _kind_of(path)
        fitting = [n for n, k in choices.items() if k == kind]
        return gr.Dropdown(choices=fitting, value=[n for n in names if n in fitting] or [first[kind]])

    def show(path: Optional[str], names: List[str]) -> List[Any]:
        """What each model says of an upload, a column each."""
        if path is None or not names:
            raise gr.Error('Drop an image or a clip, and choose one or two models.', duration=None)
        kind = _kind_of(path)
        if wrong := [n for n in names if choices.get(n) != kind]:
            raise gr.Error(f'{wrong[0]} does not take {kind}s; choose another model.', duration=None)
        updates: List[Any] = []
        for name in [*names, *[None] * (2 - len(names))]:
            updates += [gr.Column(visible=name is not None), *(_present(name, path, device) if name else [None] * 3)]
        return updates

    with gr.Blocks(title='timm-ssm', analytics_enabled=False) as page:
        gr.Markdown(INTRODUCTION.format(where='a GPU' if device.startswith('cuda') else f'{os.cpu_count()} CPU cores'))
        with gr.Row():
            with gr.Column(scale=2):
                upload = gr.File(label='Image or clip', elem_id='upload')
                names = gr.Dropdown(
                    [*choices], value=[first['image']], multiselect=True, max_choices=2, label='One or two models',
                    elem_id='models')
                button = gr.Button('Classify', variant='primary', elem_id='classify')
                gr.Examples([[path] for path in examples], upload, label='Examples')
            results: List[Any] = []
            for i in range(2):
                with gr.Column(scale=3, visible=i == 0, elem_id=f'result-{i}') as column:
                    results += [
                        column,
                        gr.Markdown(elem_classes='facts'),
                        gr.Label(show_label=False, elem_classes='classes'),
                        gr.Gallery(
                            label='What the model was given, and the rollout', columns=1, object_fit='contain',
                            format='jpeg', elem_classes='pictures'),
                    ]
        upload.change(offer, [upload, names], names, show_progress='hidden')
        # one at a time: the times shown are those of a machine that does nothing else
        button.click(show, [upload, names], results, concurrency_limit=1)
    return page.queue(max_size=MAX_QUEUE)


def _kind_of(path: str) -> str:
    try:
        return kind_of(path, os.path.basename(path))
    except ValueError as e:
        raise gr.Error(str(e), duration=None) from None


def _present(name: str, path: str, device: str) -> List[Any]:
    """Facts, classes and pictures."""
    try:
        p = predict(name, path, device)
    except (ValueError, RuntimeError, OSError) as e:  # a damaged file; weights that cannot be had
        raise gr.Error(f'{name}: {str(e).replace(path, os.path.basename(path))}', duration=None) from e
    facts = f'**{name}**\n\nforward pass {p.seconds:.2f} s, backend: {p.backend}; '
    facts += f'no rollout ({p.why_not})' if p.why_not else f'rollout {p.rollout_seconds:.2f} s'
    return [facts, p.classes, p.pictures]


def serve(
        models: Sequence[str] = (),
        host: Optional[str] = None,
        port: Optional[int] = None,
        device: str = 'cpu',
) -> None:
    """Serve the page until the process is told to end; whatever it has written is deleted then.

    Args:
        models: As for `create_page`.
        host: Address to listen on; if None that in GRADIO_SERVER_NAME, or 127.0.0.1.
        port: Port to listen on; if None that in GRADIO_SERVER_PORT, or the first free one from 7860.
        device: Where models run.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with tempfile.TemporaryDirectory(prefix='timm-ssm-app-') as folder:
        os.environ['GRADIO_TEMP_DIR'] = os.path.join(folder, 'gradio')
        examples = write_examples(Path(folder) / 'examples')
        page = create_page([path for paths in examples.values() for path in paths], models, device)
        threading.Thread(target=keep_clean, args=(Path(folder), set(Path(folder).rglob('*'))), daemon=True).start()
        page.launch(
            server_name=host, server_port=port, max_file_size=MAX_BYTES, theme=theme(), allowed_paths=[folder])


def keep_clean(folder: Path, kept: Set[Path]) -> None:
    """Delete what is old, for as long as the folder is there; Gradio's `delete_cache` leaves refused uploads."""
    while folder.exists():
        delete_old(folder, kept)
        time.sleep(LOOK)


def delete_old(folder: Path, kept: Set[Path]) -> None:
    """Delete the files below a folder that were written more than KEEP seconds ago, but for those to be kept."""
    for path in set(folder.rglob('*')) - kept:
        with suppress(FileNotFoundError):
            if path.is_file() and time.time() - path.stat().st_mtime > KEEP:
                path.unlink()


def theme() -> gr.themes.Base:
    """Gradio's, with fonts that are there."""
    return gr.themes.Default(font=['system-ui', 'sans-serif'], font_mono=['monospace'])
