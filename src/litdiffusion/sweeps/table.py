"""What has come of a sweep: ``sweep.csv``, and the same as a table for the terminal."""

import csv
import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from litdiffusion.sweeps.jobs import Job
from litdiffusion.sweeps.process import FAILED, Outcome
from litdiffusion.system.files import write_text
from litdiffusion.system.redaction import redacted_override

NUMBERS = ("train_loss", "images_per_second", "wall_seconds")
"""What of a training run is shown beside its metrics; of other commands, all that their results hold is."""

Row = dict[str, Any]


class Results:
    """The jobs of a sweep, by number, and how each of them stands.

    Args:
        path: of the csv file, which holds all rows from one call of ``note`` to the next.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._jobs: dict[int, tuple[Job, Outcome]] = {}

    def note(self, job: Job, outcome: Outcome) -> None:
        """Say how a job stands, and write the file anew."""
        self.plan(job, outcome)
        self.write()

    def plan(self, job: Job, outcome: Outcome) -> None:
        """Say how a job stands."""
        self._jobs[job.number] = (job, outcome)

    def write(self) -> None:
        """Write the file, whole."""
        rows = self.rows()
        text = io.StringIO()
        writer = csv.DictWriter(text, _columns(rows), restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(self.path, text.getvalue())

    def rows(self) -> list[Row]:
        """Return one row for each job, in order of their numbers; a job that has not ended has no numbers."""
        varied = self.varied()
        rows = []
        for number in sorted(self._jobs):
            job, outcome = self._jobs[number]
            choices = _choices(job.overrides)
            row = {"job": number, "status": outcome.status, **{key: choices.get(key, "") for key in varied}}
            if outcome.status.endswith("finished"):
                row |= _numbers(job)
            rows.append({**row, "run_dir": str(job.folder), "reason": outcome.reason})
        return rows

    def varied(self) -> list[str]:
        """Return the keys in whose values the jobs differ."""
        chosen = [_choices(job.overrides) for job, _ in self._jobs.values()]
        keys = dict.fromkeys(key for choices in chosen for key in choices)
        return [key for key in keys if len({choices.get(key) for choices in chosen}) > 1]

    def title(self, job: Job) -> str:
        """Return what is special about a job, as it would be typed."""
        choices = _choices(job.overrides)
        return " ".join(f"{key}={choices[key]}" for key in self.varied() if key in choices)

    def table(self, metric: str = "val_loss", higher_is_better: bool = False) -> str:
        """Return a table for the terminal, the best by ``metric`` first, and the rest in order."""

        def place(row: Row) -> tuple[float, int]:
            value = row.get(metric)
            if not (isinstance(value, int | float) and math.isfinite(value)):
                return math.inf, row["job"]
            return -value if higher_is_better else value, row["job"]

        rows = sorted(self.rows(), key=place)
        columns = [name for name in _columns(rows) if any(row.get(name, "") != "" for row in rows)]
        shown = [columns, *([_shown(row.get(name, "")) for name in columns] for row in rows)]
        widths = [max(len(line[i]) for line in shown) for i in range(len(columns))]
        return "\n".join(
            "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
            for line in shown
        )

    def failed(self) -> bool:
        """Whether a job has failed."""
        return any(outcome.status == FAILED for _, outcome in self._jobs.values())


def _numbers(job: Job) -> Row:
    found = {
        key.replace("/", "_"): value
        for key, value in job.results().items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    if not job.config:
        return found
    shown = (*(f"val_{name}" for name in job.config.get("metrics") or ()), *NUMBERS)
    return {key: found[key] for key in shown if key in found}


def _choices(overrides: Iterable[str]) -> dict[str, str]:
    parts = [redacted_override(text).partition("=") for text in overrides]
    return {key.lstrip("+"): value for key, _, value in parts}


def _columns(rows: Sequence[Row]) -> list[str]:
    """Return the names of all columns, the folder and the reason last."""
    names = dict.fromkeys(name for row in rows for name in row)
    last = ("run_dir", "reason")
    return [*(name for name in names if name not in last), *last]


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    text = str(value)
    return str(Path(text).relative_to(Path.cwd())) if text and Path(text).is_relative_to(Path.cwd()) else text
