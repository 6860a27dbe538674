"""Which times a training batch sees.

A rule turns one uniform number per image into a time, knowing the image's position in the global batch; it
holds no state, so any process can work out its own share. To add a rule, subclass ``TimestepRule``.
"""

from abc import ABC, abstractmethod

from jaxtyping import Float, Int
from torch import Tensor

GOLDEN_RATIO = (5**0.5 - 1) / 2


class TimestepRule(ABC):
    """A rule that draws times from 1..T."""

    @abstractmethod
    def __call__(
        self, u: Float[Tensor, " batch"], position: Int[Tensor, " batch"], batch_size: int, num_steps: int
    ) -> Int[Tensor, " batch"]:
        """Return times in 1..num_steps.

        ``u`` is uniform in [0, 1), and ``position`` in 0..batch_size-1 is where each image stands in the global
        batch.
        """


class UniformTimesteps(TimestepRule):
    """Independent and uniform (DDPM, algorithm 1)."""

    def __call__(
        self, u: Float[Tensor, " batch"], position: Int[Tensor, " batch"], batch_size: int, num_steps: int
    ) -> Int[Tensor, " batch"]:
        """1 + floor(u T)."""
        return _to_times(u, num_steps)


class StratifiedTimesteps(TimestepRule):
    """Uniform, but spread over the batch: image i draws from the i-th of ``batch_size`` equal slices of 1..T.

    Each time is as likely as before and the loss has the same mean, with less variance between batches.
    """

    def __call__(
        self, u: Float[Tensor, " batch"], position: Int[Tensor, " batch"], batch_size: int, num_steps: int
    ) -> Int[Tensor, " batch"]:
        """1 + floor(T (position + u) / batch_size)."""
        return _to_times((position + u.double()) / batch_size, num_steps)


def spread_times(position: Int[Tensor, " batch"], num_steps: int) -> Int[Tensor, " batch"]:
    """Return fixed times for validation: evenly spread over 1..T in every run of positions.

    Multiples of the golden ratio modulo 1, the additive recurrence of lowest discrepancy.
    """
    return _to_times((position.double() + 0.5) * GOLDEN_RATIO % 1, num_steps)


def _to_times(u: Float[Tensor, " batch"], num_steps: int) -> Int[Tensor, " batch"]:
    # In float64: float32 has numbers below 1 whose product with T rounds up to T.
    return ((u.double() * num_steps).long() + 1).clamp(max=num_steps)
