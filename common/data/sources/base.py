"""What every source of images offers, and the names that datasets give their parts."""

from typing import Protocol

import numpy as np

from common import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
VAL_NAMES = ("val", "validation", "valid", "test")  # the first that is there


class MissingSplit(UserError):
    """The dataset is there, but not the split that was asked for."""


class Source(Protocol):
    """A labelled set of encoded images."""

    location: str  # where this split lies, for messages
    classes: list[str]
    labels: np.ndarray  # int64 [N]
    fingerprint: str  # changes when the data change
    prepared: bool  # the bytes are upright JPEGs by `prepare`, maybe smaller than the originals in sizes()

    @property
    def group_rows(self) -> np.ndarray | None:
        """Rows that are fetched together, int64 [G]; None for random access."""

    def __len__(self) -> int: ...

    def read(self, index: int, short_side: int) -> np.ndarray:
        """Return an image's bytes, uint8 [n], from the level of a pyramid that serves `short_side` pixels; OSError: it fails."""

    def describe(self, index: int) -> str:
        """Say where an image lies, for messages."""

    def sizes(self) -> np.ndarray:
        """Return the originals' heights and widths as seen, int32 [N, 2]; 1, 1 if unreadable."""
