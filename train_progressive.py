"""Progressive resizing: train on small images first, then on larger ones; the weights carry over.

    accelerate launch --config_file accelerate_configs/p4d_8gpu.yaml train_progressive.py --data_dir /data/imagenet-pyramid

Each stage has a OneCycle of its own, whose peak follows the batch: min(0.1 x global batch / 256, 0.4). Small stages are
only cheap if their images are cheap to load: prepare a pyramid (python -m common.tools.prepare).
"""

from dataclasses import dataclass, field
from typing import Literal

from common.config import CurriculumConfig, main_with
from common.engine.fit import train
from common.scheduling import Stage

STAGES = [
    Stage(epochs=25, img_size=56, batch_size=4096),
    Stage(epochs=25, img_size=112, batch_size=1024),
    Stage(epochs=25, img_size=224, batch_size=256, mixup=0.6),  # settle on clean images
]


@dataclass
class ProgressiveConfig(CurriculumConfig):
    strategy = "progressive"

    stages: list[Stage] = field(default_factory=lambda: list(STAGES))
    stage_wise: bool = True
    lr: float | Literal["auto"] = 0.1
    max_lr: float | None = 0.4


if __name__ == "__main__":
    main_with(train, ProgressiveConfig, __doc__)
