"""Packages that take timm models take these; each test runs where its package is installed (extra `test-clients`)."""
import functools

import pytest
import timm
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

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


@pytest.mark.parametrize('size', [(96, 128), pytest.param((800, 1216), marks=pytest.mark.slow)])
def test_mask_rcnn(size):
    from torchvision.models.detection import MaskRCNN
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.ops import MultiScaleRoIAlign

    keys = list('0123')
    model = MaskRCNN(
        Pyramid('groupmamba_tiny'), 2, min_size=size[0], max_size=size[1],
        rpn_anchor_generator=AnchorGenerator(((16,), (32,), (64,), (128,)), ((.5, 1., 2.),) * 4),
        box_roi_pool=MultiScaleRoIAlign(keys, 7, 2), mask_roi_pool=MultiScaleRoIAlign(keys, 14, 2))
    height, width = size[0] - 6, size[1] - 3
    masks = torch.zeros(1, height, width, dtype=torch.uint8)
    masks[:, 20:60, 30:80] = 1
    target = dict(boxes=torch.tensor([[30., 20, 80, 60]]), labels=torch.tensor([1]), masks=masks)
    images = [torch.rand(3, height, width)]
    check_step(model, sum(model(images, [target]).values()))
    with torch.no_grad():
        out, = model.eval()(images)
    assert out['masks'].shape[1:] == (1, height, width)


def transformers_model(**kwargs):
    transformers = pytest.importorskip('transformers')
    pytest.importorskip('transformers.models.timm_wrapper')
    return transformers.TimmWrapperForImageClassification(transformers.TimmWrapperConfig(
        architecture='videomamba_tiny_patch16_224', model_args=dict(ISOTROPIC, depth=1), **kwargs))


def test_transformers(tmp_path):
    """TimmWrapper's classification, and the same from the folder that it saves, by its pipeline."""
    model = transformers_model(num_labels=3)
    out = model(pixel_values=torch.randn(2, 3, 64, 64), labels=torch.tensor([0, 2]))
    assert out.logits.shape == (2, 3)
    check_step(model, out.loss)

    from transformers import TimmWrapperImageProcessor, pipeline
    cfg = dict(timm.get_pretrained_cfg('videomamba_tiny_patch16_224').to_dict(), input_size=(3, 64, 64))
    processor = TimmWrapperImageProcessor(pretrained_cfg=cfg)
    model.eval().save_pretrained(tmp_path)
    classify = pipeline('image-classification', model=str(tmp_path), image_processor=processor)
    image = Image.new('RGB', (90, 70), 'teal')
    with torch.no_grad():
        expected = model(**processor(image)).logits.softmax(-1)[0]
    for answer in classify(image):
        index = int(answer['label'].removeprefix('LABEL_'))
        torch.testing.assert_close(answer['score'], float(expected[index]), rtol=1e-4, atol=1e-6)


def test_transformers_trainer(tmp_path):
    """One step changes the projections."""
    model = transformers_model(num_labels=3)
    pytest.importorskip('accelerate')
    from transformers import Trainer, TrainingArguments

    before = {name: value.clone() for name, value in model.named_parameters()}
    data = [dict(pixel_values=torch.randn(3, 64, 64), labels=i % 3) for i in range(4)]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=1, per_device_train_batch_size=4, learning_rate=1e-2, warmup_steps=0, report_to=[],
        save_strategy='no', use_cpu=True, disable_tqdm=True)
    assert Trainer(model, arguments, train_dataset=data).train().metrics['train_loss'] > 0
    assert all(
        (value != before[name]).any() for name, value in model.named_parameters()
        if name.endswith(('in_proj.weight', 'out_proj.weight')))


