"""The progress bar, as a terminal of 80 columns shows it."""

import io
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from lightning import LightningModule, Trainer

from commands import train_tiny
from litdiffusion.training.callbacks import Progress, progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    def fileno(self) -> int:
        return 2

    def frames(self) -> list[str]:
        """What has been shown, one after the other."""
        text = re.sub(r"\x1b\[\w", "", self.getvalue())
        return [frame.rstrip() for frame in re.split(r"[\r\n]+", text) if frame.strip()]


def show_on_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    # In the test itself: pytest sets stderr after the fixtures.
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(os, "get_terminal_size", lambda fileno: os.terminal_size((80, 24)))
    monkeypatch.setattr(progress, "LOOK_SECONDS", 0)
    return screen


class Run:
    """Steps of one second, by a clock of its own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, max_steps: int) -> None:
        self.now = 1000.0
        monkeypatch.setattr("tqdm.std.time", lambda: self.now)
        self.callback: Any = Progress()
        self.module = Mock(spec=LightningModule)
        self.trainer: Any = Mock(
            spec=Trainer,
            max_steps=max_steps,
            global_step=0,
            world_size=1,
            accumulate_grad_batches=1,
            num_val_batches=[4],
            callbacks=[self.callback],
        )
        self.callback.on_train_start(self.trainer, self.module)

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.now += 1.0
            self.trainer.global_step += 1
            batch = SimpleNamespace(images=torch.zeros(12_000, 0))
            self.callback.on_train_batch_end(self.trainer, self.module, {"loss": 0.25}, batch, 0)

    def validate(self, seconds: float) -> None:
        self.callback.on_validation_start(self.trainer, self.module)
        for _ in range(4):
            self.now += seconds / 4
            self.callback.on_validation_batch_end()
        self.callback.on_validation_end(self.trainer, self.module)


def test_rate_and_time_left_count_the_training_and_pauses_by_their_share(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal = show_on_terminal(monkeypatch)
    run = Run(monkeypatch, max_steps=40_000)
    run.train(100)
    assert "step 100/40000 [01:40, ETA 11:05:00], 12000 images/s, loss 0.2500" in terminal.frames()[-1]
    run.validate(50.0)
    assert "validation 100%" in terminal.frames()[-1]
    run.train(100)  # 200 steps in 200 s and 50 s of validation: 39,800 to go, at 1 s and 0.25 s each
    last = terminal.frames()[-1]
    assert "step 200/40000 [04:10, ETA 13:49:10], 12000 images/s, loss 0.2500" in last
    with progress.showing(run.trainer, "sampling", 300) as advance:
        for _ in range(300):
            run.now += 1.0
            advance()
    assert "sampling 100%" in terminal.frames()[-1]
    assert "[05:00, ETA 00:00]" in terminal.frames()[-1]
    run.train(1)
    assert "step 201/40000 [09:11, " in terminal.frames()[-1]
    assert "12000 images/s" in terminal.frames()[-1]
    run.callback.on_train_end(run.trainer, run.module)
    assert max(map(len, terminal.frames())) < 80


def test_a_log_file_gets_whole_lines_and_of_short_pauses_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", log := io.StringIO())
    run = Run(monkeypatch, max_steps=200)
    run.train(100)
    run.validate(20.0)
    assert "validation" not in log.getvalue()
    run.validate(400.0)
    shown = re.findall(r"validation +(\d+)%", log.getvalue())
    assert shown[0] in ("25", "50")  # tqdm waits for as many steps as it has seen in the time
    assert shown[-1] == "100"
    run.callback.on_train_end(run.trainer, run.module)
    assert "\x1b" not in log.getvalue()


def test_what_follows_the_last_step_is_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    terminal = show_on_terminal(monkeypatch)
    train_tiny(tmp_path)
    frames = terminal.frames()
    end = next(i for i, frame in enumerate(frames) if "step 4/4" in frame)
    shown = {frame.split()[0] for frame in frames[end:]}
    assert {"validation", "sampling"} <= shown, frames
    assert all("ETA 00:00" in frame for frame in frames if "step 4/4" in frame)
