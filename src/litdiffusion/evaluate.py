"""python -m litdiffusion.evaluate: measure a checkpoint, or images from anywhere, against a data set."""

import litdiffusion.system.startup  # isort: skip
import litdiffusion.configuration.questions  # noqa: F401  # isort: skip

import json
import time
from pathlib import Path
from typing import Any

import torch
from jaxtyping import UInt8
from lightning.fabric.utilities import move_data_to_device
from omegaconf import DictConfig
from torch import Tensor, nn
from tqdm import tqdm

from litdiffusion.configuration.checks import validate, whole_number
from litdiffusion.configuration.entry import entry_point
from litdiffusion.configuration.hardware import native_autocast, torch_device
from litdiffusion.configuration.nodes import build, refused
from litdiffusion.data.arrays import read_images
from litdiffusion.data.datamodule import ImageDataModule
from litdiffusion.data.sources import Source
from litdiffusion.diffusion import Sampler
from litdiffusion.errors import UserError
from litdiffusion.evaluation import Metric, Model, SampleMetric, listed, numbers
from litdiffusion.evaluation.comparison import compare, save_nearest
from litdiffusion.evaluation.features import require_features
from litdiffusion.evaluation.generated import drawn
from litdiffusion.evaluation.sources import chosen_source, held_out_images
from litdiffusion.inference import TrainedModel, load_model
from litdiffusion.reporting.images import save_each
from litdiffusion.runs.folder import absolute, results_folder
from litdiffusion.system.files import write_text
from litdiffusion.system.launch import num_started, num_tasks, process_rank
from litdiffusion.system.memory import keep_freed_memory
from litdiffusion.system.processes import rank_and_number, together

FEW_SAMPLES = 2000
"""FID of fewer images is mostly bias."""


@entry_point("evaluate")
def main(cfg: DictConfig) -> None:
    """Measure; the last line printed is what ``out/metrics.json`` holds."""
    validate(cfg)
    require_request(cfg)
    device = torch_device(cfg.device)
    keep_freed_memory()
    metrics, sample_metrics = listed(build(cfg.metrics, "metrics"))
    network: nn.Module = build(cfg.features, "features").to(device).eval()
    model = load_model(absolute(cfg.ckpt, "ckpt"), cfg.weights, device, cfg.trust) if cfg.ckpt else None
    source = chosen_source(cfg.get("data"), model, Path(absolute(cfg.paths.data, "paths.data")), cfg.trust)
    shape = (source.channels, *source.image_size)
    images = read_images(Path(absolute(cfg.images, "images")), shape) if cfg.images is not None else None
    sampler = chosen_sampler(cfg, model) if model is not None and cfg.num_images else None
    if model is not None:
        for metric in metrics.values():
            metric.to(device).require_support(model.denoiser)
    if images is not None or sampler is not None:
        require_features(network, shape)
    out = results_folder(cfg.out, ("metrics.json",), "metrics.json")

    started = time.perf_counter()
    report = origin(cfg, model)
    with together(device), native_autocast(device) as precision:
        if model is not None and cfg.num_held_out:
            report |= measure_held_out(cfg, model, source, metrics, device)
        if model is not None and sampler is not None:
            how_many = (cfg.num_images, cfg.seed, cfg.batch_size)
            images, request = drawn(model.denoiser, sampler, *how_many, out, origin(cfg, model))
            report |= request
        if images is not None:
            report |= measure_samples(cfg, images, source, sample_metrics, network, out)
    report |= {
        "data": source.name,
        "device": str(device),
        "precision": precision,
        "wall_seconds": round(time.perf_counter() - started, 2),
    }
    if process_rank() == 0:
        write_text(out / "metrics.json", json.dumps(report, indent=2) + "\n")
        print(json.dumps(report))


def require_request(cfg: DictConfig) -> None:
    """Check that it is clear what to measure.

    Raises:
        UserError: it is not.
    """
    if (cfg.ckpt is None) == (cfg.images is None):
        raise UserError("give either ckpt=FILE, a model to measure, or images=FILE, images from anywhere")
    if whole_number("num_images", cfg.num_images, 0) == 1:
        raise UserError("num_images=1: two are the least that can be measured; 0 draws none")
    if cfg.get("sampler") and not cfg.num_images:
        raise UserError("sampler: no images are drawn; say how many, as in num_images=5000")
    if num_tasks() > 1 and num_started() == 1:
        raise UserError(
            "srun has started several processes that know nothing of each other: start torchrun instead"
        )


def chosen_sampler(cfg: DictConfig, model: TrainedModel) -> Sampler:
    """Return the sampler that was asked for, or that of the checkpoint's run; one that fits the model."""
    sampler: Sampler = build(cfg.sampler, "sampler") if cfg.get("sampler") else model.default_sampler
    with refused("sampler"):
        sampler.require_support(model.denoiser)
        sampler.times(model.denoiser.schedule)
    return sampler


def origin(cfg: DictConfig, model: TrainedModel | None) -> dict[str, Any]:
    """Return what is measured."""
    if model is None:
        return {"images": absolute(cfg.images, "images")}
    return {"ckpt": absolute(cfg.ckpt, "ckpt"), "step": model.step, "weights": model.weights}


def measure_held_out(
    cfg: DictConfig, model: TrainedModel, source: Source, metrics: dict[str, Metric], device: torch.device
) -> dict[str, Any]:
    """Return the numbers of a model on held-out images."""
    data = held_out_images(source, model, cfg.num_held_out, cfg.batch_size, is_given=bool(cfg.get("data")))
    rank, _ = rank_and_number()
    for batch in tqdm(data.val_dataloader(), desc="measuring", unit="batch", disable=rank > 0):
        batch = data.finish(move_data_to_device(batch, device), training=False)
        for metric in metrics.values():
            metric.update(Model(model.denoiser, model.objective), batch)
    report: dict[str, Any] = numbers(metrics)
    for metric in metrics.values():
        with metric.sync_context():  # of all processes
            report |= metric.extent()
    return report | {"num_held_out": data.num_held_out, "held_out_split": "test"}


def measure_samples(
    cfg: DictConfig,
    images: UInt8[Tensor, "_ channels h w"],
    source: Source,
    metrics: dict[str, SampleMetric],
    network: nn.Module,
    out: Path,
) -> dict[str, Any]:
    """Return the numbers of generated images."""
    data = ImageDataModule(source, cfg.batch_size, seed=0)
    data.prepare_data()
    cache = Path(absolute(cfg.cache, "cache"))
    found = compare(metrics, images, data, network, cache, cfg.batch_size)
    biased = len(images) < FEW_SAMPLES
    lacking = [name for name, value in found.numbers.items() if value is None]
    if process_rank() == 0:
        save_nearest(metrics, images, data, out / "nearest.png")
        if cfg.pngs:
            save_each(images, out / "pngs")
        if biased:
            print(
                f"{len(images)} images: fewer than {FEW_SAMPLES} make FID larger than it is; compare at equal number"
            )
        if lacking:
            print(f"{', '.join(lacking)}: null, since there are fewer than {len(images)} test images")
    return {
        **found.numbers,
        "num_images": len(images),
        "biased": biased,
        "split": "train",
        "features": getattr(network, "name", type(network).__name__),
        "feature_hash": found.feature_hash,
    }


if __name__ == "__main__":
    main()
