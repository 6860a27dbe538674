"""A run that is stopped when its last step is done has lost nothing: the same command brings it to its end."""

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer

from commands import train_tiny
from litdiffusion import train
from litdiffusion.errors import UserError
from litdiffusion.runs.folder import RunFolder
from litdiffusion.runs.metrics import read_rows
from litdiffusion.training.callbacks import Interrupted, Monitor, SampleImages, SaveCheckpoints
from litdiffusion.training.loggers import CSVLogger
from litdiffusion.training.module import LitDiffusion

pytestmark = pytest.mark.usefixtures("one_thread", "same_handlers")

LAST_STEP = 4  # of ``train_tiny``


@pytest.fixture
def same_handlers() -> Iterator[None]:
    """Whatever became of the run, the process is as it was."""
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(signum) for signum in signals]
    yield
    assert [signal.getsignal(signum) for signum in signals] == before


def numbers(run_dir: Path) -> dict[str, Any]:
    summary = json.loads((run_dir / "summary.json").read_text())
    return {name: summary[name] for name in ("steps", "images_seen", "train_loss", "val_loss")}


def saved_step(run_dir: Path) -> int:
    saved: int = torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    return saved


def rows(run_dir: Path) -> list[dict[str, float]]:
    return [
        {name: value for name, value in row.items() if "per_second" not in name}
        for row in read_rows(run_dir / "metrics.csv")
    ]


def assert_same_end(one: Path, other: Path) -> None:
    assert numbers(one) == numbers(other)
    assert rows(one) == rows(other)
    for name in ("grid.png", "denoising.gif"):
        assert (one / "samples" / name).read_bytes() == (other / "samples" / name).read_bytes()
    assert json.loads((one / "summary.json").read_text())["images_per_second"] > 0


def once(monkeypatch: pytest.MonkeyPatch, kind: type, method: str, act: Callable[..., None]) -> None:
    """Call ``act`` with the arguments of the first call of a method of ``kind``, before the method itself."""
    original, calls = getattr(kind, method), []

    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == 1:
            act(*args)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(kind, method, wrapped)


class Killed(BaseException):
    """Nothing catches it, as nothing catches ``kill -9``."""


def kill(*args: Any) -> None:
    raise Killed


