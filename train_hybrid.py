"""Hybrid curriculum: data fraction, image size and batch change from stage to stage; layers may freeze late.

    accelerate launch --config_file accelerate_configs/g5_4gpu.yaml train_hybrid.py --data_dir /data/imagenet-pyramid

One OneCycle spans the whole run, scaled stage by stage (--stage_wise: one per stage).
"""

from dataclasses import dataclass, field

from common.config import CurriculumConfig, main_with
from common.engine.fit import train
from common.scheduling import Stage

STAGES = [
    Stage(epochs=15, img_size=128, batch_size=1024, data_fraction=0.50, lr_scale=1.00),
    Stage(epochs=15, img_size=160, batch_size=768, data_fraction=0.75, lr_scale=0.70),
    Stage(epochs=30, img_size=224, batch_size=512, lr_scale=0.50),
    Stage(epochs=20, img_size=224, batch_size=512, mixup=False, lr_scale=0.25),  # settle on clean images
]

STEM = ("conv1", "bn1", "layer1")
EXPERT_STAGES = [
    Stage(epochs=15, img_size=128, batch_size=1024, data_fraction=0.50, lr_scale=1.00),
    Stage(epochs=15, img_size=160, batch_size=768, data_fraction=0.75, lr_scale=0.60),
    Stage(epochs=20, img_size=224, batch_size=512, lr_scale=0.35),
    Stage(
        epochs=15, img_size=224, batch_size=512, lr_scale=0.20, frozen=STEM
    ),  # edges and colours have settled
    Stage(epochs=10, img_size=224, batch_size=512, mixup=False, lr_scale=0.12, frozen=(*STEM, "layer2")),
    Stage(
        epochs=5, img_size=224, batch_size=512, mixup=False, lr_scale=0.08, frozen=(*STEM, "layer2", "layer3")
    ),
]


@dataclass
class HybridConfig(CurriculumConfig):
    """Settings of the hybrid curriculum.

    Args:
        progressive_freezing: the expert curriculum: lower LR scales, early layers frozen late in the run, EMA on.
    """

    strategy = "hybrid"

    stages: list[Stage] = field(default_factory=lambda: list(STAGES))
    progressive_freezing: bool = False

    def __post_init__(self) -> None:
        if self.progressive_freezing:
            self.ema = True
            if self.stages == STAGES:
                self.stages = list(EXPERT_STAGES)


if __name__ == "__main__":
    main_with(train, HybridConfig, __doc__)
