"""Runs that are to be shown: where they lie, what was typed, and how they stand."""

import csv
import io
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from litdiffusion.configuration.sweeps import FOLDERS
from litdiffusion.data.sources.base import natural_order
from litdiffusion.errors import UserError, short_text
from litdiffusion.reporting.series import Curves
from litdiffusion.runs.folder import RunFolder
from litdiffusion.runs.lock import is_locked
from litdiffusion.runs.resume import flat, read_config

DEEPEST = 6
"""How far below a given folder runs are looked for."""


@dataclass(eq=False)
class Found:
    """A run, or what the table of a sweep says of one that has no folder.

    Args:
        folder: of the run.
        row: of ``sweep.csv``.
        config: the configuration, {} where there is none.
        typed: the overrides, by key, without folders.
        varied: the keys in which the runs that are shown differ, each with this run's value.
        numbers: of ``summary.json``.
        status: ``finished``, ``stopped early``, ``running``, ``unfinished``, ``damaged``, or what the table says.
        reason: of that status, if one is known.
        facts: texts of ``summary.json``: experiment, device, precision.
    """

    folder: Path
    row: Mapping[str, str] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    typed: dict[str, str] = field(default_factory=dict)
    varied: dict[str, str] = field(default_factory=dict)
    numbers: dict[str, float] = field(default_factory=dict)
    status: str = ""
    reason: str = ""
    facts: dict[str, str] = field(default_factory=dict)


class Ranking(NamedTuple):
    """The number of ``summary.json`` that ranks runs, None where none compares them, and a line that says so."""

    ranked_by: str | None
    ranking: str
    higher: bool

    def place(self, run: Found) -> float:
        """Return what runs are sorted by, the best first."""
        value = run.numbers.get(self.ranked_by or "", math.nan)
        return math.inf if math.isnan(value) else -value if self.higher else value


def find_runs(paths: Iterable[Path]) -> list[Found]:
    """Return the runs in folders: run folders themselves, sweeps, and folders of either.

    Raises:
        UserError: a path does not exist, or holds no run.
    """
    found: dict[Path, Found] = {}
    for path in paths:
        if not path.exists():
            raise UserError(f"{path} does not exist: give a run folder, a sweep, or a folder of runs")
        runs = list(_find(path, DEEPEST))
        if not runs:
            raise UserError(f"{path} holds no run: a run folder has a config.yaml")
        for run in runs:
            found.setdefault(run.folder.resolve(), run)
    return list(found.values())


def _find(path: Path, depth: int) -> Iterator[Found]:
    if (path / "config.yaml").is_file():
        yield Found(path)
        return
    if (path / "sweep.csv").is_file():
        text = (path / "sweep.csv").read_text(encoding="utf-8", errors="replace").replace("\0", "")
        for row in csv.DictReader(io.StringIO(text)):
            if row.get("run_dir"):
                yield Found(
                    path / row["run_dir"], {key: value for key, value in row.items() if key and value}
                )
    if depth and path.is_dir():
        with suppress(PermissionError):
            inside = [each for each in path.iterdir() if each.is_dir() and not each.is_symlink()]
            for folder in sorted(inside, key=lambda each: natural_order(each.name)):
                yield from _find(folder, depth - 1)


def guarded(run: Found, read: Callable[..., Any], *further: Any) -> Any:
    """Return what ``read`` returns; None where files are missing, or damaged, which the run's status then says."""
    try:
        return read(run, *further)
    except FileNotFoundError:
        return None
    except Exception as error:  # damaged files trip their readers in many ways
        if not (isinstance(error, UserError) and str(error).endswith("does not exist")):
            run.status, run.reason = "damaged", short_text(error)
        return None


def read_settings(run: Found) -> None:
    """Read what was typed, and the configuration."""
    folder = RunFolder(run.folder)
    if folder.overrides.exists():
        for line in folder.overrides.read_text(encoding="utf-8").splitlines():
            key, equals, value = line.lstrip("+~").partition("=")
            if equals and key not in FOLDERS and not key.startswith("hydra"):
                run.typed[key] = value
    if folder.config.exists():
        run.config = read_config(folder.config)


def read_table(run: Found, known: Collection[str]) -> None:
    """Take in what the table of a sweep says: settings, those that some job has typed, and numbers."""
    run.typed = {key: value for key, value in run.row.items() if key in known} | run.typed
    for key, value in run.row.items():
        if key not in ("job", "status", "reason", *FOLDERS, *known):
            with suppress(ValueError):
                run.numbers[key] = float(value)


def read_summary(run: Found) -> None:
    """Read how the run ended, if it has."""
    summary = RunFolder(run.folder).read_summary()
    run.numbers |= {key: value for key, value in summary.items() if type(value) in (int, float)}
    run.facts = {
        key: value for key, value in summary.items() if isinstance(value, str) and not _is_file(value)
    }
    if summary and not run.status:
        run.status = "stopped early" if "stopped" in summary else "finished"
        run.reason = str(summary.get("stopped", ""))


def _is_file(value: str) -> bool:
    return value.endswith((".png", ".gif", ".ckpt"))


def note_state(run: Found, curves: Curves) -> None:
    """Say how a run without a summary stands: by its lock, by the table of its sweep, or by how far it came."""
    if is_locked(run.folder):
        run.status = "running"
    else:
        noted, run.reason = run.row.get("status", "running"), run.row.get("reason", "")
        # The table of a sweep that was killed is not up to date; a job of sample or evaluate writes no summary.
        stale = noted == "running" or (noted.endswith("finished") and run.config)
        run.status = "unfinished" if stale else noted.removeprefix("skipped-")
    last = max((series.x[-1] for series in curves.values()), default=0)
    if last and not run.reason:
        run.reason = f"{last:,.0f} {curves.axis.replace('_', ' ')} so far"


def vary(runs: Sequence[Found]) -> list[str]:
    """Return the keys that were typed with different values, and note the values of each run as ``varied``.

    A value is the one that the run's configuration holds: what one run typed may be another's default.
    """
    typed = dict.fromkeys(key for run in runs for key in run.typed)
    spelled: dict[tuple[str, str], str] = {}
    for run in runs:
        settings = flat(run.config)
        run.varied = {key: str(settings[key]) for key in typed if key in settings} | {
            key: value for key, value in run.typed.items() if key not in settings
        }
        if run.config:
            spelled |= {(key, value): run.varied[key] for key, value in run.typed.items()}
    for run in runs:
        if not run.config:
            run.varied = {key: spelled.get((key, value), value) for key, value in run.varied.items()}
    read = [run for run in runs if run.config or len(run.varied) == len(typed)]
    axes = [key for key in typed if len({run.varied.get(key) for run in read}) > 1]
    for run in runs:
        run.varied = {key: run.varied[key] for key in axes if key in run.varied}
    return axes
