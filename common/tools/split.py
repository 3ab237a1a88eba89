"""Split one folder of class folders into train and val, the layout that the training scripts read.

    python -m common.tools.split --data_dir photos --out photos-split --val_fraction 0.2

Each class is split by itself, so that val has the classes in the proportions of the whole. Which image goes
where depends on the seed and on its own class alone: adding a class later leaves the others as they were.

Files gather in `<out>.partial`, whose `plan.json` says what goes where; the folder gets its name when all are
there. A split that was interrupted goes on when the same command is given again. At every moment each image
is whole in at least one place.
"""

import errno
import filecmp
import json
import os
import shutil
import zlib
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common import UserError
from common.data.sources.base import VAL_NAMES
from common.data.sources.folder import FolderSource
from common.run.checkpoint import TEMPORARY, write_durably
from common.tools.command_line import check_least, new_parser, one_sentence

PLAN = "plan.json"
# Paths by class, of train and val.
Plan = dict[str, dict[str, list[str]]]


def plan_split(folder: Path, val_fraction: float, seed: int) -> Plan:
    """Deal the images of each class to train and val.

    Args:
        folder: holds `<class>/**/*.jpg`.
        val_fraction: share of each class for val, in (0, 1); rounded, but at least one image and never all.
        seed: another seed, another choice.

    Returns the sorted paths relative to the folder.
    UserError: no class folders, a class of one image, or a folder that is split already.
    """
    if not folder.is_dir():
        raise UserError(f"--data_dir {folder} is not a folder")
    source = FolderSource(folder)
    if "train" in source.classes and set(VAL_NAMES) & set(source.classes):
        raise UserError(f"--data_dir {folder} is split already: it holds {', '.join(source.classes)}")
    if source.classes == ["train"]:
        raise UserError(
            f"--data_dir {folder} holds nothing but train; pass --data_dir {folder / 'train'}, whose folders are the classes"
        )
    plan: Plan = {"train": {}, "val": {}}
    for label, name in enumerate(source.classes):
        members = np.flatnonzero(source.labels == label)
        if len(members) < 2:
            raise UserError(f"{folder / name} holds one image only, and train and val need one each")
        count = min(max(round(val_fraction * len(members)), 1), len(members) - 1)
        rng = np.random.default_rng((seed, zlib.crc32(name.encode())))
        chosen = np.zeros(len(members), bool)
        chosen[rng.permutation(len(members))[:count]] = True
        for split, indices in (("train", members[~chosen]), ("val", members[chosen])):
            paths = (Path(source.describe(int(index))).relative_to(source.location) for index in indices)
            plan[split][name] = [path.as_posix() for path in paths]
    return plan


def split(folder: Path, out: Path, val_fraction: float, seed: int, how: str) -> Plan:
    """Carry out `plan_split` into `out`, or go on with one that was interrupted; return the plan.

    `how` is "copy", "link" (hard links: no space, same disk) or "move".
    UserError: `out` exists, the disk is full, or another problem that the sentence names.
    """
    partial = out.with_name(out.name + ".partial")
    settings = {"data_dir": str(folder.resolve()), "val_fraction": val_fraction, "seed": seed, "how": how}
    if (partial / PLAN).is_file():
        saved = json.loads((partial / PLAN).read_text())
        if saved["settings"] != settings:
            raise UserError(f"{partial} holds an unfinished split with other settings: {saved['settings']}")
        plan = saved["plan"]  # after some moves the folder would no longer give the same one
    else:
        if partial.exists() and set(os.listdir(partial)) - {PLAN + TEMPORARY}:
            raise UserError(f"{partial} is in the way and no unfinished split; choose another --out")
        plan = plan_split(folder, val_fraction, seed)
    _refuse(folder, out)

    files = [(name, path) for name in plan for paths in plan[name].values() for path in paths]
    try:
        partial.mkdir(parents=True, exist_ok=True)
        write_durably(partial / PLAN, json.dumps({"settings": settings, "plan": plan}).encode())
        for name, path in tqdm(files, desc=how, unit="file", delay=2):
            target = partial / name / path
            target.parent.mkdir(parents=True, exist_ok=True)
            _place(folder / path, target, how)
        partial.rename(out)
        (out / PLAN).unlink()  # not before: without it, moved files would be hard to tell from rubbish
    except FileNotFoundError as error:
        raise UserError(f"{error.filename} is gone since the split was planned") from error
    except OSError as error:
        if error.errno == errno.EXDEV:
            raise UserError("--how link needs --out on the disk of --data_dir; take --how copy") from error
        again = "the same command goes on from here" if partial.is_dir() else "choose another --out"
        raise UserError(f"cannot {how} to {partial}: {error.strerror}; {again}") from error
    return plan


