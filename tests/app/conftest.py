import numpy as np
import pytest
import timm
import torch
from PIL import Image

import timm_ssm  # noqa: F401  registers the models
from tests.data.videos import write_video


def checkpoint(folder, name, classes, img_size, num_frames=None, **kwargs):
    """A file as training writes it, of a model with random weights, and the names of its classes beside it."""
    torch.manual_seed(0)
    folder.mkdir()
    sizes = dict(img_size=img_size) if 'patch' in name else {}  # the others take any
    sizes.update(dict(num_frames=num_frames) if num_frames else {})
    model = timm.create_model(name, num_classes=len(classes), **sizes, **kwargs)
    args = dict(
        model=name, num_classes=len(classes), img_size=img_size, num_frames=num_frames, model_kwargs=kwargs,
        mean=[.5] * 3, std=[.5] * 3)
    torch.save(dict(arch=name, state_dict=model.state_dict(), args=args), folder / 'model.pth.tar')
    (folder / 'classes.txt').write_text('\n'.join(classes))
    return str(folder / 'model.pth.tar')


@pytest.fixture(scope='session')
def checkpoints(tmp_path_factory):
    """Small models by what they are: of images, of clips, of a timm Transformer, and without rollout."""
    root = tmp_path_factory.mktemp('checkpoints')
    small, names = dict(embed_dim=32, depth=2), ['ant', 'bee', 'cat', 'dog', 'eel', 'fox']
    return dict(
        image=checkpoint(root / 'image', 'videomamba_tiny_patch16_224', names, 64, **small),
        video=checkpoint(
            root / 'video', 'videomamba_tiny_patch16_f8_224', ['left', 'right'], 32, num_frames=4, **small),
        vit=checkpoint(root / 'vit', 'vit_tiny_patch16_224', names[:3], 64, num_heads=2, **small),
        other=checkpoint(
            root / 'other', 'spatialmamba_tiny', names[:2], 64, depths=(1, 1, 1, 1), embed_dim=8))


@pytest.fixture(scope='session')
def files(tmp_path_factory):
    """An image, a clip, and what is neither."""
    root = tmp_path_factory.mktemp('files')
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (80, 100, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(root / 'image.png')
    Image.fromarray(pixels).convert('L').save(root / 'grey.jpg')
    frames = [Image.fromarray(np.roll(pixels, 9 * i, 1)) for i in range(3)]
    frames[0].save(root / 'moving.gif', save_all=True, append_images=frames[1:])
    write_video(root / 'clip.mp4', num_frames=12)
    (root / 'text.png').write_text('This is no image.')
    (root / 'cut.jpg').write_bytes((root / 'grey.jpg').read_bytes()[:1500])
    return root
