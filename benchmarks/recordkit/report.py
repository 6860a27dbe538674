"""The record as a table in Markdown, and as a picture."""

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

Row = dict[str, Any]
COLORS = ("#718096", "#2f855a", "#805ad5", "#dd6b20", "#2b6cb0")


def seconds_until(fid: float, rows: Sequence[Row]) -> float | None:
    """When a contender's FID was first as low, between two scores on the line of log FID over log seconds."""
    if rows and rows[0]["fid"] <= fid:
        return float(rows[0]["seconds"])
    for before, after in pairwise(rows):
        if after["fid"] <= fid < before["fid"]:
            part = math.log(before["fid"] / fid) / math.log(before["fid"] / after["fid"])
            return float(before["seconds"] * (after["seconds"] / before["seconds"]) ** part)
    return None


def table(titles: dict[str, str], rows: Sequence[Row], times: Sequence[float]) -> str:
    """A line for each contender: FID after each time, and at its end; how soon it was as good as the first."""
    of = {key: [row for row in rows if row["key"] == key] for key in titles}
    of = {key: found for key, found in of.items() if found}
    first = next(iter(of))
    goal = of[first][-1]
    head = [
        "",
        *(f"{time / 60:g} min" for time in times),
        "at its end",
        "images",
        f"{titles[first]}'s last FID after",
    ]
    lines = [_line(head), _line(["---", *["---:"] * (len(head) - 1)])]
    for key, found in of.items():
        end = found[-1]
        # The weights at a time are those of the first step that ended after it.
        at = [next((r for r in found[:-1] if time <= r["seconds"] < time * 1.2 + 2), None) for time in times]
        until = seconds_until(goal["fid"], found)
        sooner = "never" if until is None else f"{until:,.0f} s, {goal['seconds'] / until:.1f} times sooner"
        lines.append(
            _line(
                [
                    titles[key],
                    *("" if row is None else f"{row['fid']:.2f}" for row in at),
                    f"**{end['fid']:.2f}** ({end['seconds'] / 60:.1f} min)",
                    f"{end['images']:,}",
                    f"{goal['seconds']:,.0f} s" if key == first else sooner,
                ]
            )
        )
    return "\n".join(lines)


def picture(titles: dict[str, str], rows: Sequence[Row], path: Path) -> None:
    """FID over seconds of training, and over images seen."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, key, label in zip(
        figure.subplots(1, 2, sharey=True),
        ("seconds", "images"),
        ("seconds of training", "images seen"),
        strict=True,
    ):
        for (contender, title), color in zip(titles.items(), COLORS, strict=False):
            found = [row for row in rows if row["key"] == contender]
            x, y = [row[key] for row in found], [row["fid"] for row in found]
            axes.plot(x, y, marker="o", markersize=4, color=color, label=title.replace("`", ""))
        floor = [row["val/fid_floor"] for row in rows if row.get("val/fid_floor")]
        if floor:
            axes.axhline(floor[0], color="black", linewidth=1, linestyle=":", label="test images")
        axes.set(xscale="log", yscale="log", xlabel=label)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.grid(alpha=0.3, which="both", linewidth=0.5)
    figure.axes[0].set_ylabel("FID, 5,000 images, 20 evaluations")
    figure.axes[1].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
