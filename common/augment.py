"""Batch augmentation on the device: flip, normalise, MixUp, CutMix, Random Erasing, Cutout and soft targets.

What is drawn is drawn on the CPU, as a few numbers per image, and travels to the device in one copy. The
pixels are worked on as rows of width x 3 numbers: in channels_last memory that costs no copy, and masks and
constants broadcast along long contiguous rows instead of three channels at a time.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from common.data.order import BatchItem
from common.data.rng import CUTOUT, ERASE, FLIP, uniforms

if TYPE_CHECKING:
    from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, PositiveInt

log = logging.getLogger(__name__)

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
ERASING_AREA = (0.02, 0.33)  # smallest and largest erased share of the image
CUTOUT_HOLES = 1
ERASING_ASPECT = (0.3, 1 / 0.3)  # height / width, as in the paper


@dataclass
class AugmentSettings:
    """Augmentation"""

    mixup_alpha: NonNegativeFloat = 0.2
    """MixUp's Beta parameter (Zhang et al., 2018); 0 = off. With CutMix on too, a fair coin picks one per batch."""
    cutmix_alpha: NonNegativeFloat = 1.0
    """CutMix's Beta parameter (Yun et al., 2019); 0 = off."""
    batch_aug_prob: ClosedUnitInterval = 1.0
    """Probability that a batch is mixed at all."""
    label_smoothing: ClosedUnitInterval = 0.1
    """Of batches that are not mixed (Szegedy et al., 2016)."""
    erasing_prob: ClosedUnitInterval = 0.0
    """Probability of Random Erasing, per image (Zhong et al., 2020)."""
    cutout_prob: ClosedUnitInterval = 0.0
    """Probability of Cutout, per image (DeVries and Taylor, 2017)."""
    cutout_length: PositiveInt = 8
    """Side of Cutout's hole in pixels."""
    flip: ClosedUnitInterval = 0.5
    """Probability of a horizontal flip."""


