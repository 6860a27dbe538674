"""Randomness as a pure function of where it is used, so that nothing random need ever be saved.

Every draw comes from a generator seeded by a *place*: ``(seed, purpose, step, block)`` in training,
``(seed, "sample", image index)`` in sampling. A run that is interrupted and resumed, or split over another
number of processes, meets the same places and so draws the same numbers.

The draws are made on the CPU and moved: the numbers do not depend on the device either.
"""

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor

BLOCK = 16
"""Positions of the global batch that share one generator: a process draws only the blocks it needs."""


def seed_of(*place: int | str) -> int:
    """Return a 63-bit seed for a place; places that differ anywhere have unrelated seeds."""
    digest = hashlib.blake2b(repr(place).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator_at(*place: int | str) -> torch.Generator:
    """Return a fresh CPU generator for a place."""
    return torch.Generator().manual_seed(seed_of(*place))


def draw_positions(
    draw: Callable[[torch.Generator, int], Tensor], start: int, stop: int, *place: int | str
) -> Tensor:
    """Draw one row for each position ``start <= i < stop`` of the global batch.

    ``draw(generator, BLOCK)`` returns ``BLOCK`` rows. Row ``i`` is the same whatever ``start`` and ``stop``
    are, hence the same however the batch is shared among processes.
    """
    first, last = start // BLOCK, -(-stop // BLOCK)
    rows = torch.cat([draw(generator_at(*place, block), BLOCK) for block in range(first, last)])
    return rows[start - first * BLOCK : stop - first * BLOCK]


def normal_positions(shape: tuple[int, ...], start: int, stop: int, *place: int | str) -> Tensor:
    """Standard normal noise of ``shape`` for each position: float32 [stop - start, *shape]."""
    return draw_positions(lambda g, n: torch.randn((n, *shape), generator=g), start, stop, *place)


def uniform_positions(start: int, stop: int, *place: int | str) -> Tensor:
    """A number in [0, 1) for each position: float32 [stop - start]."""
    return draw_positions(lambda g, n: torch.rand(n, generator=g), start, stop, *place)


def image_generators(seed: int, start: int, stop: int) -> list[torch.Generator]:
    """One generator for each sampled image ``start <= i < stop``: image i looks the same in any batch."""
    return [generator_at(seed, "sample", index) for index in range(start, stop)]
