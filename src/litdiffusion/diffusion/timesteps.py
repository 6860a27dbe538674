"""Which times a training batch sees.

A rule turns one uniform number per image into a time, knowing the image's position in the global batch, so any
process can work out its own share. To add a rule, subclass ``TimestepRule``. One that learns from the losses
keeps what it has learned in buffers: they are saved with the weights, and every process observes all losses.
"""

from abc import ABC, abstractmethod

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

GOLDEN_RATIO = (5**0.5 - 1) / 2


class TimestepRule(nn.Module, ABC):
    """A rule that draws times from 1..T."""

    learns = False
    """Whether ``observe`` wants to be told every step's losses."""

    @abstractmethod
    def forward(
        self, u: Float[Tensor, " batch"], position: Int[Tensor, " batch"], batch_size: int, num_steps: int
    ) -> Int[Tensor, " batch"]:
        """Return times in 1..num_steps.

        ``u`` is uniform in [0, 1), and ``position`` in 0..batch_size-1 is where each image stands in the global
        batch.
        """

    def check(self, num_steps: int) -> None:
        """Raise ValueError if the rule cannot draw from 1..num_steps; most can from any."""

    def weights(self, t: Int[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """Return 1 / (T p(t)): what makes the mean loss the same as for uniform times."""
        return torch.ones(t.shape, device=t.device)

    def observe(self, t: Int[Tensor, " images"], losses: Float[Tensor, " images"]) -> None:
        """Learn from the losses of a global batch, the same on every process."""


class UniformTimesteps(TimestepRule):
    """Independent and uniform (DDPM, algorithm 1)."""

    def forward(
        self, u: Float[Tensor, " batch"], position: Int[Tensor, " batch"], batch_size: int, num_steps: int
    ) -> Int[Tensor, " batch"]:
        """1 + floor(u T)."""
        return _to_times(u, num_steps)


class StratifiedTimesteps(TimestepRule):
    """Uniform, but spread over the batch: image i draws from the i-th of ``batch_size`` equal slices of 1..T.

    Each time is as likely as before and the loss has the same mean, with less variance between batches.
    """

    def forward(
        self, u: Float[Tensor, " batch"], position: Int[Tensor, " batch"], batch_size: int, num_steps: int
    ) -> Int[Tensor, " batch"]:
        """1 + floor(T (position + u) / batch_size)."""
        return _to_times((position + u.double()) / batch_size, num_steps)


class ImportanceTimesteps(TimestepRule):
    """Times drawn in proportion to sqrt(E[L_t^2]), which makes the loss's variance least (2102.09672, section 3.3).

    The expectation is over the last ``history`` losses at each t; until every t has as many, times are uniform.
    Spread over the batch like ``StratifiedTimesteps``. On a GPU every step waits for it: times are drawn on the CPU
    from losses that lie on the device.

    Args:
        num_steps: T.
        history: losses remembered for each t.
        uniform_share: of the probability that is spread over all t, so that none is forgotten.
    """

    learns = True
    losses: Tensor
    counts: Tensor

    def __init__(self, num_steps: int, history: int = 10, uniform_share: float = 0.001) -> None:
        super().__init__()
        if history < 1:
            raise ValueError(f"history={history}: must be at least 1")
        if not 0 < uniform_share <= 1:
            raise ValueError(f"uniform_share={uniform_share}: must lie in (0, 1]")
        self.uniform_share = uniform_share
        self.register_buffer("losses", torch.zeros(num_steps, history))
        self.register_buffer("counts", torch.zeros(num_steps, dtype=torch.int64))

    def check(self, num_steps: int) -> None:
        """Raise ValueError for another T than that of the losses it remembers."""
        if num_steps != len(self.losses):
            raise ValueError(f"timesteps.num_steps={len(self.losses)}: the schedule has {num_steps} steps")

    def probabilities(self) -> Float[Tensor, " T"]:
        """Return p(1)..p(T), in float64 on the CPU."""
        losses, counts = self.losses.cpu().double(), self.counts.cpu()
        num_steps, history = losses.shape
        uniform = torch.full((num_steps,), 1 / num_steps, dtype=torch.float64)
        size = losses.square().mean(1).sqrt()
        if bool((counts < history).any()) or not bool(size.sum() > 0):
            return uniform
        return (1 - self.uniform_share) * size / size.sum() + self.uniform_share * uniform

    def forward(
        self, u: Float[Tensor, " batch"], position: Int[Tensor, " batch"], batch_size: int, num_steps: int
    ) -> Int[Tensor, " batch"]:
        """Invert the distribution function at (position + u) / batch_size.

        Raises:
            ValueError: times are wanted of another T than the one this rule has been made for.
        """
        self.check(num_steps)
        distribution = self.probabilities().cumsum(0)
        wanted = (position + u.double()) / batch_size
        return (torch.searchsorted(distribution, wanted.cpu(), right=True) + 1).clamp(max=num_steps)

    def weights(self, t: Int[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """1 / (T p(t))."""
        p = self.probabilities()
        return (1 / (len(p) * p)).float().to(t.device)[t - 1]

    def observe(self, t: Int[Tensor, " images"], losses: Float[Tensor, " images"]) -> None:
        """Remember the losses, in place of the oldest at their t."""
        history = self.losses.shape[1]
        same = t[:, None] == t[None, :]
        earlier, all_of_t = same.tril(-1).sum(1), same.sum(1)
        kept = earlier >= all_of_t - history  # of more than fit, the last
        slot = (self.counts[t - 1] + earlier) % history
        self.losses[t[kept] - 1, slot[kept]] = losses[kept].to(self.losses)
        self.counts.index_add_(0, t - 1, torch.ones_like(t))


def spread_times(position: Int[Tensor, " batch"], num_steps: int) -> Int[Tensor, " batch"]:
    """Return fixed times for validation: evenly spread over 1..T in every run of positions.

    Multiples of the golden ratio modulo 1, the additive recurrence of lowest discrepancy.
    """
    return _to_times((position.double() + 0.5) * GOLDEN_RATIO % 1, num_steps)


def _to_times(u: Float[Tensor, " batch"], num_steps: int) -> Int[Tensor, " batch"]:
    # In float64: float32 has numbers below 1 whose product with T rounds up to T.
    return ((u.double() * num_steps).long() + 1).clamp(max=num_steps)
