"""Samplers: from noise to images, one step of a few lines each, through one loop.

A sampler walks a grid of times T = t_0 > t_1 > ... > t_N = 0 and takes every previous time from that grid. To
add a sampler, subclass ``Sampler``, write ``step``, and name the class in a YAML file.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from litdiffusion.diffusion.denoiser import Denoiser, Estimate
from litdiffusion.diffusion.process import posterior, transition
from litdiffusion.diffusion.schedules import Schedule

Images = Float[Tensor, "batch channels h w"]
Noise = Callable[[], Images]
Generators = torch.Generator | Sequence[torch.Generator] | None


@dataclass(frozen=True)
class Step:
    """A moment of the reverse process: the time, the image at that time, and the estimate of x_0 made there."""

    t: int
    x: Images
    x0: Images


class Sampler(ABC):
    """The loop that all samplers share.

    Args:
        num_steps: steps from T to 0; None takes all T.
    """

    def __init__(self, num_steps: int | None = None) -> None:
        if num_steps is not None and num_steps < 1:
            raise ValueError(f"num_steps={num_steps}: a sampler needs at least 1 step")
        self.num_steps = num_steps

    def times(self, schedule: Schedule) -> list[int]:
        """Return the grid: ``num_steps`` + 1 times from T down to 0, evenly spaced up to rounding.

        Raises:
            ValueError: more steps than the schedule has.
        """
        total, count = schedule.num_steps, self.num_steps or schedule.num_steps
        if count > total:
            raise ValueError(f"num_steps={count}: the schedule has only {total} steps")
        # Integer arithmetic, rounding half up: neighbours stay distinct, and 0 and T are always on the grid.
        return [(2 * total * i + count) // (2 * count) for i in range(count, -1, -1)]

    @abstractmethod
    def step(
        self, schedule: Schedule, x_t: Images, estimate: Estimate, t: int, s: int, noise: Noise
    ) -> Images:
        """Go from x_t to x_s, s < t, given the denoiser's estimate at t.

        ``noise()`` draws standard normal images; a deterministic sampler never calls it.
        """

    def steps(self, denoiser: Denoiser, x_T: Images, generators: Generators = None) -> Iterator[Step]:
        """Walk from the noise ``x_T`` to the images, yielding ``num_steps`` + 1 moments, t = T first, t = 0 last.

        ``generators``: one for the whole batch or one for each image, on the CPU; the second makes an image
        independent of the batch it is drawn in.
        """
        x, x0 = x_T, None
        grid = self.times(denoiser.schedule)
        for t, s in pairwise(grid):
            with torch.no_grad():  # never across a yield, where it would reach the caller
                estimate = denoiser(x, torch.full((len(x),), t, device=x.device), x0)
                x_s = self.step(denoiser.schedule, x, estimate, t, s, lambda: normal_like(x_T, generators))
            yield Step(t, x, estimate.x0)
            x, x0 = x_s, estimate.x0
        yield Step(0, x, x)

    def sample(self, denoiser: Denoiser, x_T: Images, generators: Generators = None) -> Images:
        """Run ``steps`` to the end and return the images."""
        for moment in self.steps(denoiser, x_T, generators):
            last = moment
        return last.x


class DDPM(Sampler):
    """Ancestral sampling (Ho et al., 2006.11239, algorithm 2), on any grid.

    x_s ~ N( mean of q(x_s | x_t, x_0 = estimate),  variance ), and no noise in the last step.

    Args:
        num_steps: steps from T to 0; None takes all T.
        variance: ``beta_tilde``, the posterior's own (right for a point mass), or ``beta``, that of q(x_t | x_s)
            (right for data of unit variance; DDPM's "fixedlarge").
    """

    def __init__(
        self, num_steps: int | None = None, variance: Literal["beta", "beta_tilde"] = "beta_tilde"
    ) -> None:
        super().__init__(num_steps)
        if variance not in ("beta", "beta_tilde"):
            raise ValueError(f"variance={variance!r}: choose beta or beta_tilde")
        self.variance = variance

    def step(
        self, schedule: Schedule, x_t: Images, estimate: Estimate, t: int, s: int, noise: Noise
    ) -> Images:
        """Draw x_s from the posterior at the estimate."""
        mean, variance = posterior(schedule, x_t, estimate.x0, t, s)
        if s == 0:
            return mean
        if self.variance == "beta":
            variance = transition(schedule, t, s).v
        return mean + variance**0.5 * noise()


class DDIM(Sampler):
    """Implicit sampling (Song et al., 2010.02502, equation 12).

    x_s = alpha_s x_0 + sqrt(sigma_s^2 - c^2) eps + c z,        c^2 = eta^2 . variance of q(x_s | x_t, x_0)

    Args:
        num_steps: steps from T to 0; None takes all T.
        eta: 0 is deterministic; 1 is DDPM with beta-tilde.
    """

    def __init__(self, num_steps: int | None = 50, eta: float = 0.0) -> None:
        super().__init__(num_steps)
        if not 0 <= eta <= 1:
            raise ValueError(f"eta={eta}: DDIM's eta lies in [0, 1]")
        self.eta = eta

    def step(
        self, schedule: Schedule, x_t: Images, estimate: Estimate, t: int, s: int, noise: Noise
    ) -> Images:
        """Move along the line from eps to x_0, with fresh noise where eta asks for it."""
        step = transition(schedule, t, s)
        # Where alpha_t = 0 and eta = 1, c^2 is sigma_s^2 but for rounding.
        c2 = min(self.eta**2 * step.posterior_variance, step.sigma_s**2)
        x_s = step.alpha_s * estimate.x0 + (step.sigma_s**2 - c2) ** 0.5 * estimate.eps
        return x_s if c2 == 0 else x_s + c2**0.5 * noise()


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
    return noise.to(x.device)
