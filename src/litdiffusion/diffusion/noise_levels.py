"""Noise-level distributions: which times a training batch sees.

A distribution turns uniform numbers into times by the inverse of its distribution function. Any of them can be drawn
plainly, or stratified: image i of N then draws from the i-th of N equal parts of the distribution, so that the loss
varies less between batches and has the same mean. To add one, subclass ``NoiseLevels``, write ``quantile``, and name
the class in a YAML file.
"""

import math
from abc import ABC, abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor, nn

from litdiffusion.diffusion.devices import precise_dtype
from litdiffusion.diffusion.draws import Draws
from litdiffusion.diffusion.schedule import Schedule

Times = Float[Tensor, " batch"]


class NoiseLevels(nn.Module, ABC):
    """A distribution of times in (0, 1].

    In evaluation mode the same images always get the same times, evenly spread over the distribution.

    Args:
        stratified: spread each batch evenly over the distribution.
    """

    learns = False
    """Whether ``observe`` wants to be told every step's losses."""

    def __init__(self, stratified: bool = False) -> None:
        super().__init__()
        self.stratified = stratified

    def forward(self, schedule: Schedule, draws: Draws) -> Times:
        """Draw the time of each image: of a discrete schedule one of the times i / T."""
        is_spread = self.stratified or not self.training
        u = draws.stratified("t") if is_spread else draws.uniform("t")
        t = self.quantile(u.to(precise_dtype(u.device)), schedule)
        return schedule.trained_time(t)

    @abstractmethod
    def quantile(self, u: Times, schedule: Schedule) -> Times:
        """Return the times in [0, 1] below which the share u in [0, 1) of the distribution lies."""

    def require_support(self, schedule: Schedule) -> None:
        """Raise ValueError if the times of this schedule cannot be drawn; most can."""

    def weights(self, schedule: Schedule, t: Times) -> Times:
        """Return what each image's loss is multiplied by; 1 for a distribution that is part of the objective."""
        return torch.ones_like(t)

    def observe(self, schedule: Schedule, t: Times, losses: Float[Tensor, " batch"]) -> None:
        """Learn from the times and losses of a global batch; they are the same on every process."""


class UniformLevels(NoiseLevels):
    """Uniform in t (DDPM, algorithm 1)."""

    def quantile(self, u: Times, schedule: Schedule) -> Times:
        """The identity."""
        return u


class NormalLevels(NoiseLevels):
    """Something of the time is normally distributed.

    Raises:
        ValueError: ``std`` is not positive.
    """

    def __init__(self, mean: float = 0.0, std: float = 1.0, stratified: bool = False) -> None:
        super().__init__(stratified)
        if not 0 < std < math.inf:
            raise ValueError(f"std={std}: must be positive")
        self.mean, self.std = mean, std

    def normal_quantile(self, u: Times) -> Times:
        """Return the quantile of N(mean, std^2)."""
        # Uniform numbers have 24 bits: this is half of the smallest step.
        return self.mean + self.std * torch.special.ndtri(u.clamp(2**-25, 1 - 2**-25))


class Lognormal(NormalLevels):
    """log(sigma / alpha) is normally distributed (Karras et al., 2206.00364, table 1).

    Args:
        mean, std: of log(sigma / alpha): EDM's P_mean and P_std.
        stratified: as for every distribution.
    """

    def __init__(self, mean: float = -1.2, std: float = 1.2, stratified: bool = False) -> None:
        super().__init__(mean, std, stratified)

    def quantile(self, u: Times, schedule: Schedule) -> Times:
        """The time at which sigma / alpha = exp(mean + std z)."""
        return schedule.time_of(-2 * self.normal_quantile(u))


class LogitNormal(NormalLevels):
    """log(t / (1 - t)) is normally distributed (Esser et al., 2403.03206, section 3.1).

    Args:
        mean, std: of log(t / (1 - t)).
        stratified: as for every distribution.
    """

    def quantile(self, u: Times, schedule: Schedule) -> Times:
        """sigmoid(mean + std z)."""
        return self.normal_quantile(u).sigmoid()


