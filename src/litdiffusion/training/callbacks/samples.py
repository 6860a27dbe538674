"""Pictures over the course of a run, from the same seeds every time, so that they show what training changes."""

from pathlib import Path

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from PIL.Image import Image

from litdiffusion.diffusion import Sampler, SamplerOutput
from litdiffusion.reporting import images as pictures
from litdiffusion.reporting.gif import Film, pick_frames, save_gif
from litdiffusion.reporting.steps import save_steps
from litdiffusion.sampling import sample_images
from litdiffusion.system.processes import share_of
from litdiffusion.training.callbacks.attached import datamodule_of, images_seen
from litdiffusion.training.callbacks.monitor import check_finite, clock_stopped
from litdiffusion.training.callbacks.progress import showing
from litdiffusion.training.loggers import RunLogger
from litdiffusion.training.module import LitDiffusion

STRIP_IMAGES = 4
BATCH_SIZE = 64


class SampleImages(Callback):
    """Save and log a noised strip at the start, a sample grid every so often, a denoising GIF at the end.

    Args:
        folder: where the pictures go.
        sampler: how to sample.
        every_n_steps: optimizer steps between grids.
        num_images: images in a grid.
        seed: of the noise; the same for every grid.
    """

    def __init__(
        self, folder: str, sampler: Sampler, every_n_steps: int, num_images: int = 64, seed: int = 0
    ) -> None:
        for name, value in (("every_n_steps", every_n_steps), ("num_images", num_images)):
            if value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")
        self.folder = Path(folder)
        self.sampler = sampler
        self.every_n_steps = every_n_steps
        self.num_images = num_images
        self.seed = seed

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw what the network is trained on: a few images, noised at several t."""
        if trainer.global_step > 0 or not trainer.is_global_zero:
            return
        assert isinstance(pl_module, LitDiffusion)
        few = datamodule_of(trainer).examples(STRIP_IMAGES)
        strip = pictures.noised_strip(pl_module.denoiser.schedule, few, seed=self.seed)
        self._show(trainer, "noised_strip", strip)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Sample where a grid is due."""
        stepped = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        last = trainer.global_step == trainer.max_steps
        if stepped and not last and trainer.global_step % self.every_n_steps == 0:
            with clock_stopped(trainer):
                self._sample(trainer, pl_module, f"step-{trainer.global_step:07d}", record=False)

    def finish(self, trainer: Trainer, module: LitDiffusion) -> None:
        """Sample once more when the run is over, and save the reverse process as a GIF."""
        self._sample(trainer, module, "grid", record=True)

    def _sample(self, trainer: Trainer, module: LightningModule, name: str, record: bool) -> None:
        assert isinstance(module, LitDiffusion)
        check_finite(trainer)
        module.to(trainer.strategy.root_device)  # Lightning moves it to the CPU when the training is over
        num_times = len(self.sampler.times(module.denoiser.schedule))
        film = Film(pick_frames(num_times - 1) if record else ())
        total = num_times * -(-len(share_of(self.num_images)) // BATCH_SIZE)
        # under the autocast of training
        with trainer.precision_plugin.forward_context(), showing(trainer, "sampling", total) as advance:

            def watch(start: int, output: SamplerOutput) -> None:
                film.watch(start, output)
                advance()

            samples = sample_images(
                module.ema_denoiser, self.sampler, self.num_images, self.seed, BATCH_SIZE, watch
            )
        steps = film.steps()
        if not trainer.is_global_zero:
            return
        self._show(trainer, name, pictures.grid(samples))
        if record:
            path = self.folder / "denoising.gif"
            save_gif([step.x for step in steps], path)
            self._log(trainer, path)
            save_steps(steps, self.folder / "denoising.npz")

    def _show(self, trainer: Trainer, name: str, image: Image) -> None:
        path = self.folder / f"{name}.png"
        pictures.save(image, path)
        self._log(trainer, path)

    def _log(self, trainer: Trainer, path: Path) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, RunLogger):
                logger.log_picture(path, trainer.global_step, images_seen(trainer))
