"""What all samplers share: the one loop from noise to images, and what a step of theirs may ask.

A sampler stops at times 1 = t_0 > t_1 > ... > t_N = 0 and takes every previous time from that list. The steps
themselves are in ``samplers.py``; edits, which begin elsewhere or change images on the way, are in ``editing.py``.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import count, pairwise
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from litdiffusion.diffusion.denoiser import Denoiser, Estimate
from litdiffusion.diffusion.draws import Draws
from litdiffusion.diffusion.process import renoise
from litdiffusion.diffusion.schedule import Schedule
from litdiffusion.diffusion.spacing import SPACINGS, Spacing, spaced_times

Images = Float[Tensor, "batch channels h w"]
Noise = Callable[[], Images]
"""Draws standard normal images, other ones at each call."""
Edit = Callable[[Images, float, Noise], Images]
"""From a new x_s and its time to what the next step begins with."""


@dataclass(frozen=True)
class SamplerOutput:
    """One time of the reverse process: the image at that time, and the estimate of x_0 made there."""

    t: float
    x: Images
    x0: Images


@dataclass(frozen=True)
class SamplerState:
    """Where a sampler is, and what it may ask.

    Attributes:
        schedule: alpha(t) and sigma(t).
        t, s: the time, and the next one, s < t.
        x_t: the image at t.
        estimate: the denoiser's, at x_t and t.
        noise: draws standard normal images; a deterministic step never calls it.
        denoise: the denoiser at another image and time, for steps that evaluate it more than once.
        history: the states of the steps before, the latest first: ``order`` - 1 of them.
    """

    schedule: Schedule
    t: float
    s: float
    x_t: Images
    estimate: Estimate
    noise: Noise
    denoise: Callable[[Images, float], Estimate]
    history: tuple["SamplerState", ...] = ()


class Sampler(ABC):
    """A way from noise to images, in steps.

    Args:
        num_steps: steps from 1 to 0; None for the schedule's own T.
        spacing: ``uniform`` in t, ``quadratic`` (denser near the image), ``log_snr`` (uniform in log-SNR) or
            ``karras`` (uniform in (sigma / alpha)^(1/7)).
    """

    order: ClassVar[int] = 1
    """A multistep method of this order sees the ``order`` - 1 states before in ``state.history``."""

    def __init__(self, num_steps: int | None = None, spacing: Spacing = "uniform") -> None:
        if num_steps is not None and num_steps < 1:
            raise ValueError(f"num_steps={num_steps}: a sampler needs at least 1 step")
        if spacing not in SPACINGS:
            raise ValueError(f"spacing={spacing!r}: choose {', '.join(SPACINGS)}")
        self.num_steps = num_steps
        self.spacing = spacing

    def times(self, schedule: Schedule) -> list[float]:
        """Return the times of the steps: ``num_steps`` + 1 from 1 down to 0.

        Raises:
            ValueError: more steps than a discrete schedule has.
        """
        return spaced_times(schedule, self.num_steps or schedule.num_steps, self.spacing)

    def require_support(self, denoiser: Denoiser) -> None:
        """Make sure that the sampler can use this denoiser; one that needs more than x_0 extends this.

        Raises:
            ValueError: it cannot.
        """
        self.times(denoiser.schedule)

    def churn(self, schedule: Schedule, x_t: Images, t: float, noise: Noise) -> tuple[Images, float]:
        """Go back to a noisier time before each step; by default, do not."""
        return x_t, t

    @abstractmethod
    def step(self, state: SamplerState) -> Images:
        """Go from x_t to x_s."""

    def steps(
        self,
        denoiser: Denoiser,
        x_T: Images,
        draws: Draws,
        *,
        start: float = 1.0,
        edit: Edit | None = None,
        repeats: int = 1,
    ) -> Iterator[SamplerOutput]:
        """Go from the noise ``x_T`` to the images, yielding every time on the way: t = 1 first, t = 0 last.

        Args:
            denoiser: estimates x_0.
            x_T: pure noise of the schedule's ``init_noise_sigma``; or an image at time ``start``.
            draws: each image's random numbers, so that none depends on the batch it is drawn in.
            start: begin at this time of the spacing instead of 1.
            edit: changes each new x_s.
            repeats: take each step this many times, going back from x_s to x_t in between.
        """
        schedule, shape = denoiser.schedule, tuple(x_T.shape[1:])
        numbers = count()
        x = x_T
        history: tuple[SamplerState, ...] = ()
        self_cond: Images | None = None

        def noise() -> Images:
            return draws.normal(f"noise {next(numbers)}", shape).to(x_T.dtype)

        def denoise(x: Images, t: float) -> Estimate:
            estimate: Estimate = denoiser(x, t, self_cond)
            return estimate

        for t, s in pairwise(t for t in self.times(schedule) if t <= start):
            for left in reversed(range(repeats if s > 0 else 1)):
                with torch.no_grad():  # never across a yield, where it would reach the caller
                    x_t, up = self.churn(schedule, x, t, noise)
                    state = SamplerState(schedule, up, s, x_t, denoise(x_t, up), noise, denoise, history)
                    x_s = self.step(state)
                    x_s = x_s if edit is None else edit(x_s, s, noise)
                    self_cond = state.estimate.x0
                    if left > 0:
                        x, history = renoise(schedule, x_s, s, t, noise()), ()
            yield SamplerOutput(t, x, state.estimate.x0)
            # Without their own history, or every step would stay in memory.
            x, history = x_s, (replace(state, history=()), *history)[: self.order - 1]
        yield SamplerOutput(0.0, x, x)

    def sample(self, denoiser: Denoiser, x_T: Images, draws: Draws) -> Images:
        """Run ``steps`` to the end and return the images."""
        for output in self.steps(denoiser, x_T, draws):
            last = output
        return last.x
