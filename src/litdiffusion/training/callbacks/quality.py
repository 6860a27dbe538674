"""The quality of generated images over the course of a run: FID and its relatives, on a small sample."""

import logging
from pathlib import Path

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import nn

from litdiffusion.diffusion import Sampler
from litdiffusion.errors import UserError
from litdiffusion.evaluation.comparison import NothingToMeasureError, compare, to_pixels
from litdiffusion.evaluation.features import require_features
from litdiffusion.sampling import sample_images
from litdiffusion.training.callbacks.attached import datamodule_of
from litdiffusion.training.module import LitDiffusion

log = logging.getLogger(__name__)


class MeasureSamples(Callback):
    """Measure the run's sample metrics on images drawn with averaged weights; they join the row of the validation.

    Images of which no number would say anything, as a network may draw early, leave the numbers of that step out.

    Args:
        features: what images are compared by.
        sampler: how to sample.
        every_n_steps: optimizer steps between measurements, a multiple of ``trainer.val_check_interval``; the end is
            measured too.
        num_images: how many images; FID of few is larger than of many, so compare at equal number.
        cache: folder where the features of real images are kept.
        seed: of the noise; the same every time.
        batch_size: images at a time.
    """

    def __init__(
        self,
        features: nn.Module,
        sampler: Sampler,
        every_n_steps: int,
        cache: str,
        num_images: int = 1000,
        seed: int = 0,
        batch_size: int = 64,
    ) -> None:
        for name, value, least in (("every_n_steps", every_n_steps, 1), ("num_images", num_images, 2)):
            if value < least:
                raise ValueError(f"{name}={value}: must be at least {least}")
        self.features = features
        self.sampler = sampler
        self.every_n_steps = every_n_steps
        self.cache = Path(cache)
        self.num_images = num_images
        self.seed = seed
        self.batch_size = batch_size
        self.has_warned = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse before the training what cannot be measured during it.

        Raises:
            UserError: there is no metric of generated images, or the feature network does not take such images.
        """
        assert isinstance(pl_module, LitDiffusion)
        if not pl_module.sample_metrics:
            raise UserError("callbacks.measure_samples: no metric of generated images; add metrics=samples")
        require_features(self.features, pl_module.denoiser.image_shape)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure where it is due."""
        assert isinstance(pl_module, LitDiffusion)
        step = trainer.global_step
        if trainer.sanity_checking or (step % self.every_n_steps and step != trainer.max_steps):
            return
        how_many = (self.num_images, self.seed, self.batch_size)
        images = sample_images(pl_module.ema_denoiser, self.sampler, *how_many)
        real = (datamodule_of(trainer), self.features.to(pl_module.device), self.cache, self.batch_size)
        try:
            found = compare(pl_module.sample_metrics, to_pixels(images), *real).numbers
        except NothingToMeasureError as error:  # every process holds these images: all of them go on
            if not self.has_warned and trainer.is_global_zero:
                log.warning("step %d: no sample metrics: %s", step, error)
            self.has_warned = True
            return
        pl_module.log_dict({name: value for name, value in found.items() if value is not None})
