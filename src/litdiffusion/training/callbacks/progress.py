"""The progress bar: step, images per second, loss, time left; below it, how far a validation or a sampling is."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm

from litdiffusion.training.callbacks.attached import get_callback

BAR = "{percentage:3.0f}% |{bar}| step {n_fmt}/{total_fmt} [{whole}, ETA {left}]{postfix}"
PAUSE = "{desc} {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} [{elapsed}, ETA {remaining}]"
LOOK_SECONDS = 0.5
LINE_SECONDS = 30.0
"""Where stderr is no terminal (a log file), one line this often instead of a moving bar."""


class Bar(tqdm):  # type: ignore[type-arg]  # generic in its stubs alone
    """A bar on a terminal, a line every now and then in a log file.

    ``pauses`` are seconds without training. They do not slow the rate, and every step still to come brings its share
    of them: the format's ``whole`` and ``left`` hold them, ``elapsed`` and ``remaining`` do not.
    """

    def __init__(self, form: str, total: int, **settings: Any) -> None:
        self.pauses = 0.0
        terminal = sys.stderr.isatty()
        super().__init__(
            total=total,
            bar_format=form if terminal else f"{form}\n",
            dynamic_ncols=terminal,
            mininterval=LOOK_SECONDS if terminal else LINE_SECONDS,
            maxinterval=LINE_SECONDS,
            **settings,
        )

    @property
    def format_dict(self) -> dict[str, Any]:
        """What the format may name."""
        found, done, left = super().format_dict, self.n - self.initial, "?"
        elapsed = found["elapsed"]
        if done and self.total is not None:
            pace = 1 / found["rate"] if found["rate"] else elapsed / done
            left = self.format_interval((self.total - self.n) * (pace + self.pauses / done))
        return {
            **found,
            "whole": self.format_interval(elapsed + self.pauses),
            "left": left,
        }

    def leave_out(self, seconds: float) -> None:
        """Count the last seconds as a pause."""
        self.pauses += seconds
        if not self.disable:
            self.start_t += seconds
            self.last_print_t += seconds


class Progress(ProgressBar):
    """One bar over all steps of the run, wherever it starts, and below it one for what interrupts or follows them."""

    def __init__(self) -> None:
        super().__init__()
        self._bar: Bar | None = None
        self._pause: Bar | None = None
        self._enabled = True
        self._next_look = 0.0

    def disable(self) -> None:
        """Show nothing: Lightning calls this on all processes but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Show the bar."""
        self._enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the bar at the step the run starts from."""
        self._bar = Bar(BAR, trainer.max_steps, initial=trainer.global_step, disable=not self._enabled)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move the bar."""
        if self._bar is None or self._bar.disable or trainer.global_step == self._bar.n:
            return
        rate, now = self._bar.format_dict["rate"], time.monotonic()
        if rate and now >= self._next_look:  # on a GPU, looking at the loss waits for it
            self._next_look = now + LOOK_SECONDS
            images = len(batch.images) * trainer.world_size * trainer.accumulate_grad_batches
            shown = {"loss": float(outputs["loss"]), **trainer.progress_bar_metrics}
            numbers = "".join(f", {name} {value:.4f}" for name, value in shown.items())
            self._bar.set_postfix_str(f"{rate * images:.0f} images/s{numbers}", refresh=False)
        self._bar.update(trainer.global_step - self._bar.n)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show how far the validation is."""
        self.pause("validation", int(sum(trainer.num_val_batches)))

    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Move its bar."""
        self.advance()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on with the training."""
        self.resume()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the bar."""
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Close the bar, so that the message begins on a new line."""
        self._close()

    def pause(self, name: str, total: int) -> None:
        """Show how far something else is, the training's clock standing still."""
        log = not sys.stderr.isatty()
        if self._bar is not None and not log:
            self._bar.refresh()  # the step it has come to
        place: dict[str, Any] = {"position": 0, "delay": LINE_SECONDS} if log else {"leave": False}
        self._pause = Bar(PAUSE, total, desc=name, disable=not self._enabled, **place)

    def advance(self) -> None:
        """Move its bar."""
        if self._pause is not None:
            self._pause.update()

    def resume(self) -> None:
        """Close its bar, and let the training's clock run."""
        if self._pause is not None:
            if self._bar is not None:
                self._bar.leave_out(self._pause.format_dict["elapsed"])
            self._pause.close()
            self._pause = None

    def _close(self) -> None:
        for bar in (self._pause, self._bar):
            if bar is not None:
                bar.close()
        self._pause = self._bar = None


@contextmanager
def showing(trainer: Trainer, name: str, total: int) -> Iterator[Callable[[], None]]:
    """Show how far something other than the training is; each call of what is yielded is one of ``total`` steps."""
    progress = get_callback(trainer, Progress)
    if progress is None:
        yield lambda: None
        return
    progress.pause(name, total)
    yield progress.advance
    progress.resume()
