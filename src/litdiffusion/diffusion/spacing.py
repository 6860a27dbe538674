"""Spacings: at which times a sampler stops on its way from 1 to 0."""

from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Float64
from torch import Tensor

from litdiffusion.diffusion.schedules import Schedule

Spacing = Literal["uniform", "quadratic", "log_snr", "karras"]
SPACINGS = ("uniform", "quadratic", "log_snr", "karras")
RHO = 7
"""Karras et al.'s exponent: between ``log_snr`` (infinity) and steps of equal size in sigma / alpha (1)."""
SMALLEST_SIGMA = 0.002
"""Of sigma / alpha in Karras et al.'s spacing, where the schedule itself has smaller ones."""


def spaced_times(schedule: Schedule, count: int, spacing: Spacing) -> list[float]:
    """Return ``count`` + 1 different times, from 1 down to 0.

    ``uniform`` and ``quadratic`` spread t and sqrt(t) evenly (2010.02502, appendix D.2). ``log_snr`` spreads the
    log-SNR from 1 / T on (2206.00927, section 3.4), ``karras`` (sigma / alpha)^(1 / rho) (2206.00364, equation 5);
    both leave out t = 0, and pure noise, where there is any. Of a discrete schedule, the nearest of the times i / T
    are taken: those its network was trained for.

    Raises:
        ValueError: more steps than a discrete schedule has.
    """
    if spacing in ("uniform", "quadratic"):
        power = 1 if spacing == "uniform" else 2
        times = [(i / count) ** power for i in range(count + 1)]
    else:
        times = [0.0, *_even_in_noise(schedule, count, spacing)]
    times[-1] = 1.0
    return _whole_steps(times, schedule.num_steps) if schedule.discrete else times[::-1]


def _even_in_noise(schedule: Schedule, count: int, spacing: Spacing) -> list[float]:
    T, pure_noise = schedule.num_steps, int(schedule.has_zero_terminal_snr)
    ends = torch.tensor([1 / T, max(T - pure_noise, 1) / T], dtype=torch.float64)
    log_k = -schedule.log_snr(ends) / 2  # k = sigma / alpha
    inner = max(count - pure_noise, 1)
    if spacing == "log_snr":
        wanted = torch.lerp(log_k[0], log_k[1], _fractions(inner))
    else:
        low = log_k[0].exp() if schedule.discrete else torch.tensor(SMALLEST_SIGMA, dtype=torch.float64)
        first, last = low.clamp(min=SMALLEST_SIGMA) ** (1 / RHO), log_k[1].exp() ** (1 / RHO)
        wanted = torch.lerp(first, last, _fractions(inner)).log() * RHO
    times: list[float] = schedule.time_of(-2 * wanted).tolist()
    return times[:count] if len(times) == count else [*times, 1.0]


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
