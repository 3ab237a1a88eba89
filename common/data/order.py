"""Which images, in which order, at which shape: pure functions of (seed, epoch).

An epoch is a matrix: a row is one optimizer step, a column a place in the global batch. Every process computes the
same matrix and takes its own columns; resuming means starting at a later row, another number of processes means cutting
the same rows differently. Orders are sorts by a hash of (seed, epoch, image), which no version of numpy changes.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from common.data.rng import CLASSES, ORDER, ROWS, SUBSET, uniforms
from common.data.shapes import area_lost, log_aspect

# How even classes are made: 1 - q of Kang et al. (2020), who sample a class of n images in proportion to n ** q.
EVENNESS = {"sqrt": 0.5, "balanced": 1.0}


class View(NamedTuple):
    """How an image becomes the pixels of a batch's shape."""

    scale: tuple[float, float] | None  # random crop: area as a share of the image; None = evaluation, centred
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # random crop: aspect jitter, times the shape's own aspect
    crop_pct: float = 0.875  # evaluation: the centred box is this share of the largest of the shape's aspect
    auto_augment: str = "none"  # policy of `auto_augment`
    magnitude: float = 0.0  # of its RandAugment
    strength: float = 1.0  # share of the images that it edits


class BatchItem(NamedTuple):
    """One process's micro-batch. It tells a worker all it has to know, so workers outlive any stage."""

    split: int  # 0 train, 1 val
    # int64 [B]; i + k * images of the dataset is a further copy of image i, whose crops and flips are its own.
    indices: np.ndarray
    height: int
    width: int
    epoch: int
    view: View


class Epoch(NamedTuple):
    """The global batches of one epoch; `len(epoch.indices)` optimizer steps."""

    indices: np.ndarray  # int32 [steps, global_batch], as in `BatchItem`
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


