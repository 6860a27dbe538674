"""``metrics.csv``: an append-only table that survives kills and resumes."""

import csv
import io
from pathlib import Path

from litdiffusion.errors import UserError
from litdiffusion.system.files import append_text, write_text

Row = dict[str, float]

COUNTS = ("step", "images_seen")


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
    """Return the rows of a table with a column ``step`` or ``images_seen``, or both, in file order.

    Empty cells are left out, and so are a row without its line's end, which a kill has cut short, and a row that
    says neither when it was logged.

    Raises:
        UserError: the file cannot be read, or is no such table.
    """
    rows = []
    try:
        text = path.read_text(encoding="utf-8")
        reader = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1]))
        if not set(COUNTS) & set(reader.fieldnames or COUNTS):
            raise ValueError("it has neither a column images_seen nor a column step")
        for cells in reader:
            row = {
                name: _number(cell, name, reader.line_num) for name, cell in cells.items() if name and cell
            }
            counts = {name: int(row[name]) for name in COUNTS if name in row}
            if counts:
                rows.append(row | counts)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (OSError, ValueError, OverflowError, csv.Error) as error:
        raise UserError(f"{path} is damaged or no table of numbers ({error}): repair or remove it") from error
    return rows


def _number(cell: str, name: str, line: int) -> float:
    try:
        return float(cell)
    except ValueError:
        raise ValueError(f"line {line}: {name} is {cell!r}") from None
