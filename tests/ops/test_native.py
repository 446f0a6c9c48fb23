"""What only the native backend has: instruction sets, threads, forks, a build that may fail."""
import multiprocessing
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from timm_ssm.ops import backend_report, bidirectional_causal_conv1d, bidirectional_selective_scan, selective_scan
from timm_ssm.ops.backends import native
from timm_ssm.ops.naive import selective_scan_naive

from . import test_extremes
from .test_kernels import FORMS, check_conv, check_scan
from .utils import grads, pairs, relative_error, scan_inputs

ROOT = Path(__file__).parents[2]
needs_library = pytest.mark.skipif(native._lib is None, reason=native._reason)
needs_fork = pytest.mark.skipif(not hasattr(os, 'fork'), reason='no fork on this system')


@pytest.fixture(params=native._instruction_sets() or ['none'])
def instruction_set(request, monkeypatch):
    if request.param in ('', 'none'):
        pytest.skip('this machine lacks it')
    monkeypatch.setattr(native, '_isa', native._instruction_sets().index(request.param))


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@needs_library
@pytest.mark.parametrize('form', FORMS, ids=str)
def test_instruction_sets_scan(instruction_set, form):
    """31 states are 16 + 8 + 4 + 2 + 1, 67 channels two blocks and a ragged vector, 45 tokens a tile and a rest."""
    check_scan('native', d_state=31, channels=67, length=45, **form)


@needs_library
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_instruction_sets_grouped_and_bidirectional(instruction_set, dtype):
    check_scan('native', dtype=dtype, groups=2, channels=102, length=70, bidirectional=True)


@needs_library
@pytest.mark.parametrize('kernel_size', [1, 3, 4, 7])
def test_instruction_sets_conv(instruction_set, kernel_size):
    check_conv('native', kernel_size=kernel_size, channels=67, length=150, bidirectional=True)
    check_conv('native', kernel_size=kernel_size, channels=67, form=dict(centered=True), dtype=torch.float64)


@needs_library
def test_instruction_sets_accuracy(instruction_set):
    inputs = scan_inputs(1, 197, 384, 16)
    inputs['A'] = -torch.arange(1., 17).expand(384, 16)
    inputs['delta_bias'] -= 3.
    want = selective_scan_naive(**{k: v.double() for k, v in inputs.items()})
    assert relative_error(selective_scan(**inputs, backend='native'), want) < 1e-6


@needs_library
def test_instruction_sets_extremes(instruction_set):
    """delta = -inf leaves the state alone, decays go to 0 and growth to infinity, NaN is never swallowed."""
    inputs = scan_inputs(1, 20, 20, 4, optional=False)
    inputs['delta'][:, 3] = -float('inf')
    inputs['delta'][:, 5] = 1e6
    want = selective_scan_naive(**{k: v.double() for k, v in inputs.items()})
    assert relative_error(selective_scan(**inputs, backend='native'), want) < 1e-5

    grown = selective_scan(**dict(inputs, delta=torch.full_like(inputs['delta'], -50.)),
                           delta_softplus=False, backend='native')
    assert not grown.isfinite().all()
    for name in inputs:
        poisoned = {k: v.clone() for k, v in inputs.items()}
        poisoned[name].view(-1)[0] = float('nan')
        assert selective_scan(**poisoned, backend='native')[0, 0, 0].isnan(), name


@needs_library
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=str)
def test_instruction_sets_extreme_values(instruction_set, dtype):
    for softplus in (True, False):
        test_extremes.test_scan_step_sizes_and_decays('native', dtype, softplus, 3)
    test_extremes.test_scan_gates('native', dtype)
    test_extremes.test_conv_activations('native', dtype)


def _random_view(g):
    """A function that lays a tensor out differently, if at all; what it returns may end where its storage ends."""
    kind = torch.randint(4, (), generator=g).item()

    def view(x):
        if x.ndim < 3 or kind == 0:
            return x
        if kind == 1:  # the last of two slices
            return torch.cat((x, x), -1)[..., x.shape[-1]:]
        if kind == 2:  # every other token
            return torch.stack((x, x), 2)[:, :, 1]
        return x.transpose(1, -1).contiguous().transpose(1, -1)  # channels first
    return view