def test_transformers_backbone(monkeypatch):
    """Three maps of a hierarchical model for RT-DETR, on images that are not square."""
    transformers = pytest.importorskip('transformers')
    kwargs = HIERARCHICAL['groupmamba_tiny']
    monkeypatch.setattr(timm, 'create_model', functools.partial(timm.create_model, **kwargs))
    config = transformers.RTDetrConfig(
        backbone_config=transformers.TimmBackboneConfig(backbone='groupmamba_tiny', out_indices=[1, 2, 3]),
        encoder_in_channels=kwargs['embed_dims'][1:], encoder_hidden_dim=32, encoder_ffn_dim=32, d_model=32,
        decoder_in_channels=(32, 32, 32), decoder_ffn_dim=32, decoder_layers=1, num_queries=10, num_denoising=0,
        num_labels=2)
    model = transformers.RTDetrForObjectDetection(config)
    labels = [dict(class_labels=torch.tensor([1]), boxes=torch.tensor([[.5, .5, .2, .3]]))]
    out = model(pixel_values=torch.rand(1, 3, 96, 160), labels=labels)
    assert out.pred_boxes.shape == (1, 10, 4)
    out.loss.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.model.backbone.parameters())


def test_effdet(monkeypatch):
    effdet = pytest.importorskip('effdet')
    small = functools.partial(timm.create_model, **HIERARCHICAL['groupmamba_tiny'])
    monkeypatch.setattr(effdet.efficientdet, 'create_model', small)
    config = effdet.get_efficientdet_config('efficientdet_d0')
    config.update(
        backbone_name='groupmamba_tiny', backbone_indices=(1, 2, 3), backbone_args={}, image_size=(128, 192),
        num_classes=2)
    model = effdet.DetBenchTrain(effdet.EfficientDet(config, pretrained_backbone=False), config)
    target = dict(bbox=torch.tensor([[[10., 10, 90, 80]]]), cls=torch.tensor([[1.]]))
    check_step(model, model(torch.rand(1, 3, 128, 192), target)['loss'])


@pytest.mark.parametrize('name, kwargs', [('videomamba_tiny_patch16_224', ISOTROPIC), *HIERARCHICAL.items()])
def test_fastai(name, kwargs):
    """The model that `vision_learner` makes, with fastai's head."""
    pytest.importorskip('fastai')
    from fastai.vision.learner import create_timm_model

    model, cfg = create_timm_model(name, 3, pretrained=False, **kwargs)
    out = model(torch.randn(2, 3, 64, 64))
    assert out.shape == (2, 3) and cfg['architecture'] == name
    check_step(model, out.square().mean())


def test_open_clip(monkeypatch):
    open_clip = pytest.importorskip('open_clip')
    monkeypatch.setattr(timm, 'create_model', functools.partial(timm.create_model, **ISOTROPIC))
    tower = dict(timm_model_name='videomamba_tiny_patch16_224', timm_pool='', timm_proj='linear', image_size=64)
    clip = open_clip.CLIP(16, tower, dict(width=32, heads=2, layers=1))
    image, text, scale = clip(torch.randn(2, 3, 64, 64), torch.randint(9, (2, 77)))
    assert image.shape == text.shape == (2, 16)
    check_step(clip.visual, (scale * image @ text.T).square().mean())


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


def test_counts():
    """torchinfo counts all parameters. fvcore, which counts multiplications of matrices and convolutions, counts half
    of what PyTorch's counter does without the scan, the short convolution included."""
    model, x = timm.create_model('videomamba_tiny_patch16_224', **ISOTROPIC).eval(), torch.randn(1, 3, 64, 64)
    torchinfo = pytest.importorskip('torchinfo')
    info = torchinfo.summary(model, (2, 3, 64, 64), verbose=0)
    assert info.total_params == sum(p.numel() for p in model.parameters())
    nn = pytest.importorskip('fvcore.nn')
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x)
    counts = counter.get_flop_counts()['Global']
    ours = sum(n for op, n in counts.items() if 'selective_scan' not in str(op))
    theirs = nn.FlopCountAnalysis(model, x).unsupported_ops_warnings(False).by_operator()
    assert 2 * (theirs['linear'] + theirs['conv']) == ours
