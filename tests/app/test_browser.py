"""The page in a browser: `timm-ssm app` in a process of its own, driven through Chromium.

Needs `pip install playwright` and Chromium (on Debian `apt install chromium`); run with `pytest -m slow tests/app`.
"""
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from .conftest import checkpoint

CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not CHROMIUM, reason='no Chromium')]
SECONDS = 120


@pytest.fixture(scope='module')
def slow_model(tmp_path_factory):
    """A model that takes long enough for others to wait for it."""
    return checkpoint(tmp_path_factory.mktemp('slow') / 'slow', 'videomamba_tiny_patch16_224', ['one', 'two'], 224)


@pytest.fixture(scope='module')
def server(checkpoints, slow_model, tmp_path_factory):
    """The address of the page, and its folder of temporary files, which has none in the end."""
    temporary = tmp_path_factory.mktemp('tmp')
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    models = [*checkpoints.values(), slow_model]
    command = [sys.executable, '-m', 'timm_ssm.cli', 'app', '--port', str(port), '--model', *models]
    process = subprocess.Popen(
        command, env=dict(os.environ, TMPDIR=str(temporary), PYTHONUNBUFFERED='1'), stdout=subprocess.PIPE, text=True)
    try:
        line = next(line for line in process.stdout if 'http://' in line)
        assert f'http://127.0.0.1:{port}' in line
        yield f'http://127.0.0.1:{port}', temporary
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)
        assert [path for path in temporary.rglob('*') if path.is_file()] == []


@pytest.fixture(scope='module')
def browser():
    playwright = pytest.importorskip('playwright.sync_api')
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox'])
        yield browser
        browser.close()


@pytest.fixture
def tab(browser, server):
    tab = open_tab(browser, server[0])
    yield tab
    tab.context.close()


def open_tab(browser, address):
    tab = browser.new_context(viewport=dict(width=1280, height=760)).new_page()
    tab.set_default_timeout(1000 * SECONDS)
    tab.asked = []  # hosts
    tab.on('request', lambda r: tab.asked.append(r.url.split('/')[2]) if r.url.startswith('http') else None)
    tab.goto(address)
    tab.wait_for_selector('#classify')
    return tab


def upload(tab, path, offered):
    """Give a file, and wait for the models that take it."""
    tab.set_input_files('#upload input[type=file]', str(path))
    tab.wait_for_selector(f'#upload :text("{Path(path).stem}")')
    tab.wait_for_selector(f'#models .token:has-text("{offered}")')


def choose(tab, *models):
    """Choose models in place of those chosen, once the page has answered the upload."""
    tab.wait_for_timeout(3000)
    for _ in range(tab.locator('#models .token').count()):
        tab.locator('#models .token-remove').first.click()
    for model in models:
        tab.fill('#models input', model)
        tab.locator('#models ul[role=listbox] li', has_text=model).first.click()
    tab.keyboard.press('Escape')


def result(tab, i=0):
    """The facts, the classes and the sizes of the pictures in a column."""
    tab.wait_for_selector(f'#result-{i} .pictures img')
    tab.wait_for_function(
        f'''[...document.querySelectorAll("#result-{i} .pictures img")].every(
            image => (image.loading = "eager") && image.complete && image.naturalWidth)''')
    sizes = tab.eval_on_selector_all(
        f'#result-{i} .pictures img', '(xs) => xs.map(x => [x.naturalWidth, x.naturalHeight])')
    return tab.inner_text(f'#result-{i} .facts'), tab.inner_text(f'#result-{i} .classes'), sizes


def test_an_image(tab, server, checkpoints, files):
    """Upload, result, overlay; nothing is asked of other hosts."""
    upload(tab, files / 'image.png', checkpoints['image'])
    tab.click('#classify')
    facts, classes, sizes = result(tab)
    assert 'backend: native' in facts and 'rollout' in facts
    assert sum(name in classes for name in ('ant', 'bee', 'cat', 'dog', 'eel', 'fox')) == 5 and '%' in classes
    assert [128, 64] in sizes
    assert not tab.is_visible('#result-1')
    assert set(tab.asked) == {server[0].split('/')[2]}


def test_two_models(tab, checkpoints, files):
    upload(tab, files / 'image.png', checkpoints['image'])
    choose(tab, checkpoints['vit'], checkpoints['other'])
    tab.click('#classify')
    (vit, _, left), (other, _, right) = result(tab), result(tab, 1)
    assert 'backend: PyTorch' in vit and [128, 64] in left
    assert 'no rollout' in other and [64, 64] in right


def test_a_clip(tab, checkpoints, files):
    upload(tab, files / 'clip.mp4', checkpoints['video'])
    tab.click('#classify')
    _, classes, sizes = result(tab)
    assert 'left' in classes and sizes.count([64, 32]) >= 4


def test_no_image(tab, checkpoints, files):
    """The message stays until it is closed; then an image goes through."""
    tab.set_input_files('#upload input[type=file]', str(files / 'text.png'))
    tab.wait_for_selector('.toast-body :text("text.png is neither an image nor a clip that can be read here")')
    tab.click('.toast-close')
    tab.locator('#upload button[aria-label="Clear"]').click()
    upload(tab, files / 'image.png', checkpoints['image'])
    tab.click('#classify')
    assert 'backend' in result(tab)[0]


def test_nothing_uploaded(tab):
    tab.click('#classify')
    tab.wait_for_selector('.toast-body :text("Drop an image or a clip, and choose one or two models.")')


def test_a_second_request(browser, server, checkpoints, slow_model, files):
    """It waits for the first, and each gets what it asked for."""
    first, second = (open_tab(browser, server[0]) for _ in range(2))
    upload(first, files / 'image.png', checkpoints['image'])
    choose(first, slow_model)
    upload(second, files / 'clip.mp4', checkpoints['video'])
    first.click('#classify')
    time.sleep(.3)
    second.click('#classify')
    second.wait_for_selector(':text("queue: 1/1")')
    assert not first.is_visible('#result-0 .pictures img')
    assert 'left' in result(second)[1]
    facts, classes, sizes = result(first)
    assert 'one' in classes and [448, 224] in sizes
    first.context.close(), second.context.close()