def test_killed_after_the_last_step(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    once(monkeypatch, SampleImages, "finish", kill)
    with pytest.raises(Killed):
        train_tiny(tmp_path)
    assert not (tmp_path / "summary.json").exists()
    train_tiny(tmp_path)
    assert_same_end(tmp_path, trained)


@pytest.mark.parametrize(
    ("kind", "method"),
    [(SampleImages, "finish"), pytest.param(RunFolder, "write_summary", marks=pytest.mark.slow)],
    ids=["sampling", "summing up"],
)
def test_killed_at_its_second_end(
    kind: type,
    method: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A run continued for longer: what it has written at its first end is not how it ended."""
    killed, undisturbed = tmp_path / "killed", tmp_path / "undisturbed"
    train_tiny(killed, "trainer.max_steps=2")
    shutil.copytree(killed, undisturbed)
    train_tiny(undisturbed)
    with monkeypatch.context() as patched:
        once(patched, kind, method, kill)
        with pytest.raises(Killed):
            train_tiny(killed)
    assert saved_step(killed) == LAST_STEP
    assert not (killed / "summary.json").exists()  # its pictures may be of either end by now

    with pytest.raises(UserError, match="has come to step 4 already"):
        train_tiny(killed, "trainer.max_steps=2")
    train_tiny(killed)
    assert_same_end(killed, undisturbed)
    capsys.readouterr()
    train_tiny(killed)
    assert "This run is finished, at step 4;" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("signum", "kind"), [(signal.SIGHUP, Monitor), (signal.SIGINT, SaveCheckpoints)], ids=["done", "saving"]
)
def test_asked_to_stop_when_the_last_step_is(
    signum: signal.Signals,
    kind: type,
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    once(monkeypatch, kind, "on_train_end", lambda *args: os.kill(os.getpid(), signum))
    with pytest.raises(SystemExit) as leaving:
        train_tiny(tmp_path)
    assert leaving.value.code == 128 + signum
    assert f"stopped by {signum.name} after step {LAST_STEP}" in caplog.text
    assert not (tmp_path / "samples" / "grid.png").exists()
    assert saved_step(tmp_path) == LAST_STEP
    train_tiny(tmp_path)
    assert_same_end(tmp_path, trained)


@pytest.mark.parametrize(
    ("signum", "kind", "method"),
    [(signal.SIGINT, SampleImages, "finish"), (signal.SIGTERM, LitDiffusion, "validation_step")],
    ids=["sampling", "validating"],
)
def test_asked_to_stop_after_the_last_step_is_obeyed_at_once(
    signum: signal.Signals,
    kind: type,
    method: str,
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stop(*args: Any) -> None:
        os.kill(os.getpid(), signum)
        pytest.fail("the signal was put off")

    once(monkeypatch, kind, method, stop)
    with pytest.raises(SystemExit) as leaving:
        train_tiny(tmp_path)
    assert leaving.value.code == 128 + signum
    train_tiny(tmp_path)
    assert_same_end(tmp_path, trained)


def test_asked_to_stop_before_the_first_step(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where Lightning's own handler would remember it, and end the run with exit code 0 and nothing saved."""
    once(monkeypatch, SampleImages, "on_train_start", lambda *args: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as leaving:
        train_tiny(tmp_path)
    assert leaving.value.code == 128 + signal.SIGTERM
    assert "stopped by SIGTERM after step 0" in caplog.text
    train_tiny(tmp_path)
    assert_same_end(tmp_path, trained)


def test_a_summary_names_no_pictures_of_an_earlier_end(trained: Path, tmp_path: Path) -> None:
    longer = Path(shutil.copytree(trained, tmp_path / "run"))
    train_tiny(longer, f"trainer.max_steps={LAST_STEP + 1}", "callbacks.sample_images=null")
    for run_dir, step in ((trained, LAST_STEP), (longer, LAST_STEP + 1)):
        summary = json.loads((run_dir / "summary.json").read_text())
        assert summary["steps"] == step
        assert [name in summary for name in ("grid", "gif")] == [run_dir == trained] * 2


def test_a_run_that_stops_itself_says_so_and_is_finished(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    early = {
        "_target_": "lightning.pytorch.callbacks.EarlyStopping",
        "monitor": "val/loss",
        "patience": 1,
        "min_delta": 100,  # nothing is an improvement but the first
    }
    command = [f"+callbacks.early.{name}={value}" for name, value in early.items()]
    command += ["trainer.max_steps=20", "trainer.val_check_interval=2", "lr_scheduler=constant"]
    command += ["callbacks.sample_images=null"]
    caplog.set_level("INFO")
    train_tiny(tmp_path, *command)
    reason = "Monitored metric val/loss did not improve in the last 1 records. Best score: "
    assert f"Stopped at step 4 of 20: {reason}" in caplog.text
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["steps"] == saved_step(tmp_path) == 4
    assert summary["stopped"].startswith(reason)

    train_tiny(tmp_path, *command)
    assert f"This run is finished, at step 4 ({reason}" in capsys.readouterr().out
    (tmp_path / "summary.json").unlink()  # killed before it was written
    train_tiny(tmp_path, *command)
    assert json.loads((tmp_path / "summary.json").read_text())["steps"] == saved_step(tmp_path) == 4

    last = tmp_path / "checkpoints" / "last.ckpt"
    train_tiny(tmp_path / "other", *command[-3:], "trainer.max_steps=6", f"resume={last}")
    assert saved_step(tmp_path / "other") == 6
    train_tiny(tmp_path, *command, "trainer.max_steps=21", "callbacks.early.patience=2")
    assert saved_step(tmp_path) > 4


@pytest.mark.parametrize("ending", [Interrupted(signal.SIGTERM, 3), UserError("diverged"), None], ids=str)
def test_loggers_learn_how_the_command_ends(
    ending: BaseException | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes = []

    class Remembering(CSVLogger):
        def close(self) -> None:
            codes.append(self.exit_code)

    def fit(trainer: Trainer, module: LitDiffusion, *, datamodule: Any, **rest: Any) -> None:
        if ending:
            raise ending
        raise SystemExit  # of a callback of Lightning's

    monkeypatch.setattr(train, "build_loggers", lambda cfg: [Remembering(str(tmp_path / "metrics.csv"))])
    monkeypatch.setattr(Trainer, "fit", fit)
    with pytest.raises((SystemExit, UserError)):
        train_tiny(tmp_path)
    assert codes == [128 + signal.SIGTERM if isinstance(ending, Interrupted) else 1]
