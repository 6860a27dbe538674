"""Images from a denoiser, in batches: what training previews, ``sample`` and ``load_model`` share.

Image i of a seed is the same picture in any batch, on any device and on any number of processes, up to the
rounding of the network: its noise comes from a generator of its own.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from litdiffusion.diffusion import Denoiser, Sampler, Step
from litdiffusion.diffusion.samplers import normal_like
from litdiffusion.randomness import image_generators

Watch = Callable[[int, Step], None]
"""Called with the first image's index and each moment of each batch: for previews, GIFs, progress bars."""


def sample_images(
    denoiser: Denoiser,
    sampler: Sampler,
    num_images: int,
    seed: int,
    batch_size: int = 64,
    watch: Watch | None = None,
) -> Float[Tensor, "num_images channels h w"]:
    """Draw ``num_images`` images in [-1, 1] (clamped), float32 on the CPU.

    The denoiser is put into evaluation mode for the while.
    """
    device = next(denoiser.parameters()).device
    was_training = denoiser.training
    denoiser.eval()
    batches = []
    try:
        for start in range(0, num_images, batch_size):
            generators = image_generators(seed, start, min(start + batch_size, num_images))
            shape = (len(generators), *denoiser.image_shape)
            noise = normal_like(torch.empty(shape, device=device), generators)
            for moment in sampler.steps(denoiser, noise, generators):
                if watch is not None:
                    watch(start, moment)
            batches.append(moment.x.float().clamp(-1, 1).cpu())
    finally:
        denoiser.train(was_training)
    return torch.cat(batches)
