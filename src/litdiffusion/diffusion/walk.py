"""The walk from noise to images: the one loop that all samplers share, and what a step of theirs may ask.

A sampler walks a grid of times T = t_0 > t_1 > ... > t_N = 0 and takes every previous time from that grid. The
steps themselves are in ``samplers.py``; what goes beside the loop (inpainting, variations) is in ``editing.py``.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from litdiffusion.diffusion.denoiser import Denoiser, Estimate
from litdiffusion.diffusion.devices import to_device
from litdiffusion.diffusion.grids import Grid, grid_times
from litdiffusion.diffusion.process import diffuse
from litdiffusion.diffusion.schedules import Schedule

Images = Float[Tensor, "batch channels h w"]
Generators = torch.Generator | Sequence[torch.Generator] | None


@dataclass(frozen=True)
class Step:
    """A moment of the reverse process: the time, the image at that time, and the estimate of x_0 made there."""

    t: int
    x: Images
    x0: Images


@dataclass(frozen=True)
class Here:
    """Where a sampler stands, and what it may ask.

    Attributes:
        schedule: the tables alpha and sigma.
        t, s: the time, and the next one of the grid, s < t.
        x_t: the image at t.
        estimate: the denoiser's, at x_t and t.
        noise: draws standard normal images; a deterministic step never calls it.
        denoise: the denoiser at another image and time, for steps that look twice.
        past: where the sampler stood before, the latest first: up to its ``looks_back`` steps.
    """

    schedule: Schedule
    t: int
    s: int
    x_t: Images
    estimate: Estimate
    noise: Callable[[], Images]
    denoise: Callable[[Images, int], Estimate]
    past: tuple["Here", ...] = ()


class Sampler(ABC):
    """The loop that all samplers share.

    Args:
        num_steps: steps from T to 0; None takes all T.
        grid: ``uniform`` in t, ``quadratic`` (denser near the image), or ``log_snr`` (uniform in log-SNR).
    """

    looks_back: ClassVar[int] = 0
    """How many earlier steps ``step`` wants to see in ``here.past``; multistep methods set it."""

    def __init__(self, num_steps: int | None = None, grid: Grid = "uniform") -> None:
        if num_steps is not None and num_steps < 1:
            raise ValueError(f"num_steps={num_steps}: a sampler needs at least 1 step")
        if grid not in ("uniform", "quadratic", "log_snr"):
            raise ValueError(f"grid={grid!r}: choose uniform, quadratic or log_snr")
        self.num_steps = num_steps
        self.grid = grid

    def times(self, schedule: Schedule) -> list[int]:
        """Return the grid: ``num_steps`` + 1 times from T down to 0.

        Raises:
            ValueError: more steps than the schedule has.
        """
        return grid_times(schedule, self.num_steps or schedule.num_steps, self.grid)

    def check(self, denoiser: Denoiser) -> None:
        """Make sure that the sampler can walk with this denoiser; one that asks for more than x_0 overrides this.

        Raises:
            ValueError: it cannot.
        """
        self.times(denoiser.schedule)

    def rise(
        self, schedule: Schedule, x_t: Images, t: int, noise: Callable[[], Images]
    ) -> tuple[Images, int]:
        """Go back up to a noisier time before each step; by default, stay."""
        return x_t, t

    @abstractmethod
    def step(self, here: Here) -> Images:
        """Go from x_t to x_s."""

    def steps(
        self,
        denoiser: Denoiser,
        x_T: Images,
        generators: Generators = None,
        *,
        start: int | None = None,
        edit: Callable[[Images, int], Images] | None = None,
        repeats: int = 1,
    ) -> Iterator[Step]:
        """Walk from the noise ``x_T`` to the images, yielding every moment: t = T first, t = 0 last.

        Args:
            denoiser: estimates x_0.
            x_T: pure noise, of the schedule's ``terminal_std``; or an image at time ``start``.
            generators: one for the whole batch or one for each image, on the CPU; the second makes an image
                independent of the batch it is drawn in.
            start: begin at this time of the grid instead of T.
            edit: called with each new x_s and s; returns what the walk goes on with.
            repeats: take each step this many times, going back up from x_s to x_t in between.
        """
        schedule = denoiser.schedule
        grid = [t for t in self.times(schedule) if start is None or t <= start]
        x = x_T
        past: tuple[Here, ...] = ()
        self_cond: Images | None = None

        def noise() -> Images:
            return normal_like(x_T, generators)

        def denoise(x: Images, t: int) -> Estimate:
            estimate: Estimate = denoiser(x, t, self_cond)
            return estimate

        for t, s in pairwise(grid):
            for left in reversed(range(repeats if s > 0 else 1)):
                with torch.no_grad():  # never across a yield, where it would reach the caller
                    x_t, up = self.rise(schedule, x, t, noise)
                    here = Here(schedule, up, s, x_t, denoise(x_t, up), noise, denoise, past)
                    x_s = self.step(here)
                    x_s = x_s if edit is None else edit(x_s, s)
                    self_cond = here.estimate.x0
                    if left > 0:
                        x, past = diffuse(schedule, x_s, s, t, noise()), ()
            yield Step(t, x, here.estimate.x0)
            # Without their own past, or every step would stay in memory.
            x, past = x_s, (replace(here, past=()), *past)[: self.looks_back]
        yield Step(0, x, x)

    def sample(self, denoiser: Denoiser, x_T: Images, generators: Generators = None) -> Images:
        """Run ``steps`` to the end and return the images."""
        for moment in self.steps(denoiser, x_T, generators):
            last = moment
        return last.x


def normal_like(x: Images, generators: Generators) -> Images:
    """Standard normal noise in the shape of ``x``, drawn on the CPU and moved to its device."""
    if isinstance(generators, Sequence):
        if len(generators) != len(x):
            raise ValueError(
                f"{len(generators)} generators for {len(x)} images: give one, or one for each image"
            )
        noise = torch.stack([torch.randn(x.shape[1:], generator=generator) for generator in generators])
    else:
        noise = torch.randn(x.shape, generator=generators)
    return to_device(noise.to(x.dtype), x.device)
