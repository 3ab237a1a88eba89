"""Cut an ImageFolder to a long tail of training images, with as many validation images for each class. All are links.

    python docs/long_tail.py caltech101-128 caltech101-long-tail --classes 40 --most 200 --ratio 100 --val 20

The largest classes stay, ordered by size; class k of C keeps at most `most * ratio ** (-k / (C - 1))` training images, the first
ones by name (the exponential tail of Cui et al., 2019).
"""

import argparse
from pathlib import Path


def keep(folder: Path, to: Path, count: int) -> int:
    """Link the first `count` images of a folder; returns how many there were to link."""
    to.mkdir(parents=True)
    kept = sorted(folder.iterdir())[:count]
    for path in kept:
        (to / path.name).symlink_to(path.resolve())
    return len(kept)


def cut(source: Path, to: Path, classes: int, most: int, ratio: float, val: int) -> list[int]:
    """Returns the classes' numbers of training images, the largest first."""
    sizes = {folder.name: len(list(folder.iterdir())) for folder in (source / "train").iterdir()}
    names = sorted(sizes, key=lambda name: (-sizes[name], name))[:classes]
    for name in names:
        keep(source / "val" / name, to / "val" / name, val)
    wanted = [round(most * ratio ** (-rank / (classes - 1))) for rank in range(classes)]
    return [
        keep(source / "train" / name, to / "train" / name, count)
        for name, count in zip(names, wanted, strict=True)
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path)
    parser.add_argument("to", type=Path)
    parser.add_argument("--classes", type=int, default=40)
    parser.add_argument("--most", type=int, default=200, help="training images of the largest class")
    parser.add_argument("--ratio", type=float, default=100.0, help="largest to smallest class")
    parser.add_argument("--val", type=int, default=20, help="validation images of each class, at most")
    sizes = cut(**vars(parser.parse_args()))
    print(f"{sum(sizes):,} training images in {len(sizes)} classes, from {sizes[0]} to {sizes[-1]}")
