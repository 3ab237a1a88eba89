"""A trained model as its run evaluated it: classes, shapes, crop, normalisation, precision. What `predict` and `evaluate` share."""

import argparse
import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor, nn

from common import UserError
from common.augment import Augment, AugmentSettings
from common.data.loader import Loader, LoaderSettings
from common.data.order import View
from common.data.shapes import assign, choose_shapes
from common.data.sources.base import Source
from common.data.sources.open import DataSettings, open_dataset
from common.engine.evaluate import one_view
from common.model.create import WEIGHTS, create_finetuned_model
from common.model.pretrained_cfg import CONFIG, PretrainedCfg, read_pretrained_cfg
from common.run.processes import Precision, resolve_precision

log = logging.getLogger(__name__)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line's part that makes a `TrainedModel`: RUN|MODEL_DIR and --mixed_precision."""
    place = "a run's folder, or one with model.safetensors and config.json"
    parser.add_argument("model", type=Path, metavar="RUN|MODEL_DIR", help=place)
    parser.add_argument("--mixed_precision", choices=("no", "bf16", "fp16"), help="(default: the run's)")


def model_place(folder: Path) -> Path:
    """The model's folder that a run's folder, or the model's own, means. UserError: there is none."""
    for place in (folder / "model", folder):
        if (place / CONFIG).is_file():
            return place
    raise UserError(f"{folder} is neither a run's folder nor a model's: it has no {CONFIG}")


def add_target(parser: argparse.ArgumentParser) -> None:
    """`--to`, for tools that make a model's folder; `check_target` looks at it."""
    place = "folder to make; it must not be there, or be empty"
    parser.add_argument("--to", type=Path, required=True, metavar="DIR", help=place)


def check_target(folder: Path) -> None:
    """UserError: `--to` is there already with something in it, or cannot be made."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--to {folder} is there already and not an empty folder; choose another")
    if not folder.absolute().parent.is_dir():
        raise UserError(f"--to {folder}: there is no folder {folder.parent}")


def fingerprint(place: Path) -> str:
    """Of a model's weights, for a report that is about them and no others."""
    with open(place / WEIGHTS, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


class TrainedModel:
    """A model with its classes, and what it makes of images that are prepared as in its run's evaluation.

    Args:
        folder: a run's folder, or a model's.
        mixed_precision: None = the run's; "no" for a model's folder.

    Attributes:
        settings: of the run, as its config.yaml has them; {} for a model's folder.
        shapes: heights and widths that images are brought to, int [K, 2]: one square, or the shapes of `--rect_val`.

    UserError: the folder holds no model, or one that does not know its classes.
    """

    def __init__(self, folder: Path, mixed_precision: Precision | None = None) -> None:
        place = model_place(folder)
        self.cfg: PretrainedCfg = read_pretrained_cfg(place)
        if not self.cfg.classes:
            raise UserError(f"{place / CONFIG} names no classes")
        if (self.cfg.crop_mode, self.cfg.interpolation) != ("center", "bilinear"):
            expected = f"crop_mode {self.cfg.crop_mode} and {self.cfg.interpolation} resizing"
            log.warning("the model expects %s; here they are center and bilinear", expected)
        recorded = folder / "config.yaml"
        self.settings: dict[str, Any] = yaml.safe_load(recorded.read_text()) if recorded.is_file() else {}
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        wanted = mixed_precision or self.settings.get("mixed_precision") or "no"
        self.precision, note = resolve_precision(wanted, cpu=self.device.type == "cpu")
        if note:
            log.warning("%s", note)
        if self.device.type == "cuda":
            torch.set_float32_matmul_precision("high")
        size, name = self.cfg.img_size, self.settings.get("model", self.cfg.architecture)
        model, _ = create_finetuned_model(name, self.cfg.classes, str(place), size)
        layout = torch.channels_last if self.settings.get("channels_last", True) else torch.contiguous_format
        self.model: nn.Module = model.to(self.device, memory_format=layout).eval()
        statistics = {"mean": self.cfg.mean, "std": self.cfg.std}
        self._augment = Augment(AugmentSettings(), num_classes=len(self.cfg.classes), seed=0, **statistics)
        self.shapes, self.view = np.array([[size, size]]), View(None, crop_pct=self.cfg.crop_pct)
        if self.settings.get("rect_val"):
            # Chosen from the training images, as the run chose them.
            try:
                train, _ = open_dataset(self.data_settings())
            except UserError as error:
                why = "was evaluated in rectangles, whose shapes come from its training images"
                raise UserError(f"{folder} {why}: {error}; {place} instead means square crops") from error
            self.shapes = choose_shapes(train.sizes(), size, self.settings["rect_area"])
            self.view = View(None, crop_pct=1.0)

    def data_settings(self) -> DataSettings:
        """Where the run's own images are."""
        return DataSettings(**{name: self.settings[name] for name in ("data_dir", "streaming")})

    def shape_of(self, sizes: np.ndarray) -> np.ndarray:
        """The height and width that images are brought to, int [N, 2] like their own `sizes`."""
        return self.shapes[assign(sizes, self.shapes)]

    def size_for(self, source: Source, indices: np.ndarray | slice = slice(None)) -> int | np.ndarray:
        """What an evaluation brings images of a source to: the square's side, or a height and width for each, int [N, 2]."""
        # Sizes are asked for only where they matter: that may read the headers of all files.
        if not self.settings.get("rect_val"):
            return self.cfg.img_size
        return self.shape_of(source.sizes()[indices])

    def labels_of(self, source: Source) -> np.ndarray:
        """A source's labels as the model's, matched by name: int64 [N]. UserError: it does not know some class."""
        rows = {name: row for row, name in enumerate(self.cfg.classes)}
        if unknown := [name for name in source.classes if name not in rows]:
            names = ", ".join(unknown[:5]) + (", ..." if len(unknown) > 5 else "")
            known = f"it knows {len(rows)}: {', '.join(self.cfg.classes[:3])}, ..."
            raise UserError(
                f"the model does not know {len(unknown)} of the classes in {source.location}: {names} ({known})"
            )
        return np.array([rows[name] for name in source.classes])[source.labels]

    def loader(self, source: Source, workers: int | None) -> Loader:
        """Of any batches of a source, as the run loads them; to be closed."""
        settings = LoaderSettings(workers, self.settings.get("skip_unreadable", False))
        layout = self.settings.get("channels_last", True)
        return Loader(source, source, seed=0, settings=settings, device=self.device, channels_last=layout)

    @torch.inference_mode()
    def logits(self, images: Tensor, transform: Callable[[nn.Module, Tensor], Tensor] = one_view) -> Tensor:
        """uint8 [B, 3, H, W] to float32 [B, classes], on the device."""
        images = self._augment.normalise(images.to(self.device))
        with torch.autocast(self.device.type, DTYPES.get(self.precision), self.precision in DTYPES):
            return transform(self.model, images).float()
