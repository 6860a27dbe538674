"""python -m litdiffusion.evaluate: measure a checkpoint, or images from anywhere, against a data set."""

import litdiffusion.system.startup  # isort: skip
import litdiffusion.configuration.questions  # noqa: F401  # isort: skip

import json
import time
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from jaxtyping import UInt8
from lightning.fabric.utilities import move_data_to_device
from omegaconf import DictConfig
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from litdiffusion.configuration.allowlist import require_allowed
from litdiffusion.configuration.checks import validate
from litdiffusion.configuration.entry import entry_point
from litdiffusion.configuration.hardware import native_autocast, torch_device
from litdiffusion.configuration.messages import one_line
from litdiffusion.configuration.nodes import build, refused
from litdiffusion.data.arrays import read_images
from litdiffusion.data.datamodule import ImageDataModule
from litdiffusion.data.fingerprint import changes
from litdiffusion.data.sources import FashionMNIST, Source
from litdiffusion.data.stores import to_float
from litdiffusion.diffusion import Denoiser, Sampler
from litdiffusion.errors import UserError
from litdiffusion.evaluation import Copying, Metric, Model, SampleMetric, listed, numbers
from litdiffusion.evaluation.features import extract_shared, feature_hash
from litdiffusion.evaluation.generated import drawn
from litdiffusion.evaluation.reference import real_features
from litdiffusion.evaluation.sample_metrics import Reference, measured
from litdiffusion.inference import TrainedModel, load_model
from litdiffusion.reporting.images import grid, save
from litdiffusion.runs.folder import absolute, results_folder
from litdiffusion.sampling import sample_images
from litdiffusion.system.files import write_text
from litdiffusion.system.launch import num_started, num_tasks, process_rank
from litdiffusion.system.memory import keep_freed_memory
from litdiffusion.system.processes import rank_and_number, together

FEW_SAMPLES = 2000
"""FID of fewer images is mostly bias."""
PAIRS = 16
"""Generated images shown above their nearest training images."""


@entry_point("evaluate")
def main(cfg: DictConfig) -> None:
    """Measure; the last line printed is what ``out/metrics.json`` holds."""
    validate(cfg)
    if (cfg.ckpt is None) == (cfg.images is None):
        raise UserError("give either ckpt=FILE, a model to measure, or images=FILE, images from anywhere")
    if cfg.get("sampler") and not cfg.num_images:
        raise UserError("sampler: no images are drawn; say how many, as in num_images=5000")
    if num_tasks() > 1 and num_started() == 1:
        raise UserError(
            "srun has started several processes that know nothing of each other: start torchrun instead"
        )
    device = torch_device(cfg.device)
    keep_freed_memory()
    metrics, sample_metrics = listed(build(cfg.metrics, "metrics"))
    model = load_model(absolute(cfg.ckpt, "ckpt"), cfg.weights, device, cfg.trust) if cfg.ckpt else None
    if model is not None:
        for metric in metrics.values():
            metric.to(device).require_support(model.denoiser)
    source = data_source(cfg, model)
    out = results_folder(cfg.out, ("metrics.json",), "metrics.json")
    started = time.perf_counter()
    report: dict[str, Any] = {}
    with together(device), native_autocast(device) as precision:
        if model is not None and cfg.num_held_out:
            report |= measure_held_out(cfg, model, source, metrics, device)
        if cfg.images is not None or cfg.num_images:
            report |= measure_samples(cfg, model, source, sample_metrics, device, out)
    report |= {
        "data": source.name,
        "device": str(device),
        "precision": precision,
        "wall_seconds": round(time.perf_counter() - started, 2),
    }
    if process_rank() == 0:
        write_text(out / "metrics.json", json.dumps(report, indent=2) + "\n")
        print(json.dumps(report))


def measure_held_out(
    cfg: DictConfig, model: TrainedModel, source: Source, metrics: dict[str, Metric], device: torch.device
) -> dict[str, Any]:
    """Return the numbers of a model on held-out images."""
    data = held_out_images(source, model, cfg.num_held_out, cfg.batch_size)
    if not cfg.get("data"):
        require_known_images(data, model)
    rank, _ = rank_and_number()
    for batch in tqdm(data.val_dataloader(), desc="measuring", unit="batch", disable=rank > 0):
        batch = data.finish(move_data_to_device(batch, device), training=False)
        for metric in metrics.values():
            metric.update(Model(model.denoiser, model.objective), batch)
    report: dict[str, Any] = numbers(metrics)
    for metric in metrics.values():
        report |= metric.extent()
    return report | {**of_model(cfg, model), "num_held_out": data.num_held_out}


