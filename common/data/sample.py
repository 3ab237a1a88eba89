"""A small set of pictures, drawn from nothing, so that every script runs without a download.

Ten shapes in random colours, pose, size and place, in front of random backgrounds with distractors. Colour,
place and size say nothing about the class; the outline does.
"""

import io
import shutil
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from common import UserError
from common.data.sources.cache import cache_folder, locked

VERSION = "sample-v2"  # names the folder: raise it when a picture changes
IMAGES_PER_CLASS = {"train": 200, "val": 50}


def _polar(radius: np.ndarray | float, angle: np.ndarray) -> np.ndarray:
    """Points [N, 2] at these distances and angles (radians, clockwise from the top) from the centre."""
    return np.stack([radius * np.sin(angle), -radius * np.cos(angle)], axis=1)


_ROUND = np.linspace(0, 2 * np.pi, 48, endpoint=False)
_ARMS = np.add.outer(np.arange(4) * np.pi / 2, (-0.29, 0.29, np.pi / 4)).ravel()
_LOBES = 13 * np.cos(_ROUND) - 5 * np.cos(2 * _ROUND) - 2 * np.cos(3 * _ROUND)

# Corners of each class's outline in [-1, 1]², x to the right and y downwards.
OUTLINES = {
    "arrow": [(-1, -0.3), (0.1, -0.3), (0.1, -0.9), (1, 0), (0.1, 0.9), (0.1, 0.3), (-1, 0.3)],
    "bolt": [(0.3, -1), (-0.6, 0.15), (-0.05, 0.15), (-0.3, 1), (0.6, -0.25), (0.05, -0.25)],
    "circle": _polar(0.9, _ROUND),
    "crescent": [*_polar(1, _ROUND[8:41]), *(_polar(0.8, _ROUND[38:9:-1]) - (0, 0.4))],
    "cross": _polar(np.tile([1.04, 1.04, 0.42], 4), _ARMS),
    "heart": np.stack([np.sin(_ROUND) ** 3, -_LOBES / 15], axis=1),
    "hourglass": [(-0.8, -1), (0.8, -1), (0.1, 0), (0.8, 1), (-0.8, 1), (-0.1, 0)],
    "square": [(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)],
    "star": _polar(np.tile([1, 0.4], 5), np.arange(10) * np.pi / 5),
    "triangle": [(0, -0.9), (1, 0.8), (-1, 0.8)],
}
CLASSES = tuple(OUTLINES)


def render(split: str, label: int, number: int) -> bytes:
    """One picture as a JPEG file's bytes: a pure function of the arguments, and of library versions."""
    rng = np.random.default_rng((sorted(IMAGES_PER_CLASS).index(split), label, number))
    short = int(rng.integers(72, 97))
    size = [short, round(short * 2 ** rng.uniform(0, 0.8))]
    width, height = rng.permutation(size).tolist()

    # Everything is drawn at twice the size and then halved, which makes outlines smooth.
    background = Image.fromarray(rng.integers(0, 110, (3, 3, 3), np.uint8))
    picture = background.resize((2 * width, 2 * height), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(picture)
    for _ in range(rng.integers(1, 5)):
        line = rng.uniform(0, 1, (2, 2)) * picture.size
        draw.line([*map(tuple, line)], tuple(rng.integers(0, 150, 3)), width=int(rng.integers(2, 6)))

    radius = min(picture.size) * rng.uniform(0.36, 0.48)
    lean, flip, stretch = rng.normal(0, 0.15), rng.choice((-1, 1)), rng.uniform(0.8, 1.2)
    turn = np.array([[np.cos(lean), -np.sin(lean)], [np.sin(lean), np.cos(lean)]])
    centre = radius + rng.uniform(0, 1, 2) * (np.array(picture.size) - 2 * radius)
    corners = np.array(OUTLINES[CLASSES[label]]) * (flip, stretch) @ turn.T * radius + centre
    # Brighter than any background.
    colour = rng.integers(120, 256, 3)
    draw.polygon([*map(tuple, corners)], tuple(colour), outline=tuple(colour // 3), width=3)

    pixels = np.asarray(picture.reduce(2), np.float32) * rng.uniform(0.7, 1.1)
    pixels += rng.normal(0, rng.uniform(1, 6), pixels.shape)
    photo = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    out = io.BytesIO()
    photo.save(out, "JPEG", quality=int(rng.integers(80, 96)))
    return out.getvalue()


def _draw_all(folder: Path) -> None:
    for split, count in IMAGES_PER_CLASS.items():
        for label, name in enumerate(CLASSES):
            # A process that was killed leaves some.
            (folder / split / name).mkdir(parents=True, exist_ok=True)
            for number in range(count):
                (folder / split / name / f"{name}_{number:03d}.jpg").write_bytes(render(split, label, number))


def ensure_sample_data() -> Path:
    """Make the sample in the user's cache folder unless it is there: an ImageFolder tree, 2,000 train, 500 val.

    It gets its name when it is whole; of several processes that start at once, one draws. UserError: cannot be written.
    """
    folder = cache_folder() / VERSION
    unfinished = folder.with_name(f".{VERSION}.tmp")
    with locked(folder.with_name(f".{VERSION}.lock")):
        try:
            if not folder.is_dir():
                print(f"making the sample data in {folder} (once, a few seconds)", file=sys.stderr)
                _draw_all(unfinished)
                unfinished.rename(folder)
        except OSError as error:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise UserError(f"cannot write the sample data to {folder}: {error.strerror}") from error
    return folder
