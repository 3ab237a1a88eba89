"""Arrow and Parquet: columns by type, levels by size."""

import numpy as np
import pytest
from PIL import Image

from common import UserError
from common.data.decode import read_header
from tests.data.examples import (
    encoded,
    item,
    make_loader,
    make_parquet,
    make_pyramid,
    make_tree,
    opened,
    picture,
)


@pytest.mark.parametrize(
    ("image", "label", "val"), [("img", "label", "test"), ("image", "fine", "validation")]
)
def test_parquet_columns_are_found_by_type(tmp_path, image, label, val):
    train, evaluation = opened(make_parquet(tmp_path / "data", image, label, val))
    assert train.classes == ["a", "b", "c"]
    assert train.labels.tolist() == [k % 3 for k in range(12)]
    assert len(evaluation) == 6
    assert train.read(5, 32).tobytes() == encoded(picture(5))["bytes"]
    assert train.sizes().tolist() == [[40, 50]] * 12
    assert train.describe(5).startswith("row 5 of train")
    assert not train.prepared


def test_of_several_classes_the_label_is_meant_or_else_the_finest(tmp_path):
    from datasets import ClassLabel, Dataset, Features, Value
    from datasets import Image as ImageFeature

    two, five = ClassLabel(names=["cat", "dog"]), ClassLabel(names=list("abcde"))
    for number, (columns, classes) in enumerate(
        [
            ({"label": two, "camera": five}, ["cat", "dog"]),
            ({"label": Value("int64"), "camera": five}, ["0", "1"]),
            ({"coarse": two, "fine": five}, list("abcde")),
        ]
    ):
        # A name that only a pyramid's columns have otherwise.
        features = Features({"image_512": ImageFeature(), **columns})
        rows = [{"image_512": encoded(picture(k))} | dict.fromkeys(columns, k % 2) for k in range(4)]
        folder = tmp_path / str(number)
        folder.mkdir()
        for split in ("train", "validation"):
            Dataset.from_list(rows, features).to_parquet(folder / f"{split}-00000-of-00001.parquet")
        train, _ = opened(folder)
        assert train.classes == classes
        assert not train.prepared


def test_a_pyramid_gives_the_level_that_serves_the_size(tmp_path):
    train, val = opened(make_pyramid(tmp_path / "pyramid"))

    def short_side(index: int, size: int) -> int:
        return min(read_header(train.read(index, size))[:2])

    assert train.prepared
    assert len(val) == 4
    assert [short_side(0, size) for size in (32, 56, 64, 65, 112, 128, 129, 160, 224, 384)] == [
        *(73, 73, 73),
        *(146, 146, 146),
        *(256, 256, 256, 256),
    ]
    assert [short_side(1, size) for size in (56, 128, 224)] == [73, 100, 100]  # stored once, at its own size
    assert [short_side(2, size) for size in (56, 128, 224)] == [40, 40, 40]
    assert train.sizes().tolist() == [[400, 500], [100, 200], [40, 50], [250, 300]]
    assert train.labels.tolist() == [0, 1, 0, 1]
    assert train.describe(3) == f"row 3 of {tmp_path}/pyramid/data/train-*.arrow"


def test_plain_datasets_opens_a_pyramid(tmp_path):
    import datasets

    loaded = datasets.load_dataset(str(make_pyramid(tmp_path / "pyramid")), split="train")
    assert loaded[1]["image_146"].size == (200, 100)
    assert loaded[1]["image_256"] is None


def test_a_damaged_shard_is_named(tmp_path):
    root = make_pyramid(tmp_path / "pyramid")
    shard = root / "data" / "train-00001-of-00002.arrow"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(UserError, match=f"{shard} is damaged"):
        opened(root)


def test_levels_and_original_give_the_same_crop(tmp_path):
    """Through the whole loader: a gradient tells where a crop lies."""
    ramp = np.linspace(0, 255, 800, dtype=np.uint8)
    gradient = Image.fromarray(
        np.dstack([np.tile(ramp, (800, 1)), np.tile(ramp[:, None], (1, 800)), np.zeros((800, 800), np.uint8)])
    )
    tree = make_tree(tmp_path / "tree", classes=("a", "b"), train=1, val=1)
    gradient.save(tree / "train" / "a" / "0.jpg", quality=98, subsampling=0)
    pyramid = make_pyramid(tmp_path / "pyramid", [gradient, gradient])
    for size in (48, 112, 224):
        shown = []
        for place in (tree, pyramid):
            loader = make_loader(*opened(place), seed=3)
            [batch] = loader.stream([item(0, size=(size, size), epoch=7)])
            shown.append(batch.images.float())
        assert (shown[0] - shown[1]).abs().mean() < 3
