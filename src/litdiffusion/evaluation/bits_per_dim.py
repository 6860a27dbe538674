"""The variational bound on images the training never sees, in bits per dimension, with everything random held fixed.

Image i of the held-out split meets the same noise at the same t in every run, as in ``held_out``. The bound is a sum
over all T times; from N of them it is estimated without bias by

    L_T + L_0 + (T - 1) / n  sum_{j=0..n-1} L_{i_j - 1},        i_j = 2 + floor( (j (T - 1) + k) / n ),   n = N - 1

prior and decoder exactly, and one step i (t = i / T) from each of n equal strata of 2..T. An image's offset k in
0..T-2 goes by its position: the mean over all offsets is the bound itself, as each step comes up n times, and
neighbouring images spread theirs evenly. With N = T nothing is left out.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from litdiffusion.data.stores import Batch
from litdiffusion.diffusion import Denoiser, Draws, Labelled
from litdiffusion.diffusion.devices import precise_dtype
from litdiffusion.diffusion.likelihood import Variance, bound_term, prior_bits
from litdiffusion.errors import UserError
from litdiffusion.evaluation.metric import Mean, Model

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

    def require_support(self, denoiser: Denoiser) -> None:
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
        variance: of p(x_s | x_t).
        labels: what a class-conditional network is told; any other never sees them.

    Raises:
        ValueError: ``num_times`` leaves no time to estimate from, or the network does not know the labels.
    """
    T, num_classes = denoiser.schedule.num_steps, denoiser.num_classes
    draws = Draws.at("bits per dim", start=first, stop=first + len(images), device=images.device)
    if num_classes is not None and labels is not None:
        if not bool(((labels >= 0) & (labels < num_classes)).all()):
            raise ValueError(f"labels: each must be one of 0..{num_classes - 1}")
        denoiser = Labelled(denoiser, labels)

    def term(name: str, steps: Int[Tensor, " batch"]) -> PerImage:
        eps = draws.normal(name, tuple(images.shape[1:]))
        return bound_term(denoiser, images, steps.to(precise_dtype(images.device)) / T, eps, variance)

    prior = prior_bits(denoiser.schedule, images)
    decoder = term("decoder", torch.ones_like(draws.positions))
    total = prior + decoder
    chosen = strata(draws, T, num_times)
    for j, steps in enumerate(chosen):
        total = total + (T - 1) / len(chosen) * term(f"stratum {j}", steps)
    return BoundParts(total, prior, decoder)


def strata(draws: Draws, num_steps: int, num_times: int | None) -> list[Int[Tensor, " batch"]]:
    """Return the steps i_0..i_{n-1} of each image; none where T is 1.

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
    offset = (draws.stratified("offset") * others).long().clamp(max=others - 1)
    return [2 + (j * others + offset) // n for j in range(n)]
