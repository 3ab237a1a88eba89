"""Which source a name means."""

import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from common import UserError
from common.data.sources.base import VAL_NAMES, MissingSplit, Source


@dataclass
class DataSettings:
    """The images"""

    data_dir: str = ""
    """ImageFolder tree (train/<class>/*.jpg, val/...), prepared pyramid, Parquet or Arrow folder, hub id org/name,
    or s3:// and hf:// addresses of shards; empty = the built-in sample data."""

    streaming: bool = False
    """Read Parquet or Arrow shards as they are needed instead of keeping the dataset on this machine."""


def open_dataset(settings: DataSettings) -> tuple[Source, Source]:
    """Open the train and validation images that `--data_dir` names.

    Raises:
        UserError: a split is missing or empty, or there are not two classes, the same in both.
    """
    from common.data.sample import ensure_sample_data

    data_dir = settings.data_dir or str(ensure_sample_data())
    train, val = (open_source(data_dir, split, settings.streaming) for split in ("train", "val"))
    for split in (train, val):
        if not len(split):
            raise UserError(f"--data_dir {data_dir}: {split.location} holds no images")
    for lacking, having in ((val, train), (train, val)):
        if missing := sorted(set(having.classes) - set(lacking.classes)):
            names = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
            raise UserError(
                f"--data_dir {data_dir}: {lacking.location} lacks {len(missing)} of the classes: {names}; "
                f"add them there, or remove them from {having.location}"
            )
    if train.classes != val.classes:
        raise UserError(f"--data_dir {data_dir}: train and val number their classes in different orders")
    if len(train.classes) == 1:
        raise UserError(f"--data_dir {data_dir} has one class only, {train.classes[0]}; it takes two or more")
    return train, val


def open_source(data_dir: str, split: str, streaming: bool = False) -> Source:
    """Open one split, "train" or "val", of what `--data_dir` names; `VAL_NAMES` are other names of val.

    Raises:
        MissingSplit: there are other splits, or maybe another layout.
        UserError: there is nothing, or not what is needed.
    """
    from common.data.sources.arrow import open_datasets, open_shards
    from common.data.sources.folder import FolderSource, class_folders

    names = ("train",) if split == "train" else VAL_NAMES
    if streaming:
        from common.data.sources.stream import open_stream

        return open_stream(data_dir, names)
    if not data_dir:
        raise UserError("--data_dir is empty; it names a folder with train/ and val/, or a dataset org/name")
    if data_dir.startswith("s3://"):
        from common.data.sources.remote import download

        data_dir = str(download(data_dir))
    elif data_dir.startswith("hf://"):
        data_dir = data_dir.removeprefix("hf://").removeprefix("datasets/")
    folder = Path(data_dir).expanduser()
    if not folder.is_dir():
        if folder.exists() or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", data_dir):
            raise UserError(f"--data_dir {data_dir} is not a folder; a dataset of the hub is named org/name")
        return open_datasets(data_dir, names)
    if shards := sorted(folder.glob("data/*.arrow")):
        return open_shards(data_dir, shards, names)
    trees = [folder / name for name in names if (folder / name).is_dir()]
    if trees and class_folders(os.fsencode(trees[0])):
        return FolderSource(trees[0])
    # Shards may lie in the folder of a configuration; `save_to_disk` writes a list of its splits.
    if any(next(folder.glob(shard), None) for shard in ("*.parquet", "*/*.parquet", "dataset_dict.json")):
        return open_datasets(str(folder), names)
    if trees:
        return FolderSource(trees[0])
    raise MissingSplit(f"--data_dir {data_dir} {_what_is_missing(folder.resolve(), names)}")


def _what_is_missing(folder: Path, names: tuple[str, ...]) -> str:
    """Say how a folder without the split `names[0]` becomes a dataset."""
    if folder.name in ("train", *VAL_NAMES) and (folder.parent / "train").is_dir():
        return f"is one split of a dataset; pass its parent, --data_dir {shlex.quote(str(folder.parent))}"
    unsplit = folder / "train" if (folder / "train").is_dir() else folder
    paths = ["--data_dir", str(unsplit), "--out", f"{folder}-split"]
    command = shlex.join(["python", "-m", "common.tools.split", *paths])
    return (
        f"has no {' or '.join(names)} folder, no data/*.arrow and no Parquet files; `{command}` makes train and "
        f"val of the class folders in {unsplit}, and then --data_dir is {folder}-split"
    )
