"""The interface of all loggers."""

from abc import abstractmethod
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger

from litdiffusion.errors import UserError
from litdiffusion.runs.run import Run
from litdiffusion.system.redaction import redacted_override, without_secrets


class RunLogger(Logger):
    """A logger that stays consistent when its run is killed and resumed. Only the first process calls it.

    ``metrics.csv`` in the run folder holds every row; a dashboard shows them. All methods but one may do nothing.
    """

    images_per_step = 0
    exit_code = 0
    """Of this command, when the logger is closed: not 0 where the run was stopped, or has failed."""

    def resume_at(self, step: int, images_per_step: int) -> None:
        """Set the optimizer step at which the training begins, 0 or where it is resumed, before anything is logged.

        Rows and pictures of later steps will be logged again.
        """
        self.images_per_step = images_per_step

    def describe(self, config: dict[str, Any]) -> None:
        """Open the run, and show its configuration.

        Raises:
            UserError: the dashboard cannot be reached, or refuses.
        """

    @abstractmethod
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add a row of numbers, as ``row`` completes it; a row that was added survives ``kill -9``."""

    def row(self, metrics: Mapping[str, float], step: int | None) -> dict[str, float]:
        """Return numbers with ``images_seen`` beside them; Lightning's own callbacks log them without."""
        return {"images_seen": (step or 0) * self.images_per_step, **metrics}

    def log_picture(self, path: Path, step: int, images_seen: int) -> None:
        """Show a picture or a GIF; the file is left in its place."""

    def close(self) -> None:
        """Finish, so that the next job of a sweep starts a run of its own."""

    @property
    def is_behind(self) -> bool:
        """Whether a finished run has rows or pictures that have not been logged here, but could be."""
        return False

    @property
    def name(self) -> str:
        """Required by Lightning."""
        return type(self).__name__.lower()

    @property
    def version(self) -> str:
        """Required by Lightning."""
        return ""

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Ignore a module's hyperparameters: ``describe`` shows the whole configuration."""


class ForeignLogger(RunLogger):
    """Any other Lightning logger: it gets the numbers and the configuration, and no pictures."""

    def __init__(self, logger: Logger) -> None:
        super().__init__()
        self._logger = logger

    @property
    def experiment(self) -> Any:
        """The logger's own experiment."""
        return getattr(self._logger, "experiment", None)

    def describe(self, config: dict[str, Any]) -> None:
        """See ``RunLogger``."""
        try:
            self._logger.log_hyperparams(config)
        except Exception as error:  # of any dashboard
            raise UserError(f"logger: {type(self._logger).__name__}: {error}") from error

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """See ``RunLogger``."""
        self._logger.log_metrics(self.row(metrics, step), step)
        self._logger.save()

    def close(self) -> None:
        """See ``RunLogger``."""
        self._logger.finalize("failed" if self.exit_code else "success")


def open_loggers(loggers: Sequence[RunLogger], run: Run, step: int, images_per_step: int) -> None:
    """Open loggers at an optimizer step, and show each the configuration.

    It is shown without secrets; the overrides that were typed join it as ``typed``.

    Raises:
        UserError: a dashboard cannot be reached, or refuses.
    """
    for logger in loggers:
        logger.resume_at(step, images_per_step)
    typed = " ".join(redacted_override(text) for text in run.typed if not text.startswith("run_dir="))
    for logger in loggers:
        logger.describe(without_secrets(run.config) | ({"typed": typed} if typed else {}))


def complete_loggers(loggers: Sequence[RunLogger], run: Run) -> None:
    """Log what the folder of a finished run holds wherever it has not been logged yet.

    Raises:
        UserError: a dashboard cannot be reached, or a file is in the way.
    """
    summary = run.folder.read_summary()
    for logger in loggers:
        if logger.is_behind:
            run.folder.prepare()
            images_per_step = summary.get("images_seen", 0) // max(summary["steps"], 1)
            open_loggers([logger], run, summary["steps"], images_per_step)
            logger.close()


def close_loggers(loggers: Sequence[RunLogger], exit_code: int = 0) -> None:
    """Close loggers; those that are closed already do nothing."""
    for logger in loggers:
        logger.exit_code = exit_code
        logger.close()
