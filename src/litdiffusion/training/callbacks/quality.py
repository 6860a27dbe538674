"""The quality of generated images over the course of a run: FID and its relatives, on a small sample."""

from pathlib import Path

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import nn

from litdiffusion.diffusion import Sampler
from litdiffusion.evaluation.features import extract_shared
from litdiffusion.evaluation.reference import real_features
from litdiffusion.evaluation.sample_metrics import Reference, measured
from litdiffusion.reporting.images import to_uint8
from litdiffusion.sampling import sample_images
from litdiffusion.training.callbacks.attached import datamodule_of
from litdiffusion.training.module import LitDiffusion


class MeasureSamples(Callback):
    """Measure the run's sample metrics on images drawn with averaged weights; they join the row of the validation.

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

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure where it is due."""
        assert isinstance(pl_module, LitDiffusion)
        step = trainer.global_step
        if trainer.sanity_checking or (step % self.every_n_steps and step != trainer.max_steps):
            return
        network, data = self.features.to(pl_module.device), datamodule_of(trainer)
        images = sample_images(
            pl_module.ema_denoiser, self.sampler, self.num_images, self.seed, self.batch_size
        )
        samples = extract_shared(network, to_uint8(images), self.batch_size)
        splits = (real_features(data, split, network, self.cache) for split in ("train", "test"))
        found = measured(pl_module.sample_metrics, samples, Reference(*splits))
        device = pl_module.device
        pl_module.log_dict({name: torch.tensor(value, device=device) for name, value in found.items()})
