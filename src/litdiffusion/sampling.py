"""Images from a denoiser, in batches: what training previews, ``sample`` and ``load_model`` share.

Image i of a seed is the same picture in any batch, on any device and on any number of processes, up to the
rounding of the network: its random numbers, its class and its edit are functions of i.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from litdiffusion.diffusion import Denoiser, Draws, Sampler, SamplerOutput
from litdiffusion.diffusion.devices import torch_defaults
from litdiffusion.diffusion.editing import Edit
from litdiffusion.diffusion.guidance import Guidance
from litdiffusion.system.processes import gathered, rank_and_number, share_of

Watch = Callable[[int, SamplerOutput], None]
"""Called with the first image's number and each time of each batch: for previews, GIFs, progress bars."""


@torch_defaults()
def sample_images(
    denoiser: Denoiser,
    sampler: Sampler,
    num_images: int,
    seed: int,
    batch_size: int = 64,
    watch: Watch | None = None,
    guidance: Guidance | None = None,
    edit: Edit | None = None,
    first: int = 0,
) -> Float[Tensor, "num_images channels h w"]:
    """Draw ``num_images`` images in [-1, 1] (clamped), float32 on the CPU.

    The denoiser is in evaluation mode meanwhile. Where several processes share a run, all of them must call this;
    each draws its part, and each gets all.

    Args:
        denoiser: estimates x_0.
        sampler: any.
        num_images: how many.
        seed: of the noise.
        batch_size: images at a time.
        watch: called at every time of every batch.
        guidance: what to draw; by default every class in turn, as learned.
        edit: draw them from given images.
        first: number of the first image; the noise and class of image i are the same in any call.

    Raises:
        ValueError: the sampler or the guidance asks for what the denoiser cannot do.
    """
    guidance = guidance or Guidance()
    sampler.require_support(denoiser)
    guidance.require_support(denoiser)
    device = denoiser.device
    was_training = denoiser.training
    denoiser.eval()
    mine = share_of(num_images)
    batches = [torch.empty((0, *denoiser.image_shape))]  # with more processes than images, some have none
    try:
        for start in range(mine.start, mine.stop, batch_size):
            numbers = range(first + start, first + min(start + batch_size, mine.stop))
            draws = Draws.at(seed, "sample", start=numbers.start, stop=numbers.stop, device=device)
            if edit is not None and edit.same_noise:
                draws = Draws(draws.place, torch.zeros_like(draws.positions))
            noise = draws.normal("x_T", denoiser.image_shape)
            guided = guidance.around(denoiser, numbers)
            if edit is None:
                outputs = sampler.steps(guided, denoiser.schedule.init_noise_sigma * noise, draws)
            else:
                outputs = edit.steps(sampler, guided, noise, draws, start)
            for output in outputs:
                if watch is not None:
                    watch(start, output)
            batches.append(output.x.float().clamp(-1, 1).cpu())  # waits for the device, once a batch
    finally:
        denoiser.train(was_training)
    return torch.cat(gathered(torch.cat(batches)))


def network_evaluations(denoiser: Denoiser, sampler: Sampler) -> int:
    """Return how often a sampler asks the network for one image, counted on one."""
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    hook = denoiser.core.net.register_forward_hook(count)
    try:
        sample_images(denoiser, sampler, num_images=rank_and_number()[1], seed=0)
    finally:
        hook.remove()
    return calls
