"""Spacings: at which times a sampler stops on its way from 1 to 0."""

import math
from itertools import pairwise
from typing import Literal, get_args

import torch
from jaxtyping import Float64
from torch import Tensor

from litdiffusion.diffusion.schedule import MIN_TIME, Schedule

Spacing = Literal["uniform", "quadratic", "log_snr", "karras"]
SPACINGS = get_args(Spacing)
RHO = 7
"""Karras et al.'s exponent: between ``log_snr`` (infinity) and steps of equal size in sigma / alpha (1)."""
SMALLEST_SIGMA = 0.002
"""The least sigma / alpha of ``karras``, and of ``log_snr`` in continuous time, unless the schedule begins higher."""
LARGEST_SIGMA = 1000.0
"""The largest sigma / alpha before t = 1, in continuous time that ends in pure noise."""
PURE_NOISE = 1e4
"""What sigma / alpha is at pure noise, or above."""


def spaced_times(schedule: Schedule, count: int, spacing: Spacing) -> list[float]:
    """Return ``count`` + 1 different times, from 1 down to 0.

    ``uniform`` and ``quadratic`` spread t and sqrt(t) evenly (2010.02502, appendix D.2). ``log_snr`` spreads the
    log-SNR (2206.00927, section 3.4), ``karras`` (sigma / alpha)^(1 / rho) (2206.00364, equation 5);
    both leave out t = 0, and pure noise, where there is any. Of a discrete schedule, the nearest of the times i / T
    are taken: those its network was trained for.

    Raises:
        ValueError: more steps than a discrete schedule has, or no different times.
    """
    if spacing in ("uniform", "quadratic"):
        power = 1 if spacing == "uniform" else 2
        times = [(i / count) ** power for i in range(count + 1)]
    else:
        times = [0.0, *_even_in_noise(schedule, count, spacing)]
    times[-1] = 1.0
    if schedule.discrete:
        return _whole_steps(times, schedule.num_steps)
    if not all(s < t for s, t in pairwise(times)):
        raise ValueError(
            f"spacing={spacing}: this schedule has too narrow a range of noise for {count} steps; use uniform"
        )
    return times[::-1]


def _even_in_noise(schedule: Schedule, count: int, spacing: Spacing) -> list[float]:
    if schedule.discrete:
        T = schedule.num_steps
        low, high = _k(schedule, 1 / T), _k(schedule, max(T - int(schedule.has_zero_terminal_snr), 1) / T)
        low = max(low, SMALLEST_SIGMA) if spacing == "karras" else low
    else:
        low, high = max(_k(schedule, MIN_TIME), SMALLEST_SIGMA), _k(schedule, 1.0)
        high = high if high < PURE_NOISE else LARGEST_SIGMA
    ends_before_1 = high < _k(schedule, 1.0)
    fractions = _fractions(max(count - ends_before_1, 1))
    if spacing == "log_snr":
        log_k = math.log(low) + fractions * (math.log(high) - math.log(low))
    else:
        first, last = low ** (1 / RHO), high ** (1 / RHO)
        log_k = RHO * (first + fractions * (last - first)).log()
    times: list[float] = schedule.time_of(-2 * log_k).tolist()
    return times[:count] if len(times) == count else [*times, 1.0]


def _k(schedule: Schedule, t: float) -> float:
    """Return sigma / alpha."""
    alpha, sigma = schedule.at(t)
    return sigma / alpha if alpha > 0 else math.inf


def _fractions(count: int) -> Float64[Tensor, " count"]:
    # A single time is the last.
    return (
        torch.linspace(0, 1, count, dtype=torch.float64) if count > 1 else torch.ones(1, dtype=torch.float64)
    )


def _whole_steps(ideal: list[float], T: int) -> list[float]:
    """Round rising times to multiples of 1 / T, each at least one after the one before, ending at 1; return falling.

    Raises:
        ValueError: there are more times than multiples.
    """
    count = len(ideal) - 1
    if count > T:
        raise ValueError(f"num_steps={count}: must be from 1 to schedule.num_steps={T}")
    steps = [0]
    for i, time in enumerate(ideal[1:], start=1):
        steps.append(min(max(int(time * T + 0.5 + 1e-9), steps[-1] + 1), T - (count - i)))
    assert all(s < t for s, t in pairwise(steps))
    return [step / T for step in reversed(steps)]
