"""The LightningModule: asks the objective for the loss, steps the optimizer, keeps the average.

The mathematics is in ``diffusion``; what is logged, saved and shown is in ``callbacks``.
"""

import inspect
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any, TypedDict

import torch
from jaxtyping import Float
from lightning import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from litdiffusion.data.datamodule import Batch
from litdiffusion.diffusion import Denoiser, Draws, Objective, ObjectiveOutput
from litdiffusion.errors import UserError
from litdiffusion.evaluation import Metric, Model, SampleMetric, listed, numbers
from litdiffusion.training.ema import EMA

log = logging.getLogger(__name__)


class StepOutput(TypedDict):
    """What a training step hands to Lightning and to the callbacks: the loss, and all that the objective returned."""

    loss: Float[Tensor, ""]
    output: ObjectiveOutput


class LitDiffusion(LightningModule):
    """Train a denoiser.

    Args:
        denoiser: network, schedule and parametrization.
        objective: from a denoiser, a batch and its random numbers to the loss of each image.
        optimizer: from parameters to an optimizer.
        lr_scheduler: from an optimizer to its schedule, stepped every optimizer step.
        ema: how weights are averaged; None for no average.
        metrics: what validation measures, by name; None leaves one out.
        seed: every random number of the training is a function of it (see ``diffusion.draws``).
    """

    def __init__(
        self,
        denoiser: Denoiser,
        objective: Objective,
        optimizer: Callable[..., Optimizer],
        lr_scheduler: Callable[[Optimizer], LRScheduler],
        ema: EMA | None = None,
        metrics: Mapping[str, Metric | None] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        objective.require_support(denoiser)
        self.denoiser = denoiser
        self.ema_net: nn.Module | None = ema.copy_of(denoiser.core.net) if ema else None
        self.objective = objective
        self.optimizer_factory = optimizer
        self.lr_scheduler_factory = lr_scheduler
        self.ema = ema
        # In a plain dictionary, since they are no part of the model, nor of its checkpoints.
        self.metrics, self.sample_metrics = listed(metrics)
        for metric in self.metrics.values():
            metric.require_support(denoiser)
        self.seed = seed
        self.to_log: dict[bool, set[str]] = {True: set(), False: set()}

    @property
    def ema_denoiser(self) -> Denoiser:
        """The denoiser to sample from: with averaged weights where there are any."""
        return self.denoiser if self.ema_net is None else self.denoiser.with_net(self.ema_net)

    @property
    def all_metrics(self) -> dict[str, Metric | SampleMetric]:
        """The metrics of the run by name: of held-out images, then of generated ones."""
        return {**self.metrics, **self.sample_metrics}

    def setup(self, stage: str) -> None:
        """Check that a class-conditional network and the data have the same number of classes.

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
        draws = self.draws(batch)
        torch.manual_seed(draws.seed("network", self.global_rank))  # for dropout
        output: ObjectiveOutput = self.objective(self.denoiser, batch, draws)
        self.log_dict({name: value.detach() for name, value in (output.logs or {}).items()}, sync_dist=True)
        if self.objective.learns:
            self.objective.observe(self.denoiser, *self._of_all_processes(output))
        return StepOutput(loss=output.loss, output=output)

    def draws(self, batch: Batch) -> Draws:
        """Return the random numbers of a batch: functions of the seed, the step and each image's position."""
        start, stop = batch.start, batch.start + len(batch.images)
        batch_size = len(batch.images) * self.trainer.world_size
        place = (self.seed, "train", batch.step)
        return Draws.at(*place, start=start, stop=stop, device=batch.images.device, batch_size=batch_size)

    def on_validation_epoch_start(self) -> None:
        """Measure from the beginning."""
        for metric in self.metrics.values():
            metric.to(self.device).reset()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Measure a batch of held-out images."""
        model = Model(self.ema_denoiser, self.objective, None if self.ema_net is None else self.denoiser)
        for metric in self.metrics.values():
            metric.update(model, batch)

    def on_validation_epoch_end(self) -> None:
        """Publish what was measured, the same on every process."""
        self.log_dict(numbers(self.metrics), sync_dist=True, batch_size=1)

    def log(
        self,
        name: str,
        value: Any,
        prog_bar: bool = False,
        logger: bool | None = None,
        on_step: bool | None = None,
        on_epoch: bool | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Log a number as Lightning does; the monitor adds it to its next row, of training or of validation.

        Lightning itself would log it in a row of its own. The stream of training images has no end, so what is to be
        logged by epoch is logged by step; and a validation is one row, not one of each batch.
        """
        if (on_step or on_epoch) and "epoch" not in str(self._current_fx_name):
            on_step, on_epoch = self.training, not self.training
        super().log(name, value, prog_bar, False, on_step, on_epoch, *args, **kwargs)
        if logger is not False:
            self.to_log[self.training].add(name)

    def take_logged(self, training: bool) -> dict[str, Tensor]:
        """Return the latest values of what was logged since the last call, in training or in validation."""
        if not (names := self.to_log[training]):
            return {}
        found = {name: value for name, value in self.trainer.callback_metrics.items() if name in names}
        names.difference_update(found)
        return found

    def _of_all_processes(self, output: ObjectiveOutput) -> tuple[Tensor | None, Tensor]:
        t, losses = self.all_gather((output.t, output.losses.detach()))
        return None if t is None else t.flatten(), losses.flatten()

    def configure_optimizers(self) -> Any:
        """Build optimizer and learning-rate schedule.

        Raises:
            UserError: one of them refuses its arguments.
        """
        node = "optimizer"
        try:
            learned = (*self.denoiser.core.net.parameters(), *self.objective.parameters())
            optimizer = self.optimizer_factory(
                [parameter for parameter in learned if parameter.requires_grad]
            )
            if not math.isfinite(lr := optimizer.defaults.get("lr", 0)):
                raise UserError(f"optimizer.lr={lr}: must be a finite number")
            node = "lr_scheduler"
            scheduler = self.lr_scheduler_factory(optimizer)
        except (ValueError, TypeError, RuntimeError, ArithmeticError) as error:  # torch's raise them all
            raise UserError(f"{node}: {error}") from error
        # Lightning takes every fused optimizer for one that unscales float16 gradients itself, and refuses to clip
        # for it, under bfloat16 as well, where nothing is scaled.
        if getattr(optimizer, "_step_supports_amp_scaling", False):
            optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]  # torch sets it untyped
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with the settings of this configuration, where the checkpoint's are of others or of another torch.

        The moments stay, and the learning rate keeps its place on its schedule. Without a change nothing differs by a
        bit; where the schedule has changed at this step, a warning says so.
        """
        [saved], [schedule] = checkpoint["optimizer_states"], checkpoint["lr_schedulers"]
        configured = self.configure_optimizers()
        scheduler: LRScheduler = configured["lr_scheduler"]["scheduler"]
        step = schedule["last_epoch"]
        # OneCycleLR and CyclicLR move the momentum as well.
        moved = ("betas", "momentum") if getattr(scheduler, "cycle_momentum", False) else ()
        for index, wanted in enumerate(configured["optimizer"].param_groups):
            group = saved["param_groups"][index]
            before, base = group["initial_lr"], wanted["initial_lr"]
            lr = group["lr"] * (base / before) if before else base
            if isinstance(scheduler, LambdaLR):  # a function of the step
                now = base * scheduler.lr_lambdas[index](step)
                if before and self.global_rank == 0 and not math.isclose(lr, now):
                    log.warning(
                        "lr_scheduler has changed: the learning rate goes from %.3g to %.3g at step %d"
                        " (lr_scheduler.total_steps follows trainer.max_steps)",
                        *(lr, now, step),
                    )
                lr = now
            kept = {name: group[name] for name in ("params", *moved) if name in group}
            saved["param_groups"][index] = {**wanted, **kept, "lr": lr}
        state = scheduler.state_dict()
        settings = inspect.signature(type(scheduler)).parameters.keys() - {"last_epoch"} | {"base_lrs"}
        place = {name: value for name, value in schedule.items() if name in state.keys() - settings}
        checkpoint["lr_schedulers"] = [state | place]

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, then average: before any callback of this step, so that a checkpoint holds both."""
        super().optimizer_step(*args, **kwargs)
        if self.ema is not None and self.ema_net is not None:
            self.ema.update(self.ema_net, self.denoiser.core.net, self.trainer.global_step + 1)
