"""Where numbers and pictures go: the run folder's ``metrics.csv``, W&B, TensorBoard."""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from litdiffusion.redaction import redacted_override, without_secrets
from litdiffusion.runs.folder import RunFolder
from litdiffusion.runs.metrics import MetricsTable
from litdiffusion.training.tensorboard_logger import LastingTensorBoardLogger
from litdiffusion.training.wandb_logger import LastingWandbLogger


class CSVLogger(Logger):
    """One row of ``metrics.csv`` for each logged step.

    Lightning's own logger deletes the file when a run is resumed; this one keeps the rows up to the step the run
    resumes from, and appends.
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        self._path = Path(path)
        self._table: MetricsTable | None = None

    @property
    def name(self) -> str:
        """Lightning asks for one."""
        return "csv"

    @property
    def version(self) -> str:
        """Lightning asks for one."""
        return ""

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """The run folder holds the configuration already."""

    @rank_zero_only
    def resume_at(self, step: int) -> None:
        """Drop what lies beyond ``step``: the resumed run will log it again."""
        self._table = MetricsTable(self._path, up_to_step=step)

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Append a row."""
        if self._table is None:
            self._table = MetricsTable(self._path)
        self._table.append({"step": step or 0, **metrics})


def log_picture(logger: Logger, path: Path, step: int, images_seen: int) -> None:
    """Show a picture or a GIF on a dashboard; loggers that cannot pass."""
    if isinstance(logger, LastingTensorBoardLogger | LastingWandbLogger):
        logger.log_picture(path, step, images_seen)


def describe_run(loggers: list[Logger], config: dict[str, Any], overrides: Sequence[str] = ()) -> None:
    """Hand the resolved configuration, its secrets masked, to the dashboards, and what was typed as ``typed``.

    Raises:
        UserError: W&B cannot be reached, or does not take the account.
    """
    typed = " ".join(redacted_override(each) for each in overrides if not each.startswith("run_dir="))
    shown = without_secrets(config) | ({"typed": typed} if typed else {})
    for logger in loggers:
        if isinstance(logger, LastingWandbLogger):
            logger.describe(shown)
        else:
            logger.log_hyperparams(shown)


def resume_loggers(loggers: list[Logger], step: int, images_per_step: int) -> None:
    """Tell the loggers where the run continues, before they are described: what they were told beyond is repeated."""
    for logger in loggers:
        if isinstance(logger, LastingWandbLogger):
            logger.resume_at(step, images_per_step)
    for logger in loggers:  # after that: W&B's counts the rows that are dropped here
        if isinstance(logger, CSVLogger | LastingTensorBoardLogger):
            logger.resume_at(step)


def complete_dashboards(
    loggers: list[Logger], config: dict[str, Any], overrides: Sequence[str], run: RunFolder
) -> None:
    """Tell W&B what it lacks of a finished run: one that was logged without, say. TensorBoard lacks nothing.

    Raises:
        UserError: W&B cannot be reached, or does not take the account; the run folder cannot be read or written.
    """
    summary = run.read_summary()
    for logger in loggers:
        if isinstance(logger, LastingWandbLogger):
            logger.resume_at(summary["steps"], summary.get("images_seen", 0) // max(summary["steps"], 1))
            if logger.lacks_anything():
                run.prepare()
                describe_run([logger], config, overrides)
                logger.close()


def close_loggers(loggers: list[Logger]) -> None:
    """Finish what a dashboard keeps open, so that the next job of a sweep starts a run of its own."""
    for logger in loggers:
        if isinstance(logger, LastingTensorBoardLogger | LastingWandbLogger):
            logger.close()
