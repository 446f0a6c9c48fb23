"""What a user writes; mypy holds the package's annotations to it, nothing runs it."""
from typing import Any, Dict, List, Tuple

import timm
import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import timm_ssm
from timm_ssm.models import GroupMamba, MambaVision, StableMamba, STVideoMamba, VideoMamba, VideoMambaPro, Vim
from timm_ssm.ops import (
    backend_report,
    bidirectional_causal_conv1d,
    bidirectional_selective_scan,
    causal_conv1d,
    selective_scan,
)

assert_type(timm_ssm.__version__, str)


def use_ops(x: Tensor, A: Tensor, weight: Tensor) -> None:
    assert_type(selective_scan(x, x, A, x, x), Tensor)
    assert_type(selective_scan(x, x, A, x, x, D=A, z=x, delta_bias=A, delta_softplus=False, reverse=True), Tensor)
    assert_type(selective_scan(x, x, A, x, x, residual=True, mask_diagonal=True, backend='naive'), Tensor)
    assert_type(bidirectional_selective_scan((x, x), (x, x), (A, A), (x, x), (x, x), D=(A, A), z=x), Tensor)
    assert_type(causal_conv1d(x, weight, activation=None, reverse=True, centered=False, backend=None), Tensor)
    assert_type(bidirectional_causal_conv1d(x, (weight, weight), bias=(A, A)), Tuple[Tensor, Tensor])
    selective_scan(x, x, A, x)  # type: ignore[call-arg]
    selective_scan(x, x, A, x, 'C')  # type: ignore[arg-type]
    causal_conv1d(x, weight, activation=True)  # type: ignore[arg-type]
    bidirectional_causal_conv1d(x, weight)  # type: ignore[arg-type]
    for name, entry in backend_report().items():
        assert_type(name, str)
        print(entry['available'], entry['serves'])


def use_models(image: Tensor, clip: Tensor, device: torch.device) -> None:
    models: List[nn.Module] = [
        VideoMamba(embed_dim=16, depth=2, num_classes=10, device=device), Vim(), VideoMambaPro(), StableMamba(),
        STVideoMamba(), MambaVision(), GroupMamba(), timm.create_model('vim_tiny_patch16_224')]
    print([model(image) for model in models])
    for model in (VideoMamba(img_size=(224, 320), num_frames=8, dtype=torch.bfloat16), MambaVision(), GroupMamba()):
        assert_type(model.forward_features(clip), Tensor)
        assert_type(model.forward_head(model.forward_features(clip), pre_logits=True), Tensor)
        assert_type(model.forward(clip), Tensor)
        model.reset_classifier(0, global_pool='avg')
        model.set_grad_checkpointing()
        classifier: nn.Module = model.get_classifier()
        names: Dict[str, Any] = model.group_matcher(coarse=True)
        print(classifier, names)
    VideoMamba().set_input_size((256, 256))
    MambaVision().set_input_size((256, 256))
