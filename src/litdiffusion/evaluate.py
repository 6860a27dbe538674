"""python -m litdiffusion.evaluate: open a checkpoint, measure it on images it has never seen.

Each measurement is a module of ``evaluation`` that returns flat names and numbers; here they are merged. Today they
are the held-out loss and the bound on the likelihood; image metrics join them.
"""

import litdiffusion.system.startup  # noqa: F401  # isort: skip

import json
import time
from collections.abc import Iterator
from typing import cast, get_args

from hydra.utils import instantiate
from omegaconf import DictConfig

from litdiffusion.configuration.checks import validate
from litdiffusion.configuration.entry import entry_point
from litdiffusion.configuration.hardware import native_autocast, torch_device
from litdiffusion.configuration.messages import one_line
from litdiffusion.configuration.nodes import build
from litdiffusion.configuration.targets import check_targets
from litdiffusion.data.datamodule import Batch, ImageDataModule, ValidationLoader
from litdiffusion.data.fingerprint import changes
from litdiffusion.data.sources import Source
from litdiffusion.diffusion import Denoiser
from litdiffusion.diffusion.likelihood import Variance
from litdiffusion.errors import UserError
from litdiffusion.evaluation.bits_per_dim import measured_bits
from litdiffusion.evaluation.held_out import measured_losses
from litdiffusion.runs.folder import absolute, writable_folder
from litdiffusion.runs.model import TrainedModel, load_model
from litdiffusion.system.files import write_text
from litdiffusion.system.launch import num_started, num_tasks
from litdiffusion.training.memory import keep_freed_memory


@entry_point("evaluate")
def main(cfg: DictConfig) -> None:
    """Measure a checkpoint; the last line printed is what ``out/metrics.json`` holds."""
    validate(cfg)
    check_bits(cfg)
    if num_started() > 1 or num_tasks() > 1:
        raise UserError("evaluate measures in one process: start it without torchrun or srun")
    device = torch_device(cfg.device)
    keep_freed_memory()
    model = load_model(absolute(cfg.ckpt, "ckpt"), cfg.weights, device, cfg.trust)
    denoiser = model.denoiser
    variance = bits_variance(cfg.bits_per_dim_variance, denoiser)
    source = data_source(cfg, model)
    out = writable_folder("out", absolute(cfg.out, "out"))

    started = time.perf_counter()
    held_out = HeldOut(source, denoiser, cfg.num_images, cfg.batch_size)
    if not cfg.get("data"):
        check_known_again(held_out.datamodule, model)
    with native_autocast(device) as precision:
        metrics = {
            **measured_losses(denoiser, model.objective, held_out),
            **measured_bits(denoiser, held_out, cfg.bits_per_dim_images, cfg.bits_per_dim_times, variance),
        }
    report = {
        **metrics,
        "ckpt": absolute(cfg.ckpt, "ckpt"),
        "step": model.step,
        "weights": model.weights,
        "data": source.name,
        "num_images": held_out.datamodule.num_held_out,
        "device": str(device),
        "precision": precision,
        "wall_seconds": round(time.perf_counter() - started, 2),
    }
    write_text(out / "metrics.json", json.dumps(report, indent=2) + "\n")
    print(json.dumps(report))


def data_source(cfg: DictConfig, model: TrainedModel) -> Source:
    """Return the data source that was asked for, or the one that the model was trained on.

    Raises:
        UserError: its images do not fit the model.
    """
    source: Source
    if cfg.get("data"):
        source = build(cfg.data, "data")
    else:
        sources = ("litdiffusion.data.sources",)
        check_targets(model.data_config, ours=sources, layers=(), kind=Source, trust=cfg.trust)
        try:
            source = instantiate(model.data_config, _convert_="all")
        except Exception as error:  # values from elsewhere can trip a constructor in any way
            reason = one_line(error.__cause__ or error)
            raise UserError(
                f"the checkpoint names no data to measure on ({reason}): give data=..."
            ) from error
        if not isinstance(source, Source):
            raise UserError("the checkpoint names no data to measure on: give data=...")
    shape = (source.channels, *source.image_size)
    if shape != model.denoiser.image_shape:
        raise UserError(
            f"data gives images of {list(shape)} (channels, height, width) and the model takes"
            f" {list(model.denoiser.image_shape)}: set data.channels and data.image_size"
        )
    return source


def check_known_again(datamodule: ImageDataModule, model: TrainedModel) -> None:
    """Check that images found where a checkpoint says are those beside which it was trained.

    They may have changed since; and a checkpoint from elsewhere may name a folder of this machine that has nothing
    to do with it.

    Raises:
        UserError: they are others.
    """
    if model.held_out is None or changes(model.held_out, datamodule.held_out_fingerprint()):
        raise UserError(
            f"{datamodule.source.name} does not hold the images that the checkpoint was trained beside: to measure"
            " on what is there all the same, give data=..."
        )


class HeldOut:
    """The first ``num_images`` held-out images, as finished batches on the model's device; as often as is asked.

    Raises:
        UserError: the data cannot be had, or its classes are not those of a class-conditional model.
    """

    def __init__(self, source: Source, denoiser: Denoiser, num_images: int, batch_size: int) -> None:
        self.datamodule = ImageDataModule(source, batch_size, seed=0, num_val=num_images)
        self.datamodule.prepare_data()
        self.datamodule.setup("validate")
        self.device = next(denoiser.parameters()).device
        known, found = denoiser.num_classes, self.datamodule.num_classes
        if known is not None and found is not None and known != found:
            raise UserError(
                f"data has {found} classes, and the model was trained on {known}: choose other data"
            )

    def __iter__(self) -> Iterator[Batch]:
        loader = self.datamodule.val_dataloader()
        assert isinstance(loader, ValidationLoader)  # and no empty list, since num_images is positive
        for batch in loader:
            labels = None if batch.labels is None else batch.labels.to(self.device)
            batch = batch._replace(images=batch.images.to(self.device), labels=labels)
            yield self.datamodule.finish(batch, training=False)


def check_bits(cfg: DictConfig) -> None:
    """Check what the bound is to be measured on.

    Raises:
        UserError: no such number of images or times.
    """
    images, times = cfg.bits_per_dim_images, cfg.bits_per_dim_times
    if type(images) is not int or images < 0:
        raise UserError(
            f"bits_per_dim_images={'null' if images is None else images}: must be a whole number, at least 0"
        )
    if times is not None and (type(times) is not int or times < 2):
        raise UserError(
            f"bits_per_dim_times={times}: must be a whole number, at least 2, or null for all the times there are"
        )


def bits_variance(asked: str | None, denoiser: Denoiser) -> Variance:
    """Return the variance of the model's steps: the one asked for, or what its network was trained for.

    Raises:
        UserError: there is no such variance, or the network does not give it.
    """
    if asked is None:
        return "learned" if denoiser.learned_variance else "beta"
    if asked == "learned" and not denoiser.learned_variance:
        raise UserError(
            "bits_per_dim_variance=learned: this network was trained without; choose beta or beta_tilde"
        )
    if asked not in get_args(Variance):
        raise UserError(f"bits_per_dim_variance={asked}: choose {', '.join(get_args(Variance))}")
    return cast(Variance, asked)


if __name__ == "__main__":
    main()