def measure_samples(
    cfg: DictConfig,
    model: TrainedModel | None,
    source: Source,
    metrics: dict[str, SampleMetric],
    device: torch.device,
    out: Path,
) -> dict[str, Any]:
    """Return the numbers of generated images, and what they depend on."""
    network: nn.Module = build(cfg.features, "features").to(device).eval()
    if model is None:
        images, origin = (
            read_images(Path(absolute(cfg.images, "images"))),
            {"images": absolute(cfg.images, "images")},
        )
        if (shape := tuple(images.shape[1:])) != (wanted := (source.channels, *source.image_size)):
            raise UserError(
                f"images={cfg.images} are {list(shape)} (channels, height, width), and {source.name} is"
                f" {list(wanted)}: give data=... of that size"
            )
    else:
        images, origin = draw(cfg, model, out)
    data = ImageDataModule(source, cfg.batch_size, seed=0)
    data.prepare_data()
    cache = Path(absolute(cfg.cache, "cache"))
    samples = extract_shared(network, images, cfg.batch_size)
    reference = Reference(*(real_features(data, split, network, cache) for split in ("train", "test")))
    report: dict[str, Any] = measured(metrics, samples, reference)
    if process_rank() == 0:
        for metric in metrics.values():
            if isinstance(metric, Copying):
                save_nearest(metric, images, data, out / "nearest.png")
        if cfg.pngs:
            save_singly(images, out / "pngs")
    biased = len(images) < FEW_SAMPLES
    if biased:
        print(
            f"{len(images)} images: fewer than {FEW_SAMPLES} make FID larger than it is; compare at equal number"
        )
    return report | {
        **origin,
        "num_images": len(images),
        "biased": biased,
        "split": "train",
        "features": type(network).__name__,
        "feature_hash": feature_hash(network),
    }


def draw(
    cfg: DictConfig, model: TrainedModel, out: Path
) -> tuple[UInt8[Tensor, "num_images channels h w"], dict[str, Any]]:
    """Return the images that a model is judged by, and what they depend on."""
    sampler: Sampler = build(cfg.sampler, "sampler") if cfg.get("sampler") else model.default_sampler
    with refused("sampler"):
        sampler.require_support(model.denoiser)
        times = sampler.times(model.denoiser.schedule)
    request = {
        **of_model(cfg, model),
        "model_hash": feature_hash(
            model.denoiser
        ),  # a training repeated writes other weights at the same place
        "sampler": type(sampler).__name__,
        "num_steps": len(times) - 1,
        "network_evaluations": network_evaluations(model.denoiser, sampler),
        "sampler_settings": {
            key: str(value) for key, value in vars(sampler).items() if not key.startswith("_")
        },
        "num_images": cfg.num_images,
        "seed": cfg.seed,
    }
    drew = drawn(model.denoiser, sampler, cfg.num_images, cfg.seed, cfg.batch_size, out, request)
    return drew, request


def network_evaluations(denoiser: Denoiser, sampler: Sampler) -> int:
    """Return how often a sampler asks the network for one image, counted on one."""
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    hook = denoiser.core.net.register_forward_hook(count)
    try:
        sample_images(denoiser, sampler, num_images=rank_and_number()[1], seed=0)
    finally:
        hook.remove()
    return calls


def of_model(cfg: DictConfig, model: TrainedModel) -> dict[str, Any]:
    """Return what was measured."""
    return {"ckpt": absolute(cfg.ckpt, "ckpt"), "step": model.step, "weights": model.weights}


def save_nearest(
    metric: Copying, images: UInt8[Tensor, "n c h w"], data: ImageDataModule, path: Path
) -> None:
    """Save the generated images that are nearest to a training image, each above that one."""
    assert metric.nearest is not None
    closest = metric.nearest.distances.argsort()[:PAIRS]
    train = data.read("train", metric.nearest.indices[closest].tolist())
    pairs = torch.cat(
        [torch.stack((images[i], real)) for i, real in zip(closest.tolist(), train, strict=True)]
    )
    rows = torch.cat((pairs[::2], pairs[1::2]))
    save(grid(to_float(rows), columns=len(closest)), path)


def save_singly(images: UInt8[Tensor, "n c h w"], folder: Path) -> None:
    """Save each image as a PNG of its own, under its number."""
    folder.mkdir(exist_ok=True)
    for number, pixels in enumerate(images.permute(0, 2, 3, 1).numpy()):
        Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels).save(
            folder / f"{number:06d}.png"
        )


def data_source(cfg: DictConfig, model: TrainedModel | None) -> Source:
    """Return the data source that was asked for, or the one that the model was trained on, or Fashion-MNIST.

    Raises:
        UserError: its images do not fit the model.
    """
    source: Source
    if cfg.get("data"):
        source = build(cfg.data, "data")
    elif model is None:
        return FashionMNIST(Path(absolute(cfg.paths.data, "paths.data")) / "fashion-mnist")
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
    if model is not None and shape != model.denoiser.image_shape:
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
