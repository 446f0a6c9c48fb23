import pytest
import torch


@pytest.fixture(autouse=True, scope='package')
def one_thread():
    # models this small only lose by a second thread, and lose a lot where cores are shared
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv('OMP_NUM_THREADS', '1')
        yield
    torch.set_num_threads(threads)
