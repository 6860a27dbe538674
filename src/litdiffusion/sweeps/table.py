"""What has come of a sweep: ``sweep.csv``, and the same as a table for the terminal."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from litdiffusion.sweeps.jobs import Job
from litdiffusion.sweeps.process import FAILED, Outcome
from litdiffusion.system.files import write_text

NUMBERS = ("train_loss", "images_per_second", "wall_seconds")
"""What of a training run is shown beside its metrics; of other commands, all that their results hold is."""

Row = dict[str, Any]


class Results:
    """The jobs of a sweep, and how each of them stands.

    Args:
        path: of the csv file. Folders of jobs are relative to its own, so that they may be moved together.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.outcomes: dict[Job, Outcome] = {}

    def note(self, outcomes: Mapping[Job, Outcome]) -> None:
        """Say how jobs stand, and write the file anew."""
        self.outcomes |= outcomes
        rows = self.rows()
        text = io.StringIO()
        writer = csv.DictWriter(text, _columns(rows), restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows({**row, "run_dir": _from(self.path.parent, row["run_dir"])} for row in rows)
        write_text(self.path, text.getvalue())

    def rows(self) -> list[Row]:
        """Return one row for each job; one that has not ended has no numbers."""
        varied = dict.fromkeys((key for job in self.outcomes for key in job.varied), "")
        return [
            {"job": job.number, "status": outcome.status, **varied, **job.varied}
            | (_numbers(job) if outcome.status.endswith("finished") else {})
            | {"run_dir": str(job.folder), "reason": outcome.reason}
            for job, outcome in self.outcomes.items()
        ]

    def table(self, metric: str | None, higher_is_better: bool = False) -> str:
        """Return a table for the terminal, the best by ``metric`` first, and the rest in order."""

        def place(row: Row) -> tuple[float, int]:
            value = row.get(metric or "")
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
        return any(outcome.status == FAILED for outcome in self.outcomes.values())


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


def _columns(rows: Sequence[Row]) -> list[str]:
    """Return the names of all columns, the folder and the reason last."""
    names = dict.fromkeys(name for row in rows for name in row)
    last = ("run_dir", "reason")
    return [*(name for name in names if name not in last), *last]


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return _from(Path.cwd(), str(value))


def _from(folder: Path, text: str) -> str:
    return str(Path(text).relative_to(folder)) if text and Path(text).is_relative_to(folder) else text
