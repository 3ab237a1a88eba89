"""Batch augmentation on the device: flip, normalise, MixUp, CutMix, Random Erasing, Cutout and soft targets.

What is drawn is drawn on the CPU, as a few numbers per image, and travels to the device in one copy; no number
comes back. Images keep the memory layout in which they come.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from common import ClosedUnitInterval, NonNegativeFloat, PositiveInt
from common.data.order import EVENNESS, BatchItem
from common.data.rng import CUTOUT, ERASE, FLIP, uniforms

log = logging.getLogger(__name__)

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
ERASING_AREA = (0.02, 0.33)  # shares of the image; this and the next as in the paper
ERASING_ASPECT = (0.3, 1 / 0.3)  # height / width


@dataclass
class AugmentSettings:
    """Augmentation"""

    mixup_alpha: NonNegativeFloat = 0.2
    """Parameter of MixUp's Beta(alpha, alpha) (Zhang et al., 2018); 0 = off. With CutMix on as well, a fair coin
    picks one per batch."""

    cutmix_alpha: NonNegativeFloat = 1.0
    """Parameter of CutMix's Beta(alpha, alpha) (Yun et al., 2019); 0 = off."""

    batch_aug_prob: ClosedUnitInterval = 1.0
    """Probability that a batch is mixed at all."""

    label_smoothing: ClosedUnitInterval = 0.1
    """Of batches that are not mixed (Szegedy et al., 2016)."""

    class_weights: Literal["none", "sqrt", "balanced"] = "none"
    """Weigh rare classes more in the loss: balanced = by images / (classes x images of the class), sqrt = by its root."""

    flip: ClosedUnitInterval = 0.5
    """Probability of a horizontal flip, per image."""

    erasing_prob: ClosedUnitInterval = 0.0
    """Probability of Random Erasing (Zhong et al., 2020), per image."""

    cutout_prob: ClosedUnitInterval = 0.0
    """Probability of Cutout (DeVries and Taylor, 2017), per image."""

    cutout_length: PositiveInt = 8
    """Side of Cutout's square hole in pixels."""


