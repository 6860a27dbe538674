"""Weights kept at fixed times of a training: files named by the seconds that it took so far."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning import Callback
from torch import Tensor

from litdiffusion.system.files import whole_file


class Snapshot(NamedTuple):
    """What was learned in ``seconds`` from ``images``."""

    seconds: float
    images: int
    net: Mapping[str, Tensor]


class Stopwatch:
    """Seconds of a training, which go on after an interruption, and the weights at some of them.

    What it takes to write a snapshot does not count.
    """

    def __init__(self, folder: Path, times: Sequence[float], seconds: float = 0.0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.times = sorted(times)
        self.seconds = seconds
        self.tick = time.perf_counter()

    def start(self) -> None:
        self.tick = time.perf_counter()

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """What happens inside does not count."""
        self.count()
        yield
        self.start()

    def count(self) -> None:
        now = time.perf_counter()
        self.seconds += now - self.tick
        self.tick = now

    def step(self, images: int, net: torch.nn.Module) -> None:
        """Note the end of a training step, after ``images`` in all."""
        before = self.seconds
        self.count()
        if any(before < each <= self.seconds for each in self.times):
            self.keep(images, net)

    def keep(self, images: int, net: torch.nn.Module) -> None:
        with self.stopped(), whole_file(self.folder / f"{self.seconds:07.1f}.pt") as path:
            torch.save(Snapshot(self.seconds, images, net.state_dict())._asdict(), path)


class Snapshots(Callback):
    """A stopwatch for ``litdiffusion.train``: ``+callbacks.snapshots._target_=recordkit.snapshots.Snapshots``.

    All counts that happens between the first step and the last: data, validation, samples, checkpoints.
    """

    def __init__(self, folder: str, times: Sequence[float]) -> None:
        self.watch = Stopwatch(Path(folder), times)

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.watch.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.watch.seconds = state_dict["seconds"]

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.watch.start()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        images = trainer.global_step * trainer.datamodule.batch_size
        net = pl_module.ema_denoiser.core.net
        self.watch.step(images, net)
        if trainer.global_step == trainer.max_steps:
            self.watch.keep(images, net)


def snapshots(folder: Path) -> list[Path]:
    """The files of a training, by time."""
    return sorted(folder.glob("*.pt"))
