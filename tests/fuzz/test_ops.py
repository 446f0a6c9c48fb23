"""The ops on random shapes, strides, dtypes and forms, against loops in NumPy that share no code with the package."""
import numpy as np
import pytest
import torch

from timm_ssm.ops import bidirectional_causal_conv1d, bidirectional_selective_scan, causal_conv1d, selective_scan
from timm_ssm.ops.backends import BACKENDS

from ..ops.utils import too_old_to_interpret

#: Largest error allowed, relative to the largest number that it adds to: a rounding of the result, and of sums.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
ON_CPU = [
    name for name, backend in BACKENDS.items()
    if backend.why_unavailable() is None and 'cpu' in (backend.devices or ('cpu',))]


@pytest.fixture(params=ON_CPU)
def backend(request):
    if request.param == 'triton' and too_old_to_interpret():
        pytest.skip(too_old_to_interpret())
    return request.param


def silu(x):
    return x / (1 + np.exp(-x))


def scan(u, delta, A, B, C, D, delta_bias, softplus, reverse, residual, mask):
    """One direction before the gate, one token after the other."""
    batch, length, channels = u.shape
    if B.ndim == 3:
        B, C = B[:, :, None], C[:, :, None]
    group = np.arange(channels) // (channels // B.shape[2])
    y = np.zeros_like(u)
    h = None
    for step in range(length):
        t = length - 1 - step if reverse else step
        dt = delta[:, t] + (0 if delta_bias is None else delta_bias)
        if softplus:
            dt = np.where(dt > 20, dt, np.log1p(np.exp(np.minimum(dt, 20))))
        if h is None:
            h = np.zeros((batch, *A.shape)) + (u[:, t, :, None] if residual else 0)
        decayed = np.exp(dt[..., None] * A) * h
        h = decayed + (dt * u[:, t])[..., None] * B[:, t][:, group]
        read = h if not mask else decayed if step else 0 * h
        y[:, t] = np.einsum('bdn,bdn->bd', read, C[:, t][:, group])
        if D is not None:
            y[:, t] += D * u[:, t]
    return y


def scans(arguments, flags):
    """All directions, the second in reverse, and the gate."""
    n = len(arguments['u'])
    y = sum(
        scan(*(arguments[k][i] if arguments[k] else None for k in ('u', 'delta', 'A', 'B', 'C', 'D', 'delta_bias')),
             flags['delta_softplus'], flags['reverse'] if n == 1 else i == 1, flags['residual'],
             flags['mask_diagonal'] and (n == 1 or i == 1))
        for i in range(n))
    return [y * silu(arguments['z'][0]) if arguments['z'] else y]


def convs(arguments, flags):
    """Every direction: token t meets the tokens from t - before on."""
    x, outs = arguments['x'][0], []
    n, kernel_size = len(arguments['weight']), arguments['weight'][0].shape[1]
    for i, weight in enumerate(arguments['weight']):
        reverse = flags['reverse'] if n == 1 else i == 1
        before = (kernel_size - 1) // 2 if flags['centered'] else kernel_size - 1
        y = np.zeros_like(x)
        for t in range(x.shape[1]):
            for k in range(kernel_size):
                s = t + (before - k) * (1 if reverse else -1)
                if 0 <= s < x.shape[1]:
                    y[:, t] += weight[:, k] * x[:, s]
        y = y + arguments['bias'][i] if arguments['bias'] else y
        outs.append(silu(y) if flags['activation'] else y)
    return outs


def laid_out(x, random):
    """x's values with other strides: sliced, transposed, expanded, or at an odd offset."""
    kind = random.choice(['plain', 'slice', 'every other', 'transposed', 'batch inside', 'offset'])
    if kind == 'slice':
        return torch.cat((x + 1, x, x + 1), -1)[..., x.shape[-1]:2 * x.shape[-1]]
    if kind == 'every other':
        return torch.stack((x, x + 1), -1)[..., 0]
    if kind == 'transposed':
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if kind == 'batch inside' and x.ndim > 2:
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if kind == 'offset':
        return torch.cat((x.new_ones(1), x.flatten()))[1:].view(x.shape)
    return x


