"""Standard training: one image size, one OneCycle whose peak the LR finder chooses.

    accelerate launch --config_file accelerate_configs/g5_4gpu.yaml train_standard.py --data_dir /data/imagenet

MixUp and CutMix rest for the last tenth of the epochs, so that the model settles on clean images.
"""

from dataclasses import dataclass

from common.config import TrainConfig, main_with
from common.engine.fit import train
from common.scheduling import Stage


@dataclass
class StandardConfig(TrainConfig):
    """Settings of standard training.

    Args:
        epochs: passes over the training set.
        img_size: side of the image in pixels.
        batch_size: images per process and optimizer step.
        mixup_share: share of the epochs, from the first, that use MixUp/CutMix.
    """

    strategy = "standard"

    epochs: int = 60
    img_size: int = 224
    batch_size: int = 512
    mixup_share: float = 0.9

    def curriculum(self) -> list[Stage]:
        return [
            Stage(
                epochs=self.epochs, img_size=self.img_size, batch_size=self.batch_size, mixup=self.mixup_share
            )
        ]


if __name__ == "__main__":
    main_with(train, StandardConfig, __doc__)
