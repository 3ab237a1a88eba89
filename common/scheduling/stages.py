"""The vocabulary of a curriculum: a `Stage`, and what can be done to a list of them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from common import ClosedUnitInterval, NonNegativeFloat, PositiveFloat, PositiveInt

# In `Stage.frozen`: every module but the classifier; the running mean and variance of every BatchNorm, by which it then normalises.
BACKBONE, STATISTICS = "backbone", "statistics"
# Sizes that are chosen here are multiples of it, in pixels: the patch of most vision transformers, which take no others.
PATCH = 16


@dataclass(frozen=True)
class Stage:
    """A stretch of training in which nothing changes but the learning rate. Stages have lengths, never positions."""

    epochs: PositiveInt
    """Passes over the stage's share of the data."""
    img_size: PositiveInt = 224
    """Side of the square training image in pixels (`shape: rect`: short side, or side of the square of equal area)."""
    batch_size: PositiveInt = 256
    """Images per process and optimizer step, before accumulation."""
    data_fraction: ClosedUnitInterval = 1.0
    """Share of the training images, at most 1; a smaller share is contained in a larger one."""
    mixup: ClosedUnitInterval | bool = 1.0
    """Share of the stage's epochs, from its first, that use MixUp/CutMix (true = 1.0, false = 0.0)."""
    lr_scale: PositiveFloat | None = None
    """Peak learning rate relative to the first stage's; null = by the linear rule from the stage's own batch."""
    frozen: tuple[str, ...] = ()
    """Module-name prefixes that do not train; "backbone": all but the classifier; "statistics": those of every BatchNorm."""
    shape: Literal["square", "rect"] = "square"
    """square, or rect for batches of one aspect ratio each."""
    strength: NonNegativeFloat = 1.0
    """Multiplies how strongly MixUp, CutMix, Random Erasing and random crops act; 0 = not at all."""


def in_patches(pixels: float) -> int:
    """The multiple of `PATCH` that is nearest to a size, but not 0."""
    return PATCH * max(1, round(pixels / PATCH))


def apportion(epochs: Sequence[int], total: int) -> list[int]:
    """Share `total` epochs out in proportion to `epochs`, at least one each; the sum is `total` if that is enough.

    Largest remainders (Hamilton's method); of equal remainders the later stage's, with the larger images, counts first.
    """
    shares = [count * total / sum(epochs) for count in epochs]
    counts = [max(1, int(share)) for share in shares]
    if sum(counts) > total:
        counts = [1] * len(shares)
    for _ in range(total - sum(counts)):
        counts[max(range(len(counts)), key=lambda i: (round(shares[i] - counts[i], 9), i))] += 1
    return counts


def scale_stages(
    stages: Sequence[Stage],
    epochs: int | None = None,
    img_size: int | None = None,
    batch_size: int | None = None,
) -> list[Stage]:
    """The same curriculum, shorter, smaller or on smaller GPUs: proportions stay.

    Args:
        epochs: of the whole run; each stage keeps at least one.
        img_size: of the largest stage; the others come out as multiples of `PATCH`.
        batch_size: of the stage with the largest images.
    """
    largest = max(stages, key=lambda stage: stage.img_size)
    lengths = [stage.epochs for stage in stages]
    size_scale = (img_size or largest.img_size) / largest.img_size
    batch_scale = (batch_size or largest.batch_size) / largest.batch_size

    scaled = []
    for stage, length in zip(stages, apportion(lengths, epochs or sum(lengths)), strict=True):
        pixels = stage.img_size * size_scale
        size = round(pixels) if size_scale == 1 or stage.img_size == largest.img_size else in_patches(pixels)
        batch = max(1, round(stage.batch_size * batch_scale))
        scaled.append(replace(stage, epochs=length, img_size=size, batch_size=batch))
    return scaled