class Augment:
    """Turns a batch of pixels into a batch to learn from.

    `mean` and `std` are the channels', for pixels from 0 to 1. `train_labels`, int [images], tell how rare the classes are.
    """

    def __init__(
        self,
        settings: AugmentSettings,
        *,
        num_classes: int,
        seed: int,
        mean: tuple[float, ...] = IMAGENET_MEAN,
        std: tuple[float, ...] = IMAGENET_STD,
        train_labels: np.ndarray | None = None,
    ) -> None:
        self.settings, self.num_classes, self.seed = settings, num_classes, seed
        self.mean, self.std = mean, std
        self.scale = torch.tensor([1 / (255 * s) for s in std])[None, :, None, None]
        self.offset = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)])[None, :, None, None]
        self.class_weights: Tensor | None = None
        if settings.class_weights != "none":
            assert train_labels is not None
            self.class_weights = weigh(train_labels, num_classes, EVENNESS[settings.class_weights])
        if settings.erasing_prob > 0 and settings.cutout_prob > 0:
            log.warning("Random Erasing and Cutout are both on; images may lose more than is good for them")

    def __call__(
        self, images: Tensor, labels: Tensor, item: BatchItem, *, mix: bool, strength: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Augment a batch; a pure function of the settings and the arguments, which it leaves as they are.

        Flips, erasing and holes depend on (seed, epoch, image) alone, so on no batch, process or worker;
        mixing depends on (seed, epoch, the batch's first image). Mixing comes before erasing.

        Args:
            images: uint8 [B, C, H, W], in either memory layout.
            labels: int64 [B], on the same device.
            mix: whether MixUp and CutMix may be applied.
            strength: multiplies MixUp's alpha (the larger, the nearer its shares come to halves) and the
                probabilities of CutMix, erasing and Cutout; at 0 there are none of the four.

        Returns:
            Normalised images, float32 [B, C, H, W] in the layout of `images`, and soft targets, float32
            [B, num_classes]. Rows sum to 1; cross-entropy with them is lam x loss(a) + (1 - lam) x loss(b).
            With class weights every label's part is multiplied by its class's weight, and its smoothing with it.
        """
        _, _, height, width = images.shape
        assert len(item.indices) == len(images)
        assert images.dtype == torch.uint8
        flips = uniforms(self.seed, item.epoch, item.indices, FLIP, 1) < self.settings.flip
        mixing, share, box = self._draw_mixing(item, height, width, strength if mix else 0.0)
        holes = [hole for hole in self._draw_holes(item, height, width, strength) if hole.any()]
        table = np.concatenate([flips, share, box, *holes], axis=1, dtype=np.float32)
        drawn = torch.from_numpy(table)
        if images.is_cuda:
            drawn = drawn.pin_memory()
        drawn = drawn.to(images.device, non_blocking=images.is_cuda)
        flipped, lam, box, *holes = drawn.split([1, 1] + [4] * (1 + len(holes)), 1)

        if flips.any():
            # Where the mask is 1, a + (b - a) * mask is b: exact, since uint8 wraps around, and on a CPU several
            # times faster than torch.where or indexing.
            images = images + (images.flip(3) - images) * flipped[:, :, None, None].to(torch.uint8)
        if mixing == "cutmix":
            images = _mix_partners(images.clone(), _inside(box, images))
        out = self.normalise(images)
        if mixing == "mixup":
            out = _mix_partners(out, 1 - lam[:, :, None, None])
        for hole in holes:
            # 0 is the mean colour of normalised pixels; unlike noise it is the same on any device.
            out.masked_fill_(_inside(hole, images).view(torch.bool), 0.0)
        return out, self._targets(labels, lam if mixing else None)

    def normalise(self, images: Tensor) -> Tensor:
        """(pixels / 255 - mean) / std, all that evaluation needs: uint8 to float32 [B, C, H, W]."""
        # They stay on the device: a copy for every batch would cost more than the sum.
        self.scale, self.offset = self.scale.to(images.device), self.offset.to(images.device)
        return images.to(torch.float32).mul_(_as_row(self.scale, images)).add_(_as_row(self.offset, images))

    def _targets(self, labels: Tensor, lam: Tensor | None) -> Tensor:
        """Soft targets, float32 [B, num_classes]: lam (float32 [B, 1]) of a label, the rest its partner's."""
        batch, half = len(labels), len(labels) // 2
        labels = labels[:, None]
        if self.class_weights is not None:
            self.class_weights = self.class_weights.to(labels.device)
        weights = self.class_weights
        if lam is None:
            smoothing = self.settings.label_smoothing
            floor = smoothing / self.num_classes
            targets = torch.full((batch, self.num_classes), floor, device=labels.device)
            targets.scatter_(1, labels, 1 - smoothing + floor)
            # By the image's class: the weights of the others, of which smoothing gives each a little, may be many times its own.
            return targets if weights is None else targets.mul_(weights[labels])
        partners = torch.cat([labels[half : 2 * half], labels[:half], labels[2 * half :]])
        targets = torch.zeros(batch, self.num_classes, device=labels.device)
        targets.scatter_(1, labels, lam).scatter_add_(1, partners, 1 - lam)
        return targets if weights is None else targets.mul_(weights)

    def _draw_mixing(
        self, item: BatchItem, height: int, width: int, strength: float
    ) -> tuple[str, np.ndarray, np.ndarray]:
        """Draw "mixup", "cutmix" or "", an image's own share of the mix [B, 1], and the box to cut [B, 4]."""
        batch, settings = len(item.indices), self.settings
        # Alpha and probability of each. Strength acts on CutMix's probability, since a smaller alpha would
        # not weaken its mixes: the border leaves about half of a box as large as the image.
        kinds = {
            "mixup": (settings.mixup_alpha * strength, settings.batch_aug_prob),
            "cutmix": (settings.cutmix_alpha, settings.batch_aug_prob * strength),
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
        settings, size = self.settings, np.array([[height], [width]])
        if settings.erasing_prob * strength > 0:
            chance, area, aspect, *corner = uniforms(self.seed, item.epoch, item.indices, ERASE, 5).T
            low, high = ERASING_AREA
            area = height * width * (low + (high - low) * area)
            # The paper draws again until the rectangle fits; here the aspect is drawn from what fits.
            lowest, highest = (np.clip(limit, area / width**2, height**2 / area) for limit in ERASING_ASPECT)
            aspect = lowest * (highest / lowest) ** aspect
            sides = np.rint(np.sqrt([area * aspect, area / aspect])).clip(1, size)
            first = np.floor(corner * (size - sides + 1))
            drawn = (chance < settings.erasing_prob * strength)[:, None]
            yield drawn * _box(first.T, (first + sides).T, height, width)
        if settings.cutout_prob * strength > 0:
            chance, *centre = uniforms(self.seed, item.epoch, item.indices, CUTOUT, 3).T
            first = (np.floor(centre * size) - settings.cutout_length // 2).T
            drawn = (chance < settings.cutout_prob * strength)[:, None]
            yield drawn * _box(first, first + settings.cutout_length, height, width)


def weigh(labels: np.ndarray, num_classes: int, evenness: float) -> Tensor:
    """A weight for each class, float32 [num_classes], in proportion to its images ** -evenness.

    Their mean over the images is 1, and the loss stays a sum over images divided by their number, not by their weights
    (as `cross_entropy` with labels would): so it is the same however the images are shared out to processes and micro-batches.
    """
    images = np.bincount(labels, minlength=num_classes)
    weights = np.maximum(images, 1.0) ** -evenness
    return torch.tensor(weights * len(labels) / (weights @ images), dtype=torch.float32)


def _box(first: np.ndarray, last: np.ndarray, height: int, width: int) -> np.ndarray:
    """Boxes [B, 4] (top, bottom, left, right) in whole pixels of the image, from corners (y, x) [B, 2]."""
    corners = np.stack([first, last], axis=2).clip(0, [[height], [width]])  # [B, (y, x), (first, last)]
    return np.rint(corners).reshape(-1, 4)


def _mix_partners(images: Tensor, share: Tensor) -> Tensor:
    """Give each image a share (0 to 1, [B, ...]) of the one half a batch away, in place; the last of an odd batch stays.

    With masks of 0 and 1 it is exact in uint8 too, which wraps around.
    """
    half = len(images) // 2
    first, second = images[:half], images[half : 2 * half]
    gap = second - first
    first.addcmul_(gap, share[:half])
    second.addcmul_(gap, -share[half : 2 * half])
    return images


def _inside(box: Tensor, images: Tensor) -> Tensor:
    """Mask of the inside of boxes, float32 [B, 4] (top, bottom, left, right): 0 and 1, uint8 like `images`.

    On a CPU PyTorch vectorises products of uint8, but not the conjunction of booleans.
    """
    top, bottom, left, right = box[:, :, None, None, None].unbind(1)
    y = torch.arange(images.shape[2], device=box.device)[:, None]
    x = torch.arange(images.shape[3], device=box.device)
    in_rows = ((y >= top) & (y < bottom)).to(torch.uint8)
    in_columns = ((x >= left) & (x < right)).to(torch.uint8)
    return torch.mul(in_rows, _as_row(in_columns, images), out=torch.empty_like(images))


def _as_row(values: Tensor, images: Tensor) -> Tensor:
    """Repeat values [N, 1 or C, 1, 1 or W] over channels and columns: [N, C, 1, W], in memory as in `images`.

    What follows then runs along whole rows. On a CPU PyTorch would take the pixels of channels_last memory one
    by one, with three numbers each.
    """
    return torch.empty_like(images[: len(values), :, :1], dtype=values.dtype).copy_(values)
