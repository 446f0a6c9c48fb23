"""Whether a map of relevance is any good: deletion and insertion, with Grad-CAM to compare with."""
from typing import List, NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import nn

from ..training.evaluation import evaluating
from .overlay import to_size
from .record import Record
from .tokens import TokenLayout


class Curves(NamedTuple):
    """Probabilities of the class while pixels go or come, those of most relevance first."""
    share: torch.Tensor  # (steps + 1,), of the pixels that are gone, or there
    deletion: torch.Tensor  # (B, steps + 1)
    insertion: torch.Tensor  # (B, steps + 1)

    @property
    def deletion_area(self) -> torch.Tensor:
        """Mean height of the deletion curves (B,): the lower, the better the map."""
        return torch.trapezoid(self.deletion, self.share, dim=1)

    @property
    def insertion_area(self) -> torch.Tensor:
        """Mean height of the insertion curves (B,): the higher, the better the map."""
        return torch.trapezoid(self.insertion, self.share, dim=1)


@torch.no_grad()
def deletion_insertion(
        model: nn.Module,
        x: torch.Tensor,
        relevance: torch.Tensor,
        classes: Optional[torch.Tensor] = None,
        steps: int = 32,
        batch_size: int = 16,
) -> Curves:
    """Take the pixels of inputs away, or put them back, in the order of their relevance.

    See section 3.2 of RISE (https://arxiv.org/abs/1806.07421). A pixel that is away has the mean colour, 0 of the
    normalised input.

    Args:
        model: Classifier.
        x: Its input: images (B, C, H, W), or clips (B, C, T, H, W).
        relevance: Maps (B, h, w), or (B, t, h, w) for clips, which are interpolated to the pixels.
        classes: Whose probability is followed (B,); the likeliest of each input if None.
        steps: Times that as many pixels go, or come.
        batch_size: Inputs to run at once.
    """
    relevance = to_size(relevance.to(x.device), x[:, 0].shape).flatten(1)
    rank = relevance.argsort(dim=1, descending=True, stable=True).argsort(dim=1).view_as(x[:, 0])
    share = torch.linspace(0, 1, steps + 1, device=x.device)
    deleted: List[torch.Tensor] = []
    with evaluating(model):
        if classes is None:
            classes = torch.cat([model(part).argmax(-1) for part in x.split(batch_size)])
        for sample, ranks, label in zip(x, rank, classes):
            taken = ranks < (share * ranks.numel()).round().view(-1, *(1,) * ranks.ndim)
            variants = torch.cat([sample * ~taken[:, None], sample * taken[:, None]])
            deleted.append(torch.cat([
                model(part).float().softmax(-1)[:, label] for part in variants.split(batch_size)]))
    curves = torch.stack(deleted)
    return Curves(share, curves[:, :steps + 1], curves[:, steps + 1:])


def grad_cam(model: nn.Module, x: torch.Tensor, classes: Optional[torch.Tensor] = None) -> torch.Tensor:
    """Grad-CAM (https://arxiv.org/abs/1610.02391) of the last stage's map, or of what the last block's mixer is given.

    Args:
        model: As of `rollout`, any of its poolings.
        x: As of `rollout`.
        classes: Whose logit is looked at (B,); the likeliest of each input if None.

    Returns:
        Maps (B, h, w), or (B, t, h, w) for clips.
    """
    layout = TokenLayout(model, x)
    if layout.stages:
        layer = model.stages[-1]
    else:
        block = model.blocks[-1]
        layer = block.norm1 if hasattr(block, 'norm1') else block.norm
    found: List[torch.Tensor] = []
    hook = layer.register_forward_hook(lambda module, args, output: found.append(output))
    try:
        with evaluating(model), torch.enable_grad():
            logits = model(x.detach().requires_grad_())
    finally:
        hook.remove()
    if classes is None:
        classes = logits.argmax(-1)
    features, = found
    gradient, = torch.autograd.grad(logits.gather(1, classes[:, None]).sum(), features)
    if layout.stages:
        return F.relu((features * gradient.mean((2, 3), keepdim=True)).sum(1)).detach()
    cam = F.relu((features * gradient.mean(1, keepdim=True)).sum(-1)).detach()
    return layout.to_map(Record('', layer, (), {}), cam)
