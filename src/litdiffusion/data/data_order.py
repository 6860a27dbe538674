"""The endless stream of training images, as a pure function of the position in it.

Position ``p = step * batch_size + i`` is row ``i`` of global batch ``step``. The stream is one permutation of
the data set after another, so every batch is full, and a batch may span two epochs (or more, if it is larger
than the data set):

    epoch = p // N        index = permutation(seed, epoch)[p mod N]

There is no state: any process can tell the images of any row of any batch.
"""

from functools import lru_cache

import torch
from jaxtyping import Int64
from torch import Tensor

from litdiffusion.diffusion.draws import generator_at


class DataOrder:
    """Which image is at which position of the training stream.

    Args:
        num_images: size N of the data set, at least 1.
        seed: any integer; the order depends on nothing else.
    """

    def __init__(self, num_images: int, seed: int) -> None:
        if num_images < 1:
            raise ValueError(f"num_images={num_images}: must be at least 1")
        self.num_images = num_images
        self.seed = seed
        # Two, for a batch that spans the end of an epoch; earlier ones are not needed again.
        self._permutation = lru_cache(maxsize=2)(self.permutation)

    def permutation(self, epoch: int) -> Int64[Tensor, " num_images"]:
        """Return the order of the images in one epoch."""
        return torch.randperm(self.num_images, generator=generator_at(self.seed, "order", epoch))

    def at(self, first: int, last: int) -> Int64[Tensor, " positions"]:
        """Return the indices of the images at positions ``first <= p < last`` of the stream."""
        N = self.num_images
        pieces = [
            self._permutation(epoch)[max(first - epoch * N, 0) : last - epoch * N]
            for epoch in range(first // N, -(-last // N))
        ]
        return torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.int64)

    def batch(self, step: int, batch_size: int, start: int, stop: int) -> Int64[Tensor, " rows"]:
        """Return the indices of rows ``start <= i < stop`` of global batch ``step``."""
        return self.at(step * batch_size + start, step * batch_size + stop)
