"""Which images, in which order, at which shape: pure functions of (seed, epoch).

An epoch is a matrix: a row is one optimizer step, a column a place in the global batch. Every process
computes the same matrix and takes its own columns, so all have the same number of steps and the same shape at
each step; resuming means starting at a later row; another number of processes means cutting the same rows
differently. Nothing here has state, and nothing has to be saved in a checkpoint but the row.

Orders are sorts by a hash of (seed, epoch, image), not a generator's shuffle: they stay what they are on any
machine and under any version of numpy.
"""

import math
from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np

from common import UserError
from common.data.rng import ASPECT, ORDER, ROWS, SUBSET, uniforms


class View(NamedTuple):
    """How an image becomes the pixels of a batch's shape."""

    scale: tuple[float, float] | None  # random crop: area as a share of the image; None = evaluation, centred
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # random crop: aspect jitter, times the shape's own aspect
    crop_pct: float = 0.875  # evaluation: the centred box is this share of the largest of the shape's aspect


class BatchItem(NamedTuple):
    """One process's micro-batch. It tells a worker all it has to know, so workers outlive any stage."""

    split: int  # 0 train, 1 val
    indices: np.ndarray  # int64 [B]
    height: int
    width: int
    epoch: int
    view: View


class Epoch(NamedTuple):
    """The global batches of one epoch; `len(epoch.indices)` optimizer steps."""

    indices: np.ndarray  # int32 [steps, global_batch], indices into the dataset
    shapes: np.ndarray  # int32 [steps, 2], height and width in pixels


