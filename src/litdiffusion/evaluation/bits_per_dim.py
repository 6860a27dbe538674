"""The variational bound on images the training never sees, in bits per dimension, with everything random held fixed.

Image i of the held-out split meets the same noise at the same t in every run, as in ``held_out``. The bound is a sum
over all T times; from N of them it is estimated without bias by

    L_T + L_0 + (T - 1) / n  sum_{j=0..n-1} L_{t_j - 1},        t_j = 2 + floor( (j (T - 1) + k) / n ),   n = N - 1

prior and decoder exactly, and one t from each of n equal strata of 2..T. An image's offset k in 0..T-2 goes by its
position: the mean over all offsets is the bound itself, as each t comes up n times, and neighbouring images spread
theirs evenly. With N = T nothing is left out.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from litdiffusion.data.stores import Batch
from litdiffusion.diffusion import Denoiser, Guidance
from litdiffusion.diffusion.devices import to_device
from litdiffusion.diffusion.likelihood import Variance, bound_term, prior_bits
from litdiffusion.diffusion.timesteps import spread_times
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


def bits_per_dim(
    denoiser: Denoiser,
    images: Images,
    first: int,
    num_times: int | None,
    variance: Variance,
    labels: Int[Tensor, " batch"] | None = None,
) -> PerImage:
    """Return the bound of each image; see ``bound_parts``."""
    return bound_parts(denoiser, images, first, num_times, variance, labels).total


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


def measured_bits(
    denoiser: Denoiser, batches: Iterable[Batch], num_images: int, num_times: int | None, variance: Variance
) -> dict[str, float]:
    """Return the mean of the bound, of its prior and of its decoder term, and over what they were taken.

    It is measured on the first ``num_images``; with 0 nothing is, and nothing returned. ``batches`` are the held-out
    split in order, finished and on the denoiser's device; the other arguments are those of ``bound_parts``.
    """
    parts = []
    for images, labels, start, _ in batches:
        count = min(len(images), num_images - start)
        if count <= 0:
            break
        told = None if labels is None else labels[:count]
        parts.append(bound_parts(denoiser, images[:count], start, num_times, variance, told))
    if not parts:
        return {}
    total, prior, decoder = (torch.cat(each) for each in zip(*parts, strict=True))
    num_steps = denoiser.schedule.num_steps
    return {
        "val/bits_per_dim": float(total.mean()),
        "val/bits_per_dim_prior": float(prior.mean()),
        "val/bits_per_dim_decoder": float(decoder.mean()),
        "bits_per_dim_images": len(total),
        "bits_per_dim_times": num_steps if num_times is None else min(num_times, num_steps),
    }
