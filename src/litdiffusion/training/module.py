"""The LightningModule: draws t and noise, asks the objective for the loss, keeps the average.

The mathematics is in ``diffusion``; what is logged, saved and shown is in ``callbacks``.
"""

from collections.abc import Callable
from typing import Any, TypedDict

import torch
from jaxtyping import Float, Int
from lightning import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import MeanMetric

from litdiffusion.data.datamodule import Batch
from litdiffusion.diffusion import Denoiser, Objective
from litdiffusion.diffusion.losses import Distance, Weighting
from litdiffusion.diffusion.timesteps import TimestepRule
from litdiffusion.errors import UserError
from litdiffusion.evaluation.held_out import held_out_losses
from litdiffusion.randomness import normal_positions, seed_of, uniform_positions
from litdiffusion.training.ema import EMA


class StepOutput(TypedDict):
    """What a training step hands to the callbacks: the mean loss, and each image's loss and time, detached."""

    loss: Tensor
    losses: Float[Tensor, " batch"]
    t: Int[Tensor, " batch"]


class LitDiffusion(LightningModule):
    """Train a denoiser.

    Args:
        denoiser: network, schedule and target.
        loss: the distance between the network's output and its target.
        weighting: the weight of each noise level.
        timesteps: how each batch's times are drawn.
        optimizer: from parameters to an optimizer.
        lr_scheduler: from an optimizer to its schedule, stepped every optimizer step.
        ema: how weights are averaged; None for no average.
        seed: every random number of the training is a function of it (see ``randomness``).
    """

    def __init__(
        self,
        denoiser: Denoiser,
        loss: Distance,
        weighting: Weighting,
        timesteps: TimestepRule,
        optimizer: Callable[..., Optimizer],
        lr_scheduler: Callable[[Optimizer], LRScheduler],
        ema: EMA | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.averaged: nn.Module | None = ema.copy_of(denoiser.net) if ema else None
        self.objective = Objective(loss, weighting)
        self.timesteps = timesteps
        self.optimizer_factory = optimizer
        self.lr_scheduler_factory = lr_scheduler
        self.ema = ema
        self.seed = seed
        self.val_loss = MeanMetric()
        self.val_loss_raw = MeanMetric()

    @property
    def best_denoiser(self) -> Denoiser:
        """The denoiser to sample from: with averaged weights where there are any."""
        return self.denoiser if self.averaged is None else self.denoiser.with_net(self.averaged)

    def training_step(self, batch: Batch, batch_idx: int) -> StepOutput:
        """Return the loss of one share of a global batch."""
        images, first, step = batch.images, batch.start, batch.step
        # What the network draws by itself (dropout) is the one thing drawn globally.
        torch.manual_seed(seed_of(self.seed, "network", step, self.global_rank))
        t, eps = self.draw(images, first, step)
        feed_back = bool(uniform_positions(0, 1, self.seed, "feed back", step) < 0.5)
        losses = self.objective(self.denoiser, images, t, eps, feed_back)
        return StepOutput(loss=losses.mean(), losses=losses.detach(), t=t)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add to the validation loss."""
        images, first = batch.images, batch.start
        self.val_loss.update(held_out_losses(self.best_denoiser, self.objective, images, first)[0])
        if self.averaged is not None:
            self.val_loss_raw.update(held_out_losses(self.denoiser, self.objective, images, first)[0])

    def on_validation_epoch_end(self) -> None:
        """Publish the validation loss to callbacks; they hand it to the loggers."""
        self.log("val/loss", self.val_loss, logger=False)
        if self.averaged is not None:
            self.log("val/loss_raw", self.val_loss_raw, logger=False)

    def draw(
        self, images: Float[Tensor, "batch channels h w"], first: int, step: int
    ) -> tuple[Int[Tensor, " batch"], Float[Tensor, "batch channels h w"]]:
        """Return times and noise for positions ``first``.. of the global batch of a step."""
        place, last = (self.seed, "train", step), first + len(images)
        t = self.timesteps(
            uniform_positions(first, last, *place, "t"),
            torch.arange(first, last),
            len(images) * self.trainer.world_size,
            self.denoiser.schedule.num_steps,
        )
        eps = normal_positions(tuple(images.shape[1:]), first, last, *place, "eps")
        return t.to(images.device), eps.to(images.device)

    def configure_optimizers(self) -> Any:
        """Build optimizer and learning-rate schedule.

        Raises:
            UserError: one of them refuses its arguments.
        """
        try:
            optimizer = self.optimizer_factory(self.denoiser.net.parameters())
            scheduler = self.lr_scheduler_factory(optimizer)
        except ValueError as error:
            raise UserError(f"optimizer or lr_scheduler: {error}") from error
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, then average: before any callback of this step, so that a checkpoint holds both."""
        super().optimizer_step(*args, **kwargs)
        if self.ema is not None and self.averaged is not None:
            self.ema.update(self.averaged, self.denoiser.net, self.trainer.global_step + 1)
