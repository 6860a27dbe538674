"""What counts towards throughput, what a checkpoint keeps of the monitor, and what stops a diverged run."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, Trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from commands import train_tiny, type_command
from litdiffusion.data.datamodule import TrainLoader
from litdiffusion.diffusion import ObjectiveOutput
from litdiffusion.errors import UserError
from litdiffusion.runs.metrics import read_rows
from litdiffusion.training import checkpoint_io
from litdiffusion.training.callbacks import Monitor, monitor, samples
from litdiffusion.training.module import LitDiffusion

pytestmark = pytest.mark.usefixtures("one_thread")

BATCH = 16  # of debug=tiny
WAIT, STEP, BESIDES = 1.0, 10.0, 1000.0


class FakeTime:
    """A clock that advances only when something is done."""

    def __init__(self) -> None:
        self.now = 0.0
        self.looks = 0

    def __call__(self, *args: Any) -> float:
        self.looks += 1
        return self.now

    def spent_by(self, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, seconds: float) -> None:
        original = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.now += seconds
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, wrapped)


@pytest.fixture
def fake_time(monkeypatch: pytest.MonkeyPatch) -> FakeTime:
    fake = FakeTime()
    monkeypatch.setattr(monitor, "_now", fake)
    return fake


def test_throughput_includes_waiting_for_data_and_excludes_all_but_training(
    tmp_path: Path, fake_time: FakeTime, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = TrainLoader.__iter__

    def slow(self: TrainLoader) -> Iterator[Any]:
        for batch in original(self):
            fake_time.now += WAIT
            yield batch

    monkeypatch.setattr(TrainLoader, "__iter__", slow)
    fake_time.spent_by(monkeypatch, LitDiffusion, "training_step", STEP)
    fake_time.spent_by(monkeypatch, LitDiffusion, "validation_step", BESIDES)
    fake_time.spent_by(monkeypatch, samples, "sample_images", BESIDES)
    fake_time.spent_by(monkeypatch, checkpoint_io, "write_checkpoint", BESIDES)
    train_tiny(tmp_path, "trainer.max_steps=20")
    speeds = [
        row["train/images_per_second"]
        for row in read_rows(tmp_path / "metrics.csv")
        if "train/images_per_second" in row
    ]
    assert len(speeds) == 4
    assert speeds[1:] == pytest.approx([BATCH / (WAIT + STEP)] * 3)
    assert speeds[0] == pytest.approx(5 * BATCH / (4 * WAIT + 5 * STEP))  # from the first batch on


def test_the_device_is_synchronized_once_per_row_and_not_every_step(
    tmp_path: Path, fake_time: FakeTime
) -> None:
    steps, lines = 12, 2
    options = ("callbacks.sample_images=null", "datamodule.num_val=0", "callbacks.save_checkpoints=null")
    train_tiny(
        tmp_path, *options, f"trainer.max_steps={steps}", f"callbacks.monitor.every_n_steps={steps // lines}"
    )
    assert fake_time.looks == 1 + 2 * lines + 1


def outputs(loss: float) -> Any:
    losses = torch.tensor([loss, loss])
    return {"loss": losses.mean(), "output": ObjectiveOutput(losses, torch.tensor([0.02, 1.0]))}


def test_the_first_bad_step_is_named_even_if_it_is_noticed_later(tmp_path: Path) -> None:
    watching = Monitor()
    trainer = Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    for step, loss in enumerate((0.5, float("inf"), 0.25, float("nan")), start=1):
        watching._add(outputs(loss), 1, step)
        if step == 1:
            watching.check_loss(trainer)
    with pytest.raises(UserError, match="the loss became infinite or NaN at step 2; there was no checkpoint"):
        watching.check_loss(trainer)


def spoil(monkeypatch: pytest.MonkeyPatch, batch_step: int) -> None:
    """Make the loss of one batch NaN."""
    original: Callable[..., Any] = LitDiffusion.training_step

    def training_step(self: LitDiffusion, batch: Any, batch_idx: int) -> Any:
        output = original(self, batch, batch_idx)
        return {**output, "loss": output["loss"] * float("nan")} if batch.step == batch_step else output

    monkeypatch.setattr(LitDiffusion, "training_step", training_step)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_nan_loss_stops_the_run_and_leaves_the_last_good_checkpoint(
    accumulate: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, batch_step=2 * accumulate)  # the first batch of step 3
    last = tmp_path / "checkpoints" / "last.ckpt"
    every_step = ("callbacks.save_checkpoints.every_n_steps=1", "callbacks.sample_images=null")
    with pytest.raises(UserError) as caught:
        train_tiny(tmp_path, *every_step, f"trainer.accumulate_grad_batches={accumulate}")
    assert f"the loss became infinite or NaN at step 3; the last good checkpoint is {last}" in str(
        caught.value
    )
    checkpoint = torch.load(last, weights_only=True)
    assert checkpoint["global_step"] == 2
    assert all(bool(torch.isfinite(value).all()) for value in checkpoint["state_dict"].values())


OVERSHOOT = (
    *("optimizer.lr=1e39", "lr_scheduler=constant", "trainer.gradient_clip_val=null"),
    *("callbacks.save_checkpoints.every_n_steps=1000", "callbacks.progress=null"),
)
"""The first step's loss is finite, and the weights it leads to are not."""


