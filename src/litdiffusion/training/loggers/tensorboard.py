"""TensorBoard: one curve for each run folder, however often the run is killed and resumed."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image

from litdiffusion.errors import UserError
from litdiffusion.runs.folder import shown_as
from litdiffusion.runs.resume import flat
from litdiffusion.training.loggers.base import RunLogger

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TensorBoard(RunLogger):
    """Each point once, and none lost to a kill.

    TensorBoard itself drops what lies beyond the step at which a run is resumed (``purge_step``). What its files
    hold of that very step is not written again.
    """

    def __init__(self, run_dir: str) -> None:
        super().__init__()
        self._folder = Path(run_dir) / "tensorboard"
        self._writer: SummaryWriter | None = None
        self._resumed_at = 0
        self._known: set[str] = set()

    @property
    def experiment(self) -> Any:
        """TensorBoard's ``SummaryWriter`` while it is open. Lightning's trainer asks for it, which opens nothing."""
        return self._writer

    @rank_zero_only
    def resume_at(self, step: int, images_per_step: int) -> None:
        """See ``RunLogger``.

        Raises:
            UserError: another file lies where TensorBoard's folder would.
        """
        super().resume_at(step, images_per_step)
        if (self._folder.exists() or self._folder.is_symlink()) and not self._folder.is_dir():
            raise UserError(f"{self._folder} is no folder: move it away, or use another logger")
        self._resumed_at, self._known = step, _written(self._folder, step) if step else set()

    @rank_zero_only
    def describe(self, config: dict[str, Any]) -> None:
        """Show the configuration beside the validation loss."""
        from torch.utils.tensorboard.summary import hparams

        writer: Any = self._open()
        plain = {
            key: value if isinstance(value, bool | int | float | str) else str(value)
            for key, value in flat(config).items()
        }
        summaries: Any = hparams(plain, {"val/loss": 0.0})  # type: ignore[no-untyped-call]
        for summary in summaries:
            writer.file_writer.add_summary(summary)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add a row of numbers."""
        writer = self._open()
        for key, value in self.row(metrics, step).items():
            if self._is_new(key, step):
                writer.add_scalar(key, value, step)
        writer.flush()

    @rank_zero_only
    def log_picture(self, path: Path, step: int, images_seen: int) -> None:
        """Add a picture; TensorBoard shows no GIF."""
        key = shown_as(path)
        if path.suffix != ".gif" and self._is_new(key, step):
            pixels = np.asarray(Image.open(path).convert("RGB"))
            writer = self._open()
            writer.add_image(key, pixels, step, dataformats="HWC")
            writer.flush()

    @rank_zero_only
    def close(self) -> None:
        """End the file."""
        if self._writer is not None:
            self._writer.close()

    def _open(self) -> "SummaryWriter":
        from torch.utils.tensorboard import SummaryWriter

        if self._writer is None:
            self._writer = SummaryWriter(
                str(self._folder), purge_step=self._resumed_at + 1 if self._resumed_at else 0
            )
        return self._writer

    def _is_new(self, key: str, step: int | None) -> bool:
        return step != self._resumed_at or key not in self._known


def _written(folder: Path, step: int) -> set[str]:
    """Which numbers and pictures of a step TensorBoard's files hold and show."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    found: set[str] = set()
    for file in sorted(folder.glob("events.out.tfevents.*")):
        if file.is_file() and not file.is_symlink():
            for event in EventFileLoader(str(file)).Load():
                if event.HasField("session_log") and event.step <= step:
                    found.clear()  # resumed before this step, and all from there on dropped
                elif event.step == step:
                    found |= {value.tag for value in event.summary.value}
    return found