class Augment:
    """Turns a batch of pixels into a batch to learn from.

    Args:
        settings: what is applied, and how often.
        num_classes: length of the soft targets.
        seed: of the run.
        mean: of the dataset's channels, for pixels from 0 to 1.
        std: their standard deviations.
    """

    def __init__(
        self,
        settings: AugmentSettings,
        num_classes: int,
        seed: int = 0,
        mean: tuple[float, ...] = IMAGENET_MEAN,
        std: tuple[float, ...] = IMAGENET_STD,
    ) -> None:
        self.settings, self.num_classes, self.seed, self.mean, self.std = (
            settings,
            num_classes,
            seed,
            mean,
            std,
        )
        if settings.erasing_prob > 0 and settings.cutout_prob > 0:
            log.warning("Random Erasing and Cutout are both on; images may lose more than is good for them")

    def __call__(
        self, images: Tensor, labels: Tensor, item: BatchItem, *, mix: bool, strength: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Augment a batch; a pure function of the settings and the arguments, which it leaves as they are.

        Flips, erasing and holes depend on (seed, epoch, image) alone, so on no batch, process or worker;
        mixing depends on (seed, epoch, the batch's first image). Mixing comes before erasing.

        Args:
            images: uint8 [B, 3, H, W], best in channels_last memory.
            labels: int64 [B], on the same device.
            item: says which images these are.
            mix: whether MixUp and CutMix may be applied.
            strength: multiplies MixUp's alpha (the larger, the nearer its shares come to halves) and the
                probabilities of CutMix, erasing and Cutout; at 0 there are none of the four.

        Returns:
            Normalised images, float32 [B, 3, H, W] in channels_last memory, and soft targets, float32
            [B, num_classes]. Rows sum to 1; cross-entropy with them is lam x loss(a) + (1 - lam) x loss(b).
        """
        batch, channels, height, width = images.shape
        assert len(item.indices) == batch
        assert images.dtype == torch.uint8
        flips = uniforms(self.seed, item.epoch, item.indices, FLIP, 1)[:, 0] < self.settings.flip
        flipped_first = np.argsort(~flips, kind="stable")[:, None]
        mixing, share, box = self._draw_mixing(item, height, width, strength if mix else 0.0)
        holes = [hole for hole in self._draw_holes(item, height, width, strength) if hole.any()]
        table = np.concatenate([flipped_first, share, box, *holes], axis=1, dtype=np.float32)
        flipped, lam, box, *holes = _to_device(table, images.device).split([1, 1] + [4] * (1 + len(holes)), 1)

        rows = _as_rows(images)
        if flips.any():
            flipped = flipped[: flips.sum(), 0].long()
            mirrored = rows.index_select(0, flipped).unflatten(2, (width, channels)).flip(2).flatten(2)
            rows = rows.index_copy(0, flipped, mirrored)
        if mixing == "cutmix":
            inside = _inside(box, height, width, channels)
            # Exact, since uint8 wraps around; on a CPU several times faster than torch.where.
            rows = rows + (_partners(rows) - rows) * inside
        out = self._normalise_rows(rows, width)
        if mixing == "mixup":
            half = batch // 2
            first, second = out[:half], out[half : 2 * half]  # partners of each other, mixed in place
            gap = second - first
            first.addcmul_(gap, 1 - lam[:half, :, None])
            second.addcmul_(gap, lam[half : 2 * half, :, None] - 1)
        if holes:
            covered = _inside(holes[0], height, width, channels)
            for hole in holes[1:]:
                covered |= _inside(hole, height, width, channels)
            out.masked_fill_(covered.view(torch.bool), 0.0)  # 0 is the mean colour of normalised pixels
        return _as_images(out, width), self._targets(labels, lam if mixing else None)

    def normalise(self, images: Tensor) -> Tensor:
        """(pixels / 255 - mean) / std, all that evaluation needs: uint8 [B, 3, H, W] to float."""
        width = images.shape[3]
        return _as_images(self._normalise_rows(_as_rows(images), width), width)

    def _normalise_rows(self, rows: Tensor, width: int) -> Tensor:
        scale, offset = _affine(self.mean, self.std, width, rows.device)
        return rows.to(torch.float32).mul_(scale).add_(offset)

    def _targets(self, labels: Tensor, lam: Tensor | None) -> Tensor:
        """Soft targets, float32 [B, num_classes]: lam (float32 [B, 1]) of a label, the rest its partner's."""
        labels = labels[:, None]
        if lam is None:
            floor = self.settings.label_smoothing / self.num_classes
            targets = torch.full((len(labels), self.num_classes), floor, device=labels.device)
            return targets.scatter_(1, labels, 1 - self.settings.label_smoothing + floor)
        targets = torch.zeros(len(labels), self.num_classes, device=labels.device)
        return targets.scatter_(1, labels, lam).scatter_add_(1, _partners(labels), 1 - lam)

    def _draw_mixing(
        self, item: BatchItem, height: int, width: int, strength: float
    ) -> tuple[str, np.ndarray, np.ndarray]:
        """Draw "mixup", "cutmix" or "", an image's own share of the mix [B, 1], and the box to cut [B, 4]."""
        batch = len(item.indices)
        # Alpha and probability of each. Strength acts on CutMix's probability, since a smaller alpha would
        # not weaken its mixes: the border leaves about half of a box as large as the image.
        kinds = {
            "mixup": (self.settings.mixup_alpha * strength, self.settings.batch_aug_prob),
            "cutmix": (self.settings.cutmix_alpha, self.settings.batch_aug_prob * strength),
        }
        possible = [kind for kind, (alpha, chance) in kinds.items() if alpha > 0 and chance > 0]
        rng = np.random.default_rng((self.seed, item.epoch, int(item.indices[0])))
        which, coin = rng.random(2)
        kind = possible[int(which * len(possible))] if possible else ""
        if not kind or coin >= kinds[kind][1]:
            return "", np.ones((batch, 1)), np.zeros((batch, 4))
        share = rng.beta(kinds[kind][0], kinds[kind][0], (batch, 1))
        if kind == "mixup":
            return kind, share, np.zeros((batch, 4))
        sides = np.sqrt(1 - share) * (height, width)
        centres = rng.random((batch, 2)) * (height, width)
        box = _box(centres - sides / 2, centres + sides / 2, height, width)
        # The border clips boxes, so the share is counted again, in whole pixels.
        area = (box[:, 1] - box[:, 0]) * (box[:, 3] - box[:, 2])
        return kind, 1 - area[:, None] / (height * width), box

    def _draw_holes(self, item: BatchItem, height: int, width: int, strength: float) -> Iterator[np.ndarray]:
        """Draw what Random Erasing and Cutout cover: boxes [B, 4], empty ones where nothing is drawn."""
        batch = len(item.indices)
        if self.settings.erasing_prob * strength > 0:
            chance, area, aspect, *corner = uniforms(self.seed, item.epoch, item.indices, ERASE, 5).T
            low, high = ERASING_AREA
            area = height * width * (low + (high - low) * area)
            # The paper draws again until the rectangle fits; here the aspect is drawn from what fits.
            lowest, highest = (np.clip(limit, area / width**2, height**2 / area) for limit in ERASING_ASPECT)
            aspect = lowest * (highest / lowest) ** aspect
            sides = np.rint(np.sqrt([area * aspect, area / aspect])).clip(1, [[height], [width]])
            first = np.floor(corner * (np.array([[height], [width]]) - sides + 1))
            drawn = (chance < self.settings.erasing_prob * strength)[:, None]
            yield drawn * _box(first.T, (first + sides).T, height, width)
        if self.settings.cutout_prob * strength > 0:
            chance, *centres = uniforms(self.seed, item.epoch, item.indices, CUTOUT, 1 + 2 * CUTOUT_HOLES).T
            drawn = (chance < self.settings.cutout_prob * strength)[:, None]
            centres = np.array(centres).reshape(CUTOUT_HOLES, 2, batch).swapaxes(1, 2)
            for centre in np.floor(centres * (height, width)) - self.settings.cutout_length // 2:
                yield drawn * _box(centre, centre + self.settings.cutout_length, height, width)


def _box(first: np.ndarray, last: np.ndarray, height: int, width: int) -> np.ndarray:
    """Boxes [B, 4] (top, bottom, left, right) in whole pixels of the image, from corners (y, x) [B, 2]."""
    corners = np.stack([first, last], axis=2).clip(0, [[height], [width]])  # [B, (y, x), (first, last)]
    return np.rint(corners).reshape(-1, 4)


def _to_device(table: np.ndarray, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(table)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _as_rows(images: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, H, W * C], a view if the memory is channels_last."""
    return images.permute(0, 2, 3, 1).flatten(2)


def _as_images(rows: Tensor, width: int) -> Tensor:
    """[B, H, W * C] -> [B, C, H, W], a view in channels_last memory."""
    return rows.unflatten(2, (width, -1)).permute(0, 3, 1, 2)


def _partners(values: Tensor) -> Tensor:
    """What each image is mixed with: the one half a batch away; the last of an odd batch has itself."""
    half = len(values) // 2
    return torch.cat([values[half : 2 * half], values[:half], values[2 * half :]])


def _inside(box: Tensor, height: int, width: int, channels: int) -> Tensor:
    """Mask of the inside of boxes, float32 [B, 4] (top, bottom, left, right): 0 and 1, uint8 [B, H, W * C].

    On a CPU PyTorch vectorises products of uint8, but not the conjunction of booleans.
    """
    top, bottom, left, right = box.split(1, dim=1)
    y = torch.arange(height, device=box.device)
    x = torch.arange(width * channels, device=box.device)
    in_rows = (y >= top) & (y < bottom)
    in_columns = (x >= left * channels) & (x < right * channels)
    return in_rows.to(torch.uint8)[:, :, None] * in_columns.to(torch.uint8)[:, None, :]


@lru_cache(maxsize=64)  # a few widths; a copy to the device for every batch would cost more than the sum
def _affine(
    mean: tuple[float, ...], std: tuple[float, ...], width: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Scale and offset that normalise a row of pixels, float32 [W * C] each."""
    scale = torch.tensor([1 / (255 * s) for s in std], device=device)
    offset = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], device=device)
    return scale.repeat(width), offset.repeat(width)
