"""W&B: one run for each run folder, for the folder's whole life."""

import logging
import os
import re
import secrets
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from litdiffusion.errors import UserError
from litdiffusion.files import write_text
from litdiffusion.processes import STOP_SIGNALS
from litdiffusion.training.wandb_files import STEP, told

log = logging.getLogger(__name__)

FLUSH_EVERY = 0.01
"""Seconds after which W&B's own process writes what it was told. What it has not written by then ends with it."""

SEND_SECONDS = 30.0
"""Within which it has sent what it has written; it sends every 15 seconds."""


class LastingWandbLogger(WandbLogger):
    """Lightning's logger, which outlives the process that W&B writes with.

    What asks a job to stop reaches all of its processes where Slurm sends it, and W&B's ends at once, while the
    training still has a step to finish and pictures to draw. Then another is started, and the same run goes on; where
    even that fails, the training goes on without.
    """

    def __init__(self, folder: Path, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._folder = folder
        self._told: dict[int, set[str]] = {}
        self._wandb_init.pop("anonymous", None)  # W&B warns of it, even where it is not set
        self._config: dict[str, Any] = {}
        self._given_up = False

    @rank_zero_only
    def describe(self, config: dict[str, Any]) -> None:
        """Open the run, give it its configuration and make images seen the axis of its curves.

        Raises:
            UserError: W&B cannot be reached, or does not take the account.
        """
        import wandb

        self._config = config
        try:
            self._begin()
        except wandb.Error as error:
            raise UserError(f"logger.wandb: {error}; logger.wandb.mode=offline needs neither") from error

    @rank_zero_only
    def recall(self) -> None:
        """Leave out what the run has been told before it was stopped: a resumed training repeats some of it.

        Online, the last of it may not have arrived, and is told again.
        """
        if (self._folder / "run_id").exists():
            on_its_way = 0.0 if self._offline else SEND_SECONDS
            self._told = told(self._folder, _run_id(self._folder), but_for_seconds=on_its_way)

    @rank_zero_only
    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        """Add a row of numbers."""
        if step is not None and metrics.keys() <= self._told.get(step, set()):
            return
        self._insist(lambda: super(LastingWandbLogger, self).log_metrics(metrics, step))

    @rank_zero_only
    def log_media(self, key: str, make: Callable[[], Any], step: int, images_seen: int) -> None:
        """Add a picture, which ``make`` makes anew for a run opened anew."""
        if key in self._told.get(step, set()):
            return
        at = {"images_seen": images_seen, STEP: step}
        self._insist(lambda: self.experiment.log({key: make(), **at}))

    @rank_zero_only
    def close(self) -> None:
        """Finish the run, so that the next job of a sweep starts one of its own."""
        try:
            if self._experiment is not None:
                self._experiment.finish()
        except ConnectionError:  # W&B's process has gone, and had nothing left to write
            self._forget()

    def _begin(self) -> None:
        import wandb

        if self._wandb_init["settings"].mode != "disabled":
            self._wandb_init["id"] = self._id = _run_id(self._folder)
            _start_out_of_reach()
        # Not left to Lightning, which would take up a run that has lost its process.
        self._experiment = wandb.init(**self._wandb_init)
        self.experiment.define_metric("images_seen")
        self.experiment.define_metric("*", step_metric="images_seen")
        self.log_hyperparams(self._config)

    def _insist(self, send: Callable[[], None]) -> None:
        import wandb

        if self._given_up:
            return
        try:
            try:
                send()
            except ConnectionError:
                self._forget()
                self._begin()
                send()
        except (wandb.Error, ConnectionError) as error:  # no reason to end a training
            log.warning("W&B: %s; from here on this start of the run is logged in its folder alone", error)
            self._given_up = True

    def _forget(self) -> None:
        import wandb

        with suppress(ConnectionError):
            wandb.teardown()
        self._experiment = None


def wandb_logger(
    run_dir: str,
    project: str = "litdiffusion",
    name: str | None = None,
    group: str | None = None,
    tags: list[str] | None = None,
    mode: Literal["auto", "online", "offline", "disabled"] = "auto",
) -> LastingWandbLogger:
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
    return LastingWandbLogger(
        folder=folder / "wandb",
        save_dir=folder,
        project=project,
        name=name or folder.name,
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
            x_transaction_log_flush_interval=FLUSH_EVERY,
        ),
    )


@rank_zero_only
def _start_out_of_reach() -> None:
    """Start W&B's own process, which writes, deaf to SIGUSR1 and SIGUSR2, which would end it.

    It listens to SIGINT and SIGTERM itself, whatever is blocked here: those end it.
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
