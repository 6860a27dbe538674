"""W&B: one run for each run folder, for the folder's whole life."""

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image, ImageSequence

from litdiffusion.errors import UserError
from litdiffusion.runs.folder import RunFolder, shown_as
from litdiffusion.runs.metrics import read_rows
from litdiffusion.system.files import write_text
from litdiffusion.training.loggers import wandb_client as client
from litdiffusion.training.loggers.base import RunLogger

log = logging.getLogger(__name__)

STEP = "trainer/global_step"
"""The optimizer step of a row."""

WATERMARK = "logged_until"
"""The file beside W&B's own that holds the last place up to which W&B has everything: written on closing."""

NAME_CHARACTERS = 128
"""The longest name that W&B takes."""

Place = tuple[int, int]
"""A step, and which of that step's rows; 0 for a picture, which comes before them."""

Values = Callable[[], Mapping[str, Any] | None]
"""Makes what is logged, anew each time the run is opened; None for a picture that is gone or damaged."""


class WandB(RunLogger):
    """One W&B run for the folder's whole life; it gets everything at least once.

    Whenever the run is opened, what the run folder holds beyond the watermark is logged: rows of ``metrics.csv`` and
    pictures. So nothing is lost to a kill, to the end of W&B's own process, or to a start with another logger; what
    had arrived before a crash is logged twice, as the same point of a curve.

    Slurm sends its signals to all processes of a job. W&B's ends at once, while the training still has a step to
    finish and pictures to draw. Then another one is started, and the same run continues; where that fails, the
    training continues without, and the run is opened once more at its end.

    Args:
        run_dir: the run folder.
        project: W&B's.
        name: of the run; None for what is special about it in its sweep, or else the folder's name.
        group: None for the sweep that this is a job of, if it is one.
        tags: of the run; those of the environment's ``WANDB_TAGS`` join them.
        entity, job_type, notes: W&B's; None for the environment's ``WANDB_ENTITY``, ``WANDB_JOB_TYPE`` and
            ``WANDB_NOTES``.
        mode: ``auto`` is the environment's ``WANDB_MODE``, or else online where this machine has a W&B account, and
            offline otherwise, with a notice; the user is never prompted.

    Raises:
        ValueError: W&B does not take one of these, or a variable of the environment.
        UserError: online is asked for, and there is no account.
    """

    def __init__(
        self,
        run_dir: str,
        project: str = "litdiffusion",
        name: str | None = None,
        group: str | None = None,
        tags: list[str] | None = None,
        mode: Literal["auto", "online", "offline", "disabled"] = "auto",
        entity: str | None = None,
        job_type: str | None = None,
        notes: str | None = None,
    ) -> None:
        super().__init__()
        self._run = RunFolder(Path(run_dir))
        self._folder = self._run.path / "wandb"
        self._settings = {
            "project": project,
            "name": (name or os.environ.get("LITDIFFUSION_JOB") or self._run.path.name)[:NAME_CHARACTERS],
            "group": group or os.environ.get("LITDIFFUSION_SWEEP"),
            "tags": [*(tags or ()), *filter(None, os.environ.get("WANDB_TAGS", "").split(","))] or None,
            "entity": entity,
            "job_type": job_type,
            "notes": notes,
        }
        client.require_sound(self._settings)
        self._mode, self._notice = client.settled_mode(mode, self._folder)
        self._experiment: Any = None
        self._config: dict[str, Any] = {}
        self._step = 0
        self._shown: dict[Path, tuple[int, int]] = {}
        self._described = self._given_up = False

    @property
    def experiment(self) -> Any:
        """W&B's run while it is open. Lightning's trainer asks for it, which opens nothing."""
        return self._experiment or DummyLogger().experiment

    @rank_zero_only
    def resume_at(self, step: int, images_per_step: int) -> None:
        """See ``RunLogger``."""
        super().resume_at(step, images_per_step)
        self._step = step

    @rank_zero_only
    def describe(self, config: dict[str, Any]) -> None:
        """Open the run, and give it its configuration.

        Raises:
            UserError: W&B cannot be reached, does not take the account, or cannot run here.
        """
        import wandb

        if self._mode == "disabled":
            return
        self._config = config
        if self._notice:
            log.warning(self._notice)
        try:
            with client.files_in_order():
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
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add a row of numbers."""
        self._log(step or 0, partial(dict, self.row(metrics, step)))

    @rank_zero_only
    def log_picture(self, path: Path, step: int, images_seen: int) -> None:
        """Add a picture, or a GIF."""
        self._shown[path] = step, images_seen
        self._log(step, partial(_picture, path, images_seen))

    @rank_zero_only
    def close(self) -> None:
        """Finish the run, and write the watermark."""
        if self._described:
            missed, self._given_up = self._given_up, False
            self._insist(self._finish, "the same command, repeated, logs what is missing")
            self._described = False
            if missed and not self._given_up:
                log.info("W&B has now what it missed")

    @property
    def is_behind(self) -> bool:
        """Whether the run folder holds what has not been logged to W&B.

        Raises:
            UserError: a file is in the way.
        """
        if self._mode == "disabled":
            return False
        with client.files_in_order():
            return any(place > self._watermark() for place, _ in self._entries())

    def _log(self, step: int, values: Values) -> None:
        self._step = max(self._step, step)

        def act() -> None:
            self._open()
            if logged := values():
                self._experiment.log({**logged, STEP: step})

        if self._described:
            self._insist(act)

    def _open(self) -> None:
        """Open the run, if it is not open, and log what it lacks."""
        if self._experiment is not None or self._mode == "disabled":
            return
        experiment = client.open_run(self._folder, self._mode, **self._settings)
        experiment.define_metric("images_seen")
        experiment.define_metric("*", step_metric="images_seen")
        experiment.config.update(self._config, allow_val_change=True)
        watermark = self._watermark()
        for (step, row), values in self._entries():
            if step <= self._step and (step, row) > watermark and (logged := values()):
                experiment.log({**logged, STEP: step})
        self._experiment = experiment

    def _finish(self) -> None:
        if self._experiment is None and not self.is_behind:
            return
        self._open()
        rows = sum(place[0] == self._step and place[1] > 0 for place, _ in self._entries())
        self._experiment.finish(self.exit_code)
        write_text(self._folder / WATERMARK, f"{self._step} {rows}\n")
        self._experiment = None
        client.leave()

    def _watermark(self) -> Place:
        """Return the place up to which W&B has everything; one before the first where that is not known."""
        file = self._folder / WATERMARK
        try:
            step, row = map(int, file.read_text(encoding="utf-8").split()) if file.exists() else (-1, 0)
        except ValueError:
            return -1, 0
        return step, row

    def _entries(self) -> Iterator[tuple[Place, Values]]:
        """Yield what the run folder holds, rows and pictures, each with its place."""
        seen: Counter[int] = Counter()
        for row in read_rows(self._run.metrics) if self._run.metrics.exists() else ():
            values = dict(row)
            step = int(values.pop("step"))
            seen[step] += 1
            yield (step, seen[step]), partial(dict, values)
        drawn = {path: (step, step * self.images_per_step) for step, path in self._run.pictures()}
        for path, (step, images_seen) in (drawn | self._shown).items():
            yield (step, 0), partial(_picture, path, images_seen)

    def _insist(
        self,
        act: Callable[[], None],
        consequence: str = "until the training ends, it is logged in the run folder alone",
    ) -> None:
        """Act, or warn that it has failed: a dashboard's failure does not end a training."""
        import wandb

        if self._given_up:
            return
        try:
            self._attempt(act)
        except (wandb.Error, OSError, UserError) as error:
            log.warning("W&B: %s; %s", client.reason(error), consequence)
            self._given_up = True

    def _attempt(self, act: Callable[[], None]) -> None:
        """Act; where W&B's process has ended, once more with another."""
        try:
            self._once(act)
        except ConnectionError:
            self._once(act)

    def _once(self, act: Callable[[], None]) -> None:
        try:
            with client.losses():
                act()
        except BaseException:  # a signal that stops the run may come in the middle
            self._experiment = None
            client.leave()  # or W&B would come back to what is open when this process ends
            raise


def _picture(path: Path, images_seen: int) -> dict[str, Any] | None:
    """Return what is logged of a picture; None where it is gone or damaged, with a warning."""
    import wandb

    if not path.exists():
        return None
    try:
        with Image.open(path) as picture:
            for frame in ImageSequence.Iterator(picture):
                frame.load()
    except Exception as error:  # Pillow raises many types
        log.warning("W&B: %s is damaged, and not shown (%s)", path, error)
        return None
    shown = wandb.Video(str(path), format="gif") if path.suffix == ".gif" else wandb.Image(str(path))
    return {shown_as(path): shown, "images_seen": images_seen}
