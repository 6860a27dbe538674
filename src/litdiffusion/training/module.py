"""The LightningModule: draws t and noise, asks the objective for the loss, keeps the average.

The mathematics is in ``diffusion``; what is logged, saved and shown is in ``callbacks``.
"""

import math
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
from litdiffusion.diffusion.devices import to_device
from litdiffusion.diffusion.likelihood import Variance
from litdiffusion.diffusion.timesteps import TimestepRule
from litdiffusion.errors import UserError
from litdiffusion.evaluation.bits_per_dim import bits_per_dim
from litdiffusion.evaluation.held_out import held_out_losses
from litdiffusion.randomness import normal_positions, seed_of, uniform_positions
from litdiffusion.training.ema import EMA


class StepOutput(TypedDict):
    """What a training step hands to the callbacks: the mean loss; each image's loss, time and weight, detached."""

    loss: Tensor
    losses: Float[Tensor, " batch"]
    t: Int[Tensor, " batch"]
    weights: Float[Tensor, " batch"]


class LitDiffusion(LightningModule):
    """Train a denoiser.

    Args:
        denoiser: network, schedule and target.
        objective: distance and weighting.
        timesteps: how each batch's times are drawn.
        optimizer: from parameters to an optimizer.
        lr_scheduler: from an optimizer to its schedule, stepped every optimizer step.
        ema: how weights are averaged; None for no average.
        label_dropout: share of the images whose label a class-conditional network is not told, so that it learns
            to draw without one too, as guidance needs (2207.12598).
        bits_per_dim_images: how many of the held-out images ``val/bits_per_dim`` is measured on; 0 for none.
        bits_per_dim_times: at how many times each; None for all T.
        seed: every random number of the training is a function of it (see ``randomness``).
    """

    def __init__(
        self,
        denoiser: Denoiser,
        objective: Objective,
        timesteps: TimestepRule,
        optimizer: Callable[..., Optimizer],
        lr_scheduler: Callable[[Optimizer], LRScheduler],
        ema: EMA | None = None,
        label_dropout: float = 0.1,
        bits_per_dim_images: int = 0,
        bits_per_dim_times: int | None = 10,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 0 <= label_dropout <= 1:
            raise ValueError(f"label_dropout={label_dropout}: must lie in [0, 1]")
        if bits_per_dim_images < 0 or (bits_per_dim_times or 2) < 2:
            raise ValueError(
                f"bits_per_dim_images={bits_per_dim_images}, bits_per_dim_times={bits_per_dim_times}: must be at"
                " least 0 and at least 2, or null for all times"
            )
        timesteps.check(denoiser.schedule.num_steps)
        self.denoiser = denoiser
        self.averaged: nn.Module | None = ema.copy_of(denoiser.net) if ema else None
        self.objective = objective
        self.timesteps = timesteps
        self.optimizer_factory = optimizer
        self.lr_scheduler_factory = lr_scheduler
        self.ema = ema
        self.label_dropout = label_dropout
        self.bits_per_dim_images = bits_per_dim_images
        self.bits_per_dim_times = bits_per_dim_times
        self.seed = seed
        self.val_loss = MeanMetric()
        self.val_loss_raw = MeanMetric()
        self.val_bits = MeanMetric()

    @property
    def best_denoiser(self) -> Denoiser:
        """The denoiser to sample from: with averaged weights where there are any."""
        return self.denoiser if self.averaged is None else self.denoiser.with_net(self.averaged)

    def setup(self, stage: str) -> None:
        """Check that a class-conditional network and the data speak of the same classes.

        Raises:
            UserError: they do not.
        """
        wanted, datamodule = self.denoiser.num_classes, getattr(self.trainer, "datamodule", None)
        if wanted is None or datamodule is None:
            return
        found = datamodule.num_classes
        if wanted != found:
            has = "no labels" if found is None else f"{found} classes"
            raise UserError(
                f"net.num_classes={wanted}, but the data has {has}: set net.num_classes={found or 'null'}"
            )

    def training_step(self, batch: Batch, batch_idx: int) -> StepOutput:
        """Return the loss of one share of a global batch."""
        images, first, step = batch.images, batch.start, batch.step
        # What the network draws by itself (dropout) is the one thing drawn globally.
        torch.manual_seed(seed_of(self.seed, "network", step, self.global_rank))
        t, eps = self.draw(images, first, step)
        feed_back = bool(uniform_positions(0, 1, self.seed, "feed back", step) < 0.5)
        labels = self.told_labels(batch)
        losses = self.objective(self.denoiser, images, t, eps, feed_back, labels)
        weights = self.timesteps.weights(t)
        loss = (weights * losses).mean()
        losses = losses.detach()
        if self.timesteps.learns:
            self.timesteps.observe(self._of_all_processes(t), self._of_all_processes(losses))
        return StepOutput(loss=loss, losses=losses, t=t, weights=weights)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add to the validation loss and to the bound."""
        images, first, labels = batch.images, batch.start, batch.labels
        best = self.best_denoiser
        self.val_loss.update(held_out_losses(best, self.objective, images, first, labels)[0])
        if self.averaged is not None:
            self.val_loss_raw.update(held_out_losses(self.denoiser, self.objective, images, first, labels)[0])
        measured = images[: max(0, self.bits_per_dim_images - first)]
        if len(measured):
            few = None if labels is None else labels[: len(measured)]
            variance: Variance = "learned" if best.learned_variance else "beta"
            bits = bits_per_dim(best, measured, first, self.bits_per_dim_times, variance, few)
            self.val_bits.update(bits)

    def on_validation_epoch_end(self) -> None:
        """Publish the validation loss to callbacks; they hand it to the loggers."""
        self.log("val/loss", self.val_loss, logger=False)
        if self.averaged is not None:
            self.log("val/loss_raw", self.val_loss_raw, logger=False)
        if self.bits_per_dim_images:
            self.log("val/bits_per_dim", self.val_bits, logger=False)

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
        return to_device(t, images.device), to_device(eps, images.device)

    def told_labels(self, batch: Batch) -> Int[Tensor, " batch"] | None:
        """Return the labels that the network is told: some are withheld, as ``num_classes``."""
        num_classes = self.denoiser.num_classes
        if num_classes is None or batch.labels is None:
            return None
        last = batch.start + len(batch.labels)
        coins = uniform_positions(batch.start, last, self.seed, "train", batch.step, "label")
        withheld = to_device(coins < self.label_dropout, batch.labels.device)
        return batch.labels.masked_fill(withheld, num_classes)

    def _of_all_processes(self, values: Tensor) -> Tensor:
        gathered = self.all_gather(values)
        assert isinstance(gathered, Tensor)  # as it was given
        return gathered.flatten()

    def configure_optimizers(self) -> Any:
        """Build optimizer and learning-rate schedule.

        Raises:
            UserError: one of them refuses its arguments.
        """
        try:
            optimizer = self.optimizer_factory(self.denoiser.net.parameters())
        except ValueError as error:
            raise UserError(f"optimizer: {error}") from error
        if not math.isfinite(lr := optimizer.defaults.get("lr", 0)):
            raise UserError(f"optimizer.lr={lr}: must be a finite number")
        try:
            scheduler = self.lr_scheduler_factory(optimizer)
        except ValueError as error:
            raise UserError(f"lr_scheduler: {error}") from error
        # Lightning takes every fused optimizer for one that unscales float16 gradients itself, and refuses to clip
        # for it, under bfloat16 as well, where nothing is scaled.
        if getattr(optimizer, "_step_supports_amp_scaling", False):
            optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]  # torch sets it untyped
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with the settings of this configuration's optimizer, where another run's checkpoint has others.

        The moments stay, and the learning rate keeps its place on its schedule. Without a change nothing differs by a
        bit.
        """
        [saved], [schedule] = checkpoint["optimizer_states"], checkpoint["lr_schedulers"]
        fresh = self.configure_optimizers()["optimizer"].param_groups
        for group, wanted in zip(saved["param_groups"], fresh, strict=True):
            lr = group["lr"] * (wanted["initial_lr"] / group["initial_lr"])
            group.update({**wanted, "lr": lr, "params": group["params"]})
        schedule["base_lrs"] = [group["initial_lr"] for group in fresh]

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, then average: before any callback of this step, so that a checkpoint holds both."""
        super().optimizer_step(*args, **kwargs)
        if self.ema is not None and self.averaged is not None:
            self.ema.update(self.averaged, self.denoiser.net, self.trainer.global_step + 1)
