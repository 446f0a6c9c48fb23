"""Every family trains under bfloat16 autocast, on photographs of handwritten digits."""
import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from torch.nn import functional as F

import timm_ssm

MODELS = {
    'videomamba_tiny_patch16_224': dict(img_size=32, patch_size=8, embed_dim=48, depth=4),
    'vim_tiny_patch16_224': dict(img_size=32, patch_size=8, embed_dim=48, depth=4),
    'stablemamba_tiny_patch16_224': dict(img_size=32, patch_size=8, embed_dim=48, depth=4, attn_every=4, num_heads=3),
    'videomambapro_tiny_patch16_224': dict(img_size=32, patch_size=8, embed_dim=48, depth=4),
    'stvideomamba_tiny_patch16_f16_224': dict(img_size=32, patch_size=8, embed_dim=48, depth=4, num_frames=4),
    'mambavision_tiny': dict(img_size=32, stem_dim=8, embed_dim=16, depths=(1, 1, 2, 2), num_heads=(1, 1, 2, 4)),
    'groupmamba_tiny': dict(stem_dim=8, embed_dims=(16, 32, 48, 64), depths=(1, 1, 1, 1), mlp_ratios=(2, 2, 2, 2)),
    'vmamba_tiny': dict(embed_dims=(16, 32), depths=(1, 1)),
    'spatialmamba_tiny': dict(embed_dim=8, depths=(1, 1)),
    'stable_groupmamba_small': dict(
        stem_dim=8, embed_dims=(16, 32, 48, 64), depths=(1, 1, 1, 1), mlp_ratios=(2, 2, 2, 2), attn_every=1),
}


def test_every_family_is_here():
    assert {type(timm.create_model(n, device='meta', **a)).__name__ for n, a in MODELS.items()} == set(
        timm_ssm.models.__all__)


@pytest.fixture(scope='module')
def digits():
    data = pytest.importorskip('sklearn.datasets').load_digits()
    images = torch.from_numpy(data.images).float()[:, None] / 8 - 1
    return F.interpolate(images, size=(32, 32), mode='bilinear').expand(-1, 3, -1, -1), torch.from_numpy(data.target)


@pytest.fixture
def one_thread():
    """Models this small only wait for a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize('name', MODELS)
def test_bf16_training(name, digits, one_thread):
    """200 steps: losses, gradients, parameters and buffers stay finite, and unseen digits are told apart."""
    images, labels = digits
    if name.startswith('stvideomamba'):  # four frames of a digit that moves to the right
        images = torch.stack([images.roll(t, dims=-1) for t in range(4)], dim=2)
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, drop_path_rate=.1, **MODELS[name])
    optimizer = create_optimizer_v2(model, 'adamw', lr=2e-3, weight_decay=.05)
    train = 1500
    model.train()
    for step in range(200):
        batch = torch.randint(train, (16,))
        with torch.autocast('cpu', torch.bfloat16):
            loss = F.cross_entropy(model(images[batch]).float(), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
        assert loss.isfinite() and norm.isfinite(), f'step {step}: loss {loss}, gradient norm {norm}'
        optimizer.step()
    assert all(v.isfinite().all() for v in model.state_dict().values())
    model.eval()
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        accuracy = (model(images[train:]).argmax(1) == labels[train:]).float().mean().item()
    assert accuracy > .4, accuracy  # chance is .1
