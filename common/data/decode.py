"""Encoded bytes + crop box + size -> uint8 pixels: the hot path of every worker.

The headers say how large the images are before anything is decoded, so all crop boxes of a batch are drawn at once
with numpy; the decoder's result is cropped as a view; and the antialiased resize writes straight into the batch.
"""

import io
import struct
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps

from common import first_line
from common.data.order import BatchItem, View
from common.data.rng import CROP, uniforms

MAX_PIXELS = 178_956_970  # Pillow's limit for a decompression bomb, held before anything is decoded
TRIES = 10  # random boxes drawn until one fits the image, as in torchvision's RandomResizedCrop

_resize_into = torch.ops.aten._upsample_bilinear2d_aa.out  # F.interpolate(antialias=True), into memory we own

# What the decoders raise for bytes that are not the image they claim to be.
_DECODE_ERRORS = (OSError, RuntimeError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError)

# The bytes may lie in a read-only memory map, which the decoder only reads. torch warns of that once: now.
with warnings.catch_warnings(action="ignore"):
    torch.from_numpy(np.frombuffer(b"\0", np.uint8))


class DecodeError(ValueError):
    """These bytes are not an image that can be decoded; `position` is the image's place in the batch."""

    position = 0


class Header(NamedTuple):
    height: int  # as seen, that is after EXIF orientation
    width: int
    fast: bool  # a grey or three-component JPEG, which libjpeg turns into RGB itself


def read_header(encoded: np.ndarray) -> Header:
    """Read an image's size from its first bytes (uint8 [n]), as far as the frame header; 10 us for a JPEG.

    Raises:
        DecodeError: not an image, or too large to be one in good faith.
    """
    data = encoded.data
    try:
        header = _jpeg_header(data) if data[:2] == b"\xff\xd8" else _other_header(data)
    except _DECODE_ERRORS as error:
        raise DecodeError(_reason(error)) from error
    if header.height * header.width > MAX_PIXELS:
        raise DecodeError(f"{header.width} x {header.height} pixels are more than {MAX_PIXELS}")
    return header


def _jpeg_header(data: memoryview) -> Header:
    """Find the frame header as libjpeg does, which scans on for the next marker over whatever else is there."""
    position, turned = 2, None
    while True:
        marker, length = struct.unpack_from(">HH", data, position)
        # Junk, a stuffed zero, the markers without a length, padding.
        if marker <= 0xFF01 or 0xFFD0 <= marker <= 0xFFD7 or marker == 0xFFFF:
            position += 1
            continue
        if 0xFFC0 <= marker <= 0xFFCF and marker not in (0xFFC4, 0xFFC8, 0xFFCC):  # any start of frame
            height, width, components = struct.unpack_from(">HHB", data, position + 5)
            if not (height and width):
                raise ValueError("the JPEG header gives no size")
            height, width = (width, height) if turned else (height, width)
            return Header(height, width, fast=components in (1, 3))
        if 0xFFD8 <= marker <= 0xFFDA:  # another image begins, this one ends, or its pixels begin
            raise ValueError("no JPEG frame header")
        # Of several blocks, decoders look at the first.
        if turned is None and marker == 0xFFE1 and data[position + 4 : position + 10] == b"Exif\0\0":
            turned = _exif_turned(data[position + 10 : position + 2 + length])
        position += 2 + length


def _exif_turned(tiff: memoryview) -> bool:
    """Whether an EXIF block says that height and width change places (orientation 5 to 8)."""
    order = "<" if tiff[:2] == b"II" else ">"
    try:
        (directory,) = struct.unpack_from(order + "I", tiff, 4)
        (entries,) = struct.unpack_from(order + "H", tiff, directory)
        for entry in range(directory + 2, directory + 2 + 12 * entries, 12):
            tag, _, _, value = struct.unpack_from(order + "HHIH", tiff, entry)
            if tag == 0x0112:
                return 5 <= value <= 8
    except struct.error:  # cut short: decoders ignore such a block as well
        pass
    return False


def _other_header(data: memoryview) -> Header:
    with Image.open(io.BytesIO(data)) as image:
        # PNG's own method decodes the image, to look behind its pixels.
        looks_behind = image.format == "PNG" and b"eXIf" in data.tobytes()
        exif = image.getexif() if looks_behind else Image.Image.getexif(image)
        # TIFF's size is turned already.
        turned = 5 <= exif.get(0x0112, 1) <= 8 and image.format != "TIFF"
        width, height = image.size
        return Header(*((width, height) if turned else (height, width)), fast=False)


