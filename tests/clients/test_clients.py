"""Packages that take timm models take these; each test runs where its package is installed (extra `test-clients`)."""
import pytest
import timm
import torch

import timm_ssm  # noqa: F401  registers the models

HIERARCHICAL = {
    'mambavision_tiny': dict(stem_dim=8, embed_dim=16, depths=(1, 1, 2, 2), num_heads=(1, 1, 2, 4)),
    'groupmamba_tiny': dict(stem_dim=8, embed_dims=(16, 32, 48, 64), depths=(1, 1, 1, 1)),
}
ISOTROPIC = dict(embed_dim=48, depth=4, img_size=64)


def check_step(model, loss):
    """The loss is differentiable with regard to all parameters that it depends on, among them the first."""
    loss.backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert next(p for p in model.parameters() if p.requires_grad).grad is not None
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize('decoder', ['Unet', 'FPN', 'UPerNet'])
@pytest.mark.parametrize('name', HIERARCHICAL)
def test_segmentation_models(name, decoder):
    smp = pytest.importorskip('segmentation_models_pytorch')
    model = getattr(smp, decoder)(f'tu-{name}', encoder_weights=None, classes=3, **HIERARCHICAL[name])
    out = model(torch.randn(2, 3, 64, 96))
    assert out.shape == (2, 3, 64, 96)
    check_step(model, torch.nn.functional.cross_entropy(out, torch.zeros(2, 64, 96, dtype=torch.long)))


def test_segmentation_of_an_isotropic_model():
    smp = pytest.importorskip('segmentation_models_pytorch')
    model = smp.DPT(  # its depth is the number of maps that it takes
        'tu-videomamba_tiny_patch16_224', encoder_weights=None, classes=3, dynamic_img_size=True, img_size=64,
        embed_dim=48)
    out = model(torch.randn(2, 3, 64, 64))
    assert out.shape == (2, 3, 64, 64)
    check_step(model, out.square().mean())


class Pyramid(torch.nn.Module):
    """Our maps at strides 4 to 32 as torchvision's detectors want them."""

    def __init__(self, name, out_channels=32):
        super().__init__()
        from torchvision.ops import FeaturePyramidNetwork

        self.body = timm.create_model(name, features_only=True, **HIERARCHICAL[name])
        self.fpn = FeaturePyramidNetwork(self.body.feature_info.channels(), out_channels)
        self.out_channels = out_channels

    def forward(self, x):
        return self.fpn({str(i): y for i, y in enumerate(self.body(x))})


@pytest.mark.parametrize('size', [(96, 128), pytest.param((800, 1216), marks=pytest.mark.slow)])
@pytest.mark.parametrize('name', HIERARCHICAL)
def test_retinanet(name, size):
    from torchvision.models.detection import RetinaNet
    from torchvision.models.detection.anchor_utils import AnchorGenerator

    anchors = AnchorGenerator(((16,), (32,), (64,), (128,)), ((.5, 1., 2.),) * 4)
    model = RetinaNet(Pyramid(name), 2, min_size=size[0], max_size=size[1], anchor_generator=anchors)
    images = [torch.rand(3, size[0] - 7, size[1] - 13), torch.rand(3, size[0] - 30, size[1] - 3)]
    targets = [dict(boxes=torch.tensor([[10., 10, 40, 50]]), labels=torch.tensor([1]))] * 2
    check_step(model, sum(model(images, targets).values()))
    with torch.no_grad():
        assert [set(out) for out in model.eval()(images)] == [{'boxes', 'labels', 'scores'}] * 2


def test_mask_rcnn():
    from torchvision.models.detection import MaskRCNN
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.ops import MultiScaleRoIAlign

    keys = list('0123')
    model = MaskRCNN(
        Pyramid('groupmamba_tiny'), 2, min_size=96, max_size=128,
        rpn_anchor_generator=AnchorGenerator(((16,), (32,), (64,), (128,)), ((.5, 1., 2.),) * 4),
        box_roi_pool=MultiScaleRoIAlign(keys, 7, 2), mask_roi_pool=MultiScaleRoIAlign(keys, 14, 2))
    masks = torch.zeros(1, 90, 125, dtype=torch.uint8)
    masks[:, 20:60, 30:80] = 1
    target = dict(boxes=torch.tensor([[30., 20, 80, 60]]), labels=torch.tensor([1]), masks=masks)
    check_step(model, sum(model([torch.rand(3, 90, 125)], [target]).values()))


def test_transformers():
    """TimmWrapper's classification, saved and loaded again, and its backbone."""
    transformers = pytest.importorskip('transformers')
    pytest.importorskip('transformers.models.timm_wrapper')
    config = transformers.TimmWrapperConfig(
        architecture='videomamba_tiny_patch16_224', num_labels=3, model_args=dict(ISOTROPIC, depth=1))
    model = transformers.TimmWrapperForImageClassification(config)
    out = model(pixel_values=torch.randn(2, 3, 64, 64), labels=torch.tensor([0, 2]))
    assert out.logits.shape == (2, 3)
    check_step(model, out.loss)


def test_torchao():
    """int8 weights change the logits little."""
    quantization = pytest.importorskip('torchao.quantization')
    torch.manual_seed(0)
    model, x = timm.create_model('videomamba_tiny_patch16_224', **ISOTROPIC).eval(), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        want = model(x)
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
        assert type(model.blocks[0].mixer.in_proj.weight) is not torch.nn.Parameter
        assert (model(x) - want).norm() < .05 * want.norm()


def test_captum():
    """Integrated gradients add up to the difference of the logits."""
    attr = pytest.importorskip('captum.attr')
    torch.manual_seed(0)
    model, x = timm.create_model('videomamba_tiny_patch16_224', **ISOTROPIC).eval(), torch.randn(1, 3, 64, 64)
    ours = attr.IntegratedGradients(model).attribute(x, target=3, n_steps=32)
    with torch.no_grad():
        difference = (model(x) - model(torch.zeros_like(x)))[0, 3]
    torch.testing.assert_close(ours.sum(), difference, rtol=.05, atol=.01)


def test_torchinfo():
    torchinfo = pytest.importorskip('torchinfo')
    model = timm.create_model('videomamba_tiny_patch16_224', **ISOTROPIC)
    info = torchinfo.summary(model, (2, 3, 64, 64), verbose=0)
    assert info.total_params == sum(p.numel() for p in model.parameters())
