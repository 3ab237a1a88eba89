"""A small set of photograph-like pictures, made from nothing, so that every script runs without a download.

    python -m common.tools.sample_data [--out DIR]

Ten classes of things (a boat, a mushroom, ...) of random proportions, colours, pose and place, in front of
random scenery with distractors, under random light, seen through a random lens. Colour, position and size say
nothing about the class; shape does.
"""

import argparse
import errno
import io
import math
import shutil
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageOps

from common import UserError

VERSION = "sample-v1"  # names the folder: raise it when a picture changes
CLASSES = ("balloon", "boat", "cactus", "car", "fish", "flower", "house", "mushroom", "tree", "umbrella")
IMAGES_PER_CLASS = {"train": 200, "val": 50}

Points = list[tuple[float, float]]
Part = tuple[int, Points]  # which of the thing's four colours, and an outline in [-1, 1]², y downwards


def _ellipse(x: float, y: float, rx: float, ry: float, start: float = 0.0, end: float = 360.0) -> Points:
    """A polygon along an ellipse between two angles in degrees; 180 to 360 is its upper half."""
    angles = np.radians(np.linspace(start, end, 33))
    return [(x + rx * math.cos(a), y + ry * math.sin(a)) for a in angles]


def _box(x0: float, y0: float, x1: float, y1: float) -> Points:
    return [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]


def _balloon(u) -> list[Part]:
    r, neck = u(0.55, 0.68), u(0.25, 0.4)
    return [
        (1, [(-r * 0.6, 0.0), (-0.14, 0.72), (-0.1, 0.72), (-r * 0.45, 0.0)]),
        (1, [(r * 0.6, 0.0), (0.14, 0.72), (0.1, 0.72), (r * 0.45, 0.0)]),
        (0, _ellipse(0, -0.3, r, r)),
        (0, [(-r * 0.8, 0.0), (r * 0.8, 0.0), (0.15, neck), (-0.15, neck)]),
        (2, _ellipse(0, -0.3, r * u(0.25, 0.5), r)),
        (3, _box(-0.2, 0.7, 0.2, 1.0)),
    ]


def _boat(u) -> list[Part]:
    deck, top, mast = u(0.35, 0.5), u(-1.0, -0.8), u(-0.15, 0.1)
    return [
        (0, [(-0.95, deck), (0.95, deck), (u(0.5, 0.7), 0.9), (-u(0.5, 0.7), 0.9)]),
        (1, _box(mast - 0.04, top, mast + 0.04, deck)),
        (2, [(mast + 0.07, top + 0.05), (mast + 0.07, deck - 0.1), (u(0.7, 0.9), deck - 0.12)]),
        (3, [(mast - 0.07, top + 0.2), (mast - 0.07, deck - 0.1), (-u(0.5, 0.8), deck - 0.12)]),
    ]


def _cactus(u) -> list[Part]:
    w, left, right = u(0.17, 0.24), u(-0.2, 0.25), u(-0.3, 0.2)
    arm = w * 0.65
    parts = [(0, _box(-w, -0.75, w, 0.8)), (0, _ellipse(0, -0.75, w, w))]
    for side, y in ((-1, left), (1, right)):
        x, tip = side * u(0.6, 0.75), y - u(0.35, 0.6)
        parts += [
            (0, _box(min(0, x), y - arm, max(0, x), y + arm)),
            (0, _box(x - arm, tip, x + arm, y + arm)),
            (0, _ellipse(x, tip, arm, arm)),
        ]
    return [
        *parts,
        (2, _box(-w * 0.25, -0.8, w * 0.25, 0.8)),
        (1, [(-0.45, 0.7), (0.45, 0.7), (0.3, 1.0), (-0.3, 1.0)]),
    ]


def _car(u) -> list[Part]:
    roof, sill, r = u(-0.5, -0.3), u(0.3, 0.4), u(0.18, 0.25)
    return [
        (0, [(-u(0.55, 0.7), 0.0), (-0.35, roof), (u(0.2, 0.4), roof), (0.62, 0.0)]),
        (0, [(-0.98, 0.0), (0.8, -0.02), (0.98, u(0.05, 0.15)), (0.98, sill), (-0.98, sill)]),
        (1, [(-0.45, -0.02), (-0.28, roof + 0.1), (-0.02, roof + 0.1), (-0.02, -0.02)]),
        (1, [(0.06, -0.02), (0.06, roof + 0.1), (0.22, roof + 0.1), (0.45, -0.02)]),
        *(
            (colour, _ellipse(x, sill, k * r, k * r))
            for x in (-0.55, 0.55)
            for colour, k in ((2, 1.0), (3, 0.5))
        ),
    ]


