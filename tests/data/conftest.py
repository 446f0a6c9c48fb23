import pytest

from timm_ssm.data import decode


@pytest.fixture(autouse=True)
def frame_cache(tmp_path_factory, monkeypatch, request):
    """Frame indices of videos in a folder of the test."""
    if 'test_default_cache' not in request.node.name:
        folder = str(tmp_path_factory.mktemp('frames'))
        monkeypatch.setattr(decode, 'default_cache', lambda: folder)
