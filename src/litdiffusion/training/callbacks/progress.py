"""The progress bar: step, images per second, loss, time left."""

import sys
import time
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm

BAR = "{percentage:3.0f}% |{bar:24}| step {n_fmt}/{total_fmt}{postfix} [{elapsed}, ETA {remaining}]"
LOOK_SECONDS = 0.5
LINE_SECONDS = 30.0
"""Where stderr is no terminal (a log file), one line this often instead of a moving bar."""


class Progress(ProgressBar):
    """One bar over all steps of the run, wherever it starts."""

    def __init__(self) -> None:
        super().__init__()
        self._bar: tqdm[Any] | None = None
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
        is_terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=trainer.max_steps,
            initial=trainer.global_step,
            unit="step",
            dynamic_ncols=is_terminal,
            mininterval=0.5 if is_terminal else LINE_SECONDS,
            maxinterval=10 if is_terminal else LINE_SECONDS,
            disable=not self._enabled,
            bar_format=BAR if is_terminal else f"{BAR}\n",
        )

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

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the bar."""
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Close the bar, so that the message begins on a new line."""
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