def subset(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Choose round(fraction * N) images, the same share of every class: sorted int64 indices into `labels` (int [N]).

    All images stand in one queue, by their random rank in their class relative to the class's size, so that any
    first part of it is balanced and subsets of one seed are nested. Every class comes first once.
    """
    assert 0 < fraction <= 1, fraction
    by_class = np.lexsort((uniforms(seed, 0, np.arange(len(labels)), SUBSET, 1)[:, 0], labels))
    sizes = np.bincount(labels)
    first = np.cumsum(sizes) - sizes
    sorted_labels = labels[by_class]
    rank = (np.arange(len(labels)) - first[sorted_labels]) / sizes[sorted_labels]
    queue = by_class[np.argsort(rank, kind="stable")]
    return np.sort(queue[: max(1, round(fraction * len(labels)))])


def square_epoch(pool: np.ndarray, size: int, global_batch: int, seed: int, epoch: int) -> Epoch:
    """Shuffle the images of `pool` (int [N], dataset indices) into square batches of `size` pixels.

    Images that do not fill a global batch stay out; which ones varies with the epoch.
    Raises UserError when the pool is smaller than one global batch.
    """
    indices = _shuffle(pool, global_batch, seed, epoch).reshape(-1, global_batch)
    return Epoch(indices, np.full((len(indices), 2), size, np.int32))


def _shuffle(pool: np.ndarray, global_batch: int, seed: int, epoch: int) -> np.ndarray:
    """Put `pool` in the epoch's order and cut it to whole global batches: int32 [steps * global_batch]."""
    steps = _steps(len(pool), global_batch)
    # Stable, because a tie between two hashes must fall the same way on every machine.
    order = np.argsort(uniforms(seed, epoch, pool, ORDER, 1)[:, 0], kind="stable")
    return pool[order[: steps * global_batch]].astype(np.int32)


def _steps(images: int, global_batch: int) -> int:
    if images < global_batch:
        raise UserError(
            f"{images} training images do not fill one global batch of {global_batch}: lower --batch_size"
        )
    return images // global_batch


def local_items(
    epoch_matrix: Epoch, *, epoch: int, view: View, rank: int, world: int, accumulation: int, start_step: int
) -> Iterator[BatchItem]:
    """Yield one process's micro-batches from row `start_step` on, `accumulation` of them per optimizer step.

    The micro-batches of all processes tile the row, so any `world * accumulation` that divides the global
    batch sees the same images at each step.
    """
    indices, shapes = epoch_matrix.indices[start_step:], epoch_matrix.shapes[start_step:].tolist()
    global_batch = indices.shape[1]
    assert global_batch % (world * accumulation) == 0, (global_batch, world, accumulation)
    size = global_batch // (world * accumulation)
    for row, (height, width) in zip(indices, shapes, strict=True):
        for first in range(rank * size, global_batch, world * size):
            yield BatchItem(0, row[first : first + size].astype(np.int64), height, width, epoch, view)


def eval_items(
    num_images: int, size: int | np.ndarray, batch_size: int, rank: int, world: int, view: View
) -> list[BatchItem]:
    """List one process's evaluation batches: no padding, every image exactly once over all processes.

    `size` is the side of a square, or the shape of every image, int [num_images, 2]: for rectangular
    evaluation `shapes[assign(sizes, shapes)]`, with `View(None, crop_pct=1.0)` for the whole image. Images
    are sorted by shape and dealt out in turn, so that processes differ by at most one image. They may differ
    in the number of batches, and have none when images are few: a forward pass in evaluation must not wait
    for other processes.
    """
    shape_of_image = np.broadcast_to(size, (num_images, 2))
    mine = np.lexsort(shape_of_image.T)[rank::world]
    changes = np.flatnonzero((np.diff(shape_of_image[mine], axis=0) != 0).any(axis=1)) + 1
    return [
        BatchItem(1, run[first : first + batch_size], *shape_of_image[run[0]].tolist(), 0, view)
        for run in np.split(mine, changes)
        for first in range(0, len(run), batch_size)
    ]


# Rectangular batches. Only the logarithm of an aspect (width / height) is used: cropping from aspect a to b
# loses the share 1 - exp(-|log a - log b|) of the area, so the shape that loses least is the nearest.

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
    aspects, images = np.unique(np.rint(_log_aspect(sizes) * 256) / 256, return_counts=True)
    # A sentinel at either end stands for "no shape on this side", where everything is lost.
    ends = np.concatenate([[-np.inf], _log_aspect(candidates), [np.inf]])
    lost = images[:, None] * _area_lost(aspects[:, None], ends)

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
    return shapes[np.argsort(_log_aspect(shapes))]


ASPECT_JITTER = 4 / 3  # docs/rectangular.md tells what less and more of it did


def _log_aspect(sizes: np.ndarray) -> np.ndarray:
    return np.log(sizes[:, 1] / sizes[:, 0])


def _area_lost(image: np.ndarray, shape: np.ndarray) -> np.ndarray:
    """The share of an image outside the largest box of a shape's aspect; both are logarithms of aspects."""
    return 1 - np.exp(-np.abs(image - shape))


def assign(sizes: np.ndarray, shapes: np.ndarray) -> np.ndarray:
    """Give each image (int [N, 2]) the shape (int [K, 2]) that loses least of it: int16 [N], its row."""
    aspects = _log_aspect(shapes)
    return np.searchsorted((aspects[1:] + aspects[:-1]) / 2, _log_aspect(sizes)).astype(np.int16)


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
    lost = _area_lost(_log_aspect(sizes), _log_aspect(shapes)[bucket])
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


def rect_epoch(
    pool: np.ndarray,
    bucket_of_image: np.ndarray,
    shapes: np.ndarray,
    global_batch: int,
    seed: int,
    epoch: int,
) -> Epoch:
    """Shuffle the images of `pool` (int [N], dataset indices) into batches of one shape each.

    `bucket_of_image` (int [dataset], from `assign`) are rows of `shapes` (int32 [K, 2], from
    `choose_shapes`). The shuffled images are sorted by bucket and cut into global batches, and the batches
    are shuffled. A batch across a border of buckets takes the shape that loses least of its images: leftovers
    go to a neighbour, and an epoch is `len(pool) // global_batch` steps, as with squares. The images that do
    not fill a global batch stay out, each with the same chance. For training, `View(scale, ratio=(1, 1))`
    keeps the images' own aspect.

    All batches have the same number of images, so in mode "short" steps differ in pixels, by `max_aspect` at
    most. Mode "constant" is the way to level them: it leaves the batch, the number of steps and the learning
    rate alone.
    Raises UserError when the pool is smaller than one global batch.
    """
    aspects = _log_aspect(shapes)
    assert (np.diff(aspects) > 0).all(), "shapes are not in the order of their aspect"
    indices = _shuffle(pool, global_batch, seed, epoch)
    by_bucket = np.argsort(bucket_of_image[indices], kind="stable")
    indices = indices[by_bucket].reshape(-1, global_batch)
    bucket = bucket_of_image[indices]
    images = np.stack([(bucket == k).sum(axis=1) for k in range(len(shapes))], axis=1)  # [steps, K]
    shape = np.argmin(images @ _area_lost(aspects[:, None], aspects), axis=1)
    rows = np.argsort(uniforms(seed, epoch, np.arange(len(indices)), ROWS, 1)[:, 0], kind="stable")
    return Epoch(indices[rows], shapes[shape[rows]])


LANES = 8  # parts of a streamed epoch that are read side by side; processes take whole ones while they can
WINDOW = 2048  # rows of a lane that are shuffled among each other


def streaming_epoch(group_rows: np.ndarray, size: int, global_batch: int, seed: int, epoch: int) -> Epoch:
    """Shuffle rows that are fetched in groups (int [G] rows each, in order), with few groups in use at a time.

    The groups are shuffled, and then each row moves on by up to `WINDOW` places: a shuffle buffer as a pure
    function. The order is cut into `LANES` lanes, each of which fills its own columns of every batch, so that
    a batch has images of many places and a process fetches the groups of its own lanes only. Rows that do not
    fill a global batch stay out; which ones varies with the epoch.

    Raises UserError when there are fewer rows than one global batch.
    """
    steps = _steps(int(group_rows.sum()), global_batch)
    first = np.cumsum(group_rows) - group_rows
    groups = np.argsort(uniforms(seed, epoch, np.arange(len(group_rows)), ROWS, 1)[:, 0], kind="stable")
    rows = group_rows[groups]
    place = np.arange(rows.sum())
    indices = place + np.repeat(first[groups] - (np.cumsum(rows) - rows), rows)
    moved = place + WINDOW * uniforms(seed, epoch, place, ORDER, 1)[:, 0]
    indices = indices[np.argsort(moved, kind="stable")][: steps * global_batch].astype(np.int32)
    lanes = math.gcd(LANES, global_batch)
    matrix = (
        indices.reshape(lanes, steps, global_batch // lanes).transpose(1, 0, 2).reshape(steps, global_batch)
    )
    return Epoch(matrix, np.full((steps, 2), size, np.int32))
