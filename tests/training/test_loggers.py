"""What reaches metrics.csv and TensorBoard."""

import shutil
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from lightning import Trainer
from lightning.pytorch.loggers import Logger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from commands import train_tiny
from litdiffusion.errors import UserError
from litdiffusion.runs.metrics import MetricsTable, read_rows
from litdiffusion.training.callbacks import SaveCheckpoints
from litdiffusion.training.loggers import CSVLogger, ForeignLogger


def test_tensorboard(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    train_tiny(tmp_path, "logger=tensorboard", "+trainer.log_every_n_steps=2", "+trainer.profiler=simple")
    assert "FIT Profiler Report" in caplog.text
    assert "GPU available" not in caplog.text
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [2, 4]
    assert events.Tags()["images"] == ["samples/noised_strip", "samples/grid"]
    assert (tmp_path / "metrics.csv").exists()


def test_tensorboard_loses_nothing_and_repeats_nothing_when_a_run_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run folder as ``kill -9`` leaves it is a copy of one at work: what it holds is what has been written."""
    often = (
        "logger=tensorboard",
        "callbacks.monitor.every_n_steps=1",
        "callbacks.save_checkpoints.every_n_steps=3",
    )
    killed = [tmp_path / "before a checkpoint", tmp_path / "after one"]
    finish_step = SaveCheckpoints.on_train_batch_start

    def copying(self: SaveCheckpoints, trainer: Trainer, *rest: Any) -> None:
        finish_step(self, trainer, *rest)
        if trainer.global_step in (2, 3):
            shutil.copytree(tmp_path / "run", killed[trainer.global_step - 2])

    monkeypatch.setattr(SaveCheckpoints, "on_train_batch_start", copying)
    train_tiny(tmp_path / "run", *often)
    monkeypatch.undo()
    killed.append(tmp_path / "run")  # before its summary, when nothing is left to train
    (tmp_path / "run" / "summary.json").unlink()
    time.sleep(1)  # files are read in the order of the second in which they are begun
    for run_dir in killed:
        train_tiny(run_dir, *often)
        events = EventAccumulator(str(run_dir / "tensorboard"))
        events.Reload()
        for key in ("train/loss", "val/loss"):
            logged = {row["step"]: row[key] for row in read_rows(run_dir / "metrics.csv") if key in row}
            shown = events.Scalars(key)
            assert [event.step for event in shown] == list(logged)
            assert [event.value for event in shown] == pytest.approx(list(logged.values()))
        assert [event.step for event in events.Images("samples/noised_strip")] == [0]
        assert [event.step for event in events.Images("samples/grid")] == [4]
        assert "hp_metric" not in events.Tags()["scalars"]


def test_a_file_where_tensorboards_folder_would_be_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("not a folder")
    with pytest.raises(UserError, match=f"{tmp_path}/tensorboard is no folder: move it away"):
        train_tiny(tmp_path, "logger=tensorboard")
    (tmp_path / "tensorboard").unlink()
    (tmp_path / "tensorboard").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=f"{tmp_path}/tensorboard is no folder: move it away"):
        train_tiny(tmp_path, "logger=tensorboard")


def test_what_lightnings_own_callbacks_log_has_its_place_on_the_axis(tmp_path: Path) -> None:
    logger = CSVLogger(str(tmp_path / "metrics.csv"))
    logger.resume_at(0, 16)
    logger.log_metrics({"lr-Adam": 0.1}, step=3)
    assert read_rows(tmp_path / "metrics.csv") == [{"step": 3, "images_seen": 48, "lr-Adam": 0.1}]


def test_what_another_logger_refuses_is_one_line() -> None:
    refusing = Mock(spec=Logger, log_hyperparams=Mock(side_effect=RuntimeError("no such server")))
    with pytest.raises(UserError, match="logger: Mock: no such server"):
        ForeignLogger(refusing).describe({})


def test_metrics_table_survives_kills_and_new_columns(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    table = MetricsTable(path)
    for step in (1, 2, 3):
        table.append({"step": step, "train/loss": 1 / step})
    table.append({"step": 3, "val/loss": 0.5})
    with path.open("a") as file:
        file.write("4,0.2")  # killed in the middle of a line
    assert [row["step"] for row in read_rows(path)] == [1, 2, 3, 3]

    resumed = MetricsTable(path, up_to_step=2)
    resumed.append({"step": 3, "train/loss": 1 / 3})
    assert read_rows(path) == [{"step": step, "train/loss": pytest.approx(1 / step)} for step in (1, 2, 3)]
    assert path.read_text().splitlines()[0] == "step,train/loss"


def test_a_validation_that_a_resumed_run_repeats_is_one_row(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    trained, validated = {"step": 12, "train/loss": 0.7}, {"step": 12, "val/loss": 0.1 + 0.2}
    for row in (trained, validated):
        MetricsTable(path).append(row)
    resumed = MetricsTable(path, up_to_step=12)  # killed before the checkpoint that remembers it
    resumed.append(validated | {"val/loss": 0.3})  # on another number of processes
    assert read_rows(path) == [trained, validated]
    later = {"step": 13, "val/loss": 0.2}
    resumed.append(later)
    assert read_rows(path) == [trained, validated, later]
