"""The endless stream of training images, as a pure function of the position in it.

Position ``p = step * batch_size + i`` is row ``i`` of global batch ``step``. The stream is one permutation of
the data set after another, so every batch is full and a batch may straddle two epochs (or many, if it is larger
than the data set):

    epoch = p // N        index = permutation(seed, epoch)[p mod N]

Nothing is counted or saved: any process can name the images of any row of any batch.
"""

from functools import lru_cache

import torch
from jaxtyping import Int64
from torch import Tensor

from litdiffusion.randomness import generator_at


class DataOrder:
    """Which image is at which position of the training stream.

    Args:
        num_images: size N of the data set, at least 1.
        seed: any integer; the order depends on nothing else.
    """

    def __init__(self, num_images: int, seed: int) -> None:
        if num_images < 1:
            raise ValueError(f"num_images must be at least 1, not {num_images}")
        self.num_images = num_images
        self.seed = seed
        # Two: a batch that straddles an epoch's end needs both sides, and nothing ever goes further back.
        self._permutation = lru_cache(maxsize=2)(self.permutation)

    def permutation(self, epoch: int) -> Int64[Tensor, " num_images"]:
        """The order of the images in one epoch."""
        return torch.randperm(self.num_images, generator=generator_at(self.seed, "order", epoch))

    def at(self, first: int, last: int) -> Int64[Tensor, " positions"]:
        """Indices of the images at the stream's positions ``first <= p < last``."""
        N = self.num_images
        pieces = [
            self._permutation(epoch)[max(first - epoch * N, 0) : last - epoch * N]
            for epoch in range(first // N, -(-last // N))
        ]
        return torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.int64)

    def batch(self, step: int, batch_size: int, start: int, stop: int) -> Int64[Tensor, " rows"]:
        """Indices of rows ``start <= i < stop`` of global batch ``step``; each process asks for its own rows."""
        return self.at(step * batch_size + start, step * batch_size + stop)
