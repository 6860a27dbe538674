"""Full disks, folders that cannot be written, and worker processes that are lost: nothing half-written, one line."""

import json
import logging
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from commands import Typed, train_tiny, type_command
from disks import Disk, small_disk, unwritable
from interrupted_runs import differences
from litdiffusion.configuration.messages import user_error
from litdiffusion.reporting.curves import curves
from litdiffusion.reporting.gif import save_gif
from litdiffusion.reporting.images import save
from litdiffusion.runs.checkpoint import read_checkpoint, write_checkpoint
from litdiffusion.runs.folder import RunFolder
from litdiffusion.runs.metrics import MetricsTable, read_rows
from litdiffusion.system.files import WriteError, append_text, whole_file, write_text
from litdiffusion.training.callbacks import Monitor, SaveCheckpoints
from offline_wandb import told_wandb

RUN = ["debug=tiny", "trainer.max_steps=12", "callbacks.save_checkpoints.every_n_steps=4"]
CHECKPOINT = {"state_dict": {"w": torch.zeros(5000)}, "model_config": {}, "data_config": {}, "global_step": 1}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    with small_disk(tmp_path / "disk", megabytes=2) as small:
        yield small


@pytest.fixture(scope="module")
def peaceful(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run, left in peace."""
    run_dir = tmp_path_factory.mktemp("runs") / "peaceful"
    assert type_command("train", *RUN, f"run_dir={run_dir}").code == 0
    return run_dir


def the_line(typed: Typed) -> str:
    """The one line of an error that the user can mend."""
    assert typed.code == 2, typed
    assert "Traceback" not in typed.err
    [line] = [line for line in typed.err.splitlines() if line.startswith("error: ")]
    return line


def temporaries(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob(".*") if path.name != ".lock"]


def noise() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (100, 100), dtype=np.uint8))


def npz(path: Path) -> None:
    with whole_file(path) as temporary:
        np.savez_compressed(temporary, images=np.random.default_rng(0).integers(0, 256, 9999, dtype=np.uint8))


WRITERS: dict[str, Callable[[Path], object]] = {
    "last.ckpt": lambda path: write_checkpoint(CHECKPOINT, path),
    "grid.png": lambda path: save(noise(), path),
    "denoising.gif": lambda path: save_gif([torch.rand(4, 1, 8, 8)] * 3, path),
    "summary.json": lambda path: RunFolder(path.parent).write_summary({"steps": 3}),
    "config.yaml": lambda path: RunFolder(path.parent).describe({"seed": 1}, [], {}),
    "samples.npz": npz,
    "metrics.csv": lambda path: MetricsTable(path).append({"step": 2, "val/loss": 1.0}),
    "appended.txt": lambda path: append_text(path, "new " * 2000),
}


@pytest.mark.parametrize("name", WRITERS)
def test_on_a_full_disk_a_file_stays_as_it_was(disk: Disk, name: str) -> None:
    path = disk.path / name
    path.write_bytes(b"step,train/loss\n1,0.5\n")
    disk.fill()
    with pytest.raises(WriteError) as caught:
        WRITERS[name](path)
    assert path.read_bytes() == b"step,train/loss\n1,0.5\n"
    assert temporaries(disk.path) == []
    line = user_error(caught.value)
    assert line is not None
    assert f"{path} could not be written (No space left on device): free space" in line
    assert "the same command continues" in line
    disk.free()
    WRITERS[name](path)


def test_a_row_that_does_not_fit_leaves_whole_rows(disk: Disk) -> None:
    path = disk.path / "metrics.csv"
    table = MetricsTable(path)
    table.append({"step": 1, "train/loss": 0.1})
    disk.fill()

    def go_on() -> None:  # the last block of the file still holds some rows, and a part of one
        for step in range(2, 1000):
            table.append({"step": step, "train/loss": 0.1})

    with pytest.raises(WriteError):
        go_on()
    assert path.read_bytes().endswith(b"\n")
    rows = read_rows(path)
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert len(rows) > 2


def test_a_curve_that_does_not_fit(disk: Disk) -> None:
    table = MetricsTable(disk.path / "metrics.csv")
    for step in (1, 2):
        table.append({"step": step, "train/loss": 0.1})
    disk.fill()
    with pytest.raises(WriteError, match=r"curves\.png"):
        curves(table.path, disk.path / "curves.png")
    assert not (disk.path / "curves.png").exists()
    assert temporaries(disk.path) == []


def test_the_second_name_of_a_file_needs_a_folder_that_can_be_written(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    write_checkpoint(CHECKPOINT, folder / "last.ckpt")
    with unwritable(folder), pytest.raises(WriteError, match=r"last\.ckpt") as caught:
        write_checkpoint(CHECKPOINT, folder / "last.ckpt")
    assert "make it writable, and the same command continues" in str(user_error(caught.value))


def test_a_run_whose_disk_fills_up_goes_on_when_there_is_space(peaceful: Path, tmp_path: Path) -> None:
    size = (peaceful / "checkpoints" / "last.ckpt").stat().st_size
    with small_disk(tmp_path / "disk", megabytes=size // 2**20 + 1) as disk:
        # Room for a checkpoint and the small files, but not for another one beside them.
        run_dir = disk.path / "run"
        line = the_line(type_command("train", *RUN, f"run_dir={run_dir}"))
        assert f"{run_dir}/checkpoints/last.ckpt could not be written (No space left on device)" in line
        assert "free space, and the same command continues" in line
        assert temporaries(run_dir) == []
        assert read_checkpoint(run_dir / "checkpoints" / "last.ckpt")["global_step"] == 4
        disk.fill()
        assert "could not be written" in the_line(type_command("train", *RUN, f"run_dir={run_dir}"))
        disk.free()
        disk.resize(64)
        assert type_command("train", *RUN, f"run_dir={run_dir}").code == 0
        assert differences(peaceful, run_dir) == []


@pytest.mark.slow
def test_a_disk_that_fills_up_under_a_dashboard_too_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """W&B has a log of its own there, into which it writes many lines."""
    told = [*RUN, "logger=wandb", "logger.wandb.mode=offline", "callbacks.monitor.every_n_steps=1"]
    stepping = Monitor.on_train_batch_end
    with small_disk(tmp_path / "disk", megabytes=32) as disk:

        def filling(self: Monitor, trainer: Any, *rest: Any) -> None:
            stepping(self, trainer, *rest)
            if trainer.global_step == 7:
                disk.fill()
                for _ in range(200):  # more than the last block of the log has room for
                    logging.getLogger("wandb").info("What W&B writes down about what it does")

        monkeypatch.setattr(Monitor, "on_train_batch_end", filling)
        run_dir = disk.path / "run"
        typed = type_command("train", *told, f"run_dir={run_dir}")
        assert f"{run_dir}/checkpoints/last.ckpt could not be written (No space left on device)" in the_line(
            typed
        )
        assert len(typed.err.splitlines()) < 10
        monkeypatch.undo()
        disk.free()
        assert type_command("train", *told, f"run_dir={run_dir}").code == 0
        assert told_wandb(run_dir, "train/loss") == [str(16 * step) for step in range(1, 13)]


def test_a_run_folder_that_becomes_read_only_while_running(
    peaceful: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    saving = SaveCheckpoints.save

    def spoilt(self: SaveCheckpoints, trainer: Any) -> None:
        if trainer.global_step < 8:
            saving(self, trainer)
            return
        with unwritable(self.folder):
            saving(self, trainer)

    monkeypatch.setattr(SaveCheckpoints, "save", spoilt)
    line = the_line(type_command("train", *RUN, f"run_dir={run_dir}"))
    assert f"{run_dir}/checkpoints/" in line
    assert "make it writable, and the same command continues" in line
    assert temporaries(run_dir) == []
    monkeypatch.undo()
    assert read_checkpoint(run_dir / "checkpoints" / "last.ckpt")["global_step"] == 4

    with unwritable(run_dir):
        assert f"run_dir={run_dir} cannot be written" in the_line(
            type_command("train", *RUN, f"run_dir={run_dir}")
        )
    assert type_command("train", *RUN, f"run_dir={run_dir}").code == 0
    assert differences(peaceful, run_dir) == []


def test_a_finished_run_in_a_read_only_folder_is_told_as_finished(peaceful: Path) -> None:
    with unwritable(peaceful):
        typed = type_command("train", *RUN, f"run_dir={peaceful}")
    assert typed.code == 0
    assert "This run is finished" in typed.out


def test_the_loss_of_a_worker_process_ends_in_one_line(
    peaceful: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workers = ["datamodule.memory_limit_mb=0", "datamodule.num_workers=2"]
    run_dir = tmp_path / "run"
    stepping = Monitor.on_train_batch_end

    def deadly(self: Monitor, trainer: Any, *rest: Any) -> None:
        stepping(self, trainer, *rest)
        if trainer.global_step == 6:
            os.kill(multiprocessing.active_children()[0].pid or 0, signal.SIGKILL)
            # The loss ends this; anywhere else it might end a check of shapes, which would tell it as its own.
            time.sleep(60)

    monkeypatch.setattr(Monitor, "on_train_batch_end", deadly)
    line = the_line(type_command("train", *RUN, *workers, f"run_dir={run_dir}"))
    assert "a process that decodes images was lost" in line
    assert "the same command continues" in line
    monkeypatch.undo()
    assert read_checkpoint(run_dir / "checkpoints" / "last.ckpt")["global_step"] == 4
    assert type_command("train", *RUN, *workers, f"run_dir={run_dir}").code == 0
    assert differences(peaceful, run_dir) == []


def test_what_a_killed_job_was_writing_is_tidied_up(tmp_path: Path) -> None:
    torn = tmp_path / "checkpoints" / ".litdiffusion-last-abcd1234.ckpt"
    torn.parent.mkdir()
    torn.write_bytes(b"half")
    for name in (".hidden-note.txt", ".notes-abcdefgh.txt"):
        (tmp_path / name).write_text("the user's own")
    train_tiny(tmp_path, "callbacks.sample_images=null", "datamodule.num_val=0", "trainer.max_steps=1")
    assert sorted(temporaries(tmp_path)) == [".hidden-note.txt", ".notes-abcdefgh.txt"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("provenance.json", "[" * 100_000),
        ("provenance.json", '{"seed": 0}'),
        ("metrics.csv", "step,train/loss\n1,abc\n"),
        ("config.yaml", "seed: ["),
        ("data.json", "{"),
    ],
    ids=lambda value: value[:15],
)
def test_a_damaged_file_of_the_run_folder_is_named(
    peaceful: Path, tmp_path: Path, name: str, content: str
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(peaceful, run_dir)
    (run_dir / name).write_text(content)
    line = the_line(
        type_command("train", *RUN[1:], "debug=tiny", "trainer.max_steps=13", f"run_dir={run_dir}")
    )
    assert str(run_dir / name) in line


def test_data_that_has_changed_is_refused_and_data_restored_goes_on(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    files = [tmp_path / "images" / f"{number}.png" for number in range(40)]
    for number, file in enumerate(files):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(file)
    run = [
        *("debug=tiny", "data=image_folder", f"data.path={tmp_path / 'images'}", "data.image_size=8"),
        *("data.channels=1", "callbacks.sample_images=null", "datamodule.num_val=0", "lr_scheduler=constant"),
        f"run_dir={tmp_path / 'run'}",
    ]
    assert type_command("train", *run, "trainer.max_steps=4").code == 0
    known = json.loads((tmp_path / "run" / "data.json").read_text())

    before = files[3].read_bytes()
    Image.new("RGB", (8, 8)).save(files[3])
    line = the_line(type_command("train", *run, "trainer.max_steps=6"))
    assert "the training data is not what run_dir" in line
    assert "(other pixels)" in line
    assert "restore it, or choose a new run_dir" in line

    files[3].unlink()
    line = the_line(type_command("train", *run, "trainer.max_steps=6"))
    assert f"{known['images']} images then, {known['images'] - 1} now" in line

    files[3].write_bytes(before)
    for more in ([], ["datamodule.memory_limit_mb=0", "datamodule.num_workers=0"]):
        steps = 6 + len(more)
        assert type_command("train", *run, f"trainer.max_steps={steps}", *more).code == 0


def test_what_is_appended_is_on_disk_before_a_checkpoint_counts_on_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.fstat(file).st_size))
    append_text(tmp_path / "rows.csv", "1,2\n")
    append_text(tmp_path / "rows.csv", "3,4\n")
    assert synced == [4, 8]


def test_write_text_and_append_text_in_a_folder_that_is_not_there(tmp_path: Path) -> None:
    for write in (write_text, append_text):
        with pytest.raises(WriteError, match=r"nowhere/notes\.txt"):
            write(tmp_path / "nowhere" / "notes.txt", "new")