def _fish(u) -> list[Part]:
    h, tail = u(0.38, 0.55), u(0.35, 0.55)
    return [
        (1, [(0.35, 0.0), (0.98, -tail), (0.82, 0.0), (0.98, tail)]),
        (1, [(-0.25, -h * 0.85), (0.1, -h - 0.3), (0.35, -h * 0.6)]),
        (0, _ellipse(-0.15, 0, 0.72, h)),
        (2, [(-0.1, 0.05), (0.2, -0.12), (0.2, 0.25)]),
        (3, _ellipse(-0.58, -0.1, 0.09, 0.09)),
    ]


def _flower(u) -> list[Part]:
    petals, y, r, turn = int(u(5, 9)), -0.35, u(0.36, 0.44), u(0, 6.3)
    angles = [turn + 2 * math.pi * k / petals for k in range(petals)]
    leaf = u(0.35, 0.6)
    return [
        (1, _box(-0.05, y, 0.05, 1.0)),
        (1, [(0.0, 0.8), (leaf * 0.6, 0.35), (leaf, 0.4), (leaf * 0.7, 0.65)]),
        (1, [(0.0, 0.9), (-leaf * 0.6, 0.5), (-leaf, 0.55), (-leaf * 0.7, 0.8)]),
        *((0, _ellipse(r * math.cos(a), y + r * math.sin(a), 2.0 / petals, 2.0 / petals)) for a in angles),
        (2, _ellipse(0, y, 0.2, 0.2)),
    ]


def _house(u) -> list[Part]:
    eaves, wide, door = u(-0.25, 0.0), u(0.65, 0.85), u(-0.3, 0.15)
    return [
        (3, _box(0.3, -0.85, 0.5, eaves)),
        (0, _box(-wide, eaves, wide, 0.95)),
        (1, [(-wide - 0.15, eaves), (0, -0.95), (wide + 0.15, eaves)]),
        (2, _box(door, 0.35, door + 0.28, 0.95)),
        (3, _box(-wide + 0.1, eaves + 0.2, -wide + 0.32, eaves + 0.48)),
        (3, _box(wide - 0.32, eaves + 0.2, wide - 0.1, eaves + 0.48)),
    ]


def _mushroom(u) -> list[Part]:
    rim, wide, stem = u(0.0, 0.15), u(0.8, 0.95), u(0.2, 0.32)
    spots = [(x * wide, rim - u(0.2, 0.5), u(0.08, 0.14)) for x in (-0.5, 0.0, 0.5)]
    return [
        (1, [(-stem * 0.8, rim), (stem * 0.8, rim), (stem * 1.25, 0.95), (-stem * 1.25, 0.95)]),
        (0, _ellipse(0, rim, wide, u(0.75, 0.95), 180, 360)),
        (0, _ellipse(0, rim, wide, 0.12)),
        *((2, _ellipse(x, y, r, r)) for x, y, r in spots),
    ]


def _tree(u) -> list[Part]:
    tiers, trunk = int(u(3, 5)), u(0.08, 0.14)
    step = 1.55 / tiers
    tops = [-1.0 + k * step * 0.92 for k in range(tiers)]
    return [
        (1, _box(-trunk, 0.4, trunk, 1.0)),
        *(
            (
                0 if k % 2 else 2,
                [(0, top), (w := 0.32 + 0.42 * k / (tiers - 1), top + 1.3 * step), (-w, top + 1.3 * step)],
            )
            for k, top in reversed(list(enumerate(tops)))
        ),
    ]


def _umbrella(u) -> list[Part]:
    rim, high = u(-0.05, 0.1), u(0.7, 0.95)
    scallops = [(2, _ellipse(x, rim, 0.2, 0.14, 180, 360)) for x in (-0.72, -0.24, 0.24, 0.72)]
    return [
        (1, _box(-0.035, rim - high - 0.1, 0.035, 0.8)),
        (0, _ellipse(0, rim, 0.95, high, 180, 360)),
        (3, _ellipse(0, rim, 0.4, high, 180, 360)),
        *scallops,
        (1, [*_ellipse(0.15, 0.78, 0.19, 0.2, 0, 180), *reversed(_ellipse(0.15, 0.78, 0.11, 0.12, 0, 180))]),
    ]


