"""Embeddings of the time."""

import math

import torch
from jaxtyping import Float, Num
from torch import Tensor, nn


class SinusoidalEmbedding(nn.Module):
    """Sines, then cosines, of the time at geometrically spaced frequencies (Vaswani et al., 1706.03762).

    The frequencies run from 1 down to 1 / ``max_period`` inclusive, as in the blog and Tensor2Tensor:
    the exponent is divided by ``dim / 2 - 1``. OpenAI's code divides by ``dim / 2`` and puts cosines first.
    """

    frequencies: Tensor

    def __init__(self, dim: int, max_period: float = 10_000.0) -> None:
        super().__init__()
        if dim < 4 or dim % 2:
            raise ValueError(f"dim={dim}: a sinusoidal embedding needs an even dimension of at least 4")
        exponents = torch.arange(dim // 2) / (dim // 2 - 1)
        self.register_buffer("frequencies", torch.exp(-math.log(max_period) * exponents), persistent=False)

    def forward(self, t: Num[Tensor, " batch"]) -> Float[Tensor, "batch dim"]:
        """Embed a batch of times."""
        angles = t[:, None].float() * self.frequencies[None, :]
        return torch.cat((angles.sin(), angles.cos()), dim=-1)


class TimeEmbedding(nn.Sequential):
    """Sinusoids followed by a two-layer perceptron: [batch] -> [batch, out_dim]."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__(
            SinusoidalEmbedding(dim), nn.Linear(dim, out_dim), nn.GELU(), nn.Linear(out_dim, out_dim)
        )
