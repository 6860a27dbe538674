"""Grids: at which of the times T..0 a sampler stops."""

from itertools import pairwise
from typing import Literal

import torch

from litdiffusion.diffusion.schedules import Schedule

Grid = Literal["uniform", "quadratic", "log_snr"]


def grid_times(schedule: Schedule, count: int, grid: Grid) -> list[int]:
    """Return ``count`` + 1 different times, from T down to 0.

    ``uniform`` and ``quadratic`` spread t and sqrt(t) evenly (2010.02502, appendix D.2); ``log_snr`` spreads the
    log-SNR of all times but the last 0, where it is infinite (2206.00927, section 3.4).

    Raises:
        ValueError: more steps than the schedule has.
    """
    total = schedule.num_steps
    if count > total:
        raise ValueError(f"num_steps={count}: the schedule has only {total} steps")
    if grid == "uniform":
        # Integer arithmetic, rounding half up: neighbours stay distinct, and 0 and T are always on the grid.
        return [(2 * total * i + count) // (2 * count) for i in range(count, -1, -1)]
    if grid == "quadratic":
        return _distinct([total * (i / count) ** 2 for i in range(count + 1)], total)
    return _distinct(_even_in_log_snr(schedule, count), total)


def _even_in_log_snr(schedule: Schedule, count: int) -> list[float]:
    log_snr = schedule.host_log_snr
    # Pure noise has a log-SNR of minus infinity: then the grid spreads over what comes before it.
    finite = schedule.num_steps - int(schedule.has_zero_terminal_snr)
    last = max(finite, 1)
    inner = count - int(schedule.has_zero_terminal_snr)
    wanted = torch.linspace(float(log_snr[0]), float(log_snr[last - 1]), max(inner, 1), dtype=log_snr.dtype)
    distances = (wanted[:, None] - log_snr[None, :last]).abs()
    times = [float(index) + 1 for index in distances.argmin(1)][:inner]
    return [0.0, *times, float(schedule.num_steps)][: count + 1] if inner < count else [0.0, *times]


def _distinct(ideal: list[float], total: int) -> list[int]:
    """Round rising times to whole ones, each at least 1 after the one before, ending at ``total``; return falling."""
    count = len(ideal) - 1
    times = [0]
    for i, time in enumerate(ideal[1:], start=1):
        times.append(min(max(int(time + 0.5), times[-1] + 1), total - (count - i)))
    times[-1] = total
    assert all(s < t for s, t in pairwise(times))
    return times[::-1]
