"""How far the estimate of a clean image is from the image: the same measure for every loss, target and weighting."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from litdiffusion.data.stores import Batch
from litdiffusion.diffusion import Denoiser, Draws, q_sample
from litdiffusion.evaluation.metric import Mean, Model, tenth_of


class X0MeanAbsoluteError(Mean):
    """The mean absolute error of the estimate of x_0, of pixels in [-1, 1], as a whole and by noise level.

    It is measured at times of the schedule, so another schedule means other noise.
    """

    depends_on = (*Mean.depends_on, "schedule", "rescale_betas", "ckpt")

    def update(self, model: Model, batch: Batch) -> None:
        """See ``Metric``."""
        errors, t = x0_errors(model.denoiser, batch.images, batch.start, batch.labels)
        self.add_by_noise_level(errors, tenth_of(t))


@torch.no_grad()
def x0_errors(
    denoiser: Denoiser,
    images: Float[Tensor, "batch channels h w"],
    first: int,
    labels: Int[Tensor, " batch"] | None = None,
) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]]:
    """Return the mean absolute error and the time of each image; the estimate is clipped as in sampling.

    Image i always meets the same noise, at times that are evenly spread over (0, 1] whatever the run was trained on.
    """
    schedule = denoiser.schedule
    draws = Draws.at("held out", start=first, stop=first + len(images), device=images.device)
    t = schedule.trained_time(draws.stratified("t"))
    x_t = q_sample(schedule, images, t, draws.normal("eps", tuple(images.shape[1:])))
    self_cond = denoiser(x_t, t, labels=labels).x0 if denoiser.self_condition else None
    return (denoiser(x_t, t, self_cond, labels).x0 - images).abs().flatten(1).mean(1), t