@needs_library
@pytest.mark.parametrize('seed', range(24))
def test_random_calls(seed):
    """Shapes, layouts and forms at random, for the sanitizers (`make sanitize`) above all."""
    g = torch.Generator().manual_seed(seed)

    def pick(*options):
        return options[torch.randint(len(options), (), generator=g).item()]

    shape = dict(batch=pick(1, 2, 3), length=pick(2, 3, 31, 33, 64, 71), dtype=pick(torch.float32, torch.float64))
    groups = pick(None, 1, 2, 3)
    check_scan(
        'native', **shape, channels=(groups or 1) * pick(1, 5, 16, 33), groups=groups, d_state=pick(1, 2, 3, 8, 13),
        bidirectional=(bidirectional := pick(False, True)), make=_random_view(g), optional=pick(False, True),
        residual=pick(False, True), mask_diagonal=pick(False, True), **({} if bidirectional else dict(
            reverse=pick(False, True))))
    check_conv(
        'native', **shape, channels=pick(1, 5, 16, 33, 70), kernel_size=pick(1, 2, 3, 4, 6), make=_random_view(g),
        bidirectional=(bidirectional := pick(False, True)), bias=pick(False, True), **({} if bidirectional else dict(
            form=dict(centered=pick(False, True), reverse=pick(False, True), activation=pick('silu', None)))))


@needs_library
def test_same_bits_with_any_number_of_threads(threads):
    inputs = pairs(scan_inputs(3, 100, 96), scan_inputs(3, 100, 96, seed=7))
    results = []
    for n in (1, 2, 3, 2):
        threads(n)
        out, gradients = grads(bidirectional_selective_scan, inputs, backend='native')
        results.append([out, *gradients.values()])
    for result in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], result))


@needs_library
@pytest.mark.skipif(not os.path.isdir('/proc/self/task'), reason='no /proc')
def test_threads_follow_torch():
    code = '''
import os, torch
torch.set_num_threads(1)
from timm_ssm.ops import selective_scan
x, A, B = torch.randn(4, 64, 128), -torch.rand(128, 4), torch.randn(4, 64, 4)
def count():
    selective_scan(x, x, A, B, B, backend='native')
    return len(os.listdir('/proc/self/task'))
before = len(os.listdir('/proc/self/task'))
one = count()
torch.set_num_threads(4)
print(one - before, count() - one)
'''
    out = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert out.split() == ['0', '3']


class _Scans(torch.utils.data.Dataset):

    def __init__(self, inputs):
        self.inputs = inputs

    def __len__(self):
        return 4

    def __getitem__(self, i):
        return selective_scan(**self.inputs, backend='native')


@needs_library
@needs_fork
def test_data_loader_workers(threads):
    threads(2)
    inputs = scan_inputs(4, 64, 128)
    want = selective_scan(**inputs, backend='native')  # starts threads that the workers do not inherit
    loader = torch.utils.data.DataLoader(
        _Scans(inputs), num_workers=2, multiprocessing_context='fork', timeout=60, batch_size=None)
    for got in loader:
        assert torch.equal(got, want)


def _scan_in_child(inputs, queue):
    out, gradients = grads(selective_scan, inputs, backend='native')
    queue.put([x.detach().numpy() for x in (out, *gradients.values())])


@needs_library
@needs_fork
def test_forked_process(threads):
    """A child forked after the threads were started neither waits for them nor computes anything else."""
    threads(2)
    inputs = scan_inputs(4, 64, 128)
    out, gradients = grads(selective_scan, inputs, backend='native')
    context = multiprocessing.get_context('fork')
    queue = context.Queue()
    child = context.Process(target=_scan_in_child, args=(inputs, queue), daemon=True)
    child.start()
    try:
        got = queue.get(timeout=60)
    finally:
        child.kill()
    assert all(torch.equal(torch.from_numpy(x), y) for x, y in zip(got, (out, *gradients.values())))


@needs_library
@needs_fork
def test_first_scan_in_a_fork():
    """The parent imports the package, uses PyTorch's threads and forks; only the child ever scans."""
    code = '''
import os, signal, torch, timm_ssm
torch.set_num_threads(2)
torch.ones(2000, 2000).exp().sum()
if (pid := os.fork()) == 0:
    signal.alarm(30)  # a hang ends by a signal
    from timm_ssm.ops import selective_scan
    x, A, B = torch.randn(4, 64, 128), -torch.rand(128, 4), torch.randn(4, 64, 4)
    selective_scan(x, x, A, B, B, backend='native')
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
'''
    subprocess.run([sys.executable, '-c', code], cwd=ROOT, check=True)


