"""Reading ``metrics.csv``: columns that may be missing, cells that may be empty, runs that went back."""

import csv
import math
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from litdiffusion.errors import UserError


@dataclass(frozen=True)
class Series:
    """One metric where it was logged: ``y[i]`` at ``x[i]``, x rising."""

    x: list[float]
    y: list[float]

    def smoothed(self, share: float = 0.05) -> "Series":
        """Average over a window of ``share`` of the points; centred, so that the line does not lag behind.

        At the steep start the window shrinks to stay centred; at the flat end it is cut off on one side, so
        that the line does not end in the noise of its last point.
        """
        half = round(share * len(self.y) / 2)
        sums = list(accumulate(self.y, initial=0.0))
        means = []
        for i in range(len(self.y)):
            before = min(half, i)
            after = min(before, len(self.y) - 1 - i)
            means.append((sums[i + after + 1] - sums[i - before]) / (before + after + 1))
        return Series(self.x, means)

    def final(self, share: float = 0.1) -> float:
        """The mean over the last ``share`` of the points."""
        last = self.y[-max(1, round(share * len(self.y))) :]
        return sum(last) / len(last)


@dataclass(frozen=True)
class Metrics:
    """All that was logged, by column name; ``axis`` says what the series' x counts."""

    axis: str
    series: dict[str, Series]

    def get(self, name: str) -> Series | None:
        """The series, or None when nothing finite was ever logged under that name."""
        return self.series.get(name)


def read_metrics(metrics_csv: Path) -> Metrics:
    """Read a wide csv with ``images_seen`` or ``step`` and any metrics; values that are not finite are left out.

    A run that resumed from an earlier checkpoint repeats some of its way; what it had logged beyond the point
    it went back to is dropped.

    Raises:
        UserError: the file is missing, has neither counting column, or a cell is no number.
    """
    try:
        with metrics_csv.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except FileNotFoundError:
        raise UserError(f"no metrics to draw: {metrics_csv} does not exist") from None
    columns = [name for name in rows[0] if name] if rows else []
    axis = "images_seen" if "images_seen" in columns else "step"
    if rows and axis not in columns:
        raise UserError(f"{metrics_csv} has neither a column images_seen nor a column step")
    kept: list[tuple[float, dict[str, float]]] = []
    for line, row in enumerate(rows, start=2):
        values = {name: _cell(row[name], name, metrics_csv, line) for name in columns}
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        if axis not in finite:
            continue
        x = finite[axis]
        while kept and kept[-1][0] > x:
            kept.pop()
        kept.append((x, finite))
    series = {}
    for name in columns:
        points = [(x, values[name]) for x, values in kept if name in values]
        if points:
            series[name] = Series([x for x, _ in points], [y for _, y in points])
    return Metrics(axis, series)


def _cell(text: str | None, name: str, metrics_csv: Path, line: int) -> float:
    """An empty cell, or one that a torn last line lacks, reads as NaN: nothing was logged there."""
    if not text:
        return math.nan
    try:
        return float(text)
    except ValueError:
        raise UserError(f"{metrics_csv}, line {line}: {name} is {text!r}, which is no number") from None
