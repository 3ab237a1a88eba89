"""Exact evaluation: every validation image counted once, over any number of processes."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F

from common.augment import Augment
from common.data.loader import Batch


@dataclass(frozen=True)
class Score:
    """Mean loss and accuracies in percent over `images` images."""

    loss: float
    top1: float
    top5: float
    images: int


def average_buffers(model: nn.Module, accelerator: Accelerator) -> None:
    """Give every process the mean of all processes' BatchNorm statistics, so that all evaluate the same model."""
    if accelerator.num_processes == 1:
        return
    for buffer in model.buffers():
        if buffer.is_floating_point():
            torch.distributed.all_reduce(buffer)
            buffer /= accelerator.num_processes


@torch.inference_mode()
def evaluate(
    models: Sequence[nn.Module],
    batches: Iterator[Batch],
    num_batches: int,
    num_images: int,
    accelerator: Accelerator,
    augment: Augment,
    *,
    rounds: int = 0,
    between: Callable[[], None] = lambda: None,
    transform: Callable[[nn.Module, Tensor], Tensor] = lambda model, images: model.forward(images),
) -> list[Score]:
    """Score several models on the same batches, which are decoded once.

    Args:
        models: unwrapped models (raw weights, EMA); left in eval mode.
        batches: this process's batches; `num_batches` of them are taken.
        num_images: size of the whole validation set.
        augment: knows how to normalise.
        rounds: most batches that any process has.
        between: called before each of the rounds, with or without a batch, so it may be a collective.
        transform: from normalised images [B, 3, H, W] to logits. `forward` and not `__call__`, so that a compiled
            model evaluates eagerly: the last, smaller batch would cost a compilation of its own.

    Raises:
        RuntimeError: the processes together did not see each image exactly once.
    """
    sums = torch.zeros(len(models), 4, dtype=torch.float64, device=accelerator.device)
    for model in models:
        model.eval()
    for number in range(max(rounds, num_batches)):
        between()
        if number >= num_batches:
            continue
        images_nchw, labels, *_ = next(batches)
        images_nchw = augment.normalise(images_nchw)
        for row, model in zip(sums, models, strict=True):
            with accelerator.autocast():
                logits = transform(model, images_nchw).float()
            hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
            row += torch.stack(
                [F.cross_entropy(logits, labels, reduction="sum"), hits[:, 0].sum(), hits.sum(), hits.new_tensor(len(labels), dtype=torch.float32)]
            )  # fmt: skip
    if accelerator.num_processes > 1:
        torch.distributed.all_reduce(sums)
    scores = []
    for loss, top1, top5, count in sums.tolist():
        if count != num_images:
            raise RuntimeError(f"evaluated {count:.0f} of {num_images} images")
        scores.append(Score(loss / count, 100 * top1 / count, 100 * top5 / count, int(count)))
    return scores
