"""The variational bound on images the training never sees, in bits per dimension, with everything random held fixed.

Image i of the held-out split meets the same noise at the same t in every run, as in ``held_out``. The bound is a sum
over all T times; from N of them it is estimated without bias by

    L_T + L_0 + (T - 1) / n  sum_{j=0..n-1} L_{t_j - 1},        t_j = 2 + floor( (j (T - 1) + k) / n ),   n = N - 1

prior and decoder exactly, and one t from each of n equal strata of 2..T. An image's offset k in 0..T-2 goes by its
position: the mean over all offsets is the bound itself, as each t comes up n times, and neighbouring images spread
theirs evenly. With N = T nothing is left out.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from litdiffusion.data.stores import Batch
from litdiffusion.diffusion import Denoiser, Guidance
from litdiffusion.diffusion.devices import to_device
from litdiffusion.diffusion.likelihood import Variance, bound_term, prior_bits
from litdiffusion.diffusion.timesteps import spread_times
from litdiffusion.errors import UserError
from litdiffusion.evaluation.metric import Mean, Model
from litdiffusion.randomness import generator_at

Images = Float[Tensor, "batch channels h w"]
PerImage = Float[Tensor, " batch"]


class BoundParts(NamedTuple):
    """The bound of each image and two of its parts, in bits per dimension.

    Attributes:
        total: the bound, or its estimate.
        prior: L_T, how far x_T is from pure noise.
        decoder: L_0, the cost of the gray levels given x_1.
    """

    total: PerImage
    prior: PerImage
    decoder: PerImage


class BitsPerDim(Mean):
    """The mean bound; ``_prior`` and ``_decoder``: the means of these parts.

    Args:
        num_images: how many of the held-out images it is measured on, the first ones; 0 for none.
        num_times: at how many times each; None for all T.
        variance: of the model's steps; None for the learned one where there is one, else beta.
    """

    higher_is_better = False

    def __init__(
        self, num_images: int, num_times: int | None = None, variance: Variance | None = None
    ) -> None:
        super().__init__("_prior", "_decoder")
        if num_images < 0:
            raise ValueError(f"num_images={num_images}: must be at least 0")
        if num_times is not None and num_times < 2:
            raise ValueError(f"num_times={num_times}: must be at least 2, or null for all times")
        self.num_images = num_images
        self.num_times = num_times
        self.variance = variance
        self.measured_times = 0

    def check(self, denoiser: Denoiser) -> None:
        """See ``Metric``."""
        if self.variance == "learned" and not denoiser.learned_variance:
            raise UserError(
                "metrics.bits_per_dim.variance=learned: this network was trained without; choose beta or beta_tilde"
            )

    def update(self, model: Model, batch: Batch) -> None:
        """See ``Metric``."""
        denoiser, count = model.denoiser, max(0, self.num_images - batch.start)
        images, labels = batch.images[:count], None if batch.labels is None else batch.labels[:count]
        if not len(images):
            return
        variance: Variance = self.variance or ("learned" if denoiser.learned_variance else "beta")
        parts = bound_parts(denoiser, images, batch.start, self.num_times, variance, labels)
        for suffix, values in zip(self.suffixes, parts, strict=False):
            self.add(values, suffix)
        num_steps = denoiser.schedule.num_steps
        self.measured_times = min(self.num_times or num_steps, num_steps)

    def extent(self) -> dict[str, int]:
        """See ``Metric``."""
        count = int(self.counts[0])
        return {"bits_per_dim_images": count, "bits_per_dim_times": self.measured_times} if count else {}


@torch.no_grad()
def bound_parts(
    denoiser: Denoiser,
    images: Images,
    first: int,
    num_times: int | None,
    variance: Variance,
    labels: Int[Tensor, " batch"] | None = None,
) -> BoundParts:
    """Return the bound of each image, part by part.

    Args:
        denoiser: a self-conditioned network is given its own estimate, as in sampling.
        images: in [-1, 1], on the gray levels.
        first: position of ``images[0]`` in the held-out split.
        num_times: N; None, or T and more, for all of 1..T.
        variance: of p(x_{t-1} | x_t).
        labels: what a class-conditional network is told; any other never sees them.

    Raises:
        ValueError: ``num_times`` leaves no time to estimate from, or the network does not know the labels.
    """
    num_steps = denoiser.schedule.num_steps
    if denoiser.num_classes is not None and labels is not None:
        denoiser = denoiser.guided(Guidance(labels))
    position = torch.arange(first, first + len(images))

    def term(t: Int[Tensor, " batch"]) -> PerImage:
        eps = noise(position, t, tuple(images.shape[1:]))
        t, eps = to_device(t, images.device), to_device(eps, images.device)
        return bound_term(denoiser, images, t, eps, variance)

    prior, decoder = prior_bits(denoiser.schedule, images), term(torch.ones_like(position))
    total = prior + decoder
    times = strata(position, num_steps, num_times)
    for t in times:
        total = total + (num_steps - 1) / len(times) * term(t)
    return BoundParts(total, prior, decoder)


def strata(
    position: Int[Tensor, " batch"], num_steps: int, num_times: int | None
) -> list[Int[Tensor, " batch"]]:
    """Return t_0..t_{n-1} of each image; none where T is 1.

    Raises:
        ValueError: no time but the decoder's, where there are more.
    """
    others = num_steps - 1
    n = others if num_times is None else min(num_times - 1, others)
    if n < min(1, others):
        raise ValueError(
            f"num_times={num_times}: must be at least 2, t = 1 and another to stand for the rest"
        )
    if n == 0:
        return []
    offset = spread_times(position, others) - 1
    return [2 + (j * others + offset) // n for j in range(n)]


def noise(position: Int[Tensor, " batch"], t: Int[Tensor, " batch"], shape: tuple[int, ...]) -> Images:
    """Return the standard normal noise that belongs to each image at its t; all of it on the CPU."""
    places = zip(position.tolist(), t.tolist(), strict=True)
    return torch.stack(
        [torch.randn(shape, generator=generator_at("bits per dim", i, time)) for i, time in places]
    )
