"""Hybrid curriculum: data fraction, image size and batch change from stage to stage; layers may freeze late.

    accelerate launch --config_file accelerate_configs/g5_4gpu.yaml train_hybrid.py --data_dir /data/imagenet-pyramid

One OneCycle spans the whole run, scaled stage by stage (--stage_wise: one per stage).

Measured, with sizes from 32 px: 20 epochs, in about the time of 12 of standard training, ResNet-18, two CPU cores: 82.3 against 77.1 %
top-1 on photographs of clothes at 96 px, 67.7 against 65.5 % on Caltech-101 at 64 px (docs/recipe.md). ImageNet: not measured.
"""

from dataclasses import dataclass

from common.config import CurriculumConfig, run_script
from common.data import open_dataset
from common.engine import fit
from common.model import create_model
from common.run import start_run
from common.scheduling import Stage

STAGES = [
    Stage(epochs=15, img_size=128, batch_size=1024, data_fraction=0.50, lr_scale=1.00),
    Stage(epochs=15, img_size=160, batch_size=768, data_fraction=0.75, lr_scale=0.70),
    Stage(epochs=30, img_size=224, batch_size=512, lr_scale=0.50),
    # Settle on clean images.
    Stage(epochs=20, img_size=224, batch_size=512, mixup=False, lr_scale=0.25),
]

STEM = ("conv1", "bn1", "layer1")
EXPERT_STAGES = [
    Stage(epochs=15, img_size=128, batch_size=1024, data_fraction=0.50, lr_scale=1.00),
    Stage(epochs=15, img_size=160, batch_size=768, data_fraction=0.75, lr_scale=0.60),
    Stage(epochs=20, img_size=224, batch_size=512, lr_scale=0.35),
    # Edges and colours have settled.
    Stage(epochs=15, img_size=224, batch_size=512, lr_scale=0.20, frozen=STEM),
    Stage(epochs=10, img_size=224, batch_size=512, lr_scale=0.12, mixup=False, frozen=(*STEM, "layer2")),
    Stage(epochs=5, img_size=224, batch_size=512, lr_scale=0.08, mixup=False, frozen=(*STEM, "layer2", "layer3")),
]  # fmt: skip


@dataclass
class HybridConfig(CurriculumConfig):
    """Expert curriculum"""

    strategy = "hybrid"

    progressive_freezing: bool = False
    """Lower LR scales, early layers frozen late in the run, EMA on."""

    def __post_init__(self) -> None:
        self.ema = self.ema or self.progressive_freezing

    def listed(self) -> list[Stage]:
        return EXPERT_STAGES if self.progressive_freezing else STAGES


def main(cfg: HybridConfig) -> None:
    with start_run(cfg) as run:
        train, val = open_dataset(cfg)
        model = create_model(cfg.model, len(train.classes), cfg.largest_size(), drop_path=cfg.drop_path)
        fit(run, model, train, val)


if __name__ == "__main__":
    run_script(main, HybridConfig, __doc__)