OUTLINES = (_balloon, _boat, _cactus, _car, _fish, _flower, _house, _mushroom, _tree, _umbrella)


def _clouds(rng: np.random.Generator, size: tuple[int, int], cells: int) -> np.ndarray:
    """Smooth noise around 0, float32 [H, W], about `cells` bumps across."""
    coarse = rng.integers(0, 256, (cells, cells), np.uint8)
    return np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC), np.float32) / 127.5 - 1


def _grid(size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """x as float32 [1, W] and y as [H, 1], each from -1 to 1."""
    x, y = (np.linspace(-1, 1, side, dtype=np.float32) for side in size)
    return x[None, :], y[:, None]


def _colour(rng: np.random.Generator, low: float, high: float, spread: float) -> np.ndarray:
    """A random RGB colour, float32 [3]: a grey between `low` and `high`, tinted by up to `spread`."""
    return np.clip(rng.uniform(low, high) + rng.uniform(-spread, spread, 3), 0, 255).astype(np.float32)


def _fill(colour: np.ndarray) -> tuple[int, ...]:
    return tuple(int(c) for c in colour)


def _scenery(rng: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    """Sky, ground and clutter, muted as things far away are."""
    sky, ground = _colour(rng, 40, 130, 35), _colour(rng, 40, 130, 35)
    x, y = _grid(size)
    edge = np.clip(
        (y + rng.uniform(-0.3, 0.3) * x - rng.uniform(-0.4, 0.8)) / rng.uniform(0.02, 1) + 0.5, 0, 1
    )[..., None]
    pixels = sky * (1 - edge) + ground * edge
    for cells in (3, int(rng.integers(6, 40))):
        pixels += _clouds(rng, size, cells)[..., None] * rng.uniform(0, 20, 3).astype(np.float32)
    picture = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    for _ in range(int(rng.integers(2, 7))):
        (x, y), r = rng.uniform(0, 1, 2) * size, rng.uniform(0.03, 0.16) * min(size)
        fill = _fill(_colour(rng, 30, 150, 40))
        match rng.integers(3):
            case 0:
                draw.ellipse((x - r, y - r * 0.6, x + r, y + r * 0.6), fill)
            case 1:
                draw.polygon(
                    [(x + r * math.cos(a), y + r * math.sin(a)) for a in rng.uniform(0, 6.3, 4)], fill
                )
            case _:
                draw.line((x, y, *(rng.uniform(0, 1, 2) * size)), fill, width=int(rng.integers(1, 4)))
    return picture.filter(ImageFilter.GaussianBlur(rng.uniform(0, 2.5)))  # out of focus, more or less


def render(split: str, label: int, number: int) -> bytes:
    """One picture as a JPEG file's bytes: a pure function of the arguments, and of library versions."""
    rng = np.random.default_rng((sorted(IMAGES_PER_CLASS).index(split), label, number))
    short = int(rng.integers(96, 141))
    long = round(short * 2 ** rng.uniform(0, 1))
    final = (long, short) if rng.random() < 0.6 else (short, long)
    size = (final[0] * 2, final[1] * 2)  # the thing is drawn at twice the size, then halved: smooth outlines
    picture = _scenery(rng, final).resize(size, Image.Resampling.BILINEAR)

    # The thing: posed, painted, lit from one side, with a soft shadow.
    reach = min(size) * rng.uniform(0.4, 0.52)
    lean = math.radians(rng.normal(0, 9))
    flip = rng.choice((-1.0, 1.0))
    centre = [rng.uniform(reach * 0.85, side - reach * 0.85) for side in size]
    turn = np.array([[math.cos(lean), -math.sin(lean)], [math.sin(lean), math.cos(lean)]]) * reach
    turn = turn @ np.diag([flip, rng.uniform(0.85, 1.1)])
    colours = [_colour(rng, low, high, 80) for low, high in ((170, 235), (20, 80), (20, 230), (20, 230))]
    mask = Image.new("L", size)
    paint, outline = ImageDraw.Draw(picture), ImageDraw.Draw(mask)
    placed = [
        (colour, [tuple(p) for p in np.array(points) @ turn.T + centre])
        for colour, points in OUTLINES[label](rng.uniform)
    ]
    for _, points in placed:
        outline.polygon(points, 255)
    shade = mask.filter(ImageFilter.GaussianBlur(reach * 0.08))
    offset = (int(rng.uniform(-0.2, 0.2) * reach), int(rng.uniform(0, 0.2) * reach))
    depth = rng.uniform(0.3, 0.7)
    picture.paste((12, 12, 16), offset, shade.point(lambda v: v * depth))
    for colour, points in placed:
        paint.polygon(points, _fill(colours[colour]))
    if rng.random() < 0.4:  # something thin in front
        x = rng.uniform(0, size[0])
        line = (x, 0, x + rng.uniform(-0.3, 0.3) * size[0], size[1])
        paint.line(line, _fill(_colour(rng, 40, 180, 50)), width=int(rng.integers(2, 9)))

    # The camera: light from one side, surface grain, vignette, exposure, colour cast, sensor noise, blur.
    pixels = np.asarray(picture.reduce(2), np.float32)
    x, y = _grid(final)
    angle = rng.uniform(0, 2 * math.pi)
    light = (
        1
        + rng.uniform(0, 0.35) * (x * math.cos(angle) + y * math.sin(angle))
        - rng.uniform(0, 0.2) * (x * x + y * y)
    )
    light += _clouds(rng, final, int(rng.integers(8, 50))) * rng.uniform(0, 0.15)
    cast = rng.uniform(0.7, 1.25) * rng.uniform(0.85, 1.15, 3).astype(np.float32)
    pixels = pixels * light[..., None] * cast + rng.standard_normal(
        (*pixels.shape[:2], 1), np.float32
    ) * rng.uniform(1, 8)
    photo = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    photo = photo.filter(ImageFilter.GaussianBlur(rng.uniform(0, 0.9)))
    if rng.random() < 0.06:
        photo = ImageOps.grayscale(photo)
    out = io.BytesIO()
    photo.save(out, "JPEG", quality=int(rng.integers(80, 96)), subsampling=int(rng.choice((0, 2))))
    return out.getvalue()


def _write_class(folder: Path, split: str, label: int) -> None:
    target = folder / split / CLASSES[label]
    target.mkdir(parents=True)
    for number in range(IMAGES_PER_CLASS[split]):
        (target / f"{CLASSES[label]}_{number:03d}.jpg").write_bytes(render(split, label, number))


def _pool() -> ProcessPoolExecutor:
    """Spawned, not forked: the caller may hold threads and a CUDA context by now."""
    return ProcessPoolExecutor(mp_context=get_context("spawn"))


def ensure_sample_data(cache: Path | None = None) -> Path:
    """Make the sample unless it is there; return its folder, an ImageFolder tree: 2,000 train, 500 val.

    `cache` is the folder to put `sample-v1` into (default: the user's cache folder). It gets its name when
    it is whole, so a process that is killed leaves none, and several that start at once end with one.
    UserError: cannot be written.
    """
    if cache is None:
        from common.data.sources.folder import cache_folder

        cache = cache_folder()
    folder = cache / VERSION
    if folder.is_dir():
        return folder
    print(f"making the sample data in {folder} (once, about 10 s)", file=sys.stderr)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{VERSION}-", dir=cache))
        try:
            unfinished.chmod(0o755)  # mkdtemp's own mode shuts out other users of a shared cache
            with _pool() as pool:
                jobs = [
                    pool.submit(_write_class, unfinished, split, label)
                    for split in IMAGES_PER_CLASS
                    for label in range(len(CLASSES))
                ]
                for job in jobs:
                    job.result()
            unfinished.rename(folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)  # nothing left of it once renamed
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY) and folder.is_dir():
            return folder  # another process was faster; its pictures are the same
        raise UserError(f"cannot write the sample data to {folder}: {error.strerror}") from error
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Make the small sample data set: 10 classes of drawn things, 2,000 train and 500 val."
    )
    where = f"folder to put {VERSION} into (default: ~/.cache/image-classification-training)"
    parser.add_argument("--out", type=Path, help=where)
    try:
        print(ensure_sample_data(parser.parse_args().out))
    except UserError as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()
