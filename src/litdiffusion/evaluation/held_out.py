"""The loss on images the training never sees, with everything random held fixed.

Image i of the held-out split always meets the same t and the same noise, whatever the run, its seed, its batch
size and its number of processes. So the loss of two checkpoints, or of two runs, differs by what was learned.
"""

from collections.abc import Iterable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from litdiffusion.data.stores import Batch
from litdiffusion.diffusion import Denoiser, Draws, Objective, ObjectiveOutput

BINS = 10


@torch.no_grad()
def held_out_losses(
    denoiser: Denoiser,
    objective: Objective,
    images: Float[Tensor, "batch channels h w"],
    first: int,
    labels: Int[Tensor, " batch"] | None = None,
) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]]:
    """Return the loss and the time of each image; ``images[0]`` is image ``first`` of the split.

    A self-conditioned network is given its own estimate, as in sampling, and a class-conditional one its labels.
    """
    draws = Draws.at("held out", start=first, stop=first + len(images), device=images.device)
    output: ObjectiveOutput = objective.eval()(denoiser, Batch(images, labels, first, 0), draws)
    assert output.t is not None
    return output.losses, output.t


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
        **loss_by_time(losses, times, "val/loss"),
        "num_images": len(losses),
    }


def loss_by_time(
    losses: Float[Tensor, " images"], t: Float[Tensor, " images"], name: str
) -> dict[str, float]:
    """Return the mean loss in each tenth of (0, 1] as ``name_t00`` .. ``name_t09``; empty tenths are left out."""
    bins = tenth_of(t)
    return {
        f"{name}_t{i:02d}": float(losses[bins == i].mean()) for i in range(BINS) if bool((bins == i).any())
    }


def tenth_of(t: Float[Tensor, " images"]) -> Int[Tensor, " images"]:
    """Return which tenth of (0, 1] each time lies in, its end included up to rounding: 0..9."""
    return (t * BINS - 1e-6).long().clamp(0, BINS - 1)
