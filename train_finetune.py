"""Fine-tuning: start from weights, train a new head first, then all layers, more gently towards the stem.

    accelerate launch --config_file accelerate_configs/single_gpu.yaml train_finetune.py \\
        --data_dir /data/flowers --weights runs/standard-20260101-120000

`--weights` takes a run folder, a .safetensors or .pth file, or a timm pretrained tag (--model resnet50.a1_in1k --weights timm).
"""

from dataclasses import dataclass

from common.config import TrainConfig, UserError, main_with
from common.engine.fit import train
from common.scheduling import BACKBONE, Stage


@dataclass
class FinetuneConfig(TrainConfig):
    """Settings of fine-tuning.

    Args:
        epochs: passes over the training set, the head's included.
        head_epochs: of these, how many train the head alone, everything else frozen.
        img_size: side of the image in pixels.
        batch_size: images per process and optimizer step; cut down to a small dataset.
        body_lr_scale: peak learning rate of the second stage relative to the head's.
        mixup_share: share of the second stage's epochs, from its first, that use MixUp/CutMix.
    """

    strategy = "finetune"

    epochs: int = 50
    head_epochs: int = 5
    img_size: int = 224
    batch_size: int = 1024
    body_lr_scale: float = 0.3
    mixup_share: float = 0.9
    stage_wise: bool = True
    layer_decay: float | None = 0.8

    def curriculum(self) -> list[Stage]:
        if not self.weights:
            raise UserError("--weights is needed: a run folder, a weights file, or a timm pretrained tag")
        if not 0 < self.head_epochs < self.epochs:
            raise UserError(f"--head_epochs must be above 0 and below --epochs, not {self.head_epochs}")
        common = {"img_size": self.img_size, "batch_size": self.batch_size}
        return [
            Stage(epochs=self.head_epochs, mixup=False, frozen=(BACKBONE,), **common),
            Stage(
                epochs=self.epochs - self.head_epochs,
                mixup=self.mixup_share,
                lr_scale=self.body_lr_scale,
                **common,
            ),
        ]


if __name__ == "__main__":
    main_with(train, FinetuneConfig, __doc__)
