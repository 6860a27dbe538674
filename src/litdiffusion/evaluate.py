"""python -m litdiffusion.evaluate: open a checkpoint, measure it on held-out images."""

import litdiffusion.system.startup  # isort: skip
import litdiffusion.configuration.questions  # noqa: F401  # isort: skip

import json
import time
from typing import Any

from hydra.utils import instantiate
from lightning.fabric.utilities import move_data_to_device
from omegaconf import DictConfig
from tqdm import tqdm

from litdiffusion.configuration.allowlist import require_allowed
from litdiffusion.configuration.checks import validate
from litdiffusion.configuration.entry import entry_point
from litdiffusion.configuration.hardware import native_autocast, torch_device
from litdiffusion.configuration.messages import one_line
from litdiffusion.configuration.nodes import build
from litdiffusion.data.datamodule import ImageDataModule
from litdiffusion.data.fingerprint import changes
from litdiffusion.data.sources import Source
from litdiffusion.errors import UserError
from litdiffusion.evaluation import Model, listed, numbers
from litdiffusion.inference import TrainedModel, load_model
from litdiffusion.runs.folder import absolute, results_folder
from litdiffusion.system.files import write_text
from litdiffusion.system.launch import num_started, num_tasks
from litdiffusion.system.memory import keep_freed_memory


@entry_point("evaluate")
def main(cfg: DictConfig) -> None:
    """Measure a checkpoint; the last line printed is what ``out/metrics.json`` holds."""
    validate(cfg)
    if num_started() > 1 or num_tasks() > 1:
        raise UserError("evaluate measures in one process: start it without torchrun or srun")
    metrics = listed(build(cfg.metrics, "metrics"))
    device = torch_device(cfg.device)
    keep_freed_memory()
    model = load_model(absolute(cfg.ckpt, "ckpt"), cfg.weights, device, cfg.trust)
    for metric in metrics.values():
        metric.to(device).require_support(model.denoiser)
    source = data_source(cfg, model)
    out = results_folder(cfg.out, ("metrics.json",), "metrics.json")

    started = time.perf_counter()
    held_out = held_out_images(source, model, cfg.num_images, cfg.batch_size)
    if not cfg.get("data"):
        require_known_images(held_out, model)
    with native_autocast(device) as precision:
        for batch in tqdm(held_out.val_dataloader(), desc="measuring", unit="batch"):
            batch = held_out.finish(move_data_to_device(batch, device), training=False)
            for metric in metrics.values():
                metric.update(Model(model.denoiser, model.objective), batch)
    report: dict[str, Any] = numbers(metrics)
    for metric in metrics.values():
        report |= metric.extent()
    report |= {
        "ckpt": absolute(cfg.ckpt, "ckpt"),
        "step": model.step,
        "weights": model.weights,
        "data": source.name,
        "num_images": held_out.num_held_out,
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
        require_allowed(model.data_config, ours=sources, layers=(), kind=Source, trust=cfg.trust)
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


def held_out_images(source: Source, model: TrainedModel, num_images: int, batch_size: int) -> ImageDataModule:
    """Return the first ``num_images`` held-out images of a data source.

    Raises:
        UserError: the data cannot be had, or its classes are not those of a class-conditional model.
    """
    datamodule = ImageDataModule(source, batch_size, seed=0, num_val=num_images)
    datamodule.prepare_data()
    datamodule.setup("validate")
    known, found = model.denoiser.num_classes, datamodule.num_classes
    if known is not None and found is not None and known != found:
        raise UserError(f"data has {found} classes, and the model was trained on {known}: choose other data")
    return datamodule


def require_known_images(datamodule: ImageDataModule, model: TrainedModel) -> None:
    """Check that images found where a checkpoint says are those beside which it was trained.

    They may have changed since; and a checkpoint from elsewhere may name a folder of this machine that has nothing
    to do with it.

    Raises:
        UserError: they are others.
    """
    name, way_out = datamodule.source.name, "to measure on what is there all the same, give data=..."
    if model.held_out is None:
        raise UserError(
            f"no images of {name} were held out of the training (datamodule.num_val=0): {way_out}"
        )
    if changes(model.held_out, datamodule.held_out_fingerprint() or {}):
        raise UserError(f"{name} does not hold the images that the checkpoint was trained beside: {way_out}")


if __name__ == "__main__":
    main()
