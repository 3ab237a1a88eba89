"""Standard training: one image size, one OneCycle whose peak the LR finder chooses.

    accelerate launch --config_file accelerate_configs/g5_4gpu.yaml train_standard.py --data_dir /data/imagenet

MixUp and CutMix rest for the last tenth of the epochs, so that the model settles on clean images.

Measured: Caltech-101, ResNet-18, 96 px, 20 epochs, two CPU cores: 68.2 % top-1 in 26 min (docs/results.md). ImageNet: not
measured.
"""

from dataclasses import dataclass

from common import ClosedUnitInterval, PositiveInt
from common.config import OneSizeConfig, run_script
from common.data import open_dataset
from common.engine import fit
from common.model import create_model
from common.run import start_run
from common.scheduling import Stage


@dataclass
class StandardConfig(OneSizeConfig):
    strategy = "standard"

    epochs: PositiveInt = 60
    img_size: PositiveInt = 224
    batch_size: PositiveInt = 512
    mixup_share: ClosedUnitInterval = 0.9

    def curriculum(self) -> list[Stage]:
        return [Stage(self.epochs, self.img_size, self.batch_size, mixup=self.mixup_share)]


def main(cfg: StandardConfig) -> None:
    with start_run(cfg) as run:
        train, val = open_dataset(cfg)
        model = create_model(cfg.model, len(train.classes), cfg.largest_size(), drop_path=cfg.drop_path)
        fit(run, model, train, val)


if __name__ == "__main__":
    run_script(main, StandardConfig, __doc__)