@pytest.mark.parametrize(
    "due",
    [
        ["callbacks.sample_images.every_n_steps=1"],
        ["trainer.val_check_interval=1", "callbacks.sample_images=null"],
        ["callbacks.save_checkpoints.every_n_steps=1", "callbacks.sample_images=null"],
        ["trainer.max_steps=1", "callbacks.sample_images=null", "datamodule.num_val=0"],
    ],
    ids=["sampling", "validating", "saving", "ending"],
)
def test_nonfinite_weights_are_neither_sampled_nor_validated_nor_saved(
    due: list[str], tmp_path: Path
) -> None:
    typed = type_command("train", "debug=tiny", f"run_dir={tmp_path}", *OVERSHOOT, *due)
    assert typed.code == 2, typed.err
    (line,) = (line for line in typed.err.splitlines() if line.startswith("error: "))
    assert "a weight became infinite or NaN at step 1; there was no checkpoint yet" in line
    assert list((tmp_path / "checkpoints").iterdir()) == []
    assert [path.name for path in (tmp_path / "samples").iterdir() if "step" in path.name] == []
    table = tmp_path / "metrics.csv"
    assert not table.exists() or not any("val/loss" in row for row in read_rows(table))


class Researcher(LitDiffusion):
    """Logs in every step, in some steps, in validation, and once without a logger."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("train/x", torch.tensor(float(batch_idx)))
        if batch_idx in (1, 10):
            self.log("train/seldom", torch.tensor(float(batch_idx)))
        self.log("train/hidden", 1.0, logger=False)
        self.log_dict({"train/by_epoch": float(batch_idx)}, on_epoch=True, prog_bar=True)
        self.log("train/by_both", float(batch_idx), on_step=True, on_epoch=True)
        return super().training_step(batch, batch_idx)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.log("train/after", float(batch_idx))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.log("val/x", batch.images.new_tensor(len(batch.images)))
        self.log("val/by_both", batch.images.new_tensor(len(batch.images)), on_step=True, on_epoch=True)


class Beside(Callback):
    """A callback that logs, too, and another that does so once: in the last step of the first of two commands."""

    def on_train_batch_end(
        self, _: Trainer, module: LitDiffusion, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        module.log("train/beside", float(batch_idx))
        if batch_idx == 11:
            module.log("train/once", float(batch_idx))


@pytest.mark.filterwarnings("error:.*self.log:UserWarning", "error:.*batch_size:UserWarning")
def test_what_a_researcher_logs_joins_the_row_and_stays_after_a_resumption(tmp_path: Path) -> None:
    own = (
        f"module._target_={__name__}.Researcher",
        f"+callbacks.beside._target_={__name__}.Beside",
        *(
            "callbacks.sample_images=null",
            "logger=tensorboard",
            "datamodule.num_val=24",
            "lr_scheduler=constant",
        ),
    )
    for last in (12, 20):
        train_tiny(tmp_path, *own, f"trainer.max_steps={last}")
    table = read_rows(tmp_path / "metrics.csv")
    trained = [row for row in table if "train/loss" in row]
    # Rows are due at every fifth step, of which the first batch is number 0.
    assert [(row["step"], row["images_seen"], row["train/x"]) for row in trained] == [
        (step, step * BATCH, step - 1) for step in (5, 10, 15, 20)
    ]
    for name in ("train/by_epoch", "train/by_both", "train/after", "train/beside"):
        assert [row[name] for row in trained] == [row["step"] - 1 for row in trained], name
    assert [row.get("train/seldom") for row in trained] == [1.0, None, 10.0, None]
    assert [row.get("train/once") for row in trained] == [None, None, 11.0, None]
    validated = [row for row in table if "val/loss" in row]
    # Of batches of 16 and 8 images, weighted by their sizes.
    assert [(row["step"], row["val/x"]) for row in validated] == [
        (step, pytest.approx((16 * 16 + 8 * 8) / 24)) for step in (10, 12, 20)
    ]
    assert len(table) == len(trained) + len(validated)
    assert [row["val/by_both"] for row in validated] == [row["val/x"] for row in validated]
    names = {name for row in table for name in row}
    assert not names & {"train/hidden", "epoch", *(f"{name}_step" for name in names)}
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/x")] == [
        (row["step"], row["train/x"]) for row in trained
    ]


def test_a_checkpoint_keeps_what_the_summary_reports(trained: Path) -> None:
    (kept,) = (
        state
        for name, state in torch.load(trained / "checkpoints" / "last.ckpt", weights_only=True)[
            "callbacks"
        ].items()
        if "Monitor" in name
    )
    assert kept["validated_step"] == 4
    for name in ("loss", "images_per_second"):
        assert kept[name] > 0, name
    assert kept["validated"]["val/loss"] > 0
    restored = Monitor()
    restored.load_state_dict(kept)
    assert restored.state_dict().keys() == kept.keys()
    assert (restored.loss, restored.validated) == (kept["loss"], kept["validated"])
