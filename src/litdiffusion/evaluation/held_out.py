"""The loss on images the training never sees, with everything random held fixed.

Image i of the held-out split always meets the same t and the same noise, whatever the run, its seed, its batch
size and its number of processes. So the loss of two checkpoints, or of two runs, differs by what was learned.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from litdiffusion.data.stores import Batch
from litdiffusion.diffusion import Denoiser, Draws, Objective, ObjectiveOutput
from litdiffusion.evaluation.metric import Mean, Model, tenth_of


class HeldOutLoss(Mean):
    """The mean loss, as a whole and by noise level; ``_raw``: of the weights that are not averaged.

    It compares what was trained on one objective.
    """

    depends_on = (
        *Mean.depends_on,
        *("schedule", "rescale_betas", "target", "loss", "weighting", "noise_levels", "objective"),
        *("net.learned_variance", "ckpt"),
    )

    def __init__(self) -> None:
        super().__init__("_raw")

    def update(self, model: Model, batch: Batch) -> None:
        """See ``Metric``."""
        share = batch.images, batch.start, batch.labels
        losses, t = held_out_losses(model.denoiser, model.objective, *share)
        if t is None:
            self.add(losses)
        else:
            self.add_by_noise_level(losses, tenth_of(t))
        if model.raw is not None:
            self.add(held_out_losses(model.raw, model.objective, *share)[0], "_raw")


@torch.no_grad()
def held_out_losses(
    denoiser: Denoiser,
    objective: Objective,
    images: Float[Tensor, "batch channels h w"],
    first: int,
    labels: Int[Tensor, " batch"] | None = None,
) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"] | None]:
    """Return the loss of each image, and its time where the objective has one.

    ``images[0]`` is image ``first`` of the split. A self-conditioned network is given its own estimate, as in
    sampling, and a class-conditional one its labels.
    """
    draws = Draws.at("held out", start=first, stop=first + len(images), device=images.device)
    was_training = objective.training
    output: ObjectiveOutput = objective.eval()(denoiser, Batch(images, labels, first, 0), draws)
    objective.train(was_training)
    return output.losses, output.t
