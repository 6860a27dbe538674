"""How far the estimate of a clean image is from the image: the same measure for every loss, target and weighting."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from litdiffusion.data.stores import Batch
from litdiffusion.diffusion import Denoiser, q_sample
from litdiffusion.diffusion.devices import to_device
from litdiffusion.diffusion.timesteps import spread_times
from litdiffusion.evaluation.metric import Mean, Model, tenth_of
from litdiffusion.randomness import normal_positions


class X0MeanAbsoluteError(Mean):
    """The mean absolute error of the estimate of x_0, of pixels in [-1, 1], as a whole and by noise level."""

    higher_is_better = False

    def update(self, model: Model, batch: Batch) -> None:
        """See ``Metric``."""
        errors, t = x0_errors(model.denoiser, batch.images, batch.start, batch.labels)
        self.add_by_noise_level(errors, tenth_of(t, model.denoiser.schedule.num_steps))


@torch.no_grad()
def x0_errors(
    denoiser: Denoiser,
    images: Float[Tensor, "batch channels h w"],
    first: int,
    labels: Int[Tensor, " batch"] | None = None,
) -> tuple[Float[Tensor, " batch"], Int[Tensor, " batch"]]:
    """Return the mean absolute error and the time of each image; times and noise are those of ``held_out_losses``."""
    position = torch.arange(first, first + len(images), device=images.device)
    t = spread_times(position, denoiser.schedule.num_steps)
    eps = normal_positions(tuple(images.shape[1:]), first, first + len(images), "held out")
    x_t = q_sample(denoiser.schedule, images, t, to_device(eps, images.device))
    self_cond = denoiser.self_conditioning(x_t, t, labels) if denoiser.self_condition else None
    output, _ = denoiser.output(x_t, t, self_cond, labels)
    return (denoiser.estimate(output, x_t, t).x0 - images).abs().flatten(1).mean(1), t