def even_out(pool: np.ndarray, labels: np.ndarray, evenness: float, seed: int, epoch: int) -> np.ndarray:
    """Draw as many images as `pool` (int [N], dataset indices) has, a class of n of them in proportion to n ** (1 - evenness).

    Within a class all are drawn equally often, give or take one; who is, changes with the epoch. Returns int64 [N], with
    copies as in `BatchItem`; `labels` (int [images]) are the dataset's.
    """
    _, row, sizes = np.unique(labels[pool], return_inverse=True, return_counts=True)
    shares = sizes ** (1.0 - evenness)
    # Rounded as a running sum, so that they add up to N.
    wanted = np.diff(np.rint(np.cumsum([0, *shares]) * len(pool) / shares.sum()).astype(int))
    by_class = np.lexsort((uniforms(seed, epoch, pool, CLASSES, 1)[:, 0], row))
    place = np.arange(len(pool)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    drawn = (wanted // sizes)[row[by_class]] + (place < (wanted % sizes)[row[by_class]])
    copy = np.arange(len(pool)) - np.repeat(np.cumsum(drawn) - drawn, drawn)
    # An epoch's matrix is int32: of very many copies some are the same.
    return np.repeat(pool[by_class], drawn) + copy % (2**31 // len(labels)) * len(labels)


def square_epoch(pool: np.ndarray, size: int, global_batch: int, seed: int, epoch: int) -> Epoch:
    """Shuffle the images of `pool` (int [N], dataset indices) into square batches of `size` pixels.

    Images that do not fill a global batch stay out; which ones varies with the epoch.
    """
    indices = _shuffle(pool, global_batch, seed, epoch).reshape(-1, global_batch)
    return Epoch(indices, np.full((len(indices), 2), size, np.int32))


def _shuffle(pool: np.ndarray, global_batch: int, seed: int, epoch: int) -> np.ndarray:
    """Put `pool` in the epoch's order and cut it to whole global batches: int32 [steps * global_batch]."""
    whole = len(pool) // global_batch * global_batch
    return pool[_by_hash(seed, epoch, pool, ORDER)[:whole]].astype(np.int32)


def _by_hash(seed: int, epoch: int, indices: np.ndarray, stream: int) -> np.ndarray:
    """Sort by hashes; stable, because a tie between two must fall the same way on every machine."""
    return np.argsort(uniforms(seed, epoch, indices, stream, 1)[:, 0], kind="stable")


def local_items(
    epoch_matrix: Epoch, epoch: int, view: View, rank: int, world: int, accumulation: int, start_step: int
) -> Iterator[BatchItem]:
    """Yield one process's micro-batches from row `start_step` on, `accumulation` of them per optimizer step.

    All processes' tile the row: whatever `world * accumulation` divides it sees the same images at each step.
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

    `size` is the side of a square, or the shape of every image, int [num_images, 2]. Images are sorted by shape and
    dealt out in turn, so that processes differ by at most one image. They may differ in the number of batches, and have
    none when images are few: a forward pass in evaluation must not wait for other processes.
    """
    shape_of_image = np.broadcast_to(size, (num_images, 2))
    mine = np.lexsort(shape_of_image.T)[rank::world]
    changes = np.flatnonzero((np.diff(shape_of_image[mine], axis=0) != 0).any(axis=1)) + 1
    return [
        BatchItem(1, run[first : first + batch_size], height, width, 0, view)
        for run in np.split(mine, changes)
        for height, width in shape_of_image[run[:1]].tolist()
        for first in range(0, len(run), batch_size)
    ]


def rect_epoch(
    pool: np.ndarray,
    bucket_of_image: np.ndarray,
    shapes: np.ndarray,
    global_batch: int,
    seed: int,
    epoch: int,
) -> Epoch:
    """Shuffle the images of `pool` (int [N], dataset indices) into batches of one shape each.

    `bucket_of_image` (int [dataset], from `assign`) are rows of `shapes` (int32 [K, 2], from `choose_shapes`). The
    shuffled images are sorted by bucket and cut into global batches, and the batches are shuffled. A batch across a
    border of buckets takes the shape that loses least of its images: leftovers go to a neighbour, and an epoch has as
    many steps, and leaves out as many images, as with squares.
    """
    aspects = log_aspect(shapes)
    indices = _shuffle(pool, global_batch, seed, epoch)
    by_bucket = np.argsort(bucket_of_image[indices % len(bucket_of_image)], kind="stable")
    indices = indices[by_bucket].reshape(-1, global_batch)
    bucket = bucket_of_image[indices % len(bucket_of_image)]
    images = np.stack([(bucket == k).sum(axis=1) for k in range(len(shapes))], axis=1)  # [steps, K]
    shape = np.argmin(images @ area_lost(aspects[:, None], aspects), axis=1)
    rows = _by_hash(seed, epoch, np.arange(len(indices)), ROWS)
    return Epoch(indices[rows], shapes[shape[rows]])


LANES = 8  # parts of a streamed epoch that are read side by side; processes take whole ones while they can
WINDOW = 2048  # rows of a lane that are shuffled among each other


def streaming_epoch(group_rows: np.ndarray, size: int, global_batch: int, seed: int, epoch: int) -> Epoch:
    """Shuffle rows that are fetched in groups (int [G] rows each, in order), with few groups in use at a time.

    The groups are shuffled, and then each row moves on by up to `WINDOW` places: a shuffle buffer as a pure function. The
    order is cut into `LANES` lanes, each of which fills its own columns of every batch, so that a batch has images of
    many places and a process fetches the groups of its own lanes only.
    """
    steps = int(group_rows.sum()) // global_batch
    first = np.cumsum(group_rows) - group_rows
    groups = _by_hash(seed, epoch, np.arange(len(group_rows)), ROWS)
    rows = group_rows[groups]
    place = np.arange(rows.sum())
    indices = place + np.repeat(first[groups] - (np.cumsum(rows) - rows), rows)
    moved = place + WINDOW * uniforms(seed, epoch, place, ORDER, 1)[:, 0]
    indices = indices[np.argsort(moved, kind="stable")][: steps * global_batch].astype(np.int32)
    lanes = math.gcd(LANES, global_batch)
    side_by_side = indices.reshape(lanes, steps, -1).transpose(1, 0, 2)
    return Epoch(side_by_side.reshape(steps, global_batch), np.full((steps, 2), size, np.int32))
