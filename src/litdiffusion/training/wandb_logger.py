"""W&B: one run for each run folder, for the folder's whole life."""

import logging
import os
import re
import secrets
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from litdiffusion.errors import UserError
from litdiffusion.files import write_text
from litdiffusion.processes import STOP_SIGNALS
from litdiffusion.runs.folder import RunFolder
from litdiffusion.runs.metrics import read_rows
from litdiffusion.training.wandb_files import STEP, note_all_sent, note_start, starts_are_gone, told

log = logging.getLogger(__name__)

FLUSH_EVERY = 0.01
"""Seconds after which W&B's own process writes what it was told. What it has not written by then ends with it."""

SEND_SECONDS = 30.0
"""Within which it has sent what it has written; it sends every 15 seconds."""


@dataclass(frozen=True)
class Entry:
    """A row of numbers, or a picture."""

    step: int
    """The optimizer step that it belongs to."""
    keys: frozenset[str]
    """What it says."""
    values: Callable[[], dict[str, Any]]
    """Makes what W&B's run is given, anew for a run opened anew."""


class LastingWandbLogger(WandbLogger):
    """Lightning's logger, which outlives the process that W&B writes with.

    What asks a job to stop reaches all of its processes where Slurm sends it, and W&B's ends at once, while the
    training still has a step to finish and pictures to draw. Then another is started, and the same run goes on; where
    even that fails, the training goes on without.

    What W&B's process is told while it ends is lost without a word. So whenever the run is opened, it is told what
    the run folder holds and W&B's files do not; and never what they hold, though a resumed training repeats it. Where
    files of W&B's have been removed, it counts as told up to where the training is resumed.
    """

    def __init__(self, run: RunFolder, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._folder, self._table = run.path / "wandb", run.metrics
        self._pictures: list[Entry] = []
        self._told: dict[int, set[str]] = {}
        self._resumed_at, self._told_until = 0, -1
        self._wandb_init.pop("anonymous", None)  # W&B warns of it, even where it is not set
        self._config: dict[str, Any] = {}
        self._given_up = False

    def resume_at(self, step: int) -> None:
        """Say where the training is resumed, before the run is described."""
        self._resumed_at = step

    @rank_zero_only
    def describe(self, config: dict[str, Any]) -> None:
        """Open the run, give it its configuration and make images seen the axis of its curves.

        Raises:
            UserError: W&B cannot be reached, does not take the account, or cannot run here.
        """
        import wandb

        self._config = config
        try:
            self._attempt(self._open)
        except ConnectionError as error:
            raise UserError(
                f"logger.wandb: {error}, twice; logger=csv or tensorboard does without"
            ) from error
        except wandb.Error as error:
            raise UserError(f"logger.wandb: {error}; logger.wandb.mode=offline needs neither") from error

    @rank_zero_only
    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        """Add a row of numbers."""
        self._insist(lambda: self._tell(_row(step or 0, metrics)))

    @rank_zero_only
    def log_media(self, key: str, make: Callable[[], Any], step: int, images_seen: int) -> None:
        """Add a picture, which ``make`` makes anew for a run opened anew."""
        picture = Entry(step, frozenset({key}), lambda: {key: make(), "images_seen": images_seen})
        self._pictures.append(picture)
        self._insist(lambda: self._tell(picture))

    @rank_zero_only
    def close(self) -> None:
        """Finish the run, so that the next job of a sweep starts one of its own."""
        if self._experiment is None:
            return
        try:
            with _losses():
                self._finish()
        except ConnectionError:
            self._forget()
            self._recall()
            if not all(self._knows(entry) for entry in self._entries()):
                self._insist(self._finish)
        except OSError as error:  # a full disk, say: what has ended the training is told, not this
            log.warning("W&B: its files could not be written to their end (%s)", error.strerror)
            self._forget()

    def _open(self) -> None:
        import wandb

        if self._experiment is not None:
            return
        self._recall()
        if self._wandb_init["settings"].mode != "disabled":
            self._wandb_init["id"] = self._id = _run_id(self._folder)
            _start_out_of_reach()
        # Not left to Lightning, which would take up a run that has lost its process.
        self._experiment = wandb.init(**self._wandb_init)
        if self._wandb_init["settings"].mode != "disabled":
            note_start(self._folder, Path(self.experiment.dir).parent.name)
        self.experiment.define_metric("images_seen")
        self.experiment.define_metric("*", step_metric="images_seen")
        self.log_hyperparams(self._config)
        for entry in self._entries():
            with suppress(FileNotFoundError):  # a picture that has been removed since
                self._tell(entry)
            self._told.setdefault(entry.step, set()).update(entry.keys)

    def _finish(self) -> None:
        self._open()
        self.experiment.finish()
        if self._wandb_init["settings"].mode == "online":
            note_all_sent(self._folder)

    def _recall(self) -> None:
        """Look up what the run has been told; online, the last of it may not have arrived, and is told again."""
        if (self._folder / "run_id").exists():
            on_its_way = 0.0 if self._offline else SEND_SECONDS
            self._told = told(self._folder, _run_id(self._folder), but_for_seconds=on_its_way)
            self._told_until = self._resumed_at if starts_are_gone(self._folder) else -1

    def _entries(self) -> list[Entry]:
        """What the run should have been told by now."""
        rows = read_rows(self._table) if self._table.exists() else []
        return [*(_row(int(row.pop("step")), row) for row in rows), *self._pictures]

    def _knows(self, entry: Entry) -> bool:
        return entry.step <= self._told_until or entry.keys <= self._told.get(entry.step, set())

    def _tell(self, entry: Entry) -> None:
        if not self._knows(entry):
            self.experiment.log({**entry.values(), STEP: entry.step})

    def _insist(self, act: Callable[[], None]) -> None:
        """Do it, or say that it cannot be done, which is no reason to end a training."""
        import wandb

        if self._given_up:
            return
        try:
            self._attempt(act)
        except (wandb.Error, ConnectionError) as error:
            log.warning("W&B: %s; from here on this start of the run is logged in its folder alone", error)
            self._given_up = True
            self._forget()

    def _attempt(self, act: Callable[[], None]) -> None:
        """Do it; where W&B's process has ended, open the run anew and do it once more."""
        try:
            with _losses():
                act()
        except ConnectionError:
            self._forget()
            with _losses():
                self._open()
                act()

    def _forget(self) -> None:
        import wandb

        with suppress(OSError), _losses():
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

    run = RunFolder(Path(run_dir))
    settled = _settled(mode, run.path / "wandb")
    return LastingWandbLogger(
        run,
        save_dir=run.path,
        project=project,
        name=name or run.path.name,
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


def _row(step: int, metrics: dict[str, float]) -> Entry:
    return Entry(step, frozenset(metrics), lambda: metrics)


@contextmanager
def _losses() -> Iterator[None]:
    """Tell the loss of W&B's process in one way, of the several that W&B has.

    Raises:
        ConnectionError: it has ended.
    """
    from wandb.sdk.lib.service.service_port_file import ServicePollForTokenError
    from wandb.sdk.lib.service.service_token import WandbServiceConnectionError
    from wandb.sdk.mailbox import HandleAbandonedError, MailboxClosedError

    before_its_address, before_its_answer = ServicePollForTokenError, WandbServiceConnectionError
    later = (HandleAbandonedError, MailboxClosedError, ConnectionError)
    try:
        yield
    except (before_its_address, before_its_answer, *later) as error:
        raise ConnectionError(
            f"the process that W&B writes with has ended ({str(error) or type(error).__name__})"
        ) from error


@rank_zero_only
def _start_out_of_reach() -> None:
    """Start W&B's own process, which writes, deaf to SIGUSR1 and SIGUSR2, which would end it.

    It listens to SIGINT and SIGTERM itself, whatever is blocked here: those end it.
    """
    import wandb
    from wandb.analytics.opentelemetry import opentelemetry_proxy

    opentelemetry_proxy.disable()  # or a process that ends as it starts leaves this one waiting for its own lock
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
