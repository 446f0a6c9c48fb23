"""The page without a browser: what uploads are, what is shown of a model, and how the page is served."""
import os
import time
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

pytest.importorskip('gradio')

import gradio as gr
from gradio_client import Client, handle_file

from timm_ssm import cli
from timm_ssm.app import page as page_module
from timm_ssm.app import uploads
from timm_ssm.app.examples import write_examples
from timm_ssm.app.page import create_page, theme
from timm_ssm.app.predict import predict
from timm_ssm.app.uploads import kind_of
from timm_ssm.hub.classify import classify, load_model


class TestUploads:

    @pytest.mark.parametrize('name, kind', [
        ('image.png', 'image'), ('grey.jpg', 'image'), ('clip.mp4', 'video'), ('moving.gif', 'video')])
    def test_kinds(self, files, tmp_path, name, kind):
        """By the content, whatever the file is called."""
        renamed = tmp_path / 'upload.bin'
        renamed.write_bytes((files / name).read_bytes())
        assert kind_of(str(renamed), name) == kind

    @pytest.mark.parametrize('content', [b'', b'This is no image.', b'%!PS-Adobe-3.0 EPSF-3.0\n', b'\x89PNG\r\n\x1a\n'])
    def test_neither(self, tmp_path, content):
        path = tmp_path / 'x.png'
        path.write_bytes(content)
        with pytest.raises(ValueError, match='^x.png is neither an image nor a clip that can be read here; needs JPEG'):
            kind_of(str(path), 'x.png')

    def test_a_playlist_opens_no_other_file(self, files, tmp_path):
        path = tmp_path / 'list.m3u8'
        path.write_text(
            f'#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{files / "clip.mp4"}\n#EXT-X-ENDLIST\n')
        with pytest.raises(ValueError, match='neither'):
            kind_of(str(path), 'list.m3u8')

    def test_bounds(self, files, monkeypatch):
        """Refused from what the headers say."""
        monkeypatch.setattr(uploads, 'MAX_FRAMES', 11)
        with pytest.raises(ValueError, match='clip has more than 11 frames'):
            kind_of(str(files / 'clip.mp4'), 'clip')
        monkeypatch.setattr(uploads, 'MAX_FRAMES', 12)
        assert kind_of(str(files / 'clip.mp4'), 'clip') == 'video'
        monkeypatch.setattr(uploads, 'MAX_PIXELS', 1000)
        for name in ('image.png', 'clip.mp4'):
            with pytest.raises(ValueError, match='million pixels, needs at most'):
                kind_of(str(files / name), name)

    def test_bomb(self, tmp_path, monkeypatch):
        """An image that Pillow itself refuses."""
        Image.new('1', (400, 400)).save(tmp_path / 'large.png')
        monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 100)
        with pytest.raises(ValueError, match='inf million pixels'):
            kind_of(str(tmp_path / 'large.png'), 'large.png')


