"""The run folder: the folder is the run.

config.yaml       the resolved configuration          checkpoints/    last.ckpt, previous.ckpt
overrides.txt     what was typed                      metrics.csv     numbers over the course of the run
provenance.json   code, versions, hardware, seed      samples/        grids, noised strip, denoising GIF and npz
data.json         fingerprint, names of classes       curves.png, wandb/, tensorboard/
summary.json      how it ended                        report.html     all of this on one page
.lock             which job is at work here
sampled/, evaluated/    what these commands make of its checkpoints

None of these files holds a secret from the configuration, the command or the code.
"""

import json
import logging
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import OmegaConf

from litdiffusion.errors import UserError
from litdiffusion.system.files import UNFINISHED, write_text
from litdiffusion.system.redaction import redacted_override, without_secrets

log = logging.getLogger(__name__)

T = TypeVar("T")


class RunFolder:
    """Names of everything in a run folder, as the head of this file explains them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.overrides = path / "overrides.txt"
        self.provenance = path / "provenance.json"
        self.data = path / "data.json"
        self.summary = path / "summary.json"
        self.metrics = path / "metrics.csv"
        self.curves = path / "curves.png"
        self.report = path / "report.html"
        self.checkpoints = path / "checkpoints"
        self.last_checkpoint = self.checkpoints / "last.ckpt"
        self.samples = path / "samples"

    def require_usable(self) -> None:
        """Require that the folder can be made and written; nothing is left in it.

        Raises:
            UserError: it cannot, or it holds files that a run would overwrite and no run has made.
        """
        try:
            there = next(folder for folder in (self.path, *self.path.parents) if folder.exists())
        except OSError as error:
            raise _unwritable("run_dir", self.path, error) from error
        _require_writable("run_dir", self.path, there)
        own = (
            self.overrides,
            self.provenance,
            self.data,
            self.summary,
            self.metrics,
            self.curves,
            self.report,
        )
        foreign = next((file for file in own if file.exists()), None)
        if foreign and not self.config.exists():
            raise UserError(
                f"run_dir {self.path} holds a {foreign.name}, but no config.yaml, so it is no run: choose"
                " another folder"
            )

    def prepare(self) -> None:
        """Make the folder, and make sure that it can be written, and that nothing written into it lands elsewhere.

        Raises:
            UserError: it cannot, or something in it is a link that leads out of it.
        """
        writable_folder("run_dir", str(self.path))
        inside = self.path.resolve()
        for member in self.path.iterdir():
            if member.is_symlink() and not member.resolve().is_relative_to(inside):
                raise UserError(
                    f"{member} is a link that leads out of the run folder: remove it, or choose another run_dir"
                )
        for folder in (self.checkpoints, self.samples):
            writable_folder("run_dir", str(folder))

    def tidy(self) -> None:
        """Remove the unfinished files of a killed job; only the holder of the lock may."""
        for folder in (self.path, self.checkpoints, self.samples):
            for file in folder.iterdir():
                if file.name.startswith(UNFINISHED) and file.is_file():
                    file.unlink(missing_ok=True)

    def describe(self, config: dict[str, Any], overrides: Iterable[str], provenance: dict[str, Any]) -> None:
        """Write configuration, overrides and provenance of this start."""
        write_text(self.config, OmegaConf.to_yaml(OmegaConf.create(without_secrets(config))))
        write_text(self.overrides, "".join(f"{redacted_override(override)}\n" for override in overrides))
        starts = read_json(self.provenance, list) if self.provenance.exists() else []
        write_text(self.provenance, json.dumps([*starts, provenance], indent=2) + "\n")

    def remember_data(self, fingerprint: dict[str, Any]) -> None:
        """Write the fingerprint of the training images, with the names of their classes."""
        write_text(self.data, json.dumps(fingerprint, indent=2) + "\n")

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write how the run ended."""
        write_text(self.summary, json.dumps(summary, indent=2) + "\n")

    def read_summary(self) -> dict[str, Any]:
        """Return how the run ended, {} where it has not.

        Raises:
            UserError: the file is damaged, or holds something else.
        """
        if not self.summary.exists():
            return {}
        summary: dict[str, Any] = read_json(self.summary, dict)
        counts = {"steps": None, "images_seen": 0, "max_steps": 0}
        if any(type(summary.get(name, default)) is not int for name, default in counts.items()):
            raise UserError(f"{self.summary} is not what a run writes there: move it away")
        return summary

    def pictures(self) -> list[tuple[int, Path]]:
        """Return what has been drawn, each with its step: the noised strip, the grids, and the end's grid and GIF.

        Raises:
            UserError: the summary is damaged.
        """
        drawn = [(0, self.samples / "noised_strip.png")]
        for path in sorted(self.samples.glob("step-*.png")):
            if (number := path.stem.removeprefix("step-")).isdecimal():
                drawn.append((int(number), path))
        summary = self.read_summary()
        ends = self.pictures_of_end()
        drawn += [(summary["steps"], ends[name]) for name in ("grid", "gif") if name in summary]
        return [(step, path) for step, path in drawn if path.is_file() and not path.is_symlink()]

    def pictures_of_end(self, sampled: bool = True) -> dict[str, Path]:
        """Return the pictures that a summary names, where they would lie.

        Args:
            sampled: whether the end was sampled; otherwise what lies there is of an earlier end.
        """
        drawn = {"grid": self.samples / "grid.png", "gif": self.samples / "denoising.gif"} if sampled else {}
        return {**drawn, "noised_strip": self.samples / "noised_strip.png", "curves": self.curves}

    def has_ended_at(self, step: int) -> bool:
        """Whether the run has ended, at this step or a later one, or before it, since a callback stopped it.

        A run that is continued beyond its end keeps the summary of it until the next end.

        Raises:
            UserError: the summary is damaged.
        """
        summary = self.read_summary()
        return max(summary.get("steps", -1), summary.get("max_steps", -1)) >= step