class Importance(NoiseLevels):
    """In proportion to sqrt(E[L_t^2]), which makes the loss vary least (Nichol & Dhariwal, 2102.09672, section 3.3).

    The expectation is over the last ``history`` losses in each of ``bins`` equal parts of (0, 1]; until each has as
    many, times are uniform. The losses are weighted so that their mean is that of uniform times. In evaluation mode
    times are uniform.

    Args:
        bins: how many parts; the schedule's T in the paper.
        history: losses remembered for each.
        uniform_share: of the probability, spread evenly, so that no part is forgotten.
        stratified: as for every distribution.
    """

    learns = True
    losses: Tensor
    counts: Tensor

    def __init__(
        self, bins: int = 1000, history: int = 10, uniform_share: float = 0.001, stratified: bool = True
    ) -> None:
        super().__init__(stratified)
        if bins < 1 or history < 1:
            raise ValueError(f"bins={bins}, history={history}: must be at least 1")
        if not 0 < uniform_share <= 1:
            raise ValueError(f"uniform_share={uniform_share}: must lie in (0, 1]")
        self.uniform_share = uniform_share
        self.register_buffer("losses", torch.zeros(bins, history))
        self.register_buffer("counts", torch.zeros(bins, dtype=torch.int64))

    def require_support(self, schedule: Schedule) -> None:
        """Raise ValueError if some parts hold none of a discrete schedule's times, so that nothing is ever known."""
        bins = len(self.losses)
        if schedule.discrete and bins > schedule.num_steps:
            raise ValueError(
                f"noise_levels.bins={bins}: the schedule has {schedule.num_steps} steps; use at most as many"
            )

    def probabilities(self) -> Float[Tensor, " bins"]:
        """Return the probability of each part."""
        losses = self.losses.to(precise_dtype(self.losses.device))
        bins, history = losses.shape
        size = losses.square().mean(1).sqrt()
        is_known = (self.counts >= history).all() & (size.sum() > 0)
        learned = (1 - self.uniform_share) * size / size.sum() + self.uniform_share / bins
        return torch.where(is_known, learned, 1 / bins)

    def quantile(self, u: Times, schedule: Schedule) -> Times:
        """The inverse of the distribution function, which is a straight line in each part."""
        if not self.training:
            return u
        p = self.probabilities()
        ends = p.cumsum(0)
        part = torch.searchsorted(ends, u.to(ends), right=True).clamp(max=len(p) - 1)
        inside = ((u - (ends - p)[part]) / p[part]).clamp(1e-3, 1 - 1e-3)
        return (part + inside) / len(p)

    def weights(self, schedule: Schedule, t: Times) -> Times:
        """1 / (bins p)."""
        if not self.training:
            return torch.ones_like(t)
        return (1 / (len(self.losses) * self.probabilities()))[self._part(t)]

    def observe(self, schedule: Schedule, t: Times, losses: Float[Tensor, " batch"]) -> None:
        """Remember the losses, in place of the oldest of their parts."""
        history, part = self.losses.shape[1], self._part(t)
        same = part[:, None] == part[None, :]
        earlier, all_of_part = same.tril(-1).sum(1), same.sum(1)
        # Of more than fit, the last are kept; a column that is thrown away takes the others. Picking out the rows
        # that are kept would make the host wait for a GPU.
        is_kept = earlier >= all_of_part - history
        column = torch.where(is_kept, (self.counts[part] + earlier) % history, history)
        remembered = torch.cat((self.losses, self.losses[:, :1]), dim=1)
        remembered[part, column] = losses.to(self.losses)
        self.losses.copy_(remembered[:, :history])
        self.counts.index_add_(0, part, torch.ones_like(part))

    def _part(self, t: Times) -> Tensor:
        # A time i / T at the end of a part belongs to it, whatever the rounding.
        return (t * len(self.losses) - 5e-4).long().clamp(0, len(self.losses) - 1)
