import csv
from types import SimpleNamespace

import pytest

from common import UserError
from common.run.checkpoint import Progress
from common.run.records import Background, Records, draw, start_trackers, upload_model


def test_work_is_done_in_order_and_its_errors_come_when_it_is_drained():
    background, done = Background(), []
    for number in range(5):
        background.submit(done.append, number)
    background.drain()
    assert done == [0, 1, 2, 3, 4]

    def fail():
        raise UserError("the disk is full")

    background.submit(fail)
    with pytest.raises(UserError, match="disk is full"):
        background.drain()
    background.drain()
    background.close()


def test_a_plot_that_fails_is_a_warning(tmp_path, caplog):
    def fail(folder):
        raise ValueError("a cell is not a number")

    draw(fail, tmp_path)
    assert "no plots this time: a cell is not a number" in caplog.text


def test_columns_are_those_of_the_first_row_and_late_rows_are_dropped(tmp_path):
    records = Records(tmp_path)
    for epoch in (1, 2, 3):
        records.add({"epoch": epoch, "total_s": epoch / 3})
    records.keep_epochs(2)
    with open(records.csv_path) as file:
        assert list(csv.reader(file)) == [["epoch", "total_s"], ["1", "0.333333"], ["2", "0.666667"]]
    records.keep_epochs(0)
    assert not records.csv_path.exists()


def test_a_log_that_an_older_version_began_gets_the_columns_it_lacks(tmp_path):
    records = Records(tmp_path)
    records.csv_path.write_text("epoch,gone,total_s\r\n1,7,0.5\r\n2,7,1\r\n")
    records.keep_epochs(1)
    records.add({"epoch": 2, "balanced": 50.0, "total_s": 2.0})
    assert records.rows() == [
        {"epoch": "1", "gone": "7", "total_s": "0.5", "balanced": ""},
        {"epoch": "2", "gone": "", "total_s": "2", "balanced": "50"},
    ]


def test_wandb_that_cannot_be_reached_falls_back_to_offline(tmp_path, monkeypatch, caplog):
    import wandb

    from train_standard import StandardConfig

    modes = []

    class Accelerator:
        is_main_process, trackers = True, []

        def init_trackers(self, project, config, init_kwargs):
            modes.append(init_kwargs["wandb"]["mode"])
            if modes[-1] == "online":
                raise wandb.errors.CommError("no route to host")

        def get_tracker(self, name, unwrap):
            return SimpleNamespace(offline=modes[-1] == "offline")

    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    with caplog.at_level("INFO"):
        start_trackers(StandardConfig(), Accelerator(), tmp_path, Progress(wandb_id="abc"))
    assert modes == ["online", "offline"]
    assert "kept offline" in caplog.text
    assert "uploads the run later" in caplog.text
    monkeypatch.setenv("WANDB_MODE", "offline")
    start_trackers(StandardConfig(), Accelerator(), tmp_path, Progress())
    assert modes == ["online", "offline", "offline"]


def test_the_model_is_an_artifact_of_an_online_run_alone(tmp_path):
    uploaded = []
    for name, offline in (("tensorboard", None), ("wandb", True), ("wandb", False)):
        run = SimpleNamespace(offline=offline, log_model=uploaded.append)
        upload_model(SimpleNamespace(trackers=[SimpleNamespace(name=name, run=run)]), tmp_path)
        assert len(uploaded) == (offline is False)
    assert uploaded == [tmp_path / "model"]
