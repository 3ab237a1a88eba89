"""From a plan to the batch items of one process: the whole run, training and evaluation, as one sequence."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

from common import ClosedUnitInterval, UserError
from common.data import order
from common.data.order import BatchItem, View
from common.data.shapes import assign, bucket_table, choose_shapes, jittered
from common.data.sources.base import Source
from common.scheduling import EpochPlan, Plan, Stage

WHOLE = 0.0  # instead of the share that a square crop keeps


@dataclass
class ViewSettings:
    """What the model sees"""

    crop_scale: tuple[ClosedUnitInterval, ClosedUnitInterval] = (0.08, 1.0)
    """Smallest and largest share of the image that a random training crop covers."""

    crop_pct: ClosedUnitInterval = 0.875
    """Share of the (shorter) side that evaluation's centre crop keeps."""

    auto_augment: Literal["none", "trivial", "rand", "three"] = "none"
    """Edits of training images in the loader: TrivialAugmentWide, RandAugment (two edits), DeiT III's 3-Augment."""

    rand_magnitude: ClosedUnitInterval = 0.9
    """RandAugment's magnitude, as a share of its authors' 10."""

    rect_val: bool = False
    """Evaluate each image whole, at the aspect ratio nearest its own."""

    rect_area: Literal["short", "constant"] = "short"
    """What rectangular shapes hold constant: short = the short side, constant = the pixels per image."""

    sampler: Literal["none", "sqrt", "balanced"] = "none"
    """Draw rare classes more often, frequent ones less: balanced = all equally often, sqrt = by the root of their size."""


def stage_shapes(stage: Stage, train: Source, settings: ViewSettings) -> list[tuple[int, int]]:
    """Heights and widths that training batches of a stage can have."""
    if stage.shape == "square":
        return [(stage.img_size, stage.img_size)]
    shapes = choose_shapes(train.sizes(), stage.img_size, settings.rect_area)
    return [(height, width) for height, width in shapes.tolist()]


class Batches:
    """What process `rank` of `world` loads at each step; a pure function of the plan, the seed and the position.

    Raises:
        UserError: settings that exclude each other.
    """

    def __init__(
        self, plan: Plan, train: Source, val: Source, settings: ViewSettings, seed: int, rank: int, world: int
    ) -> None:
        self.plan, self.train, self.val, self.settings = plan, train, val, settings
        self.seed, self.rank, self.world = seed, rank, world
        low, high = settings.crop_scale
        if not 0 < low <= high:
            raise UserError(f"--crop_scale needs 0 < smallest <= largest <= 1, not {low}, {high}")
        if settings.crop_pct == WHOLE:
            raise UserError("--crop_pct must be above 0; --rect_val true evaluates images whole")
        random_access = (
            settings.rect_val
            or settings.sampler != "none"
            or any(stage.data_fraction < 1 or stage.shape == "rect" for stage in plan.stages)
        )
        if train.group_rows is not None and random_access:
            raise UserError(
                "--streaming reads shards in order: it goes with data_fraction 1, square shapes and --sampler none only"
            )

    def run_items(self, start_epoch: int, start_step: int) -> Iterator[BatchItem]:
        """Everything from a position to the end of the run, so that the workers never wait at an epoch's end."""
        for epoch in self.plan.epochs(start_epoch):
            yield from self.train_items(epoch, start_step)
            if epoch.evaluated:
                yield from self.eval_items(epoch.stage.img_size, self.plan.micro_batch(epoch.stage_index))

    def train_items(self, epoch: EpochPlan, start_step: int = 0) -> Iterator[BatchItem]:
        """This process's micro-batches of an epoch, from optimizer step `start_step` of the run."""
        stage = epoch.stage
        size, key = stage.img_size, (epoch.global_batch, self.seed, epoch.index)
        if self.train.group_rows is not None:
            matrix = order.streaming_epoch(self.train.group_rows, size, *key)
        elif stage.shape == "rect":
            shapes = self._shapes(size)
            buckets = assign(jittered(self.train.sizes(), self.seed, epoch.index), shapes)
            matrix = order.rect_epoch(self._pool(epoch), buckets, shapes, *key)
        else:
            matrix = order.square_epoch(self._pool(epoch), size, *key)
        view, accumulation = self.train_view(stage), self.plan.accumulation(epoch.stage_index)
        start = max(0, start_step - epoch.first_step)
        yield from order.local_items(matrix, epoch.index, view, self.rank, self.world, accumulation, start)

    def train_view(self, stage: Stage) -> View:
        """A stage's random crops and edits: the weaker its strength, the larger the smallest crop and the fewer images are edited."""
        low, high = self.settings.crop_scale
        view = View(
            (high * (low / high) ** stage.strength, high),
            auto_augment=self.settings.auto_augment,
            magnitude=self.settings.rand_magnitude,
            strength=stage.strength,
        )
        return view._replace(ratio=(1.0, 1.0)) if stage.shape == "rect" else view

    def eval_items(self, img_size: int, batch_size: int, crop: float | None = None) -> list[BatchItem]:
        """This process's share of the validation images, each exactly once over all processes.

        `crop` is the share of the shorter side that a centred square keeps; `WHOLE` = everything, at its own aspect
        ratio; None = as `--rect_val` and `--crop_pct` say.
        """
        if crop is None:
            crop = WHOLE if self.settings.rect_val else self.settings.crop_pct
        view = View(None, crop_pct=crop or 1.0)
        size: int | np.ndarray = img_size
        if crop == WHOLE:
            shapes = self._shapes(img_size)
            size = shapes[assign(self.val.sizes(), shapes)]
        return order.eval_items(len(self.val), size, batch_size, self.rank, self.world, view)

    def bucket_tables(self) -> str:
        """For each image size of the plan that has rectangular batches: shapes, shares and what cropping loses."""
        sizes = {s.img_size for s in self.plan.stages if s.shape == "rect" or self.settings.rect_val}
        return "\n".join(bucket_table(self.train.sizes(), self._shapes(size)) for size in sorted(sizes))

    def _pool(self, epoch: EpochPlan) -> np.ndarray:
        """The epoch's images, in no order yet."""
        pool = self._subset(epoch.stage.data_fraction)
        if self.settings.sampler == "none":
            return pool
        evenness = order.EVENNESS[self.settings.sampler]
        return order.even_out(pool, self.train.labels, evenness, self.seed, epoch.index)

    @lru_cache(maxsize=4)  # noqa: B019 -- lives as long as the run
    def _subset(self, fraction: float) -> np.ndarray:
        return order.subset(self.train.labels, fraction, self.seed)

    @lru_cache(maxsize=4)  # noqa: B019
    def _shapes(self, img_size: int) -> np.ndarray:
        """Shapes [K, 2] for an image size."""
        return choose_shapes(self.train.sizes(), img_size, self.settings.rect_area)
