"""Which source a name means."""

import re
from pathlib import Path

from common import UserError
from common.data.sources.base import VAL_NAMES, MissingSplit, Source


def open_dataset(cfg) -> tuple[Source, Source]:
    """Open the train and validation images that `--data_dir` names.

    Raises:
        UserError: a split is missing, or the two do not have the same classes.
    """
    from common.data.sources.stream import open_stream

    open_split = open_stream if cfg.streaming else open_source
    train, val = open_split(cfg.data_dir, "train"), open_split(cfg.data_dir, "val")
    for name, some, others in (("val", train, val), ("train", val, train)):
        if missing := sorted(set(some.classes) - set(others.classes)):
            names = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
            raise UserError(f"--data_dir {cfg.data_dir}: {name} lacks {len(missing)} classes: {names}")
    if train.classes != val.classes:
        raise UserError(f"--data_dir {cfg.data_dir}: train and val number their classes in different orders")
    return train, val


def open_source(data_dir: str, split: str) -> Source:
    """Open one split of what `--data_dir` names.

    Args:
        data_dir: an ImageFolder tree, a folder of Arrow or Parquet files, a hub dataset `org/name`, or
            s3://bucket/prefix with Arrow or Parquet files, which are downloaded.
        split: "train" or "val", which stands for the first of val, validation, valid and test that is there.

    Raises:
        MissingSplit: there are other splits, or maybe another layout.
        UserError: there is nothing, or not what is needed.
    """
    from common.data.sources.arrow import open_datasets, open_shards
    from common.data.sources.folder import FolderSource
    from common.data.sources.remote import download

    if data_dir.startswith("s3://"):
        data_dir = str(download(data_dir))
    elif data_dir.startswith("hf://"):
        data_dir = data_dir.removeprefix("hf://").removeprefix("datasets/")
    folder = Path(data_dir).expanduser()
    names = ("train",) if split == "train" else VAL_NAMES
    if not data_dir:
        raise UserError("--data_dir is empty; it names a folder with train/ and val/, or a dataset org/name")
    if not folder.is_dir():
        if folder.exists() or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", data_dir):
            raise UserError(f"--data_dir {data_dir} is not a folder")
        return open_datasets(data_dir, names)
    if shards := sorted(folder.glob("data/*.arrow")):
        return open_shards(data_dir, shards, names)
    if any(next((folder / below).glob("*.parquet"), None) for below in ("", "data", *names)):
        return open_datasets(data_dir, names)
    for name in names:
        if (folder / name).is_dir():
            return FolderSource(folder / name)
    raise MissingSplit(
        f"--data_dir {data_dir} has no {' or '.join(names)} folder, no data/*.arrow and no Parquet files; "
        "`python -m common.tools.split` makes train/ and val/ of one folder of class folders"
    )
