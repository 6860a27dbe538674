"""Random numbers as pure functions of what they are for, so that no random state is ever saved.

Every number is a function of a *place*, (seed, purpose, step, name), of an image's position in the global batch, and
of nothing else. A run that is interrupted and resumed, or shared by another number of processes, draws the same
numbers; so does another device, up to the rounding of its logarithms and cosines.

The generator is Philox4x32-10 (Salmon et al., SC11), as in CUDA: it turns a counter and a key into 128 random bits.
It is written in plain tensor operations, so the numbers are made on the device that needs them, and the host waits
for none.
"""

import hashlib
import math
import operator
from dataclasses import dataclass
from typing import SupportsIndex

import torch
from jaxtyping import Float, Float32, Int64, Shaped
from torch import Tensor

from litdiffusion.diffusion.devices import precise_dtype

GOLDEN_RATIO = (5**0.5 - 1) / 2
WORD = 0xFFFFFFFF
ROUNDS = 10


def seed_of(*place: SupportsIndex | str) -> int:
    """Return a 63-bit seed for a place; places that differ anywhere have unrelated seeds.

    Equal numbers are one place, whether they are Python's, NumPy's or torch's.
    """
    plain = tuple(str(part) if isinstance(part, str) else int(operator.index(part)) for part in place)
    digest = hashlib.blake2b(repr(plain).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator_at(*place: int | str) -> torch.Generator:
    """Return a fresh CPU generator for a place."""
    return torch.Generator().manual_seed(seed_of(*place))


@dataclass(frozen=True)
class Draws:
    """The random numbers of a batch of images.

    Attributes:
        place: what they are for, such as (seed, "train", step).
        positions: where each image stands in the global batch, in the data set, or among the images that are drawn;
            on the device where the numbers are wanted.
        batch_size: size of the global batch; None where the positions are those of a fixed set of images.
    """

    place: tuple[int | str, ...]
    positions: Int64[Tensor, " batch"]
    batch_size: int | None = None

    @classmethod
    def at(
        cls,
        *place: int | str,
        start: int,
        stop: int,
        device: torch.device | str = "cpu",
        batch_size: int | None = None,
    ) -> "Draws":
        """Return the draws of the positions ``start <= i < stop``."""
        return cls(place, torch.arange(start, stop, device=device), batch_size)

    def __len__(self) -> int:
        return len(self.positions)

    def uniform(self, name: str) -> Float32[Tensor, " batch"]:
        """Return a number in [0, 1) for each image."""
        return (self._bits(1, "uniform", name)[:, 0] >> 8).float() * 2**-24

    def normal(self, name: str, shape: tuple[int, ...]) -> Float32[Tensor, "batch ..."]:
        """Return standard normal noise of ``shape`` for each image (Box and Muller's transform)."""
        size = math.prod(shape)
        half = -(-size // 2)
        bits = self._bits(2 * half, "normal", name, size)
        radius = (-2 * ((bits[:, :half].float() + 0.5) * 2**-32).log()).sqrt()
        angle = bits[:, half:].float() * (2 * math.pi * 2**-32)
        pairs = torch.cat((radius * angle.cos(), radius * angle.sin()), dim=1)
        return pairs[:, :size].reshape(len(self), *shape)

    def stratified(self, name: str) -> Float[Tensor, " batch"]:
        """Return a number in [0, 1) for each image, evenly spread over the batch.

        Image i of N draws from [i / N, (i + 1) / N). Of a fixed set the numbers are fixed too: multiples of the
        golden ratio modulo 1, which are evenly spread in every run of positions.
        """
        positions = self.positions.to(precise_dtype(self.positions.device))
        if self.batch_size is None:
            return (positions + 0.5) * GOLDEN_RATIO % 1
        return (positions + self.uniform(name)) / self.batch_size

    def shared_uniform(self, name: str) -> float:
        """Return one number in [0, 1) for the whole batch; on the host, so that decisions can follow it."""
        return self.seed(name) / 2**63

    def seed(self, *name: int | str) -> int:
        """Return a 63-bit seed, for what draws from a generator of its own (dropout)."""
        return seed_of(*self.place, *name)

    def _bits(self, count: int, *name: int | str) -> Int64[Tensor, "batch count"]:
        """Return ``count`` words of 32 bits for each image."""
        key = self.seed(*name)
        block = torch.arange(-(-count // 4), device=self.positions.device)[None, :]
        position = self.positions[:, None]
        zero = torch.zeros_like(position)
        words = philox((block, position & WORD, position >> 32, zero), (key & WORD, key >> 32))
        return torch.cat(words, dim=1)[:, :count]


def philox(
    counter: tuple[Shaped[Tensor, "..."], ...], key: tuple[int, int]
) -> tuple[Shaped[Tensor, "..."], ...]:
    """Return Philox4x32-10 of four words of 32 bits, in int64 tensors that broadcast, under a key of two words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        # The product of two words fills 64 bits: as a signed number it wraps round, and its bits are right.
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = ((p1 >> 32) & WORD) ^ c1 ^ k0, p1 & WORD, ((p0 >> 32) & WORD) ^ c3 ^ k1, p0 & WORD
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return c0, c1, c2, c3
