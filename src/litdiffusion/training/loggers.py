"""Where numbers and pictures go: the run folder's ``metrics.csv``, W&B, TensorBoard."""

import logging
import os
import re
import secrets
import signal
from argparse import Namespace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from PIL.Image import Image

from litdiffusion.errors import UserError
from litdiffusion.files import write_text
from litdiffusion.processes import STOP_SIGNALS
from litdiffusion.redaction import without_secrets
from litdiffusion.runs.metrics import MetricsTable

log = logging.getLogger(__name__)


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


def wandb_logger(
    run_dir: str,
    project: str = "litdiffusion",
    name: str | None = None,
    group: str | None = None,
    tags: list[str] | None = None,
    mode: Literal["auto", "online", "offline", "disabled"] = "auto",
) -> WandbLogger:
    """Return a W&B logger whose run belongs to the run folder for life.

    The jobs of a sweep are a group of their own, unless ``group`` names another.

    ``auto`` is what the environment's ``WANDB_MODE`` says; else online where this machine has a W&B account, and
    offline otherwise, in so many words: nobody is ever asked a question. The run's id is kept in the folder, so a
    resumed run continues the same W&B run.

    Raises:
        UserError: online is asked for, and there is no account.
    """
    import wandb

    folder = Path(run_dir)
    settled = _settled(mode, folder / "wandb")
    if settled != "disabled":
        _start_out_of_reach()
    return WandbLogger(
        save_dir=folder,
        project=project,
        name=name or folder.name,
        id=None if settled == "disabled" else _run_id(folder / "wandb"),
        group=group or os.environ.get("LITDIFFUSION_SWEEP"),
        tags=tags,
        offline=settled == "offline",
        resume="allow",
        settings=wandb.Settings(
            silent=True,
            mode=settled,
            # Addresses of repositories and commands may hold secrets; the run folder knows both without them.
            disable_git=True,
            x_disable_meta=True,
        ),
    )


@rank_zero_only
def _start_out_of_reach() -> None:
    """Start W&B's own process, which writes, deaf to SIGUSR1 and SIGUSR2, which would end it.

    It listens to SIGINT and SIGTERM itself, whatever is blocked here.
    """
    import wandb

    heard = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        wandb.setup()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, heard)


def _settled(mode: str, folder: Path) -> Literal["online", "offline", "disabled"]:
    """Return what ``mode`` comes to on this machine."""
    import wandb

    source, asked = "logger.wandb.mode", mode
    if mode == "auto" and os.environ.get("WANDB_MODE"):
        source, asked = "WANDB_MODE", os.environ["WANDB_MODE"].lower()
    asked = {"dryrun": "offline", "run": "online"}.get(asked, asked)  # W&B's old names
    if asked == "disabled":
        return "disabled"
    if asked == "offline":
        return "offline"
    if asked not in ("auto", "online"):
        raise UserError(f"{source}={asked}: choose online, offline or disabled")
    if wandb.login(prompt=False, verify=False):
        return "online"
    if asked != "auto":
        raise UserError(
            f"{source}={asked}: W&B has no account here; run `wandb login`, set WANDB_API_KEY, or use"
            " logger.wandb.mode=offline"
        )
    log.warning(
        "W&B: this machine has no account (see `wandb login`), so the run is logged offline in %s; upload it later"
        " with `wandb sync %s/offline-run-*`",
        folder,
        folder,
    )
    return "offline"


def _run_id(folder: Path) -> str:
    """Return the id that the folder keeps; a new one the first time.

    Raises:
        UserError: what it keeps is no id.
    """
    file = folder / "run_id"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_text(file, secrets.token_hex(4))
    run_id = file.read_text(errors="replace").strip()
    if not re.fullmatch(r"[\w-]{1,64}", run_id, re.ASCII):  # it becomes a part of file names
        raise UserError(f"{file} holds no id of a W&B run: remove it, and a new run is begun there")
    return run_id


def log_image(logger: Logger, key: str, image: Image, step: int, images_seen: int) -> None:
    """Show a picture on a dashboard; loggers without pictures pass."""
    if isinstance(logger, WandbLogger):
        import wandb

        logger.experiment.log(
            {key: wandb.Image(image), "images_seen": images_seen, "trainer/global_step": step}
        )
    elif isinstance(logger, TensorBoardLogger):
        logger.experiment.add_image(key, np.asarray(image.convert("RGB")), step, dataformats="HWC")


def log_gif(logger: Logger, key: str, path: Path, step: int, images_seen: int) -> None:
    """Show a GIF on a dashboard; loggers that cannot pass."""
    if isinstance(logger, WandbLogger):
        import wandb

        logger.experiment.log(
            {
                key: wandb.Video(str(path), format="gif"),
                "images_seen": images_seen,
                "trainer/global_step": step,
            }
        )


def describe_run(loggers: list[Logger], config: dict[str, Any]) -> None:
    """Hand the resolved configuration, its secrets masked, to the dashboards; make images seen their axis.

    Raises:
        UserError: W&B cannot be reached, or does not take the account.
    """
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            _open(logger)
            logger.experiment.define_metric("images_seen")
            logger.experiment.define_metric("*", step_metric="images_seen")
        logger.log_hyperparams(without_secrets(config))


def _open(logger: WandbLogger) -> None:
    import wandb

    try:
        _ = logger.experiment  # Lightning starts the run when it is first asked for it
    except wandb.Error as error:
        raise UserError(f"logger.wandb: {error}; logger.wandb.mode=offline needs neither") from error


def resume_loggers(loggers: list[Logger], step: int) -> None:
    """Tell the loggers that keep a table where the run continues."""
    for logger in loggers:
        if isinstance(logger, CSVLogger):
            logger.resume_at(step)


def close_loggers(loggers: list[Logger]) -> None:
    """Finish what a dashboard keeps open, so that the next job of a sweep starts a run of its own."""
    if any(isinstance(logger, WandbLogger) for logger in loggers):
        import wandb

        wandb.finish()
