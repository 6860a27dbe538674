"""The numbers that a run has logged, by name, over the course of its training."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from statistics import fmean

from litdiffusion.runs.metrics import Row


@dataclass(frozen=True)
class Series:
    """The values ``y[i]`` of a metric, logged at rising ``x[i]``."""

    x: list[float]
    y: list[float]

    def smoothed(self, share: float = 0.05) -> "Series":
        """Average over a window of ``share`` of the points, centred so that the curve does not lag.

        At the start, which is steep, the window shrinks to stay centred; at the end, which is flat, it loses only its
        right side, so that the curve does not end in the noise of the last point.
        """
        half = round(share * len(self.y) / 2)
        sums = list(accumulate(self.y, initial=0.0))
        means = []
        for i in range(len(self.y)):
            before = min(half, i)
            after = min(before, len(self.y) - 1 - i)
            means.append((sums[i + after + 1] - sums[i - before]) / (before + after + 1))
        return Series(self.x, means)

    def thinned(self, most: int) -> "Series":
        """Average over neighbours so that at most ``most`` points remain."""
        parts = min(most, len(self.y))
        bounds = [round(i * len(self.y) / parts) for i in range(parts + 1)]
        return Series(*([fmean(all_[a:b]) for a, b in pairwise(bounds)] for all_ in (self.x, self.y)))

    def final(self, share: float = 0.1) -> float:
        """Return the mean over the last ``share`` of the points."""
        last = self.y[-max(1, round(share * len(self.y))) :]
        return sum(last) / len(last)


class Curves(dict[str, Series]):
    """The finite values in rows, by name, over ``axis``: ``images_seen``, or ``step`` where no row has that.

    A run that resumes from an earlier checkpoint repeats steps: what it had logged of them before is dropped.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        super().__init__()
        self.axis = "images_seen" if any("images_seen" in row for row in rows) else "step"
        kept: list[Row] = []
        for row in rows:
            if self.axis in row:
                while kept and kept[-1][self.axis] > row[self.axis]:
                    kept.pop()
                kept.append(row)
        for row in kept:
            for name, value in row.items():
                if math.isfinite(value):
                    series = self.setdefault(name, Series([], []))
                    series.x.append(row[self.axis])
                    series.y.append(value)
