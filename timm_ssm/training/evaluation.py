"""The accuracy of a model."""
from contextlib import contextmanager, nullcontext
from typing import Callable, Dict, Iterable, Iterator, Optional

import torch
import torch.nn.functional as F
from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """A context in which a model is in eval mode; then each module is in the mode that it was in."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def evaluate(
        model: nn.Module,
        loader: Iterable,
        device: torch.device,
        autocast: Callable = nullcontext,
        channels_last: bool = False,
        num_samples: Optional[int] = None,
        distributed: bool = False,
) -> Dict[str, float]:
    """Mean cross-entropy `loss`, and `top1` and `top5` in percent; with fewer than 5 classes top5 is 100.

    Args:
        model: Returns logits (batch, num_classes); left in eval mode.
        loader: Yields images (batch, channels, height, width) and class indices (batch,).
        device: Where the model is.
        autocast: Makes the context to run the model in.
        channels_last: Give the model channels-last images.
        num_samples: Images to count. A distributed sampler pads the share of each process with images of others; they
            run through the model, to keep the processes in step, but do not count.
        distributed: Sum over the processes of the default group.
    """
    model.eval()
    model_dtype = next(model.parameters()).dtype
    dtype = torch.float32 if device.type == 'mps' else torch.float64
    seen, totals = 0, torch.zeros(3, dtype=dtype, device=device)  # loss, top-1 hits, top-5 hits
    with torch.inference_mode():
        for input, target in loader:
            input, target = input.to(device, model_dtype), target.to(device)
            if channels_last:
                input = input.contiguous(memory_format=torch.channels_last)
            with autocast():
                output = model(input)
            if num_samples is not None:
                output, target = output[:num_samples - seen], target[:num_samples - seen]
            seen += len(target)
            hits = output.topk(min(5, output.shape[1]), dim=1).indices == target[:, None]
            loss = F.cross_entropy(output.float(), target, reduction='sum')
            totals += torch.stack([loss, hits[:, :1].sum(), hits.sum()])
    totals = torch.cat([totals, totals.new_tensor([seen])])
    if distributed:
        torch.distributed.all_reduce(totals)
    loss, top1, top5, count = totals.tolist()
    if not count:
        raise ValueError('there is no image to evaluate on')
    return dict(loss=loss / count, top1=100 * top1 / count, top5=100 * top5 / count)
