"""The run folder: the folder is the run.

config.yaml       the resolved configuration          checkpoints/    last.ckpt, previous.ckpt
overrides.txt     what was typed                      metrics.csv     numbers over the course of the run
provenance.json   code, versions, hardware, seed      samples/        grids, noised strip, denoising GIF
summary.json      how it ended                        curves.png, wandb/, tensorboard/
"""

import json
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from litdiffusion.errors import UserError
from litdiffusion.files import write_text


@dataclass(frozen=True)
class RunFolder:
    """Names of everything in a run folder."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.yaml"

    @property
    def overrides(self) -> Path:
        """The overrides of the command, one a line."""
        return self.path / "overrides.txt"

    @property
    def provenance(self) -> Path:
        """Where the run came from: appended to by each start of it."""
        return self.path / "provenance.json"

    @property
    def summary(self) -> Path:
        """How the run ended."""
        return self.path / "summary.json"

    @property
    def metrics(self) -> Path:
        """The table of numbers."""
        return self.path / "metrics.csv"

    @property
    def curves(self) -> Path:
        """The picture of the numbers."""
        return self.path / "curves.png"

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def last_checkpoint(self) -> Path:
        """The newest checkpoint."""
        return self.checkpoints / "last.ckpt"

    @property
    def samples(self) -> Path:
        """The folder of pictures."""
        return self.path / "samples"

    def check(self) -> None:
        """Make sure that the folder can be made and written, and leave no trace.

        Raises:
            UserError: it cannot.
        """
        try:
            there = next(folder for folder in (self.path, *self.path.parents) if folder.exists())
        except OSError as error:
            raise _unwritable("run_dir", self.path, error) from error
        _check_writable("run_dir", self.path, there)

    def prepare(self) -> None:
        """Make the folder, and make sure that it can be written.

        Raises:
            UserError: it cannot.
        """
        writable_folder("run_dir", str(self.path))
        for folder in (self.checkpoints, self.samples):
            writable_folder("run_dir", str(folder))

    def describe(self, config: dict[str, Any], overrides: Iterable[str], provenance: dict[str, Any]) -> None:
        """Write down what is about to run."""
        write_text(self.config, OmegaConf.to_yaml(OmegaConf.create(config)))
        write_text(self.overrides, "".join(f"{override}\n" for override in overrides))
        starts = json.loads(self.provenance.read_text()) if self.provenance.exists() else []
        write_text(self.provenance, json.dumps([*starts, provenance], indent=2) + "\n")

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write down how the run ended."""
        write_text(self.summary, json.dumps(summary, indent=2) + "\n")


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
    _check_writable(key, folder, folder)
    return folder


def _check_writable(key: str, folder: Path, where: Path) -> None:
    try:
        with tempfile.TemporaryFile(dir=where):
            pass
    except OSError as error:
        raise _unwritable(key, folder, error) from error


def _unwritable(key: str, folder: Path, error: OSError) -> UserError:
    return UserError(f"{key}={folder} cannot be written ({error.strerror}): choose another folder")


def absolute(path: object) -> str:
    """Return a path as the user meant it: relative to where the command was typed, ``~`` for home.

    Raises:
        UserError: the path is null.
    """
    if path is None:
        raise UserError("run_dir, ckpt and out each need a path, not null")
    return str(Path(str(path)).expanduser().absolute())