def _refuse(folder: Path, out: Path) -> None:
    if out.exists():
        raise UserError(f"--out {out} exists already; choose another name")
    if out.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"--out {out} lies inside --data_dir {folder}; choose a place outside")


def _place(source: Path, target: Path, how: str) -> None:
    """Bring one file to its place, whole or not at all; what is there already, an earlier run put there."""
    if not target.exists():
        if how == "move" and not source.is_symlink():
            try:
                source.rename(target)
                return
            except OSError as error:
                if error.errno != errno.EXDEV:
                    raise
        if how == "link":
            _link(source, target)
        elif how == "move" and source.is_symlink():
            target.symlink_to(source.resolve())  # a relative one would lead nowhere from its new place
        else:
            copy = target.with_name(f".{target.name}.copy")
            shutil.copy2(source, copy)
            if how == "move":  # to another disk: the copy must be safe before the original goes
                with open(copy, "rb") as file:
                    os.fsync(file.fileno())
            copy.rename(target)
    if how == "move" and source.exists():
        if not filecmp.cmp(source, target, shallow=False):
            raise UserError(f"{source} is not the image that was moved from there to {target}; move it away")
        source.unlink()


def _link(source: Path, target: Path) -> None:
    """Link the image itself: a link to a symbolic link would be a relative one in another place."""
    image = os.path.realpath(source)
    try:
        os.link(image, target)
    except OSError as error:
        # The image of a symbolic link may lie on another disk, or be somebody else's.
        if not source.is_symlink() or error.errno not in (errno.EXDEV, errno.EPERM):
            raise
        target.symlink_to(image)


def check_val_fraction(share: float) -> None:
    """UserError: no images would be left on one side."""
    if not 0 < share < 1:
        raise UserError(f"--val_fraction must lie between 0 and 1, not {share}")


def _table(plan: Plan, limit: int = 20) -> str:
    """Images per class and in all."""
    counts = {name: (len(plan["train"][name]), len(plan["val"][name])) for name in plan["train"]}
    rows = [(name, *counts[name]) for name in list(counts)[:limit]]
    if len(counts) > limit:
        rest = list(counts.values())[limit:]
        rows.append((f"... {len(rest)} more", *map(sum, zip(*rest, strict=True))))
    rows.append(("all", *map(sum, zip(*counts.values(), strict=True))))
    width = max(len(row[0]) for row in rows) + 2
    return "\n".join(
        f"{name:<{width}}{train:>9}{val:>9}" for name, train, val in [("class", "train", "val"), *rows]
    )


def main(args: list[str] | None = None) -> None:
    parser = new_parser("split", __doc__)
    add = parser.add_argument
    add("--data_dir", type=Path, required=True, help="folder that holds one folder per class")
    add("--out", type=Path, required=True, help="will hold train/ and val/; must not exist yet")
    add("--val_fraction", type=float, default=0.2, help="share of each class for val (default: 0.2)")
    add("--seed", type=int, default=0, help="another seed, another choice (default: 0)")
    ways = ("copy", "link", "move")
    add("--how", choices=ways, default="copy", help="link = hard links (default: copy)")
    add("--dry_run", action="store_true", help="say what would be done and do nothing")
    options = parser.parse_args(args)
    with one_sentence(parser):
        check_val_fraction(options.val_fraction)
        check_least(options, seed=0)
        if options.dry_run:
            _refuse(options.data_dir, options.out)
            plan = plan_split(options.data_dir, options.val_fraction, options.seed)
        else:
            plan = split(options.data_dir, options.out, options.val_fraction, options.seed, options.how)
    print(_table(plan))
    print("nothing was done (--dry_run)" if options.dry_run else f"written to {options.out}")


if __name__ == "__main__":
    main()