def shown_as(picture: Path) -> str:
    """Return the name of a picture on a dashboard; all grids have one, so that it shows them over time."""
    return f"samples/{picture.stem}" if picture.stem in ("noised_strip", "denoising") else "samples/grid"


def read_json(path: Path, kind: type[T]) -> T:
    """Read what a run has written about itself.

    Raises:
        UserError: the file is damaged, or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: repair or remove it") from error
    if not isinstance(value, kind):
        raise UserError(f"{path} is not what a run writes there: move it away")
    return value


def writable_folder(key: str, path: str) -> Path:
    """Make the folder that ``key=path`` names, and make sure that it can be written.

    Raises:
        UserError: it cannot.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(key, folder, error) from error
    _require_writable(key, folder, folder)
    return folder


def results_folder(out: object, files: Iterable[str], report: str) -> Path:
    """Make the folder ``out`` for the files of a command, or say that those of an earlier one are replaced.

    Args:
        out: as it was given.
        files: what the command writes.
        report: the one of them by which its folders are known.

    Raises:
        UserError: it cannot be written, or holds such files of something else.
    """
    folder = writable_folder("out", absolute(out, "out"))
    found = [name for name in files if (folder / name).exists()]
    if found and report not in found:
        raise UserError(f"out={folder} holds a {found[0]} that is not of this command: choose another folder")
    if found:
        log.info("%s holds results already: they are replaced", folder)
    return folder


def _require_writable(key: str, folder: Path, where: Path) -> None:
    try:
        with tempfile.TemporaryFile(dir=where):
            pass
    except OSError as error:
        raise _unwritable(key, folder, error) from error


def _unwritable(key: str, folder: Path, error: OSError) -> UserError:
    return UserError(f"{key}={folder} cannot be written ({error.strerror}): choose another folder")


def absolute(path: object, key: str = "run_dir") -> str:
    """Return a path as the user meant it: relative to where the command was typed, ``~`` for home.

    Args:
        path: as it was given.
        key: for what.

    Raises:
        UserError: the path is null or empty.
    """
    if path is None or not str(path).strip():
        raise UserError(f"{key} needs a path, not {'null' if path is None else 'an empty word'}")
    return str(Path(str(path)).expanduser().absolute())