def randn(random, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(random.randrange(1 << 32)), dtype=torch.float64)


def sizes(random, backend):
    interpreted = backend == 'triton'
    batch = random.choice([0, 1, 1, 2] if interpreted else [0, 1, 1, 2, 3])
    length = random.choice([0, 1, 2, 5] if interpreted else [0, 1, 2, 31, 32, 33, random.randint(1, 100)])
    return batch, length, random.choice([1, 2, 3, 8, 12, 33] if interpreted else [1, 2, 3, 8, 16, 33, 67, 130])


def scan_case(random, backend):
    batch, length, channels = sizes(random, backend)
    d_state = random.choice([1, 2, 3] if backend == 'triton' else [1, 2, 5, 8, 16, 31])
    groups = random.choice([None, *(g for g in (1, 2, 3, channels) if channels % g == 0)])
    shape = (batch, length, channels)
    shape_B = (batch, length, d_state) if groups is None else (batch, length, groups, d_state)
    n = random.choice([1, 2])
    flags = dict(
        delta_softplus=random.random() < .7, residual=random.random() < .3, mask_diagonal=random.random() < .3,
        reverse=random.random() < .5)

    def each(*shape, given=1.):
        return [randn(random, *shape) for _ in range(n)] if random.random() < given else []

    tensors = dict(
        u=each(*shape), delta=each(*shape), A=[-x.exp() for x in each(channels, d_state)], B=each(*shape_B),
        C=each(*shape_B), D=each(channels, given=.7), delta_bias=each(channels, given=.7),
        z=[randn(random, *shape)] if random.random() < .6 else [])
    if not flags['delta_softplus']:
        tensors['delta'] = [.1 * x.abs() for x in tensors['delta']]
        tensors['delta_bias'] = [.1 * x.abs() for x in tensors['delta_bias']]
    return tensors, flags, n


def conv_case(random, backend):
    batch, length, channels = sizes(random, backend)
    n = random.choice([1, 2])
    flags = dict(
        activation=random.choice(['silu', None]), centered=n == 1 and random.random() < .3,
        reverse=random.random() < .5)
    tensors = dict(
        x=[randn(random, batch, length, channels)],
        weight=[randn(random, channels, random.choice([1, 2, 3, 4, 5, 7]))])
    tensors['weight'] += [randn(random, *tensors['weight'][0].shape) for _ in range(n - 1)]
    tensors['bias'] = [randn(random, channels) for _ in range(n)] if random.random() < .7 else []
    return tensors, flags, n


PARAMETERS = ('A', 'D', 'delta_bias', 'weight', 'bias')


def call(tensors, flags, n, backend):
    """The public function on `tensors`, lists over directions, as a list of outputs."""
    is_scan = 'u' in tensors
    fn = ((selective_scan, bidirectional_selective_scan) if is_scan else (causal_conv1d, bidirectional_causal_conv1d))[
        n - 1]
    both = () if n == 1 else ('u', 'delta', 'A', 'B', 'C', 'D', 'delta_bias', 'weight', 'bias')
    arguments = {k: (tuple(v) if k in both else v[0]) if v else None for k, v in tensors.items()}
    flags = {k: v for k, v in flags.items() if n == 1 or k not in ('reverse', 'centered')}
    out = fn(**arguments, **flags, backend=backend)
    return list(out) if isinstance(out, tuple) else [out]


def close(got, want, tolerance, scale=None):
    if np.size(want):
        error = np.abs(got - want).max()
        limit = tolerance * max(np.abs(want).max() if scale is None else scale, 1e-3)
        assert error <= limit, f'error {error:.3g}, allowed {limit:.3g}'


