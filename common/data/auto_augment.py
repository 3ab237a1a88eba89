"""Random edits of colour and geometry, in the workers: TrivialAugmentWide, RandAugment and 3-Augment.

In Pillow, as their authors did it, which on a CPU is faster than the same on tensors (docs/input-pipeline.md).
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from common.data.order import BatchItem
from common.data.rng import AUTO, uniforms

# What comes into view from outside: ImageNet's mean colour, which is 0 to the network.
GREY = (124, 116, 104)
# 3-Augment's: brightness, contrast and colour change by up to this share.
JITTER = 0.3


class Ranges(NamedTuple):
    """How far the edits go at full magnitude."""

    shear: float  # columns per row
    translate: float  # share of the side
    rotate: float  # degrees
    enhance: float  # added to 1, or taken off
    posterize: float  # bits


# Cubuk et al. (2020) at magnitude 10 of 10, and the "wide" ranges of Müller and Hutter (2021), whose 32 pixels are a share of 224 here, so
# that small stages keep their images.
RAND = Ranges(0.3, 0.45, 30.0, 0.9, 4.0)
WIDE = Ranges(0.99, 32 / 224, 135.0, 0.99, 6.0)


def _affine(image: Image.Image, *inverse: float) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, inverse, fillcolor=GREY)


# Image, magnitude from -1 to 1, and ranges in; both papers have these fourteen.
EDITS: tuple[Callable[[Image.Image, float, Ranges], Image.Image], ...] = (
    lambda image, m, most: image,
    lambda image, m, most: ImageOps.autocontrast(image),
    lambda image, m, most: ImageOps.equalize(image),
    lambda image, m, most: ImageOps.posterize(image, 8 - round(most.posterize * abs(m))),
    lambda image, m, most: ImageOps.solarize(image, 256 - round(256 * abs(m))),
    lambda image, m, most: image.rotate(most.rotate * m, fillcolor=GREY),
    lambda image, m, most: _affine(image, 1, most.shear * m, 0, 0, 1, 0),
    lambda image, m, most: _affine(image, 1, 0, 0, most.shear * m, 1, 0),
    lambda image, m, most: _affine(image, 1, 0, most.translate * m * image.width, 0, 1, 0),
    lambda image, m, most: _affine(image, 1, 0, 0, 0, 1, most.translate * m * image.height),
    lambda image, m, most: ImageEnhance.Brightness(image).enhance(1 + most.enhance * m),
    lambda image, m, most: ImageEnhance.Color(image).enhance(1 + most.enhance * m),
    lambda image, m, most: ImageEnhance.Contrast(image).enhance(1 + most.enhance * m),
    lambda image, m, most: ImageEnhance.Sharpness(image).enhance(1 + most.enhance * m),
)


def auto_augment(images: np.ndarray, item: BatchItem, seed: int) -> None:
    """Edit a batch (uint8 [B, H, W, 3]) in place, as its view says; the edits depend on (seed, epoch, image) alone."""
    draws = uniforms(seed, item.epoch, item.indices, AUTO, 6).tolist()
    for image, (chance, *own) in zip(images, draws, strict=True):
        if chance < item.view.strength:
            image[:] = _edit(Image.fromarray(image), item.view.auto_augment, item.view.magnitude, *own)


def _edit(
    image: Image.Image, policy: str, magnitude: float, which: float, a: float, b: float, c: float, d: float
) -> Image.Image:
    """One image by one policy; `which` to `d` are in [0, 1)."""
    if policy == "trivial":
        # One edit at a random magnitude.
        return EDITS[int(which * len(EDITS))](image, 2 * a - 1, WIDE)
    if policy == "rand":
        # Two at the magnitude given, to either side.
        for number, side in ((which, a), (b, c)):
            image = EDITS[int(number * len(EDITS))](image, magnitude if side < 0.5 else -magnitude, RAND)
        return image
    # Touvron et al. (2022, DeiT III): greyscale, solarisation or blur, and then colour jitter.
    one_of_three = (
        lambda: ImageOps.grayscale(image).convert("RGB"),
        lambda: ImageOps.solarize(image),
        lambda: image.filter(ImageFilter.GaussianBlur(0.1 + 1.9 * a)),
    )
    image = one_of_three[int(which * 3)]()
    jitters = {ImageEnhance.Brightness: b, ImageEnhance.Contrast: c, ImageEnhance.Color: d}
    for kind, draw in jitters.items():
        image = kind(image).enhance(1 + JITTER * (2 * draw - 1))
    return image
