"""python -m litdiffusion.sample: open a checkpoint, draw images, show how they came to be."""

import json
import time

import numpy as np
from jaxtyping import Float
from omegaconf import DictConfig
from torch import Tensor
from tqdm import tqdm

from litdiffusion.configuration.checks import validate
from litdiffusion.configuration.entry import entry_point
from litdiffusion.configuration.hardware import native_autocast, torch_device
from litdiffusion.configuration.nodes import build
from litdiffusion.diffusion import Sampler, Step
from litdiffusion.errors import UserError
from litdiffusion.files import whole_file, write_text
from litdiffusion.reporting.gif import pick_frames, save_gif
from litdiffusion.reporting.images import grid, save, to_uint8
from litdiffusion.runs.folder import absolute, writable_folder
from litdiffusion.runs.model import TrainedModel, load_model
from litdiffusion.training.memory import keep_freed_memory

GRID_IMAGES = 64


@entry_point("sample")
def main(cfg: DictConfig) -> None:
    """Draw images from a checkpoint into ``out``."""
    validate(cfg)
    device = torch_device(cfg.device)
    keep_freed_memory()
    model = load_model(absolute(cfg.ckpt), cfg.weights, device)
    sampler: Sampler = build(cfg.sampler, "sampler") if cfg.get("sampler") else model.default_sampler
    out = writable_folder("out", absolute(cfg.out))

    started = time.perf_counter()
    with native_autocast(device) as precision:
        images, frames = draw(model, sampler, cfg)
    seconds = time.perf_counter() - started

    save(grid(images[:GRID_IMAGES]), out / "grid.png")
    save_gif(frames, out / "denoising.gif")
    with whole_file(out / "samples.npz") as temporary:
        np.savez_compressed(temporary, images=to_uint8(images).permute(0, 2, 3, 1).numpy())
    report = {
        "ckpt": absolute(cfg.ckpt),
        "step": model.step,
        "weights": model.weights,
        "sampler": type(sampler).__name__.lower(),
        "num_steps": len(frame_times(model, sampler)) - 1,
        "num_images": cfg.num_images,
        "seed": cfg.seed,
        "device": str(device),
        "precision": precision,
        "wall_seconds": round(seconds, 2),
        "images_per_second": round(cfg.num_images / seconds, 2),
    }
    write_text(out / "sample.json", json.dumps(report, indent=2) + "\n")
    print(
        f"Drew {cfg.num_images} images in {seconds:.0f} s ({cfg.num_images / seconds:.1f} images/s). {out} holds"
        " grid.png, denoising.gif, samples.npz and sample.json."
    )


def draw(
    model: TrainedModel, sampler: Sampler, cfg: DictConfig
) -> tuple[Float[Tensor, "num_images channels h w"], list[Float[Tensor, "batch channels h w"]]]:
    """Return the images, and some moments of the first batch on its way to them."""
    times = frame_times(model, sampler)
    shown = {times[index] for index in pick_frames(len(times) - 1, cfg.frames)}
    frames: list[Tensor] = []
    batches = -(-cfg.num_images // cfg.batch_size)
    with tqdm(total=batches * (len(times) - 1), unit="step", desc="sampling") as bar:

        def watch(start: int, moment: Step) -> None:
            bar.update(moment.t < times[0])
            if start == 0 and moment.t in shown:
                frames.append(moment.x.float().cpu())

        images = model.sample(cfg.num_images, sampler, seed=cfg.seed, batch_size=cfg.batch_size, watch=watch)
    return images, frames


def frame_times(model: TrainedModel, sampler: Sampler) -> list[int]:
    """Return the sampler's grid, T first.

    Raises:
        UserError: more steps than the checkpoint's schedule has.
    """
    try:
        return sampler.times(model.denoiser.schedule)
    except ValueError as error:
        raise UserError(f"sampler.{error}: choose fewer") from error


if __name__ == "__main__":
    main()
