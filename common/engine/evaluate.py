"""Exact evaluation: every validation image counted once, over any number of processes."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.augment import Augment
from common.data.batches import WHOLE, Batches
from common.data.loader import Batch, Loader
from common.model.create import check_size
from common.run.checkpoint import TrainState
from common.run.processes import rank0_errors
from common.run.run import Run

# Evaluation batches between two looks at signals.
ROUNDS_BETWEEN = 10
# The final grid: times the training size, and shares of the shorter side that are kept.
FINAL_SIZES = (1.0, 1.15, 1.3)
FINAL_CROPS = (0.875, 1.0, WHOLE)
# What the grid costs, in evaluations at the training size: one view, and two of them with the mirrored one.
GRID_EVALUATIONS = sum(3 * size**2 for size in FINAL_SIZES) * len(FINAL_CROPS)


@dataclass(frozen=True)
class Score:
    """Mean loss, accuracies in percent, and images and hits by class."""

    loss: float
    top1: float
    top5: float
    class_images: list[int]
    class_hits: list[int]

    @property
    def balanced(self) -> float:
        """Balanced accuracy in percent: the mean of the recalls of all classes that have images."""
        return 100 * fmean(h / n for h, n in zip(self.class_hits, self.class_images, strict=True) if n)


def one_view(model: nn.Module, images_nchw: Tensor) -> Tensor:
    """Logits, by `forward` and not `__call__`: a compiled model would compile anew for the last, smaller batch."""
    return model.forward(images_nchw)


def with_flip(model: nn.Module, images_nchw: Tensor) -> Tensor:
    """Mean logits of an image and its mirror image."""
    return (model.forward(images_nchw) + model.forward(images_nchw.flip(3))) / 2


@torch.inference_mode()
def evaluate(
    run: Run,
    models: Sequence[nn.Module],
    batches: Iterator[Batch],
    num_batches: int,
    num_images: int,
    augment: Augment,
    transform: Callable[[nn.Module, Tensor], Tensor] = one_view,
) -> list[Score]:
    """Score several models on the same batches, which are decoded once; a collective.

    Args:
        models: not wrapped; left in eval mode.
        batches: this process's, of which `num_batches` are taken.
        num_images: of all processes.
        transform: from normalised images [B, 3, H, W] to logits.

    Raises:
        Interrupted: a process has been told to stop.
        RuntimeError: the processes together did not see each image exactly once.
    """
    accelerator = run.accelerator
    sums = torch.zeros(len(models), 2, dtype=torch.float64, device=accelerator.device)
    # Images by class, and below them each model's hits.
    counts = torch.zeros(1 + len(models), augment.num_classes, dtype=torch.int64, device=accelerator.device)
    for model in models:
        model.eval()
    # Processes may have different numbers of batches, and all have to ask equally often.
    for number in range(run.votes.largest(num_batches)[0]):
        if number % ROUNDS_BETWEEN == 0:
            run.stop_if_asked()
        if number >= num_batches:
            continue
        images_nchw, labels, *_ = next(batches)
        images_nchw = augment.normalise(images_nchw)
        counts[0].index_add_(0, labels, torch.ones_like(labels))
        for row, right, model in zip(sums, counts[1:], models, strict=True):
            with accelerator.autocast():
                logits = transform(model, images_nchw).float()
            hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
            loss = F.cross_entropy(logits, labels, reduction="sum")
            row += torch.stack([loss, hits.sum()])
            right.index_add_(0, labels, hits[:, 0].to(torch.int64))
    images, *rights = accelerator.reduce(counts, "sum").tolist()
    if (count := sum(images)) != num_images:
        raise RuntimeError(f"evaluated {count} of {num_images} images")
    return [
        Score(loss / count, 100 * sum(right) / count, 100 * top5 / count, images, right)
        for (loss, top5), right in zip(accelerator.reduce(sums, "sum").tolist(), rights, strict=True)
    ]


def final_grid(run: Run, state: TrainState, augment: Augment, batches: Batches, loader: Loader) -> None:
    """Try the finished weights at larger sizes, other crops and flipped (FixRes, Touvron et al., 2019)."""
    # --patience may have ended the run before its last stage.
    plan, (index, _) = batches.plan, batches.plan.locate(state.progress.step - 1)
    stage, batch_size = plan.stages[index], plan.micro_batch(index)
    models = {"raw": state.model} | ({"ema": state.ema.module} if state.ema is not None else {})
    # Streamed shards cannot be sorted by shape.
    crops = FINAL_CROPS if batches.train.group_rows is None else FINAL_CROPS[:-1]
    larger = (8 * round(stage.img_size * factor / 8) for factor in FINAL_SIZES if factor > 1)
    rows = []
    for size, crop in itertools.product(dict.fromkeys([stage.img_size, *larger]), crops):
        items = batches.eval_items(size, batch_size, crop)
        shapes = {(item.height, item.width) for item in items}
        # Some transformers take no other size than training's. Of rare shapes not every process has an image.
        if run.votes.largest(int(any(check_size(state.model, *shape) for shape in shapes)))[0]:
            continue
        for flip, transform in (("no", one_view), ("yes", with_flip)):
            stream, count = loader.stream(items), len(batches.val)
            scores = evaluate(run, [*models.values()], stream, len(items), count, augment, transform)
            for name, score in zip(models, scores, strict=True):
                row = {"weights": name, "img_size": size, "crop": "whole" if crop == WHOLE else crop}
                rows.append({**row, "flip": flip, "top1": score.top1, "top5": score.top5})
    best = max(rows, key=lambda row: row["top1"])
    form = "{weights:>8}{img_size:>6} px{crop!s:>7}{flip:>6}{top1:>8.2f}{top5:>8.2f}"
    run.log.info("final evaluation: weights, size, crop, flip, top-1, top-5; last, the best for deployment")
    for row in (*rows, best):
        run.log.info("%s", form.format(**row))
    with rank0_errors():
        if run.is_main:
            run.records.write_json("final_eval.json", {"rows": rows, "best": best})
