"""The loss on images the training never sees, with everything random held fixed.

Image i of the held-out split always meets the same t and the same noise, whatever the run, its seed, its batch
size and its number of processes. So the loss of two checkpoints, or of two runs, differs by what was learned.
"""

from collections.abc import Iterable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from litdiffusion.data.stores import Batch
from litdiffusion.diffusion import Denoiser, Objective
from litdiffusion.diffusion.devices import to_device
from litdiffusion.diffusion.timesteps import spread_times
from litdiffusion.randomness import normal_positions

BINS = 10


@torch.no_grad()
def held_out_losses(
    denoiser: Denoiser,
    objective: Objective,
    images: Float[Tensor, "batch channels h w"],
    first: int,
    labels: Int[Tensor, " batch"] | None = None,
) -> tuple[Float[Tensor, " batch"], Int[Tensor, " batch"]]:
    """Return the loss and the time of each image; ``images[0]`` is image ``first`` of the split.

    A self-conditioned network is given its own estimate, as in sampling, and a class-conditional one its labels.
    """
    position = torch.arange(first, first + len(images), device=images.device)
    t = spread_times(position, denoiser.schedule.num_steps)
    eps = normal_positions(tuple(images.shape[1:]), first, first + len(images), "held out")
    eps = to_device(eps, images.device)
    return objective(denoiser, images, t, eps, feed_back=True, labels=labels), t


def measured_losses(denoiser: Denoiser, objective: Objective, batches: Iterable[Batch]) -> dict[str, float]:
    """Return the mean loss of the held-out split, as a whole and by time, and the number of its images.

    ``batches`` are finished and on the denoiser's device.
    """
    measured = [
        held_out_losses(denoiser, objective, batch.images, batch.start, batch.labels) for batch in batches
    ]
    losses, times = (torch.cat(each).cpu() for each in zip(*measured, strict=True))
    return {
        "val/loss": float(losses.mean()),
        **loss_by_time(losses, times, denoiser.schedule.num_steps, "val/loss"),
        "num_images": len(losses),
    }


def loss_by_time(
    losses: Float[Tensor, " images"], t: Int[Tensor, " images"], num_steps: int, name: str
) -> dict[str, float]:
    """Return the mean loss in each tenth of 1..T as ``name_t00`` .. ``name_t09``; empty tenths are left out."""
    bins = (t - 1) * BINS // num_steps
    return {
        f"{name}_t{i:02d}": float(losses[bins == i].mean()) for i in range(BINS) if bool((bins == i).any())
    }
