"""Rectangular training: batches of one aspect ratio, so that images are seen whole instead of cropped square.

    accelerate launch --config_file accelerate_configs/single_gpu.yaml train_rect.py --data_dir /data/imagenet

Aspect ratios come from the files' headers, shapes from the data's own aspects; validation is rectangular too. A cosine
with warm-up is a OneCycle with a short rise and no momentum swing. (--dist_port of the original script is now
`accelerate launch --main_process_port`.)

Measured, ResNet-18, 12 epochs, the last 3 on rectangles: 64.5 % top-1 on Caltech-101 at 64 px, where squares end at 65.3, 76.1 against
76.7 on photographs of clothes at 96 px, means of two and three seeds (docs/recipe.md). ImageNet: not measured.
"""

from dataclasses import dataclass
from typing import Literal

from common import ClosedUnitInterval, NonNegativeFloat, PositiveFloat, PositiveInt
from common.config import TrainConfig, run_script
from common.data import open_dataset
from common.engine import fit
from common.model import create_model
from common.run import start_run
from common.scheduling import Stage


@dataclass
class RectConfig(TrainConfig):
    """Length, size and rate"""

    strategy = "rect"

    epochs: PositiveInt = 90
    """Passes over the training set."""
    batch_size: PositiveInt = 256
    """Images per process and micro-batch, of which an optimizer step takes --accumulation."""
    target_size: PositiveInt = 224
    """Short side in pixels, or with --rect_area constant the side of the square of equal area."""
    mixup_share: ClosedUnitInterval = 0.9
    """Share of the epochs, from the first, that use MixUp/CutMix."""
    no_amp: bool = False
    """No mixed precision, whatever `accelerate launch` was told."""
    lr: PositiveFloat | Literal["auto"] = 0.1
    pct_start: ClosedUnitInterval = 0.05
    momentum_swing: NonNegativeFloat = 0.0
    batch_aug_prob: ClosedUnitInterval = 0.5
    erasing_prob: ClosedUnitInterval = 0.25
    crop_scale: tuple[ClosedUnitInterval, ClosedUnitInterval] = (0.35, 1.0)
    rect_val: bool = True

    def __post_init__(self) -> None:
        if self.no_amp:
            self.mixed_precision = "no"

    def curriculum(self) -> list[Stage]:
        return [Stage(self.epochs, self.target_size, self.batch_size, mixup=self.mixup_share, shape="rect")]


def main(cfg: RectConfig) -> None:
    with start_run(cfg) as run:
        train, val = open_dataset(cfg)
        model = create_model(cfg.model, len(train.classes), cfg.largest_size(), drop_path=cfg.drop_path)
        fit(run, model, train, val)


if __name__ == "__main__":
    run_script(main, RectConfig, __doc__)
