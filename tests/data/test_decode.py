"""Decoding is faithful to Pillow, crops are torchvision's, and no bytes get past it undescribed."""

import functools
import io

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps
from torchvision.io import decode_jpeg

from common.data import decode as decode_module
from common.data.decode import MAX_PIXELS, DecodeError, crop_boxes, decode_batch, read_header
from common.data.order import BatchItem, View
from common.data.rng import CROP, uniforms

RANDOM, CENTRED = View((0.08, 1.0)), View(None)


@functools.cache
def photograph(width: int = 500, height: int = 375) -> Image.Image:
    """Smooth colours, edges and a little noise, as a photograph has them."""
    rng = np.random.default_rng(width * height)
    y, x = np.mgrid[:height, :width] / 60.0
    edges = 25 * (np.sin(9 * x * y) > 0)
    channels = [128 + 60 * np.sin(x + k) + 50 * np.cos(y * (k + 1)) + edges for k in range(3)]
    pixels = np.stack(channels, 2) + rng.normal(0, 4, (height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def encode(image: Image.Image, file_format: str, **options) -> np.ndarray:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return np.frombuffer(buffer.getvalue(), np.uint8)


def exif(orientation: int) -> bytes:
    block = Image.Exif()
    block[0x0112] = orientation
    return block.tobytes()


def transparent_palette() -> np.ndarray:
    return encode(photograph().quantize(64), "PNG", transparency=bytes(range(0, 256, 4)))


def sixteen_bits() -> Image.Image:
    return Image.fromarray(np.asarray(photograph().convert("L")).astype(np.uint16) * 257)


ENCODED = {
    "jpeg 4:4:4": lambda: encode(photograph(), "JPEG", quality=90, subsampling=0),
    "jpeg 4:2:0": lambda: encode(photograph(), "JPEG", quality=90, subsampling=2),
    "jpeg progressive": lambda: encode(photograph(), "JPEG", progressive=True),
    "jpeg grey": lambda: encode(photograph().convert("L"), "JPEG"),
    "jpeg CMYK": lambda: encode(photograph().convert("CMYK"), "JPEG"),
    **{
        f"jpeg exif {turn}": lambda turn=turn: encode(photograph(), "JPEG", exif=exif(turn))
        for turn in range(2, 9)
    },
    "png": lambda: encode(photograph(), "PNG"),
    "png alpha": lambda: encode(photograph().convert("RGBA"), "PNG"),
    "png grey alpha": lambda: encode(photograph().convert("LA"), "PNG"),
    "png palette": lambda: encode(photograph().quantize(64), "PNG"),
    "png transparent palette": transparent_palette,
    "png one bit": lambda: encode(photograph().convert("1", dither=Image.Dither.NONE), "PNG"),
    "png 16 bit": lambda: encode(sixteen_bits(), "PNG"),
    "png exif": lambda: encode(photograph(), "PNG", exif=exif(6)),
    "png exif of no meaning": lambda: encode(photograph(), "PNG", exif=exif(9)),
    "tiff": lambda: encode(photograph(), "TIFF"),
    "tiff exif": lambda: encode(photograph(), "TIFF", exif=exif(6)),
    "webp": lambda: encode(photograph(), "WEBP"),
    "bmp": lambda: encode(photograph(), "BMP"),
    "gif": lambda: encode(photograph(), "GIF"),
    "small, enlarged": lambda: encode(photograph(40, 30), "JPEG"),
}


def decode(
    encoded: list[np.ndarray], size: tuple[int, int], view: View, sizes=None, indices=None
) -> torch.Tensor:
    """Decode a batch of epoch 3 of seed 5, HWC for comparisons."""
    indices = np.arange(len(encoded)) if indices is None else indices
    item = BatchItem(0, indices, *size, 3, view)
    images = torch.empty((len(encoded), 3, *size), dtype=torch.uint8, memory_format=torch.channels_last)
    decode_batch(encoded, item, 5, images, sizes)
    return images.permute(0, 2, 3, 1)


def pillow(encoded: np.ndarray, size: tuple[int, int], view: View) -> np.ndarray:
    """The same crop by Pillow: convert, crop, antialiased bilinear resize."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(encoded)))
    if image.mode == "I;16":
        image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
    image = image.convert("RGBA").convert("RGB") if image.mode == "P" else image.convert("RGB")
    item = BatchItem(0, np.arange(1), *size, 3, view)
    [[top, left, height, width]] = crop_boxes(np.array([image.size[::-1]]), item, 5)
    crop = image.crop((left, top, left + width, top + height))
    return np.asarray(crop.resize(size[::-1], Image.Resampling.BILINEAR))


def psnr(one, other) -> float:
    error = np.mean((np.asarray(one, np.float64) - np.asarray(other, np.float64)) ** 2)
    return 99.0 if error == 0 else 10 * np.log10(255**2 / error)


@pytest.mark.parametrize("size", [(224, 224), (128, 128), (56, 56), (224, 288)], ids=str)
@pytest.mark.parametrize("kind", ENCODED)
def test_pixels_are_pillows(kind, size):
    encoded = ENCODED[kind]()
    for view in (RANDOM, CENTRED):
        assert psnr(decode([encoded], size, view)[0], pillow(encoded, size, view)) >= 60


@pytest.mark.parametrize("kind", ENCODED)
def test_header_gives_the_size_as_seen(kind):
    encoded = ENCODED[kind]()
    width, height = ImageOps.exif_transpose(Image.open(io.BytesIO(encoded))).size
    header = read_header(encoded)
    assert header[:2] == (height, width)
    assert header.fast == (encoded[:2].tobytes() == b"\xff\xd8" and kind != "jpeg CMYK")


def test_of_two_exif_blocks_the_first_counts():
    once = encode(photograph(), "JPEG", exif=exif(6)).tobytes()
    block = b"\xff\xe1" + (len(exif(1)) + 2).to_bytes(2, "big") + exif(1)
    frame = once.index(b"\xff\xdb")
    twice = np.frombuffer(once[:frame] + block + once[frame:], np.uint8)
    assert read_header(twice)[:2] == ImageOps.exif_transpose(Image.open(io.BytesIO(twice))).size[::-1]


def test_a_pngs_header_is_read_without_its_pixels():
    assert read_header(encode(photograph(), "PNG")[:200])[:2] == (375, 500)


def test_long_exif_block_before_the_frame_header():
    encoded = encode(photograph(), "JPEG", exif=exif(6), icc_profile=bytes(200_000))
    assert read_header(encoded)[:2] == (500, 375)
    with pytest.raises(DecodeError, match="cut short"):
        read_header(encoded[: 16 << 10])  # what makes a header scan read the whole file


def odd(
    marker: bytes, inserted: bytes, offset: int = 0, written: bytes = b"", mode: str = "RGB"
) -> np.ndarray:
    """A JPEG file with bytes inserted before the first of these markers, or written at an offset from it."""
    content = encode(photograph().convert(mode), "JPEG").tobytes()
    place = content.index(marker)
    begin = place + offset
    return np.frombuffer(
        content[:place] + inserted + content[place:begin] + written + content[begin + len(written) :],
        np.uint8,
    )


TABLES, FRAME, SCAN = b"\xff\xdb", b"\xff\xc0", b"\xff\xda"
ADOBE = b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0\x01"
PHOTOSHOP = b"Photoshop 3.0\x008BIM\x03\xed\0\0\0\0\0\x10\0"
ODD = {
    "junk before a marker": odd(TABLES, b"junk\0\x01"),
    "junk before the frame header": odd(FRAME, b"\0\x13garbage"),
    "junk before the scan": odd(SCAN, b"zz"),
    "stuffed zeros before a marker": odd(TABLES, b"\xff\0\xff\0ab"),
    "stuffed zero before the frame header": odd(FRAME, b"\xff\0"),
    "restart marker in the header": odd(FRAME, b"\xff\xd0"),
    "marker without a length": odd(FRAME, b"\xff\x01"),
    "APP14 of five bytes": odd(TABLES, b"\xff\xee\0\x07Adobe"),
    "APP14 that reaches into the next block": odd(TABLES, ADOBE[:-4] + b"\xff\xfe\0\x20" + bytes(30)),
    "APP14 of length 0": odd(TABLES, b"\xff\xee\0\0"),
    "APP14 of length 1": odd(TABLES, b"\xff\xee\0\x01"),
    "Photoshop block cut short": odd(TABLES, b"\xff\xed\0\x1d" + PHOTOSHOP),
    "Photoshop block longer than it says": odd(TABLES, b"\xff\xed\0\x05" + PHOTOSHOP),
    "CMYK, junk before the frame header": odd(FRAME, b"junk", mode="CMYK"),
}


def reads(library, encoded: np.ndarray) -> np.ndarray | None:
    try:
        return np.asarray(library(encoded))
    except (RuntimeError, OSError):
        return None


@pytest.mark.parametrize("kind", ODD)
def test_what_either_library_reads_trains(kind):
    encoded = ODD[kind]
    expected = [
        reads(lambda data: Image.open(io.BytesIO(data)).convert("RGB"), encoded),
        reads(lambda data: decode_jpeg(torch.from_numpy(data.copy()), "RGB").permute(1, 2, 0), encoded),
    ]
    [whole] = decode([encoded], (375, 500), View(None, crop_pct=1.0))
    assert any(pixels is not None for pixels in expected)
    assert max(psnr(whole, pixels) for pixels in expected if pixels is not None) >= 60
    assert read_header(encoded)[:2] == (375, 500)


@pytest.mark.parametrize("mode", ["RGB", "CMYK"])
def test_a_jpeg_is_turned_by_its_exif_alone(mode):
    """Pillow, which decodes CMYK, would turn it by XMP as well, where its header and torchvision say nothing."""
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    plain, turned = (encode(photograph().convert(mode), "JPEG", **more) for more in ({}, {"xmp": xmp}))
    assert read_header(turned) == read_header(plain)
    assert psnr(decode([turned], (64, 64), CENTRED), decode([plain], (64, 64), CENTRED)) > 60


@pytest.mark.parametrize(("broken", "mode"), [("_torchvision", "RGB"), ("_pillow", "CMYK")])
def test_the_other_library_is_asked_where_one_refuses(monkeypatch, broken, mode):
    def refuse(data):
        raise RuntimeError("a marker that this library does not know")

    encoded = encode(photograph().convert(mode), "JPEG")
    expected = decode([encoded], (64, 64), CENTRED)
    monkeypatch.setattr(decode_module, broken, refuse)
    assert psnr(decode([encoded], (64, 64), CENTRED), expected) >= (60 if mode == "RGB" else 25)
    with pytest.raises(DecodeError, match="does not know"):
        decode([encoded[:2000]], (64, 64), CENTRED)


FAULTS = {
    "empty": (np.empty(0, np.uint8), "not an image"),
    "text": (np.frombuffer(b"<html>Not found</html>", np.uint8), "not an image"),
    "only the start marker": (np.frombuffer(b"\xff\xd8", np.uint8), "cut short"),
    "header cut short": (encode(photograph(), "JPEG")[:100], "cut short"),
    "pixels cut short": (encode(photograph(), "JPEG")[:8000], "truncated"),
    "PNG cut short": (encode(photograph(), "PNG")[:8000], "truncated"),
    "text after the start marker": (np.frombuffer(b"\xff\xd8" + b"text " * 50, np.uint8), "cut short"),
    "pixels before the frame header": (
        np.frombuffer(b"\xff\xd8\xff\xda\0\x08", np.uint8),
        "no JPEG frame header",
    ),
    "no pixels high": (odd(b"\xff\xc0", b"", 5, b"\0\0"), "no size"),
}


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_numbers_without_a_known_range_are_refused_and_not_trained_as_black(kind):
    """A TIFF may hold 0 to 1, 0 to 4095 or anything else in 32 bits."""
    grey = Image.fromarray(np.asarray(photograph().convert("L")).astype(kind))
    with pytest.raises(DecodeError, match="make them 8 or 16 bits"):
        decode([encode(grey, "TIFF")], (56, 56), CENTRED)


@pytest.mark.parametrize("fault", FAULTS)
def test_damage_is_named_with_its_place_in_the_batch(fault):
    encoded, why = FAULTS[fault]
    good = ENCODED["jpeg 4:2:0"]()
    with pytest.raises(DecodeError, match=why) as caught:
        decode([good, good, encoded, good], (56, 56), RANDOM)
    assert caught.value.position == 2


def test_a_decompression_bomb_is_refused_before_it_is_decoded():
    encoded = bytearray(encode(photograph(), "JPEG").tobytes())
    frame = encoded.index(b"\xff\xc0")
    encoded[frame + 5 : frame + 9] = b"\xff\xff\xff\xff"
    with pytest.raises(DecodeError, match=str(MAX_PIXELS)):
        read_header(np.frombuffer(bytes(encoded), np.uint8))
    with pytest.raises(DecodeError, match=str(MAX_PIXELS)):
        read_header(encode(Image.new("1", (20_000, 10_000)), "PNG"))


def boxes_one_by_one(sizes, height, width, view, draws):
    """torchvision's RandomResizedCrop.get_params as it reads, with our draws."""
    boxes = []
    for (image_h, image_w), draw in zip(sizes.tolist(), draws.reshape(-1, 4, 10), strict=True):
        low, high = (bound * width / height for bound in view.ratio)
        for area, shape, top, left in draw.T:
            target = image_h * image_w * (view.scale[0] + area * (view.scale[1] - view.scale[0]))
            aspect = np.exp(np.log(low) + shape * (np.log(high) - np.log(low)))
            w, h = round(np.sqrt(target * aspect)), round(np.sqrt(target / aspect))
            if 0 < w <= image_w and 0 < h <= image_h:
                boxes.append([int(top * (image_h - h + 1)), int(left * (image_w - w + 1)), h, w])
                break
        else:
            w, h = image_w, image_h
            if image_w / image_h < low:
                h = max(1, round(w / low))
            elif image_w / image_h > high:
                w = max(1, round(h * high))
            boxes.append([(image_h - h) // 2, (image_w - w) // 2, h, w])
    return np.array(boxes)


sides = st.integers(1, 3000)


@given(st.lists(st.tuples(sides, sides), min_size=1, max_size=8), sides, sides, st.integers(0, 9))
def test_boxes_are_torchvisions_and_lie_inside(sizes, height, width, epoch):
    sizes = np.array(sizes)
    draws = uniforms(1, epoch, np.arange(len(sizes)), CROP, 40)
    item = BatchItem(0, np.arange(len(sizes)), height, width, epoch, RANDOM)
    boxes = crop_boxes(sizes, item, 1)
    np.testing.assert_array_equal(boxes, boxes_one_by_one(sizes, height, width, RANDOM, draws))
    for box in (boxes, crop_boxes(sizes, item._replace(view=CENTRED), 1)):
        assert (box[:, :2] >= 0).all()
        assert (box[:, 2:] >= 1).all()
        assert (box[:, :2] + box[:, 2:] <= sizes).all()


def test_centred_box_is_resize_256_then_crop_224():
    [box] = crop_boxes(np.array([[512, 700]]), BatchItem(0, np.arange(1), 224, 224, 0, CENTRED), 0)
    assert box.tolist() == [32, 126, 448, 448]
    whole = View(None, crop_pct=1.0)
    [box] = crop_boxes(np.array([[400, 1200]]), BatchItem(0, np.arange(1), 224, 448, 0, whole), 0)
    assert box.tolist() == [0, 200, 400, 800]


def test_areas_are_uniform_and_positions_reach_both_ends():
    item = BatchItem(0, np.arange(4000), 10, 10, 0, RANDOM)
    top, left, height, width = crop_boxes(np.full((4000, 2), 1000), item, 0).T
    # Boxes of more than three quarters of the image may stick out and be drawn again, so look below that.
    shares, _ = np.histogram(height * width / 1e6, [0.08, 0.24, 0.40, 0.56, 0.72])
    assert shares.min() > 0.85 * shares.max()
    assert 0.45 < np.median(left / np.maximum(1000 - width, 1)) < 0.55
    assert top.min() == 0
    assert (top + height).max() == 1000


def test_a_crop_does_not_depend_on_the_batch_but_on_the_epoch():
    encoded = [encode(photograph(300 + 10 * k, 200), "JPEG") for k in range(6)]
    together = decode(encoded, (64, 64), RANDOM)
    alone = decode(encoded[4:5], (64, 64), RANDOM, indices=np.array([4]))
    assert torch.equal(together[4], alone[0])
    item = BatchItem(0, np.array([4]), 64, 64, 4, RANDOM)
    images = torch.empty((1, 3, 64, 64), dtype=torch.uint8, memory_format=torch.channels_last)
    decode_batch(encoded[4:5], item, 5, images)
    assert not torch.equal(together[4], images[0].permute(1, 2, 0))


@pytest.mark.parametrize("short_side", [292, 146, 73])
@pytest.mark.parametrize("view", [RANDOM, CENTRED], ids=["random", "centred"])
def test_a_smaller_copy_shows_the_same_crop(short_side, view):
    """A pyramid's levels differ from the original by their resolution, not by where one looks."""
    original = photograph(600, 500).resize((1200, 1000), Image.Resampling.BICUBIC)
    copy = original.resize((short_side * 1200 // 1000, short_side), Image.Resampling.LANCZOS)
    whole = decode([encode(original, "JPEG", quality=95)], (48, 48), view)
    small = decode([encode(copy, "JPEG", quality=95)], (48, 48), view, sizes=np.array([[1000, 1200]]))
    shifted = torch.roll(whole, 1, dims=2)
    assert psnr(whole[0], small[0]) > 24
    assert psnr(whole[0], small[0]) > psnr(shifted[0], small[0]) + 3
