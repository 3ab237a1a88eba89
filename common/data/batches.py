"""From a plan to the batch items of one process: the whole run, training and evaluation, as one sequence."""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np

from common.config import TrainConfig, UserError
from common.data import order as sampling
from common.data.loader import Source
from common.data.order import BatchItem, View
from common.scheduling import EpochPlan, Plan, Stage

WHOLE = 0.0  # instead of the share that a square crop keeps


class Batches:
    """What each process loads at each step; a pure function of the plan, the seed and the position.

    Args:
        cfg: crop and shape settings, seed.
        plan: the run's epochs.
        train, val: labels and image sizes.
        rank, world: this process, and how many there are.
    """

    def __init__(
        self, cfg: TrainConfig, plan: Plan, train: Source, val: Source, rank: int, world: int
    ) -> None:
        self.cfg, self.plan, self.train, self.val, self.rank, self.world = cfg, plan, train, val, rank, world
        random_access = cfg.rect_val or any(s.data_fraction < 1 or s.shape == "rect" for s in plan.stages)
        if train.group_rows is not None and random_access:
            raise UserError(
                "--streaming reads shards in order: it goes with data_fraction 1 and square shapes only"
            )

    def run_items(self, start_epoch: int, start_step: int) -> Iterator[BatchItem]:
        """Everything from a position to the end of the run, so that the workers never wait at an epoch's end."""
        for epoch in self.plan.epochs(start_epoch):
            yield from self.train_items(epoch, start_step)
            yield from self.eval_items(epoch.stage.img_size, self.micro_batch(epoch.stage_index))

    def train_items(self, epoch: EpochPlan, start_step: int = 0) -> Iterator[BatchItem]:
        """This process's micro-batches of an epoch, from optimizer step `start_step` of the run."""
        stage = epoch.stage
        pool = self._pool(stage.data_fraction)
        if self.train.group_rows is not None:
            matrix = sampling.streaming_epoch(
                self.train.group_rows, stage.img_size, epoch.global_batch, self.cfg.seed, epoch.index
            )
        elif stage.shape == "rect":
            shapes = self._shapes(stage.img_size)
            sizes = sampling.jittered(self.train.sizes(), self.cfg.seed, epoch.index)
            buckets = sampling.assign(sizes, shapes)
            matrix = sampling.rect_epoch(
                pool, buckets, shapes, epoch.global_batch, self.cfg.seed, epoch.index
            )
        else:
            matrix = sampling.square_epoch(
                pool, stage.img_size, epoch.global_batch, self.cfg.seed, epoch.index
            )
        yield from sampling.local_items(
            matrix,
            epoch=epoch.index,
            view=self.train_view(stage),
            rank=self.rank,
            world=self.world,
            accumulation=self.plan.accumulation(epoch.stage_index),
            start_step=max(0, start_step - epoch.first_step),
        )

    def train_view(self, stage: Stage) -> View:
        low, high = self.cfg.rect_scale if stage.shape == "rect" else self.cfg.crop_scale
        scale = (high * (low / high) ** stage.strength, high)  # strength 0: no smaller crop than the largest
        return View(scale, ratio=(1.0, 1.0)) if stage.shape == "rect" else View(scale)

    def eval_items(self, img_size: int, batch_size: int, crop: float | None = None) -> list[BatchItem]:
        """This process's share of the validation images, each exactly once over all processes.

        Args:
            crop: share of the shorter side that a centred square keeps; `WHOLE` = everything, at its own aspect
                ratio; None = as `--rect_val` and `--crop_pct` say.
        """
        if crop is None:
            crop = WHOLE if self.cfg.rect_val else self.cfg.crop_pct
        if crop != WHOLE:
            view = View(None, crop_pct=crop)
            return sampling.eval_items(len(self.val), img_size, batch_size, self.rank, self.world, view)
        shapes = self._shapes(img_size)
        size = shapes[sampling.assign(self.val.sizes(), shapes)]
        view = View(None, crop_pct=1.0)
        return sampling.eval_items(len(self.val), size, batch_size, self.rank, self.world, view)

    def bucket_tables(self) -> str:
        """For each image size of the plan that has rectangular batches: shapes, shares and what cropping loses."""
        sizes = sorted(
            {stage.img_size for stage in self.plan.stages if stage.shape == "rect" or self.cfg.rect_val}
        )
        return "\n".join(
            sampling.format_buckets(sampling.bucket_table(self.train.sizes(), self._shapes(size)))
            for size in sizes
        )

    def micro_batch(self, stage_index: int) -> int:
        return self.plan.global_batches[stage_index] // self.world // self.plan.accumulation(stage_index)

    def stage_shapes(self, stage: Stage) -> list[tuple[int, int]]:
        """Heights and widths that training batches of a stage can have."""
        if stage.shape == "rect":
            return [(int(h), int(w)) for h, w in self._shapes(stage.img_size)]
        return [(stage.img_size, stage.img_size)]

    @lru_cache(maxsize=4)  # noqa: B019 -- lives as long as the run
    def _pool(self, fraction: float) -> np.ndarray:
        return sampling.subset(self.train.labels, fraction, self.cfg.seed)

    @lru_cache(maxsize=4)  # noqa: B019
    def _shapes(self, img_size: int) -> np.ndarray:
        """Shapes [K, 2] for an image size."""
        return sampling.choose_shapes(self.train.sizes(), img_size, self.cfg.rect_area, self.cfg.rect_buckets)
