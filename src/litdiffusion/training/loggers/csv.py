"""The run folder's own table."""

from collections.abc import Mapping
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_only

from litdiffusion.runs.metrics import MetricsTable
from litdiffusion.training.loggers.base import RunLogger


class CSVLogger(RunLogger):
    """One row of ``metrics.csv`` for each logged step.

    Lightning's own logger deletes the file when a run is resumed; this one keeps the rows up to the step the run
    resumes from, and appends.
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        self._path = Path(path)
        self._table: MetricsTable | None = None

    @property
    def save_dir(self) -> str:
        """Where Lightning's own callbacks and profilers write: the run folder."""
        return str(self._path.parent)

    @rank_zero_only
    def resume_at(self, step: int, images_per_step: int) -> None:
        """Drop the rows of later steps."""
        super().resume_at(step, images_per_step)
        self._table = MetricsTable(self._path, up_to_step=step)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append a row."""
        if self._table is None:
            self._table = MetricsTable(self._path)
        self._table.append({"step": step or 0, **self.row(metrics, step)})
