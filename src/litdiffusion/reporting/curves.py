"""Plots of a run's metrics and of noise schedules, by matplotlib without pyplot and its global state."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator
from torch import Tensor

from litdiffusion.reporting.series import Curves, Series
from litdiffusion.runs.metrics import read_rows
from litdiffusion.system.files import whole_file

BLUE, ORANGE, GRAY = "#2b6cb0", "#dd6b20", "#718096"
OWN = ("step", "images_seen", "train/loss", "train/lr", "train/grad_norm", "train/images_per_second", "val/")
"""The beginnings of the columns that a run writes by itself; each other one has a panel."""
LABELS = {"images_seen": "training images seen", "step": "training steps"}


def curves(
    metrics_csv: Path, png: Path, metrics: Iterable[str] = (), sample_metrics: Iterable[str] = ()
) -> None:
    """Plot the values in ``metrics_csv`` into the file ``png``.

    Loss, loss by noise level, learning rate and gradient norm always have a panel, which says so where nothing was
    logged; others of the run's ``metrics`` and ``sample_metrics`` have one where they were.

    Raises:
        UserError: ``metrics_csv`` is missing or no table of metrics.
    """
    logged = Curves(read_rows(metrics_csv))
    further = {f"val/{name}": f"{name}, held out" for name in metrics if name != "loss"}
    further |= {f"val/{name}": f"{name}, samples" for name in sample_metrics}
    further |= {name: name for name in logged if not name.startswith(OWN)}
    further = {name: title for name, title in further.items() if name in logged}
    rows = 2 + -(-len(further) // 2)
    figure = _figure(9.6, 3.0 * rows)
    loss, by_time, rate, norm, *others = figure.subplots(rows, 2).flat
    _draw_loss(loss, logged)
    _draw_loss_by_time(by_time, logged)
    _draw_one(rate, logged, "train/lr", "learning rate", smooth=False)
    _draw_one(norm, logged, "train/grad_norm", "gradient norm", smooth=True)
    for (name, title), axes in zip(further.items(), others, strict=False):
        _draw_one(axes, logged, name, title, smooth=False)
    for axes in others[len(further) :]:
        axes.set_visible(False)
    with whole_file(png) as temporary:
        figure.savefig(temporary, format="png")


def schedules_figure(schedules: Mapping[str, Sequence[float] | Float[Tensor, " T"]]) -> Figure:
    """Plot the alpha_bar and log-SNR of noise schedules over t.

    Args:
        schedules: by name, alpha_bar at t = 1 / T, 2 / T, ..., 1, in (0, 1).
    """
    figure = _figure(9.6, 3.6)
    alpha_bar, log_snr = figure.subplots(1, 2)
    for name, table in schedules.items():
        values = np.asarray(table, dtype=np.float64)
        t = np.arange(1, len(values) + 1) / len(values)
        alpha_bar.plot(t, values, label=name)
        with np.errstate(divide="ignore"):
            log_snr.plot(t, np.log(values) - np.log1p(-values), label=name)
    _dress(alpha_bar, "share of the image's variance that remains", "t")
    alpha_bar.set_ylabel(r"$\bar\alpha_t$")
    _dress(log_snr, "signal-to-noise ratio", "t")
    log_snr.set_ylabel(r"$\log\,(\bar\alpha_t \,/\, (1 - \bar\alpha_t))$")
    alpha_bar.legend(frameon=False)
    return figure


def _figure(width: float, height: float) -> Figure:
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08, wspace=0.03, hspace=0.03)
    return Figure(figsize=(width, height), dpi=110, layout=layout)


def _dress(axes: Axes, title: str, x_label: str) -> None:
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
    axes.set_xlabel(x_label, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(color="#e2e8f0", linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _empty(axes: Axes, title: str) -> None:
    _dress(axes, title, "")
    axes.text(0.5, 0.5, "not logged", transform=axes.transAxes, ha="center", va="center", color=GRAY)
    axes.set_xticks([])
    axes.set_yticks([])


def _over_images(axes: Axes, metrics: Curves, title: str) -> None:
    _dress(axes, title, LABELS[metrics.axis])
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def _log_scale(axes: Axes) -> None:
    """Set a log scale with readable ticks: the default shows a single one where values span less than a decade."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    if high / low < 30:
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")


def _line(axes: Axes, series: Series, color: str, label: str) -> None:
    """Plot a line, with markers where the points are few: a single one would not be seen."""
    marker = "o" if len(series.x) < 25 else ""
    axes.plot(series.x, series.y, color=color, label=label, linewidth=1.8, marker=marker)


def _smooth_line(axes: Axes, series: Series, label: str) -> None:
    axes.plot(series.x, series.y, color=BLUE, alpha=0.25, linewidth=0.8)
    _line(axes, series.smoothed(), BLUE, label)


def _draw_loss(axes: Axes, metrics: Curves) -> None:
    train = metrics.get("train/loss")
    held_out, raw = metrics.get("val/loss"), metrics.get("val/loss_raw")
    if not any((train, held_out, raw)):
        _empty(axes, "loss")
        return
    _over_images(axes, metrics, "loss")
    if train is not None:
        _smooth_line(axes, train, "training")
    if raw is not None:
        axes.plot(raw.x, raw.y, color=ORANGE, linewidth=1, linestyle=":", label="held out, raw weights")
    if held_out is not None:
        _line(axes, held_out, ORANGE, "held out")
    _log_scale(axes)
    axes.set_xlim(left=0)
    axes.legend(frameon=False, fontsize=8)


def _draw_loss_by_time(axes: Axes, metrics: Curves) -> None:
    tenths = [metrics.get(f"train/loss_t{tenth:02d}") for tenth in range(10)]
    title = "training loss by noise level, at the end"
    if not any(tenths):
        _empty(axes, title)
        return
    _dress(axes, title, "t")
    heights = [series.final() if series else 0 for series in tenths]
    axes.bar([tenth / 10 for tenth in range(10)], heights, width=0.094, align="edge", color=BLUE)
    axes.set_xlim(0, 1)
    axes.set_xticks([0, 0.2, 0.4, 0.6, 0.8, 1])
    axes.grid(visible=False, axis="x")


def _draw_one(axes: Axes, metrics: Curves, name: str, title: str, smooth: bool) -> None:
    series = metrics.get(name)
    if series is None:
        _empty(axes, title)
        return
    _over_images(axes, metrics, title)
    if smooth:
        _smooth_line(axes, series, title)
        _log_scale(axes)
    else:
        _line(axes, series, BLUE, title)
        if min(series.y) >= 0:
            axes.set_ylim(0, 1.06 * max(series.y) or 1)
        axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlim(left=0)
