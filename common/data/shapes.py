"""The shapes of rectangular batches, and which image goes into which.

Only the logarithm of an aspect (width / height) is used: cropping from aspect a to b loses the share
1 - exp(-|log a - log b|) of the area, so the shape that loses least is the nearest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from common.data.rng import ASPECT, uniforms

if TYPE_CHECKING:
    from common.data.batches import ViewSettings
    from common.data.sources.base import Source
    from common.scheduling import Stage

Mode = Literal["short", "constant"]


def choose_shapes(
    sizes: np.ndarray,
    target_size: int,
    mode: Mode,
    max_buckets: int = 9,
    multiple: int | None = None,
    max_aspect: float = 2.0,
) -> np.ndarray:
    """Choose the shapes that lose least of the images' area to cropping: int32 [K, 2], ordered by aspect.

    `sizes`: height and width of the original images, int [N, 2].
    `mode`: "short" holds the shorter side at `target_size` pixels; "constant" holds the area between 1/16
        less and 1/32 more than the square's.
    `multiple`: of which sides are multiples, unless they equal the target. By default 32 from 224 pixels on,
        the stride of the usual networks, so that no feature map is rounded up; below, the largest power of
        two that still cuts the target into seven, as 32 does 224, since 64 by 32 leaves next to no choice.
    `max_aspect`: the limit of shapes; images beyond it are cropped. At 2 a "short" batch takes at most twice
        the square's memory, and few photographs are longer.

    The choice is optimal, by dynamic programming over the candidates in the order of their aspect. Each shape
    costs a warm-up and a compiled plan, so the fewest are taken that lose at most 0.1 % of the area more.
    """
    multiple = multiple or min(32, 2 ** int(np.log2(max(target_size / 7, 1))))
    candidates = _candidate_shapes(target_size, mode, multiple, max_aspect)
    # Aspects to the nearest 0.4 %: a few hundred distinct ones, however many images.
    aspects, images = np.unique(np.rint(log_aspect(sizes) * 256) / 256, return_counts=True)
    # A sentinel at either end stands for "no shape on this side", where everything is lost.
    ends = np.concatenate([[-np.inf], log_aspect(candidates), [np.inf]])
    lost = images[:, None] * area_lost(aspects[:, None], ends)

    def lost_between(i: int, j: int) -> float:
        """Area lost by the images between candidates i and j if both are chosen and none between them."""
        inside = (aspects > ends[i]) & (aspects <= ends[j])
        return float(np.minimum(lost[inside, i], lost[inside, j]).sum()) if i < j else np.inf

    between = [[lost_between(i, j) for j in range(len(ends))] for i in range(len(ends))]
    inner = range(1, len(ends) - 1)
    # paths[j]: of all choices of k candidates that end with the j-th, the one that has lost least so far.
    paths = [(between[0][j], [j]) for j in inner]
    best = []
    for _ in range(min(max_buckets, len(candidates))):
        best.append(min((loss + between[path[-1]][-1], path) for loss, path in paths))
        paths = [min((loss + between[path[-1]][j], [*path, j]) for loss, path in paths) for j in inner]
    good_enough = min(loss for loss, _ in best) + 0.001 * len(sizes)
    chosen = next(path for loss, path in best if loss <= good_enough)
    return candidates[np.array(chosen) - 1]


def stage_shapes(stage: Stage, train: Source, settings: ViewSettings) -> list[tuple[int, int]]:
    """Heights and widths that training batches of a stage can have."""
    if stage.shape == "square":
        return [(stage.img_size, stage.img_size)]
    shapes = choose_shapes(train.sizes(), stage.img_size, settings.rect_area)
    return [(height, width) for height, width in shapes.tolist()]


def _candidate_shapes(target: int, mode: Mode, multiple: int, max_aspect: float) -> np.ndarray:
    """List the shapes a bucket may have, int32 [C, 2], ordered by aspect; the square is always among them."""
    grid = range(multiple, int(target * max_aspect) + 1, multiple)
    if mode == "short":
        pairs = [(target, long) for long in grid if long > target]
    else:
        pairs = [
            (short, long)
            for short in grid
            for below in [target**2 // short // multiple * multiple]
            for long in (below, below + multiple)
            if short < long <= short * max_aspect and 15 / 16 <= short * long / target**2 <= 33 / 32
        ]
    shapes = np.array([(target, target), *pairs, *[pair[::-1] for pair in pairs]], np.int32)
    return shapes[np.argsort(log_aspect(shapes))]


ASPECT_JITTER = 4 / 3  # docs/rectangular.md tells what less and more of it did


def log_aspect(sizes: np.ndarray) -> np.ndarray:
    return np.log(sizes[:, 1] / sizes[:, 0])


def area_lost(image: np.ndarray, shape: np.ndarray) -> np.ndarray:
    """The share of an image outside the largest box of a shape's aspect; both are logarithms of aspects."""
    return 1 - np.exp(-np.abs(image - shape))


def assign(sizes: np.ndarray, shapes: np.ndarray) -> np.ndarray:
    """Give each image (int [N, 2]) the shape (int [K, 2]) that loses least of it: int16 [N], its row."""
    aspects = log_aspect(shapes)
    return np.searchsorted((aspects[1:] + aspects[:-1]) / 2, log_aspect(sizes)).astype(np.int16)


def jittered(sizes: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """Images (int [N, 2]) as if each were at random up to `ASPECT_JITTER` times wider or narrower: float64 [N, 2].

    Aspect ratio goes with content, and a batch of one aspect would be a batch of few classes, from which BatchNorm
    learns statistics that no evaluation repeats. Random square crops vary the aspect as much (torchvision's 3/4 to 4/3).
    """
    draws = uniforms(seed, epoch, np.arange(len(sizes)), ASPECT, 1)[:, 0]
    factors = ASPECT_JITTER ** (draws - 0.5)  # of each side, so its square of the aspect
    return np.stack([sizes[:, 0] / factors, sizes[:, 1] * factors], 1)


class Bucket(NamedTuple):
    """One shape and what it does to its images."""

    height: int
    width: int
    share: float  # of all images
    lost: float  # mean share of its images' area that is cropped away to get its aspect


def bucket_table(sizes: np.ndarray, shapes: np.ndarray) -> list[Bucket]:
    """Measure each shape (int [K, 2]) on images of the given sizes (int [N, 2])."""
    bucket = assign(sizes, shapes)
    images = np.bincount(bucket, minlength=len(shapes))
    lost = area_lost(log_aspect(sizes), log_aspect(shapes)[bucket])
    mean_lost = np.bincount(bucket, lost, minlength=len(shapes)) / np.maximum(images, 1)
    columns = (*shapes.T, images / len(sizes), mean_lost)
    return [Bucket(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]


def format_buckets(buckets: list[Bucket]) -> str:
    """Write the table for the console, with a line for all images."""
    pixels = sum(bucket.share * bucket.height * bucket.width for bucket in buckets)
    lost = sum(bucket.share * bucket.lost for bucket in buckets)
    lines = [f"{b.height:>5} × {b.width:<5}{b.share:>8.1%}{b.lost:>8.1%}" for b in buckets]
    header = f"{'high':>5} × {'wide':<5}{'images':>8}{'lost':>8}"
    return "\n".join([header, *lines, f"{'all':<13}{1:>8.1%}{lost:>8.1%}   {pixels:,.0f} pixels per image"])
