"""Which dataset a name means, and in which words it is refused."""

import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from common import UserError
from common.data import sample
from common.data.sources.arrow import open_datasets
from common.data.sources.base import MissingSplit
from common.data.sources.open import open_source
from tests.data.examples import encoded, make_parquet, make_pyramid, make_tree, opened, picture
from tests.helpers import launch


@pytest.mark.parametrize("name", ["validation", "valid", "test"])
def test_other_names_of_the_validation_split(tree, name):
    (tree / "val").rename(tree / name)
    assert len(opened(tree)[1]) == 9


def refused(data_dir) -> str:
    with pytest.raises(UserError) as caught:
        opened(data_dir)
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


def test_what_is_refused_is_named(tree, tmp_path):
    assert "/nowhere is not a folder" in refused("/nowhere")
    (tmp_path / "readme").write_text("text")
    assert "readme is not a folder" in refused(tmp_path / "readme")
    (tree / "train" / "empty").mkdir()
    assert f"{tree}/train/empty holds no images" in refused(tree)
    (tmp_path / "flat" / "train").mkdir(parents=True)
    assert f"{tmp_path}/flat/train/ holds no class folders" in refused(tmp_path / "flat")
    with pytest.raises(UserError, match="--data_dir is empty"):
        open_source("", "train")


def test_classes_that_one_split_lacks_are_named_with_the_folder_to_mend(tree):
    (tree / "val" / "owl").rename(tree / "val" / "eagle")
    mend = f"add them there, or remove them from {tree}/train"
    assert f"{tree}/val lacks 1 of the classes: owl; {mend}" in refused(tree)
    shutil.rmtree(tree / "val" / "eagle")
    assert f"{tree}/val lacks 1 of the classes: owl; {mend}" in refused(tree)
    shutil.copytree(tree / "val" / "dog", tree / "val" / "owl")
    shutil.rmtree(tree / "train" / "dog")
    mend = f"add them there, or remove them from {tree}/val"
    assert f"{tree}/train lacks 1 of the classes: dog; {mend}" in refused(tree)


def test_a_folder_without_val_is_told_the_command_that_makes_it(tree):
    shutil.rmtree(tree / "val")
    assert "has no val or validation" in refused(tree)
    command = f"`python -m common.tools.split --data_dir {tree}/train --out {tree}-split`"
    assert command in refused(tree)
    assert f"--data_dir is {tree}-split" in refused(tree)


def test_a_folder_of_class_folders_is_told_the_command_that_splits_it(tree):
    spaced = (tree / "train").rename(tree.parent / "my photos")
    assert f"split --data_dir '{spaced}' --out '{spaced}-split'`" in refused(spaced)
    with pytest.raises(MissingSplit):
        open_source(str(spaced), "train")


@pytest.mark.parametrize("split", ["train", "val"])
def test_one_split_instead_of_the_dataset(tree, split):
    assert f"pass its parent, --data_dir {tree}" in refused(tree / split)


def test_a_single_class(tmp_path):
    assert "has one class only, cat" in refused(make_tree(tmp_path / "one", classes=("cat",)))


def test_an_empty_split(tmp_path):
    path = make_parquet(tmp_path / "data") / "test-00000-of-00001.parquet"
    pq.write_table(pq.read_table(path)[:0], path)
    assert "a split is empty, or a file damaged" in refused(tmp_path / "data")
    [*_, path] = sorted((make_pyramid(tmp_path / "pyramid", shard=4) / "data").iterdir())
    schema = pa.ipc.open_file(path).schema
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema):
        pass
    assert f"{tmp_path}/pyramid/data/validation-*.arrow holds no images" in refused(tmp_path / "pyramid")


def test_no_name_means_the_sample(tree, monkeypatch):
    monkeypatch.setattr(sample, "ensure_sample_data", lambda: tree)
    assert [len(source) for source in opened("")] == [18, 9]


WITHOUT = """
import sys
sys.modules["pyarrow"] = sys.modules["datasets"] = None
import common.data.loader, common.data.batches, common.data.sources.open, common.data.sources.cache
"""


def test_needs_no_arrow_to_import(tmp_path):
    (tmp_path / "without.py").write_text(WITHOUT)
    done = launch(1, str(tmp_path / "without.py"))
    assert done.returncode == 0, done.stderr


def test_a_tree_stays_one_beside_a_table(tree):
    pq.write_table(pa.table({"note": ["x"]}), tree / "meta.parquet")
    assert [len(source) for source in opened(tree)] == [18, 9]


def test_images_that_datasets_keeps_as_files_are_read(tree):
    source = open_datasets(str(tree), ("train",))
    assert source.read(0, 32).tobytes() == (tree / "train" / "cat" / "0.jpg").read_bytes()
    assert source.sizes().tolist() == [[40, 50]] * 18


@pytest.mark.parametrize("layout", ["configuration", "saved to disk"])
def test_other_layouts_of_datasets(tmp_path, layout):
    import datasets

    flat = make_parquet(tmp_path / "flat")
    if layout == "configuration":
        (tmp_path / "data" / "plain_text").mkdir(parents=True)
        for shard in flat.glob("*.parquet"):
            shard.rename(tmp_path / "data" / "plain_text" / shard.name)
    else:
        datasets.load_dataset(str(flat)).save_to_disk(tmp_path / "data")
    train, val = opened(tmp_path / "data")
    assert (len(train), len(val), train.classes) == (12, 6, ["a", "b", "c"])
    assert train.read(5, 32).tobytes() == encoded(picture(5))["bytes"]


def test_what_datasets_cannot_load_is_one_sentence(tmp_path, monkeypatch):
    import datasets

    def refuse(*args, **options):
        raise ValueError("Config name is missing.\nPlease pick one")

    monkeypatch.setattr(datasets, "get_dataset_split_names", refuse)
    assert "`datasets` cannot load it: Config name is missing." in refused("org/name")


def test_hub_that_cannot_be_reached(monkeypatch):
    import datasets

    def unreachable(*args, **options):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "get_dataset_split_names", unreachable)
    assert "the hub gave no such dataset: no network" in refused("org/name")
