"""Rectangular training: batches of one aspect ratio, so that images are seen whole instead of cropped square.

    accelerate launch --config_file accelerate_configs/single_gpu.yaml train_rect.py --data_dir /data/imagenet

Aspect ratios come from the files' headers, shapes from the data's own aspects; validation is rectangular too. A cosine
with warm-up is a OneCycle with a short rise and no momentum swing. (--dist_port of the original script is now
`accelerate launch --main_process_port`.)
"""

from dataclasses import dataclass
from typing import Literal

from common.config import TrainConfig, main_with
from common.engine.fit import train
from common.scheduling import Stage


@dataclass
class RectConfig(TrainConfig):
    """Settings of rectangular training.

    Args:
        epochs: passes over the training set.
        batch_size: images per process and optimizer step.
        target_size: short side in pixels, or with --rect_area constant the side of the square of equal area.
        mixup_share: share of the epochs, from the first, that use MixUp/CutMix.
        no_amp: no mixed precision, whatever `accelerate launch` was told.
    """

    strategy = "rect"

    epochs: int = 90
    batch_size: int = 256
    target_size: int = 224
    mixup_share: float = 0.9
    no_amp: bool = False
    lr: float | Literal["auto"] = 0.1
    pct_start: float = 0.05
    momentum_swing: float = 0.0
    batch_aug_prob: float = 0.5
    erasing_prob: float = 0.25
    rect_val: bool = True

    def __post_init__(self) -> None:
        if self.no_amp:
            self.mixed_precision = "no"

    def curriculum(self) -> list[Stage]:
        return [
            Stage(
                epochs=self.epochs,
                img_size=self.target_size,
                batch_size=self.batch_size,
                mixup=self.mixup_share,
                shape="rect",
            )
        ]


if __name__ == "__main__":
    main_with(train, RectConfig, __doc__)