class TestPredict:

    @pytest.mark.parametrize('kind, file, pictures', [
        ('image', 'image.png', [(128, 64)]), ('vit', 'grey.jpg', [(128, 64)]), ('video', 'clip.mp4', [(64, 32)] * 4)])
    def test_as_classify(self, checkpoints, files, kind, file, pictures):
        """The classes are those of `timm-ssm classify`; pictures are what the model is given, beside the rollout."""
        p = predict(checkpoints[kind], str(files / file))
        (_, expected), = classify(load_model(checkpoints[kind]), [str(files / file)])
        assert list(p.classes) == [row['name'] for row in expected]
        assert list(p.classes.values()) == pytest.approx([row['probability'] for row in expected], abs=1e-5)
        assert [picture.size for picture in p.pictures] == pictures and not p.why_not
        left, right = (p.pictures[0].crop((x, 0, x + 32, 32)) for x in (0, p.pictures[0].width // 2))
        assert left.tobytes() != right.tobytes()
        assert p.seconds > 0 < p.rollout_seconds
        assert p.backend == dict(vit='PyTorch, as the model has no scans').get(kind, p.backend)

    @pytest.mark.parametrize('backend', ('eager', 'naive'))
    def test_backend(self, checkpoints, files, backend, monkeypatch):
        """That which ran the model."""
        monkeypatch.setattr('timm_ssm.ops.backends.FORCED', backend)
        assert predict(checkpoints['image'], str(files / 'image.png')).backend == backend

    def test_without_rollout(self, checkpoints, files):
        p = predict(checkpoints['other'], str(files / 'image.png'))
        assert p.why_not and [picture.size for picture in p.pictures] == [(64, 64)]

    def test_classes_of_one_name(self, checkpoints, files, monkeypatch):
        monkeypatch.setattr('timm_ssm.app.predict.class_names', lambda model: ['crane', 'crane', 'ox'])
        assert set(predict(checkpoints['vit'], str(files / 'image.png')).classes) == {'crane (0)', 'crane (1)', 'ox'}


def test_examples(tmp_path):
    examples = write_examples(tmp_path / 'examples')
    assert {k: len(v) for k, v in examples.items()} == dict(image=3, video=1)
    for kind, paths in examples.items():
        assert {kind_of(path, path) for path in paths} == {kind}


@pytest.fixture(scope='module')
def served(checkpoints, tmp_path_factory):
    """A client of the page, and the folder of Gradio's files."""
    folder = tmp_path_factory.mktemp('served')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('GRADIO_TEMP_DIR', str(folder / 'gradio'))
        page = create_page([], list(checkpoints.values()))
        page.launch(prevent_thread_lock=True, quiet=True, max_file_size=29_000, theme=theme())
        yield Client(page.local_url, verbose=False, download_files=str(folder / 'downloads')), page
        page.close()


def ask(client, path, *names):
    return client.predict(handle_file(str(path)), list(names), api_name='/show')


def test_served(served, checkpoints, files):
    """One model or two, a column each."""
    client, page = served
    assert page.local_url.startswith('http://127.0.0.1:')
    facts, classes, pictures, other, _, _ = ask(client, files / 'image.png', checkpoints['image'], checkpoints['vit'])
    assert checkpoints['image'] in facts and 'backend: PyTorch' in other
    expected = predict(checkpoints['image'], str(files / 'image.png')).classes
    assert {c['label']: c['confidence'] for c in classes['confidences']} == pytest.approx(expected, abs=1e-4)
    assert Image.open(pictures[0]['image']).size == (128, 64)
    _, _, pictures, other, _, _ = ask(client, files / 'clip.mp4', checkpoints['video'])
    assert len(pictures) == 4 and other is None


@pytest.mark.parametrize('file, kind, message', [
    ('text.png', 'image', 'text.png is neither an image nor a clip'),
    ('cut.jpg', 'image', 'image: cannot open cut.jpg'),
    ('clip.mp4', 'image', 'model.pth.tar does not take videos; choose another model'),
    ('image.png', '/etc/passwd', 'is not in the list of choices|does not take images'),
])
def test_errors(served, checkpoints, files, file, kind, message):
    with pytest.raises(Exception, match=message):
        ask(served[0], files / file, checkpoints.get(kind, kind))


def test_size(served, checkpoints, files, tmp_path):
    path = tmp_path / 'large.bmp'
    Image.new('RGB', (100, 100)).save(path)
    with pytest.raises(Exception, match='413|exceeds'):
        ask(served[0], path, checkpoints['image'])


def test_old_files_go_away(tmp_path):
    paths = [tmp_path / 'gradio' / name for name in ('old', 'new', 'example')]
    paths[0].parent.mkdir()
    for path in paths:
        path.write_text('')
    for path in (paths[0], paths[2]):
        os.utime(path, (time.time() - page_module.KEEP - 1,) * 2)
    page_module.delete_old(tmp_path, {paths[2]})
    assert [path.exists() for path in paths] == [False, True, True]


def test_errors_of_models(capsys, tmp_path, monkeypatch):
    """A model that cannot be loaded is refused before the page is there."""
    assert cli.main(['app', '--model', str(tmp_path / 'none.pth')]) == 1
    assert 'timm-ssm app: ' in capsys.readouterr().err


def test_the_space():
    """app/ has what a Hugging Face Space needs, and asks for the Gradio that the extra asks for."""
    root = Path(__file__).parents[2] / 'app'
    front = (root / 'README.md').read_text().split('---')[1]
    values = dict(line.split(': ', 1) for line in front.strip().split('\n'))
    assert values['sdk'] == 'gradio' and (root / values['app_file']).exists()
    assert gr.__version__.split('.')[0] == values['sdk_version'].split('.')[0]
    assert (root / 'requirements.txt').read_text().strip() == 'timm-ssm[app]'


def test_every_tag_is_offered(checkpoints):
    offered = {c[1] for b in create_page([]).blocks.values() if isinstance(b, gr.Dropdown) for c in b.choices}
    assert 'videomamba_tiny_patch16_224.in1k' in offered and 'mambavision_tiny.in1k' in offered
    assert timm.is_model('videomamba_tiny_patch16_224') and torch.get_num_threads()
