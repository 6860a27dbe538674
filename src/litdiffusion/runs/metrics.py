"""``metrics.csv``: an append-only table that survives kills and resumes."""

import csv
import io
from pathlib import Path

from litdiffusion.errors import UserError
from litdiffusion.system.files import append_text, write_text

Row = dict[str, float]


class MetricsTable:
    """Rows of numbers, each with a ``step``; a column that is missing in a row is an empty cell.

    Args:
        path: the file; what it holds is kept.
        up_to_step: drop rows of later steps, and a last row that a kill cut short. A row of this very step that is
            appended once more, as when the kill came between a validation and its checkpoint, is left out: on
            another number of processes, its numbers are the same only to rounding.
    """

    def __init__(self, path: Path, up_to_step: int | None = None) -> None:
        self.path = path
        self.columns: list[str] = []
        self._resumed_at = up_to_step
        self._known: list[set[str]] = []
        if path.exists():
            rows = read_rows(path)
            kept = [row for row in rows if up_to_step is None or row["step"] <= up_to_step]
            self.columns = list(dict.fromkeys(name for row in kept for name in row))
            self._known = [set(row) for row in kept if row["step"] == up_to_step]
            self._rewrite(kept)

    def append(self, row: Row) -> None:
        """Add a row at the end; a new column rewrites the file."""
        if row["step"] == self._resumed_at and set(row) in self._known:
            return
        new = [name for name in row if name not in self.columns]
        if new:
            rows = read_rows(self.path) if self.path.exists() else []
            self.columns += new
            self._rewrite([*rows, row])
        else:
            append_text(self.path, self._lines([row]))

    def _rewrite(self, rows: list[Row]) -> None:
        header = io.StringIO()
        csv.writer(header, lineterminator="\n").writerow(self.columns)
        write_text(self.path, header.getvalue() + self._lines(rows))

    def _lines(self, rows: list[Row]) -> str:
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, restval="", lineterminator="\n")
        writer.writerows(rows)
        return text.getvalue()


def read_rows(path: Path) -> list[Row]:
    """Return the whole rows of the table; empty cells are left out, and so is a row without its line's end.

    Raises:
        UserError: it is no such table.
    """
    try:
        return _rows(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, OverflowError, csv.Error) as error:
        raise UserError(f"{path} is damaged or no table of numbers: mend it, or move it away") from error


def _rows(text: str) -> list[Row]:
    whole = text[: text.rfind("\n") + 1]
    rows = []
    for cells in csv.DictReader(io.StringIO(whole)):
        row = {name: float(cell) for name, cell in cells.items() if name and cell}
        for name in ("step", "images_seen"):
            if name in row:
                row[name] = int(row[name])
        if "step" in row:
            rows.append(row)
    return rows
