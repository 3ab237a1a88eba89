"""The shapes of rectangular batches, and which image goes into which.

Only the logarithm of an aspect (width / height) is used: cropping from aspect a to b loses the share
1 - exp(-|log a - log b|) of the area, so the shape that loses least is the nearest.
"""

from typing import Literal

import numpy as np

from common.data.rng import ASPECT, uniforms

MAX_SHAPES = 9
# Images beyond it are cropped. At 2 a batch of one short side takes at most twice the square's memory, and few photographs are longer.
MAX_ASPECT = 2.0
ASPECT_JITTER = 4 / 3  # docs/rectangular.md tells what less and more of it did


def choose_shapes(sizes: np.ndarray, target_size: int, mode: Literal["short", "constant"]) -> np.ndarray:
    """Choose shapes that lose little of the area of images (`sizes` int [N, 2]) to cropping: int32 [K, 2], ordered by aspect.

    Mode "short" holds the shorter side at `target_size` pixels, "constant" the area between 1/16 less and 1/32 more than
    the square's.

    Each shape costs a warm-up and a compiled plan. So the choice begins with all candidates and drops the one that
    is missed least, down to `MAX_SHAPES`, and further while that loses no more than 0.1 % of the area in all. On
    600 random sets of aspects nine shapes lost 0.01 % more than the best nine on average, 0.16 % at most.
    """
    shapes = _candidate_shapes(target_size, mode)
    # Aspects to the nearest 0.4 %: a few hundred distinct ones, however many images.
    aspects, images = np.unique(np.rint(log_aspect(sizes) * 256) / 256, return_counts=True)
    lost = images[:, None] * area_lost(aspects[:, None], log_aspect(shapes))
    limit = lost.min(axis=1).sum() + 0.001 * len(sizes)
    while len(shapes) > 1:
        without = [np.delete(lost, k, axis=1).min(axis=1).sum() for k in range(len(shapes))]
        cheapest = int(np.argmin(without))
        if len(shapes) > MAX_SHAPES:
            limit = without[cheapest] + 0.001 * len(sizes)
        elif without[cheapest] > limit:
            break
        shapes, lost = np.delete(shapes, cheapest, axis=0), np.delete(lost, cheapest, axis=1)
    return shapes


def _candidate_shapes(target: int, mode: str) -> np.ndarray:
    """List the shapes a bucket may have, int32 [C, 2], ordered by aspect; the square is always among them.

    Other sides are multiples of 32 from 224 pixels on, the stride of the usual networks, so that no feature map is
    rounded up; below, of the largest power of two that still cuts the target into seven, as 32 does 224, since 64 by
    32 leaves next to no choice.
    """
    multiple = min(32, 2 ** int(np.log2(max(target / 7, 1))))
    grid = range(multiple, int(target * MAX_ASPECT) + 1, multiple)
    if mode == "short":
        pairs = [(target, long) for long in grid if long > target]
    else:
        pairs = [
            (short, long)
            for short in grid
            for below in [target**2 // short // multiple * multiple]
            for long in (below, below + multiple)
            if short < long <= short * MAX_ASPECT and 15 / 16 <= short * long / target**2 <= 33 / 32
        ]
    shapes = np.array([(target, target), *pairs, *[pair[::-1] for pair in pairs]], np.int32)
    return shapes[np.argsort(log_aspect(shapes))]


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


def bucket_table(sizes: np.ndarray, shapes: np.ndarray) -> str:
    """What shapes (int [K, 2]) do to images of the given sizes (int [N, 2]): a line for each, and one for all.

    `lost` is the mean share of the images' area that is cropped away to get the shape's aspect.
    """
    bucket = assign(sizes, shapes)
    lost = area_lost(log_aspect(sizes), log_aspect(shapes)[bucket])
    lines = [f"{'high':>5} × {'wide':<5}{'images':>8}{'lost':>8}"]
    for row, (height, width) in enumerate(shapes.tolist()):
        own = lost[bucket == row]
        lines.append(
            f"{height:>5} × {width:<5}{len(own) / len(lost):>8.1%}{own.sum() / max(len(own), 1):>8.1%}"
        )
    pixels = shapes.prod(axis=1)[bucket].mean()
    return "\n".join([*lines, f"{'all':<13}{1:>8.1%}{lost.mean():>8.1%}   {pixels:,.0f} pixels per image"])
