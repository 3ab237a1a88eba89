"""Small pictures for the tests of the tools, and their command lines run in a process of their own."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

PROJECT = Path(__file__).parents[2]


def picture(seed: int, width: int, height: int, mode: str = "RGB") -> Image.Image:
    """A smooth picture with some detail, so that a faithful copy can be told from a poor one."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (5, 7, 3), np.uint8)
    smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    fine = rng.normal(0, 6, (height, width, 1))
    pixels = np.clip(np.asarray(smooth, float) + fine, 0, 255).astype(np.uint8)
    return Image.fromarray(pixels).convert(mode)


def image_folder(root: Path, classes: dict[str, int], width: int = 60, height: int = 40) -> Path:
    """`<root>/<class>/<n>.jpg`; every picture is different."""
    for label, (name, count) in enumerate(classes.items()):
        (root / name).mkdir(parents=True)
        for number in range(count):
            picture(1000 * label + number, width + number, height).save(root / name / f"{number:03}.jpg")
    return root


def files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder by its path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def tool(name: str, *args: object, cache: Path, **options) -> subprocess.CompletedProcess[str]:
    """Run `python -m common.tools.<name>` as a user would."""
    command = [sys.executable, "-m", f"common.tools.{name}", *map(str, args)]
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache)}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.run(command, cwd=PROJECT, env=environment, text=True, **options)
