"""Progressive resizing: train on small images first, then on larger ones; the weights carry over.

    accelerate launch --config_file accelerate_configs/p4d_8gpu.yaml train_progressive.py --data_dir /data/imagenet-pyramid

Each stage has a OneCycle of its own, whose peak follows the batch: min(0.1 x global batch / 256, 0.4). Small stages are
only cheap if their images are cheap to load: prepare a pyramid (python -m common.tools.prepare).

Measured: Caltech-101, ResNet-18, 32 / 64 / 96 px, two CPU cores: 69.5 % top-1 in 0.54 of the time in which standard training
ends at 68.2 % (docs/results.md, with a list of its own). ImageNet: not measured.
"""

from dataclasses import dataclass
from typing import Literal

from common import PositiveFloat
from common.config import CurriculumConfig, run_script
from common.data import open_dataset
from common.engine import fit
from common.model import create_model
from common.run import start_run
from common.scheduling import Stage

STAGES = [
    Stage(epochs=25, img_size=56, batch_size=4096),
    Stage(epochs=25, img_size=112, batch_size=1024),
    # The last epochs settle on clean images.
    Stage(epochs=25, img_size=224, batch_size=256, mixup=0.6),
]


@dataclass
class ProgressiveConfig(CurriculumConfig):
    """Learning rate of the stages"""

    strategy = "progressive"

    lr: PositiveFloat | Literal["auto"] = 0.1
    max_lr: PositiveFloat | None = 0.4
    stage_wise: bool = True

    def listed(self) -> list[Stage]:
        return STAGES


def main(cfg: ProgressiveConfig) -> None:
    with start_run(cfg) as run:
        train, val = open_dataset(cfg)
        model = create_model(cfg.model, len(train.classes), cfg.largest_size(), drop_path=cfg.drop_path)
        fit(run, model, train, val)


if __name__ == "__main__":
    run_script(main, ProgressiveConfig, __doc__)