@needs_library
def test_slices_are_read_in_place(monkeypatch):
    """Halves of in_proj's output and slices of x_proj's are not copied."""
    xz, dbc = torch.randn(2, 33, 128), torch.randn(2, 33, 4 + 2 * 16)
    x, z = xz.chunk(2, -1)
    _, B, C = dbc.split((4, 16, 16), -1)
    A, w = -torch.rand(64, 16), torch.randn(64, 4)
    addresses, tensor = [], native._tensor

    def watch(t, alive):
        addresses.append(tensor(t, alive)[0])
        assert not alive, 'copied'
        return addresses[-1], *tensor(t, alive)[1:]

    monkeypatch.setattr(native, '_tensor', watch)
    selective_scan(x, x, A, B, C, None, z, backend='native')
    bidirectional_causal_conv1d(x, (w, w), backend='native')
    one = torch.randn(2, 33, 2)[..., ::2]  # of one state, whose stride does not matter
    selective_scan(x, x, A[:, :1], one, one, backend='native')
    assert {t.data_ptr() for t in (x, z, B, C)} <= set(addresses)


def test_without_the_library(monkeypatch):
    for name, value in zip(('_lib', '_reason'), native._load(None)):
        monkeypatch.setattr(native, name, value)
    report = backend_report()
    assert 'compiler' in report['native']['available'] and report['eager']['serves'][0] == 'cpu'
    inputs = scan_inputs()
    assert relative_error(selective_scan(**inputs), selective_scan_naive(**inputs)) < 1e-5
    with pytest.raises(RuntimeError, match='compiler'):
        selective_scan(**inputs, backend='native')


STUB = """
#include <stdlib.h>
long long timm_ssm_abi(int i) { return (long long[]) {%s}[i]; }
const char* timm_ssm_isa(int i) { abort(); }
int timm_ssm_scan_forward(const void* p) { abort(); }
int timm_ssm_scan_backward(const void* p) { abort(); }
int timm_ssm_conv_forward(const void* p) { abort(); }
int timm_ssm_conv_backward(const void* p) { abort(); }
"""


@pytest.mark.parametrize('other', [None, *range(len(native._ABI)), 'old'])
def test_library_of_another_version(other, tmp_path):
    """A library that differs in version, struct sizes or chunk size, or that lacks a function, is not used."""
    if not shutil.which('cc'):
        pytest.skip('no C compiler')
    abi = [n + 1 if i == other else n for i, n in enumerate(native._ABI)]
    stub = STUB % ', '.join(map(str, abi))
    source, library = tmp_path / 'stub.c', tmp_path / '_native.so'
    source.write_text(stub.replace('timm_ssm_abi', 'timm_ssm_something') if other == 'old' else stub)
    subprocess.run(['cc', '-shared', '-fPIC', source, '-o', library], check=True)
    lib, reason = native._load(library)
    if other is None:
        assert lib is not None and not reason
    else:
        assert lib is None and 'built for another version of timm-ssm' in reason and str(library) in reason


@needs_library
def test_struct_sizes(monkeypatch):
    """What is packed for two directions is as large as the structs of the library."""
    sizes = []
    monkeypatch.setattr(native, '_run', lambda function, dtype, fields: sizes.append(8 * (3 + len(fields))))
    inputs = pairs(scan_inputs(), scan_inputs())
    bidirectional_selective_scan(**inputs, backend='native')
    bidirectional_causal_conv1d(torch.randn(2, 5, 8), (torch.randn(8, 4),) * 2, backend='native')
    assert sizes == [native._lib.timm_ssm_abi(1), native._lib.timm_ssm_abi(2)]


def _wheel_libraries(folder: Path, **env: str):
    source = folder / 'source'
    subprocess.run(['git', 'clone', '-q', ROOT, source], check=True)
    subprocess.run(
        [sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps', '--no-build-isolation', '-w', folder, source],
        check=True, env=dict(os.environ, **env))
    wheel, = folder.glob('*.whl')
    with zipfile.ZipFile(wheel) as z:
        return [name for name in z.namelist() if name.endswith('.so')]


@pytest.mark.slow
def test_install_without_a_compiler(tmp_path):
    assert _wheel_libraries(tmp_path, CC='/bin/false', CXX='/bin/false') == []


@pytest.mark.slow
def test_install_without_openmp(tmp_path):
    compiler = tmp_path / 'c++'
    compiler.write_text('#!/bin/sh\ncase "$*" in *-fopenmp*) exit 1;; esac\nexec g++ "$@"\n')
    compiler.chmod(0o755)
    assert _wheel_libraries(tmp_path, CC=str(compiler), CXX=str(compiler)) == ['timm_ssm/ops/backends/_native.so']