@pytest.mark.parametrize('make, reference', [(scan_case, scans), (conv_case, convs)], ids=['scan', 'conv'])
def test_against_loops(backend, make, reference, cases):
    """Outputs, and the gradient of every argument along a random direction."""
    for random in cases({'triton': 4, 'naive': 8}.get(backend, 20)):
        tensors, flags, n = make(random, backend)
        dtype = random.choice(list(TOLERANCE))
        acc = torch.float64 if dtype == torch.float64 else torch.float32
        tensors = {
            k: [laid_out(x.to(acc if k in PARAMETERS else dtype), random).requires_grad_() for x in xs]
            for k, xs in tensors.items()}
        shapes = {k: tuple(xs[0].shape) for k, xs in tensors.items() if xs}
        print(f'{dtype} {n} directions {shapes} {flags}')
        wide = {k: [x.detach().double().numpy() for x in xs] for k, xs in tensors.items()}
        want = reference(wide, flags)

        with torch.no_grad():
            again = call(tensors, flags, n, backend)
        outs = call(tensors, flags, n, backend)
        for out, w, a in zip(outs, want, again, strict=True):
            assert out.dtype == dtype and out.shape == w.shape and out.is_contiguous() and torch.equal(out, a)
            close(out.detach().double().numpy(), w, TOLERANCE[dtype])

        grad_outs = [randn(random, *out.shape).to(dtype) for out in outs]
        leaves = [x for xs in tensors.values() for x in xs]
        grads = torch.autograd.grad(outs, leaves, grad_outs)
        grad_outs = [g.double().numpy() for g in grad_outs]
        positions = [(k, i) for k, xs in tensors.items() for i in range(len(xs))]
        for (k, i), leaf, grad in zip(positions, leaves, grads, strict=True):
            assert grad.shape == leaf.shape and grad.dtype == leaf.dtype
            if not leaf.numel() or not outs[0].numel():
                assert not grad.any()
                continue
            along = randn(random, *leaf.shape).numpy()
            ahead, behind = (
                reference(dict(wide, **{k: [x + s * along * (j == i) for j, x in enumerate(wide[k])]}), flags)
                for s in (1e-5, -1e-5))
            slope = sum(((a - b) * g).sum() for a, b, g in zip(ahead, behind, grad_outs)) / 2e-5
            terms = grad.double().numpy() * along
            print('gradient of', k, i)
            close(terms.sum(), slope, 4 * TOLERANCE[dtype] + 1e-7, np.abs(terms).max() * terms.size ** .5)


SPOIL = {
    'longer': lambda x, axis: torch.cat((x, x.new_ones(*x.shape[:axis], 1, *x.shape[axis + 1:])), axis),
    'flat': lambda x, axis: x.flatten() if x.ndim > 1 else x[None],
    'deeper': lambda x, axis: x[..., None, None],
    'integer': lambda x, axis: x.long(),
    'complex': lambda x, axis: x.to(torch.complex128),
    'meta': lambda x, axis: x.to('meta'),
    'sparse': lambda x, axis: x.to_sparse(),
    'list': lambda x, axis: x.tolist(),
    'none': lambda x, axis: None,
}


@pytest.mark.parametrize('make', [scan_case, conv_case], ids=['scan', 'conv'])
def test_refusals(make, cases):
    """One wrong argument, whichever and however wrong, is a ValueError that begins with its name."""
    for random in cases(300):
        tensors, flags, n = make(random, '')
        key = random.choice([k for k, xs in tensors.items() if xs])
        i = random.randrange(len(tensors[key]))
        x = tensors[key][i]
        axis = random.randrange(x.ndim)
        how = random.choice(list(SPOIL))
        alone = n == 1 or key in ('x', 'z')
        if how == 'none' and alone and key in ('D', 'z', 'delta_bias', 'bias'):
            continue  # means that it is absent
        if alone and (
                key in ('u', 'x') and how in ('longer', 'meta')  # then the others are wrong
                or key == 'B' and how == 'deeper'):
            continue
        if key in ('A', 'weight') and how == 'longer' and axis == 1 or (key, i) in (('B', 0), ('u', 0)):
            continue
        print(key, i, how, axis, {k: tuple(xs[0].shape) for k, xs in tensors.items() if xs})
        changed = dict(tensors, **{key: [SPOIL[how](y, axis) if j == i else y for j, y in enumerate(tensors[key])]})
        with pytest.raises(ValueError, match=rf'^{key}(\[{i}\])?: got .*, needs '):
            call(changed, flags, n, None)
