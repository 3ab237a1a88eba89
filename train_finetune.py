"""Fine-tuning: start from weights, train a new head first, then all layers, more gently towards the stem.

    accelerate launch --config_file accelerate_configs/single_gpu.yaml train_finetune.py \\
        --data_dir /data/flowers --weights runs/standard-20260101-120000

Measured: half of Caltech-101 from weights of the other half, ResNet-18, 64 px, 4 epochs: 55.7 %, 39.1 % from scratch (docs/results.md).
"""

from dataclasses import dataclass

from common import ClosedUnitInterval, PositiveInt, UserError
from common.config import OneSizeConfig, run_script
from common.data import open_dataset
from common.engine import fit
from common.engine.probe import fit_head, probe
from common.model import create_finetuned_model, create_model
from common.run import start_run
from common.scheduling import BACKBONE, Stage


@dataclass
class FinetuneConfig(OneSizeConfig):
    """Weights and head"""

    strategy = "finetune"

    weights: str = ""
    """Start from these: a run or model folder, a .safetensors or .pth file, a timm pretrained tag, or "timm"."""
    epochs: PositiveInt = 50
    head_epochs: PositiveInt | None = None
    """Of the epochs, those that train the head alone, all else frozen; null = a tenth, or none where it is fitted at once."""
    batch_size: PositiveInt = 1024
    stage_wise: bool = True
    layer_decay: ClosedUnitInterval | None = 0.8
    probe: bool = False
    """Train the head alone, as a logistic regression on features that are made once: minutes, without a GPU."""

    def curriculum(self) -> list[Stage]:
        size = {"img_size": self.img_size, "batch_size": self.batch_size}
        if self.epochs == 1 and not self.head_epochs:
            return [Stage(1, mixup=self.mixup_share, **size)]
        head_epochs = self.head_epochs or max(1, round(self.epochs / 10))
        if head_epochs >= self.epochs:
            raise UserError(f"--head_epochs {head_epochs} must be below --epochs {self.epochs}")
        return [
            Stage(head_epochs, mixup=False, frozen=(BACKBONE,), **size),
            Stage(self.epochs - head_epochs, mixup=self.mixup_share, lr_scale=0.3, **size),
        ]


def main(cfg: FinetuneConfig) -> None:
    with start_run(cfg) as run:
        train, val = open_dataset(cfg)
        size, drop_path = cfg.largest_size(), cfg.drop_path
        if run.stages:
            # A resumed run brings its own weights along.
            model, source = create_model(cfg.model, len(train.classes), size, drop_path), None
        else:
            model, source = create_finetuned_model(cfg.model, train.classes, cfg.weights, size, drop_path)
        if cfg.probe:
            probe(run, model, train, val, source)
        else:
            fit(run, model, train, val, source, start=fit_head)


if __name__ == "__main__":
    run_script(main, FinetuneConfig, __doc__)