def crop_boxes(sizes: np.ndarray, item: BatchItem, seed: int) -> np.ndarray:
    """Choose the part of each image (`sizes` [B, 2]) that a batch shows.

    Random: area a uniform share of the image, aspect log-uniform about the target's, place uniform; up to
    ten tries and then the largest centred box within the aspect's range (Szegedy et al., 2014, as in
    torchvision's RandomResizedCrop). Evaluation: the centred box of the target's aspect, `crop_pct` of the
    largest there is.

    Returns:
        int64 [B, 4]: top, left, height, width in the images' own pixels.
    """
    image_h, image_w = np.asarray(sizes, np.float64).T
    view, aspect = item.view, item.width / item.height
    if view.scale is None:
        box_h = view.crop_pct * np.minimum(image_h, image_w / aspect)
        box_h, box_w = np.maximum(np.rint(box_h), 1), np.maximum(np.rint(box_h * aspect), 1)
        return np.stack([(image_h - box_h) // 2, (image_w - box_w) // 2, box_h, box_w], 1).astype(np.int64)

    draws = uniforms(seed, item.epoch, item.indices, CROP, 4 * TRIES)
    low, high = np.multiply(view.ratio, aspect)
    area, shape, top, left = draws.reshape(len(sizes), 4, TRIES).transpose(1, 0, 2)
    area = (view.scale[0] + area * (view.scale[1] - view.scale[0])) * (image_h * image_w)[:, None]
    ratio = np.exp(np.log(low) + shape * np.log(high / low))
    box_w, box_h = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (box_w >= 1) & (box_w <= image_w[:, None]) & (box_h >= 1) & (box_h <= image_h[:, None])
    chosen = np.arange(len(sizes)), fits.argmax(1)  # the first try that fits
    box_h, box_w, top, left = (values[chosen] for values in (box_h, box_w, top, left))

    fallback = ~fits[chosen]
    box_w = np.where(fallback, np.minimum(image_w, np.maximum(np.rint(image_h * high), 1)), box_w)
    box_h = np.where(fallback, np.minimum(image_h, np.maximum(np.rint(image_w / low), 1)), box_h)
    top = np.where(fallback, (image_h - box_h) // 2, np.floor(top * (image_h - box_h + 1)))
    left = np.where(fallback, (image_w - box_w) // 2, np.floor(left * (image_w - box_w + 1)))
    return np.stack([top, left, box_h, box_w], 1).astype(np.int64)


def decode_batch(
    encoded: Sequence[np.ndarray],
    item: BatchItem,
    seed: int,
    images: torch.Tensor,
    original_sizes: np.ndarray | None = None,
) -> None:
    """Decode, crop and resize one micro-batch, with the antialiased bilinear filter that Pillow uses.

    Args:
        encoded: B arrays, uint8 [n]: anything that Pillow reads.
        item: whose images they are, how large and how cropped they shall be.
        seed: of the run, for random crops.
        images: uint8 [B, 3, height, width] in channels_last memory, which is written.
        original_sizes: [B, 2], if the bytes are smaller copies written by `prepare` (upright JPEGs, so no header is
            read). Boxes are drawn in the original's pixels, so that every copy gives the same crop.

    Raises:
        DecodeError: for the first image that cannot be decoded.
    """
    position = 0
    try:
        headers: list[Header] = []
        if original_sizes is None:
            for data in encoded:
                position = len(headers)
                headers.append(read_header(data))
            original_sizes = np.array([header[:2] for header in headers])
        boxes = crop_boxes(original_sizes, item, seed)
        target = [item.height, item.width]
        for position, (data, (original_h, original_w), (top, left, box_h, box_w), out) in enumerate(
            zip(encoded, original_sizes.tolist(), boxes.tolist(), images.split(1), strict=True)
        ):
            pixels = _decode(data, not headers or headers[position].fast)
            _, height, width = pixels.shape
            # A smaller copy: the same box, in its pixels.
            if (height, width) != (original_h, original_w):
                top, box_h = _scaled(top, box_h, height / original_h, height)
                left, box_w = _scaled(left, box_w, width / original_w, width)
            crop = pixels[None, :, top : top + box_h, left : left + box_w]
            _resize_into(crop, target, False, None, None, out=out)
    except DecodeError as error:
        error.position = position
        raise


def decode_one(
    encoded: np.ndarray, height: int, width: int, view: View, original_sizes: np.ndarray | None = None
) -> torch.Tensor:
    """One image as evaluation sees it, by a view without random crops: uint8 [1, 3, height, width]; as `decode_batch`."""
    pixels = torch.empty((1, 3, height, width), dtype=torch.uint8, memory_format=torch.channels_last)
    item = BatchItem(0, np.zeros(1, np.int64), height, width, 0, view)
    decode_batch([encoded], item, 0, pixels, original_sizes)
    return pixels


def _decode(data: np.ndarray, fast: bool) -> torch.Tensor:
    """Decode with the library that suits, or with the other where that one refuses: uint8 [3, H, W].

    Their strictness differs at damaged metadata, not their pixels: both read JPEGs by libjpeg, and neither
    accepts an image that is cut short. So an image trains that any other program shows, and as it shows it.
    """
    first, second = (_torchvision, _pillow) if fast else (_pillow, _torchvision)
    try:
        return first(data)
    except _DECODE_ERRORS as error:
        try:
            return second(data)
        except _DECODE_ERRORS:
            raise DecodeError(_reason(error)) from error


def _torchvision(data: np.ndarray) -> torch.Tensor:
    # Registers the operator. It takes as long as torch's import, so it waits until an image is to be decoded.
    import torchvision.io  # noqa: F401

    # `torchvision.io.decode_jpeg` to RGB, less 4 us of Python.
    return torch.ops.image.decode_jpeg(torch.from_numpy(data), 3, True)


def _pillow(data: np.ndarray) -> torch.Tensor:
    with Image.open(io.BytesIO(data.data)) as opened:
        if data[:2].tobytes() == b"\xff\xd8":
            # Pillow alone would turn a JPEG without EXIF by it.
            opened.info.pop("xmp", None)
        image = ImageOps.exif_transpose(opened)
        if image.mode in ("F", "I"):
            raise ValueError("its numbers of 32 bits have no known black and white; make them 8 or 16 bits")
        if image.mode.startswith("I;"):  # 16 bits of grey, which convert("RGB") would clip to white
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        elif image.mode in ("P", "PA"):  # the colour that is marked transparent keeps its own value
            image = image.convert("RGBA")
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def _scaled(start: int, length: int, factor: float, limit: int) -> tuple[int, int]:
    first = min(round(start * factor), limit - 1)
    last = min(max(round((start + length) * factor), first + 1), limit)
    return first, last - first


def _reason(error: Exception) -> str:
    if isinstance(error, struct.error | Image.UnidentifiedImageError):
        return "not an image in a known format, or its header is cut short"
    return first_line(error)
