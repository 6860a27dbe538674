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
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image, ImageSequence

from litdiffusion.errors import UserError
from litdiffusion.files import write_text
from litdiffusion.processes import STOP_SIGNALS
from litdiffusion.runs.folder import RunFolder, shown_as
from litdiffusion.runs.metrics import Row, read_rows
from litdiffusion.training.wandb_files import (
    STEP,
    Until,
    note_all_sent,
    note_starts,
    starts,
    told,
    told_by_what_is_gone,
)

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
    values: Callable[[], dict[str, Any] | None]
    """Makes what W&B's run is given, anew for a run opened anew; None where the picture is gone or damaged."""
    path: Path | None = None
    """Of a picture."""


class LastingWandbLogger(WandbLogger):
    """Lightning's logger, which outlives the process that W&B writes with.

    What asks a job to stop reaches all of its processes where Slurm sends it, and W&B's ends at once, while the
    training still has a step to finish and pictures to draw. Then another is started, and the same run goes on; where
    even that fails, the training goes on without, and the run is opened once more at its end.

    What W&B's process is told while it ends is lost without a word. So whenever the run is opened, it is told what
    the run folder holds and W&B's files do not; and never what they hold, though a resumed training repeats it. What
    its files have held is written down when the run is closed, and counts when they have been removed since.
    """

    def __init__(self, run: RunFolder, notice: str | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._run, self._folder, self._notice = run, run.path / "wandb", notice
        self._mode = kwargs["settings"].mode
        self._pictures: list[Entry] = []
        self._told: dict[int, set[str]] = {}
        self._told_by_gone: Until = {}
        self._logged: Until = {}
        self._starts: dict[str, Until] = {}
        self._wandb_init.pop("anonymous", None)  # W&B warns of it, even where it is not set
        self._config: dict[str, Any] = {}
        self._described = self._given_up = False

    @property
    def experiment(self) -> Any:
        """W&B's run while it is open. Lightning's trainer asks for it, which opens nothing."""
        return self._experiment or DummyLogger().experiment

    @rank_zero_only
    def resume_at(self, step: int, images_per_step: int) -> None:
        """Say where the training is resumed, before the rows beyond are dropped and the run is described."""
        drawn = [_picture(path, at, at * images_per_step) for at, path in self._run.pictures()]
        self._pictures = drawn
        for entry in sorted(self._entries(), key=lambda entry: entry.step):
            self._logged |= dict.fromkeys(entry.keys, entry.step)
        self._pictures = [picture for picture in drawn if picture.step <= step]

    @rank_zero_only
    def describe(self, config: dict[str, Any]) -> None:
        """Open the run, give it its configuration and make images seen the axis of its curves.

        Raises:
            UserError: W&B cannot be reached, does not take the account, or cannot run here.
        """
        import wandb

        self._config = config
        if self._notice:
            log.warning(self._notice)
        try:
            with _files_in_order():
                self._attempt(self._open)
        except ConnectionError as error:
            raise UserError(
                f"logger.wandb: {error}, twice; logger=csv or tensorboard does without"
            ) from error
        except wandb.Error as error:
            way_out = "; logger.wandb.mode=offline needs neither network nor account"
            raise UserError(f"logger.wandb: {error}{way_out * (self._mode == 'online')}") from error
        self._described = True

    @rank_zero_only
    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        """Add a row of numbers."""
        self._insist(lambda: self._tell(_row(step or 0, metrics)))

    @rank_zero_only
    def log_picture(self, path: Path, step: int, images_seen: int) -> None:
        """Add a picture, or a GIF."""
        picture = _picture(path, step, images_seen)
        # What had been drawn there before can be told no more.
        self._pictures = [*(each for each in self._pictures if each.path != path), picture]
        self._insist(lambda: self._tell(picture))

    @rank_zero_only
    def close(self) -> None:
        """Finish the run, so that the next job of a sweep starts one of its own."""
        if self._described:
            missed, self._given_up = self._given_up, False
            try:
                self._insist(self._finish, "what it lacks, the run's command tells it when it is repeated")
            finally:
                self._note()
            self._described = False
            if missed and not self._given_up:
                log.info("W&B has been told now what it missed")

    def lacks_anything(self) -> bool:
        """Whether the run folder holds what W&B's run has not been told.

        Raises:
            UserError: W&B's files cannot be read.
        """
        if self._mode == "disabled":
            return False
        with _files_in_order():
            self._recall()
            return any(not self._knows(entry) and entry.values() for entry in self._entries())

    def _open(self) -> None:
        import wandb

        if self._experiment is not None:
            return
        self._recall()
        if self._mode != "disabled":
            self._wandb_init["id"] = self._id = _run_id(self._folder)
            _start_out_of_reach()
        # Not left to Lightning, which would take up a run that has lost its process.
        self._experiment = wandb.init(**self._wandb_init)
        if self._mode != "disabled":
            note_starts(self._folder, {**self._starts, Path(self._experiment.dir).parent.name: None})
        self._experiment.define_metric("images_seen")
        self._experiment.define_metric("*", step_metric="images_seen")
        self.log_hyperparams(self._config)
        for entry in self._entries():
            self._tell(entry)
            self._told.setdefault(entry.step, set()).update(entry.keys)

    def _finish(self) -> None:
        if self._experiment is None and not self.lacks_anything():
            return
        self._open()
        self.experiment.finish()
        if self._mode == "online":
            note_all_sent(self._folder)
        self._forget()

    def _recall(self) -> None:
        """Look up what the run has been told; online, the last of it may not have arrived, and is told again."""
        if (self._folder / "run_id").exists():
            run_id, on_its_way = _run_id(self._folder), 0.0 if self._offline else SEND_SECONDS
            self._told = told(self._folder, run_id, but_for_seconds=on_its_way)
            self._starts = starts(self._folder, run_id, self._logged)
            self._told_by_gone = told_by_what_is_gone(self._folder, self._starts)

    def _note(self) -> None:
        """Write down what W&B's files hold, while they are there."""
        if self._mode != "disabled":
            with suppress(OSError, UserError):
                self._recall()
                note_starts(self._folder, self._starts)

    def _rows(self) -> list[Row]:
        return read_rows(self._run.metrics) if self._run.metrics.exists() else []

    def _entries(self) -> list[Entry]:
        """What the run should have been told by now."""
        return [*(_row(int(row.pop("step")), row) for row in self._rows()), *self._pictures]

    def _knows(self, entry: Entry) -> bool:
        told = self._told.get(entry.step, set())
        return all(key in told or entry.step <= self._told_by_gone.get(key, -1) for key in entry.keys)

    def _tell(self, entry: Entry) -> None:
        self._open()
        if not self._knows(entry) and (values := entry.values()):
            self.experiment.log({**values, STEP: entry.step})

    def _insist(
        self,
        act: Callable[[], None],
        consequence: str = "until the training ends, it is logged in the run folder alone",
    ) -> None:
        """Do it, or say that it cannot be done, which is no reason to end a training."""
        import wandb

        if self._given_up:
            return
        try:
            self._attempt(act)
        except (wandb.Error, OSError, UserError) as error:
            reason = _reason(error) if isinstance(error, OSError) else error
            log.warning("W&B: %s; %s", reason, consequence)
            self._given_up = True
            self._note()

    def _attempt(self, act: Callable[[], None]) -> None:
        """Do it; where W&B's process has ended, once more, with another."""
        try:
            with self._forgotten_if_lost():
                act()
        except ConnectionError:
            with self._forgotten_if_lost():
                act()

    @contextmanager
    def _forgotten_if_lost(self) -> Iterator[None]:
        try:
            with _losses():
                yield
        except BaseException:  # a signal that stops the run may come in the middle
            self._forget()
            raise

    def _forget(self) -> None:
        """Leave nothing open that W&B would come back to when this process ends."""
        import wandb

        self._experiment = None
        with suppress(OSError, SystemExit), _losses():
            wandb.teardown()


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
    settled, notice = _settled(mode, run.path / "wandb")
    return LastingWandbLogger(
        run,
        notice,
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


def _picture(path: Path, step: int, images_seen: int) -> Entry:
    key = shown_as(path)

    def values() -> dict[str, Any] | None:
        import wandb

        if not path.exists():
            return None
        try:
            with Image.open(path) as picture:
                for frame in ImageSequence.Iterator(picture):
                    frame.load()
        except Exception as error:  # Pillow has many ways to say it
            log.warning("W&B: %s is damaged, and not shown (%s)", path, error)
            return None
        shown = wandb.Video(str(path), format="gif") if path.suffix == ".gif" else wandb.Image(str(path))
        return {key: shown, "images_seen": images_seen}

    return Entry(step, frozenset({key}), values, path)


@contextmanager
def _files_in_order() -> Iterator[None]:
    """Name the file that is in the way.

    Raises:
        UserError: one is.
    """
    try:
        yield
    except ConnectionError:
        raise
    except OSError as error:
        raise UserError(f"logger.wandb: {_reason(error)}: mend it, or move it away") from error


def _reason(error: OSError) -> str:
    return f"{error.filename} ({error.strerror})" if error.filename else error.strerror or str(error)


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


def _settled(mode: str, folder: Path) -> tuple[Literal["online", "offline", "disabled"], str | None]:
    """Return what ``mode`` comes to on this machine, and what there is to be said of it."""
    import wandb

    source, asked = "logger.wandb.mode", mode
    if mode == "auto" and os.environ.get("WANDB_MODE"):
        source, asked = "WANDB_MODE", os.environ["WANDB_MODE"].lower()
    asked = {"dryrun": "offline", "run": "online"}.get(asked, asked)  # W&B's old names
    if asked == "disabled":
        return "disabled", None
    if asked == "offline":
        return "offline", None
    if asked not in ("auto", "online"):
        raise UserError(f"{source}={asked}: choose online, offline or disabled")
    if wandb.login(prompt=False, verify=False):
        return "online", None
    if asked != "auto":
        raise UserError(
            f"{source}={asked}: W&B has no account here; run `wandb login`, set WANDB_API_KEY, or use"
            " logger.wandb.mode=offline"
        )
    return "offline", (
        "W&B: this machine has no account (see `wandb login`), so the run is logged offline in"
        f" {folder}; upload it later with `wandb sync {folder}/offline-run-*`"
    )


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
