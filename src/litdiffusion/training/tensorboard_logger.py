"""TensorBoard: one curve for each run folder, however often the run is killed and resumed."""

from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image

from litdiffusion.errors import UserError
from litdiffusion.runs.folder import shown_as


class LastingTensorBoardLogger(TensorBoardLogger):
    """Lightning's logger, which shows each point once, and loses none to a kill.

    What lies beyond the step at which a run is resumed is dropped by TensorBoard itself, which is told that step. Of
    that very step, what its files hold already is not written again.
    """

    def __init__(self, run_dir: str) -> None:
        super().__init__(save_dir=run_dir, name="tensorboard", version="")
        self._resumed_at = 0
        self._known: set[str] = set()

    @rank_zero_only
    def resume_at(self, step: int) -> None:
        """Say where the training is resumed, before anything is logged.

        Raises:
            UserError: another file lies where TensorBoard's folder would.
        """
        folder = Path(self.log_dir)
        if (folder.exists() or folder.is_symlink()) and not folder.is_dir():
            raise UserError(f"{folder} is no folder: move it away, or use another logger")
        self._kwargs["purge_step"] = step + 1 if step else 0
        self._resumed_at, self._known = step, _written(folder, step) if step else set()

    @rank_zero_only
    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        """Add a row of numbers."""
        super().log_metrics({key: value for key, value in metrics.items() if self._is_new(key, step)}, step)

    @rank_zero_only
    def log_picture(self, path: Path, step: int, images_seen: int) -> None:
        """Add a picture; TensorBoard shows no GIF."""
        key = shown_as(path)
        if path.suffix != ".gif" and self._is_new(key, step):
            pixels = np.asarray(Image.open(path).convert("RGB"))
            self.experiment.add_image(key, pixels, step, dataformats="HWC")
            self.save()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Lightning ends the file here, though the run's last pictures are still to come."""
        self.save()

    @rank_zero_only
    def close(self) -> None:
        """End the file."""
        if self._experiment is not None:
            self._experiment.close()

    def _is_new(self, key: str, step: int | None) -> bool:
        if key == "hp_metric":  # Lightning's own -1, which says nothing, at each start
            return False
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
