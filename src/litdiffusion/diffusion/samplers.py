"""Samplers: from noise to images, one step of a few lines each, through one loop.

A sampler walks a grid of times T = t_0 > t_1 > ... > t_N = 0 and takes every previous time from that grid. To
add a sampler, subclass ``Sampler``, write ``step``, and name the class in a YAML file. What goes beside the loop
(inpainting, variations) is in ``editing.py``.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from litdiffusion.diffusion.denoiser import Denoiser, Estimate
from litdiffusion.diffusion.grids import Grid, grid_times
from litdiffusion.diffusion.process import diffuse, learned_log_variance, posterior, transition
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
            estimate: Estimate = denoiser(x, torch.full((len(x),), t, device=x.device), self_cond)
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


class DDPM(Sampler):
    """Ancestral sampling (Ho et al., 2006.11239, algorithm 2), on any grid.

    x_s ~ N( mean of q(x_s | x_t, x_0 = estimate),  variance ), and no noise in the last step.

    Args:
        num_steps, grid: as for every sampler.
        variance: ``beta_tilde``, the posterior's own (right for a point mass); ``beta``, that of q(x_t | x_s)
            (right for data of unit variance; DDPM's "fixedlarge"); or ``learned``, between the two as the network
            says (2102.09672).
    """

    def __init__(
        self,
        num_steps: int | None = None,
        variance: Literal["beta", "beta_tilde", "learned"] = "beta_tilde",
        grid: Grid = "uniform",
    ) -> None:
        super().__init__(num_steps, grid)
        if variance not in ("beta", "beta_tilde", "learned"):
            raise ValueError(f"variance={variance!r}: choose beta, beta_tilde or learned")
        self.variance = variance

    def check(self, denoiser: Denoiser) -> None:
        """See ``Sampler.check``; a learned variance must have been learned."""
        super().check(denoiser)
        if self.variance == "learned" and not denoiser.learned_variance:
            raise ValueError(
                "variance=learned: this network was not trained to give its variance; use beta_tilde"
            )

    def step(self, here: Here) -> Images:
        """Draw x_s from the posterior at the estimate."""
        schedule, t, s = here.schedule, here.t, here.s
        mean, variance = posterior(schedule, here.x_t, here.estimate.x0, t, s)
        if s == 0:
            return mean
        if self.variance == "beta":
            variance = transition(schedule, t, s).v
        elif self.variance == "learned":
            if here.estimate.variance is None:
                raise ValueError("variance=learned: this network was not trained to give its variance")
            variance = learned_log_variance(schedule, here.estimate.variance, t, s).exp()
        return mean + variance**0.5 * here.noise()


class DDIM(Sampler):
    """Implicit sampling (Song et al., 2010.02502, equation 12).

    x_s = alpha_s x_0 + sqrt(sigma_s^2 - c^2) eps + c z,        c^2 = eta^2 . variance of q(x_s | x_t, x_0)

    Args:
        num_steps, grid: as for every sampler.
        eta: 0 is deterministic; 1 is DDPM with beta-tilde.
    """

    def __init__(self, num_steps: int | None = 50, eta: float = 0.0, grid: Grid = "uniform") -> None:
        super().__init__(num_steps, grid)
        if not 0 <= eta <= 1:
            raise ValueError(f"eta={eta}: DDIM's eta lies in [0, 1]")
        self.eta = eta

    def step(self, here: Here) -> Images:
        """Move along the line from eps to x_0, with fresh noise where eta asks for it."""
        step = transition(here.schedule, here.t, here.s)
        # Where alpha_t = 0 and eta = 1, c^2 is sigma_s^2 but for rounding.
        c2 = min(self.eta**2 * step.posterior_variance, step.sigma_s**2)
        x_s = step.alpha_s * here.estimate.x0 + (step.sigma_s**2 - c2) ** 0.5 * here.estimate.eps
        return x_s if c2 == 0 else x_s + c2**0.5 * here.noise()

    @torch.no_grad()
    def invert(
        self, denoiser: Denoiser, x0: Images, iterations: int = 1, times: Sequence[int] | None = None
    ) -> Images:
        """Return the noise x_T from which deterministic steps lead to the image ``x0`` (eta is taken as 0).

        Going up, eps belongs to the x_t that is sought: x_t = a x_s + (sigma_t - a sigma_s) eps(x_t, t), solved
        by fixed-point iteration from x_s on (Pan et al., 2309.04907). Where noise prevails, eps is that of x_s at
        the estimate of x_0: the network's own says next to nothing there, and nothing at all where alpha_t = 0.
        One iteration is the usual inversion; with more, the way back meets the image more closely. A
        self-conditioned network is given the estimate made before, first the image itself; on the way back it is
        given the one from the other side, so the two ways meet as the steps become fine.

        Args:
            denoiser: estimates x_0; guided or not.
            x0: images.
            iterations: of each step.
            times: the grid from T down to 0; by default this sampler's own.

        Raises:
            ValueError: fewer than 1 iteration.
        """
        if iterations < 1:
            raise ValueError(f"iterations={iterations}: inversion needs at least 1")
        schedule, x_s, self_cond = denoiser.schedule, x0, x0
        for s, t in pairwise(reversed(times or self.times(schedule))):
            step, x_t = transition(schedule, t, s), x_s
            for _ in range(iterations):
                earlier = self_cond if t < schedule.num_steps else None  # the way back begins without
                estimate = denoiser(x_t, torch.full((len(x_t),), t, device=x_t.device), earlier)
                self_cond = estimate.x0
                eps = estimate.eps
                if s > 0 and step.sigma_t > step.a * step.alpha_s:
                    eps = (x_s - step.alpha_s * estimate.x0) / step.sigma_s
                x_t = step.a * x_s + (step.sigma_t - step.a * step.sigma_s) * eps
            x_s = x_t
        return x_s


class DPMSolverPP2M(Sampler):
    """DPM-Solver++(2M), the multistep solver of second order (Lu et al., 2211.01095, algorithm 2).

    With lambda = log(alpha / sigma), h = lambda_s - lambda_t, and r = (the step before) / h:

        D   = x_0(t) + (x_0(t) - x_0(before)) / 2r
        x_s = (sigma_s / sigma_t) x_t + (alpha_s - alpha_t sigma_s / sigma_t) D

    The first step, and the last, at whose end lambda is infinite, take D = x_0(t), which is DDIM's step. On a grid
    uniform in log-SNR the whole is of second order. Elsewhere the last step's error may come to prevail as the grid
    is refined: it falls only like 1 / num_steps where sigma^2 leaves 0 in proportion to t.

    Args:
        num_steps, grid: as for every sampler.
    """

    looks_back = 1

    def __init__(self, num_steps: int | None = 20, grid: Grid = "uniform") -> None:
        super().__init__(num_steps, grid)

    def step(self, here: Here) -> Images:
        """Extrapolate x_0 over the step, and follow it exactly."""
        schedule, t, s = here.schedule, here.t, here.s
        step = transition(schedule, t, s)
        d = here.estimate.x0
        if here.past and s > 0:
            before = here.past[0]
            lambda_before, lambda_t, lambda_s = (_lambda(schedule, time) for time in (before.t, t, s))
            # Pure noise has lambda = -infinity: then this is 0, and the estimate made there counts for nothing.
            half_of_1_by_r = (lambda_s - lambda_t) / (lambda_t - lambda_before) / 2
            d = d + half_of_1_by_r * (d - before.estimate.x0)
        shrink = step.sigma_s / step.sigma_t
        return shrink * here.x_t + (step.alpha_s - step.a * step.alpha_s * shrink) * d


class Heun(Sampler):
    """Heun's method with churn (Karras et al., 2206.00364, algorithm 2): two looks a step, second order.

    With k = sigma / alpha, the probability flow is d(x / alpha) / dk = eps. A step follows the mean of eps at its
    two ends. Two kinds of step are DDIM's instead: the last, which has no eps at its end, and those from k > 80,
    where the paper's noise begins: in k, a schedule that drowns the image further has no bounded first step. The
    order is the second on a grid uniform in log-SNR; for others see ``DPMSolverPP2M``.

    Args:
        num_steps, grid: as for every sampler.
        churn: how much noise a whole run adds on the way (S_churn): each step first rises to the time whose k is
            nearest to (1 + churn / num_steps) k_t, at most sqrt(2) k_t.
        churn_interval: of k, where there is churn (S_tmin, S_tmax).
        churn_noise: standard deviation of the noise added (S_noise).
    """

    largest_k = 80.0

    def __init__(
        self,
        num_steps: int | None = 18,
        churn: float = 0.0,
        churn_interval: Sequence[float] = (0.0, math.inf),
        churn_noise: float = 1.0,
        grid: Grid = "uniform",
    ) -> None:
        super().__init__(num_steps, grid)
        if churn < 0 or churn_noise < 0:
            raise ValueError(f"churn={churn}, churn_noise={churn_noise}: neither may be negative")
        self.churn = churn
        self.churn_interval = churn_interval
        self.churn_noise = churn_noise

    def rise(
        self, schedule: Schedule, x_t: Images, t: int, noise: Callable[[], Images]
    ) -> tuple[Images, int]:
        """Add noise by the forward process, to a time of the schedule."""
        k = schedule.sigma / schedule.alpha
        gamma = min(self.churn / (self.num_steps or schedule.num_steps), 2**0.5 - 1)
        low, high = self.churn_interval
        if gamma == 0 or not low <= float(k[t]) <= high or t == schedule.num_steps:
            return x_t, t
        up = t + int((k[t:] - (1 + gamma) * k[t]).abs().argmin())
        return (x_t, t) if up == t else (diffuse(schedule, x_t, t, up, self.churn_noise * noise()), up)

    def step(self, here: Here) -> Images:
        """Look at both ends of the step, where both have an eps."""
        step = transition(here.schedule, here.t, here.s)
        eps = here.estimate.eps
        x_s = step.alpha_s * here.estimate.x0 + step.sigma_s * eps
        if here.s == 0 or step.sigma_t > self.largest_k * step.a * step.alpha_s:
            return x_s
        mean_eps = (eps + here.denoise(x_s, here.s).eps) / 2
        return here.x_t / step.a + (step.sigma_s - step.sigma_t / step.a) * mean_eps


def _lambda(schedule: Schedule, t: int) -> float:
    return float(schedule.log_snr[t - 1]) / 2


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
    return noise.to(x)
