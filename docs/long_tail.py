"""Cut an ImageFolder's training images to a long tail; the validation images stay as they are. All are links.

    python docs/long_tail.py caltech101-128 caltech101-long-tail --most 200 --ratio 100

The classes are ordered by size, and class k of C keeps at most `most * ratio ** (-k / (C - 1))` images, the first ones by name
(the exponential tail of Cui et al., 2019).
"""

import argparse
from pathlib import Path


def cut(source: Path, to: Path, most: int, ratio: float) -> list[int]:
    """Link what is kept; returns the classes' sizes, the largest first."""
    folders = sorted(
        (source / "train").iterdir(), key=lambda folder: (-len(list(folder.iterdir())), folder.name)
    )
    sizes = []
    for rank, folder in enumerate(folders):
        kept = sorted(folder.iterdir())[: max(1, round(most * ratio ** (-rank / (len(folders) - 1))))]
        sizes.append(len(kept))
        place = to / "train" / folder.name
        place.mkdir(parents=True)
        for path in kept:
            (place / path.name).symlink_to(path.resolve())
    (to / "val").symlink_to((source / "val").resolve())
    return sizes


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path)
    parser.add_argument("to", type=Path)
    parser.add_argument("--most", type=int, default=200, help="images of the largest class")
    parser.add_argument("--ratio", type=float, default=100, help="largest to smallest class")
    sizes = cut(**vars(parser.parse_args()))
    print(f"{sum(sizes):,} images in {len(sizes)} classes, from {sizes[0]} to {sizes[-1]}")
