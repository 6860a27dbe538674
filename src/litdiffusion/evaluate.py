"""python -m litdiffusion.evaluate: open a checkpoint, measure it on images it has never seen.

Today that is the held-out loss. Image metrics join it here, and are computed in ``evaluation``.
"""

import json
import time

import torch
from hydra.utils import instantiate
from jaxtyping import Float, Int
from omegaconf import DictConfig
from torch import Tensor

from litdiffusion.configuration.checks import validate
from litdiffusion.configuration.entry import entry_point
from litdiffusion.configuration.hardware import native_autocast, torch_device
from litdiffusion.configuration.nodes import build
from litdiffusion.configuration.targets import check_targets
from litdiffusion.data.datamodule import ImageDataModule, ValidationLoader
from litdiffusion.data.sources import Source
from litdiffusion.errors import UserError
from litdiffusion.evaluation.held_out import held_out_losses, loss_by_time
from litdiffusion.files import write_text
from litdiffusion.runs.folder import absolute, writable_folder
from litdiffusion.runs.model import TrainedModel, load_model
from litdiffusion.training.memory import keep_freed_memory


@entry_point("evaluate")
def main(cfg: DictConfig) -> None:
    """Measure a checkpoint; the last line printed is what ``out/metrics.json`` holds."""
    validate(cfg)
    device = torch_device(cfg.device)
    keep_freed_memory()
    model = load_model(absolute(cfg.ckpt), cfg.weights, device)
    source = data_source(cfg, model)
    out = writable_folder("out", absolute(cfg.out))

    started = time.perf_counter()
    with native_autocast(device) as precision:
        losses, times = measure(model, source, cfg.num_images, cfg.batch_size)
    metrics = {
        "val/loss": float(losses.mean()),
        **loss_by_time(losses, times, model.denoiser.schedule.num_steps, "val/loss"),
        "num_images": len(losses),
        "ckpt": absolute(cfg.ckpt),
        "step": model.step,
        "weights": model.weights,
        "data": source.name,
        "device": str(device),
        "precision": precision,
        "wall_seconds": round(time.perf_counter() - started, 2),
    }
    write_text(out / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    print(json.dumps(metrics))


def data_source(cfg: DictConfig, model: TrainedModel) -> Source:
    """Return the data source that was asked for, or the one that the model was trained on.

    Raises:
        UserError: its images do not fit the model.
    """
    source: Source
    if cfg.get("data"):
        source = build(cfg.data, "data")
    else:
        check_targets(model.data_config, ours=("litdiffusion.data.sources",), layers=())
        source = instantiate(model.data_config, _convert_="all")
    shape = (source.channels, *source.image_size)
    if shape != model.denoiser.image_shape:
        raise UserError(
            f"data gives images of {list(shape)} (channels, height, width) and the model takes"
            f" {list(model.denoiser.image_shape)}: set data.channels and data.image_size"
        )
    return source


def measure(
    model: TrainedModel, source: Source, num_images: int, batch_size: int
) -> tuple[Float[Tensor, " images"], Int[Tensor, " images"]]:
    """Return loss and time of each of the first ``num_images`` held-out images."""
    datamodule = ImageDataModule(source, batch_size, seed=0, num_val=num_images)
    datamodule.prepare_data()
    datamodule.setup("validate")
    device = next(model.denoiser.parameters()).device
    results = []
    loader = datamodule.val_dataloader()
    assert isinstance(loader, ValidationLoader)  # and no empty list, since num_images is positive
    for batch in loader:
        images = datamodule.finish(batch._replace(images=batch.images.to(device)), training=False).images
        results.append(held_out_losses(model.denoiser, model.objective, images, batch.start))
    losses, times = zip(*results, strict=True)
    return torch.cat(losses).cpu(), torch.cat(times).cpu()


if __name__ == "__main__":
    main()
