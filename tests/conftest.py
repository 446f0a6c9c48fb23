import os
import signal
import tempfile
import time

import pytest
import torch

from .hub_server import HubServer

if not torch.cuda.is_available():
    os.environ.setdefault('TRITON_INTERPRET', '1')  # read when Triton is imported
torch.set_num_threads(1 if 'PYTEST_XDIST_WORKER' in os.environ else min(2, os.cpu_count() or 1))
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells start background jobs with Ctrl-C ignored

# The tests see a Hub on this machine and an empty cache. huggingface_hub reads these once, when it is imported.
_HUB = HubServer()
_HF_HOME = tempfile.TemporaryDirectory(prefix='hf_home_')
os.environ.update(HF_ENDPOINT=_HUB.url, HF_HOME=_HF_HOME.name, HF_HUB_DISABLE_XET='1')
for _name in ('HF_TOKEN', 'HUGGING_FACE_HUB_TOKEN', 'HF_HUB_CACHE', 'HF_HUB_OFFLINE', 'TRANSFORMERS_OFFLINE'):
    os.environ.pop(_name, None)


@pytest.fixture
def hub(monkeypatch):
    """The Hub of the tests, empty; huggingface_hub waits only briefly before it tries again."""
    sleep = time.sleep
    monkeypatch.setattr(time, 'sleep', lambda seconds: sleep(min(seconds, .01)))
    _HUB.reset()
    return _HUB


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of huggingface_hub."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'cache'))
    return tmp_path / 'cache'


@pytest.fixture(scope='session')
def digits(tmp_path_factory):
    """scikit-learn's 8 x 8 digits as an image folder: 160 to train on, 16 of each digit, and 41 to validate on."""
    from PIL import Image
    from sklearn.datasets import load_digits

    root = tmp_path_factory.mktemp('digits')
    data = load_digits()
    for digit in range(10):
        images = data.images[data.target == digit]
        splits = dict(train=images[:16], validation=images[16:21 if digit == 0 else 20])
        for split, images in splits.items():
            folder = root / split / f'class_{digit}'
            folder.mkdir(parents=True)
            for i, image in enumerate(images):
                Image.fromarray((image * 15).astype('uint8')).save(folder / f'{i:02d}.png')
    return root
