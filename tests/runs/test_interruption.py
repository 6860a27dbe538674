"""A run that is killed or asked to stop, and then repeated, ends as if nothing had happened."""

import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from lightning import LightningModule, Trainer

from commands import run
from interrupted_runs import COMMAND, differences, finish, finish_here, kill, rows, start, wait_for
from litdiffusion.system.processes import STOP_SIGNALS, handling, stop_signals
from litdiffusion.training.callbacks import StopCleanly, interruption

SHORT = "trainer.max_steps=42"


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "uninterrupted"
    finish_here(run_dir, SHORT)
    return run_dir


def has_logged(run_dir: Path, lines: int) -> Callable[[], bool]:
    return lambda: (run_dir / "metrics.csv").exists() and len(rows(run_dir)) >= lines


def assert_stopped(process: subprocess.Popen[str], signum: signal.Signals) -> str:
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signum, output
    assert f"stopped by {signum.name} after step" in output
    assert "Traceback" not in output
    return output


def test_killed_and_repeated(uninterrupted: Path, tmp_path: Path) -> None:
    process = start(tmp_path, SHORT)
    wait_for((tmp_path / "checkpoints" / "previous.ckpt").exists, process)
    kill(process)
    assert "Continuing from step" in finish_here(tmp_path, SHORT)
    assert differences(uninterrupted, tmp_path) == []


@pytest.mark.slow
def test_asked_to_stop_three_times_and_repeated(uninterrupted: Path, tmp_path: Path) -> None:
    for signum, lines in ((signal.SIGTERM, 3), (signal.SIGINT, 6), (signal.SIGHUP, 8)):
        process = start(tmp_path, SHORT)
        wait_for(has_logged(tmp_path, lines), process)
        process.send_signal(signum)
        assert_stopped(process, signum)
    assert "Continuing from step" in finish_here(tmp_path, SHORT)
    assert differences(uninterrupted, tmp_path) == []


@pytest.mark.parametrize(
    ("trainer", "signum"),
    [("cpu", signal.SIGTERM), pytest.param("ddp_cpu", signal.SIGUSR1, marks=pytest.mark.slow)],
)
def test_out_of_time_in_the_middle_of_a_validation(
    uninterrupted: Path, tmp_path: Path, trainer: str, signum: signal.Signals
) -> None:
    run_dir = tmp_path / "run"
    endless = {"_target_": "hold.EndlessValidation", "step": 28, "begun": tmp_path / "begun"}
    overrides = [f"+callbacks.endless.{name}={value}" for name, value in endless.items()]
    overrides += ["callbacks.stop_cleanly.grace_seconds=0.5", f"trainer={trainer}", SHORT]
    process = start(run_dir, *overrides)
    wait_for((tmp_path / "begun").exists, process)
    os.killpg(process.pid, signum)  # as Slurm does, to all of them
    output = assert_stopped(process, signum)
    assert f"stopped by {signum.name} after step 28, of which 21 are saved" in output
    repeated = (finish_here if trainer == "cpu" else finish)(run_dir, *overrides)
    assert "Continuing from step 21" in repeated
    if trainer == "cpu":
        assert differences(uninterrupted, run_dir) == []


def test_a_finished_run_is_left_alone(uninterrupted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in sorted(uninterrupted.rglob("*")) if path.is_file()}
    run("train", *COMMAND, SHORT, f"run_dir={uninterrupted}")
    after = {path: path.read_bytes() for path in sorted(uninterrupted.rglob("*")) if path.is_file()}
    assert "This run is finished" in capsys.readouterr().out
    assert before == after


def test_continued_for_longer(tmp_path: Path) -> None:
    tiny = ["debug=tiny", "lr_scheduler=constant", "callbacks.sample_images=null", "datamodule.num_val=0"]
    run("train", *tiny, "trainer.max_steps=12", f"run_dir={tmp_path / 'at once'}")
    run("train", *tiny, "trainer.max_steps=7", f"run_dir={tmp_path / 'in two'}")
    run("train", *tiny, "trainer.max_steps=12", f"run_dir={tmp_path / 'in two'}")
    first, second = (
        torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for name in ("at once", "in two")
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_under_nohup_outlives_its_terminal() -> None:
    with handling([signal.SIGHUP], signal.SIG_DFL):
        assert signal.SIGHUP in stop_signals()
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        assert stop_signals() == [signum for signum in STOP_SIGNALS if signum != signal.SIGHUP]


class Processes:
    """A trainer of two processes as ``StopCleanly`` sees it: the other one says ``others``; a step takes 0.1 s."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.trainer = Mock(
            spec=Trainer, world_size=2, accumulate_grad_batches=1, global_step=0, callbacks=[]
        )
        self.trainer.strategy = Mock(root_device=torch.device("cpu"), reduce=self._reduce)
        self.others, self.meanwhile = (0.0, 0.0), lambda: None
        self.agreed: list[int] = []
        monkeypatch.setattr(interruption.time, "monotonic", lambda: 0.1 * self.trainer.global_step)

    def _reduce(self, mine: torch.Tensor, reduce_op: str) -> torch.Tensor:
        assert reduce_op == "max"
        self.agreed.append(self.trainer.global_step)
        self.meanwhile()
        return torch.maximum(mine, torch.tensor(self.others))

    def step(self, stop: StopCleanly, times: int = 1) -> None:
        for _ in range(times):
            stop.on_train_batch_start(
                self.trainer, Mock(spec=LightningModule), None, self.trainer.global_step
            )
            self.trainer.global_step += 1


def test_a_signal_that_comes_in_while_the_processes_agree_counts_the_next_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stop, trainer = StopCleanly(), Processes(monkeypatch)
    trainer.step(stop)
    trainer.meanwhile = lambda: stop._note(signal.SIGTERM, None)
    trainer.step(stop)
    trainer.meanwhile = lambda: None
    with pytest.raises(interruption.Interrupted, match="SIGTERM after step 8"):
        trainer.step(stop, 20)


def test_what_reached_another_process_stops_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    stop, trainer = StopCleanly(), Processes(monkeypatch)
    trainer.others = (float(signal.SIGUSR1), 0.0)
    with pytest.raises(interruption.Interrupted, match="SIGUSR1 after step 0"):
        trainer.step(stop)


def test_processes_agree_at_every_step_where_one_of_them_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    stop, trainer = StopCleanly(), Processes(monkeypatch)
    trainer.step(stop, 25)
    assert trainer.agreed == [0, 1, 8, 16, 24]
    trainer.others = (0.0, 2.0)
    trainer.step(stop, 10)
    assert trainer.agreed == [0, 1, 8, 16, 24, 32, 33, 34]
    trainer.others = (0.0, 0.0)
    trainer.step(stop, 10)
    assert trainer.agreed[8:] == [35, 40]
