"""python -m litdiffusion.sample: open a checkpoint, draw images, show how they came to be."""

import litdiffusion.system.startup  # isort: skip
import litdiffusion.configuration.questions  # noqa: F401  # isort: skip

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import Tensor
from tqdm import tqdm

from litdiffusion.configuration.checks import validate, whole_number
from litdiffusion.configuration.entry import entry_point
from litdiffusion.configuration.hardware import native_autocast, torch_device
from litdiffusion.configuration.messages import needs_value
from litdiffusion.configuration.nodes import build, refused, takes
from litdiffusion.data.pictures import read_given
from litdiffusion.diffusion import Sampler, SamplerOutput
from litdiffusion.diffusion.editing import Edit
from litdiffusion.diffusion.guidance import Guidance
from litdiffusion.errors import UserError
from litdiffusion.inference import TrainedModel, load_model
from litdiffusion.reporting.edits import edit_strip
from litdiffusion.reporting.gif import Film, pick_frames, save_gif
from litdiffusion.reporting.images import grid, save, to_uint8
from litdiffusion.runs.folder import absolute, results_folder
from litdiffusion.sampling import sample_images
from litdiffusion.system.files import whole_file, write_text
from litdiffusion.system.launch import process_rank
from litdiffusion.system.memory import keep_freed_memory
from litdiffusion.system.processes import share_of, together

GRID_IMAGES = 64
FILES = ("grid.png", "denoising.gif", "samples.npz", "sample.json")
PICTURES = ("image", "image2", "mask")
"""Keys that name pictures. An edit's node is completed by those of them that its class takes."""
EDIT_KEYS = (*PICTURES, "strength", "repeats")
"""Keys that mean nothing without an edit."""


@entry_point("sample")
def main(cfg: DictConfig) -> None:
    """Draw images from a checkpoint into ``out``."""
    validate(cfg, {"edit": PICTURES})
    whole_number("num_images", cfg.num_images, 1)
    require_edit(cfg)
    device = torch_device(cfg.device)
    keep_freed_memory()
    model = load_model(absolute(cfg.ckpt, "ckpt"), cfg.weights, device, cfg.trust)
    sampler: Sampler = build(cfg.sampler, "sampler") if cfg.get("sampler") else model.default_sampler
    given = read_pictures(cfg, model)
    edit: Edit | None = build(cfg.edit, "edit", **given) if cfg.edit else None
    guide = (
        load_model(absolute(cfg.guide_ckpt, "guide_ckpt"), cfg.weights, device, cfg.trust)
        if cfg.guide_ckpt
        else None
    )
    with refused("sampler"):
        sampler.require_support(model.denoiser)
    with refused():
        guidance = Guidance(
            plain(cfg.labels),
            plain(cfg.guidance_scale),
            plain(cfg.guidance_interval),
            guide.denoiser if guide else None,
        )
        guidance.require_support(model.denoiser)
        times = visited_times(model, sampler, edit)
    out = results_folder(cfg.out, FILES, "sample.json")

    started = time.perf_counter()
    with together(device), native_autocast(device) as precision:
        images, frames = draw(model, sampler, cfg, times, guidance, edit)
    seconds = time.perf_counter() - started
    if not images.isfinite().all():
        named = f"ckpt={cfg.ckpt}" + (f" guide_ckpt={cfg.guide_ckpt}" if guide else "")
        raise UserError(
            f"{named}: the images came out infinite or NaN, as from weights that are; use an earlier checkpoint, or"
            " the other weights (ema, raw)"
        )
    if process_rank() > 0:
        return

    save(edit_strip(given, images) if edit else grid(images[:GRID_IMAGES]), out / "grid.png")
    save_gif(frames, out / "denoising.gif")
    with whole_file(out / "samples.npz") as temporary:
        np.savez_compressed(temporary, images=to_uint8(images).permute(0, 2, 3, 1).numpy())
    report = {
        "ckpt": absolute(cfg.ckpt, "ckpt"),
        "step": model.step,
        "weights": model.weights,
        "sampler": type(sampler).__name__,
        "num_steps": len(times) - 1,
        "start": times[0],
        "num_images": cfg.num_images,
        "seed": cfg.seed,
        "labels": guidance.classes(model.denoiser),
        "class_names": model.class_names,
        "guidance_scale": guidance.scale,
        "guidance_interval": list(guidance.interval),
        "guide_ckpt": absolute(cfg.guide_ckpt, "guide_ckpt") if guide else None,
        "edit": type(edit).__name__.lower() if edit else None,
        **{key: plain(cfg[key]) for key in EDIT_KEYS if cfg[key] is not None},
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
    model: TrainedModel,
    sampler: Sampler,
    cfg: DictConfig,
    times: list[float],
    guidance: Guidance,
    edit: Edit | None,
) -> tuple[Float[Tensor, "num_images channels h w"], list[Float[Tensor, "batch channels h w"]]]:
    """Return the images, and the first of them at some of the ``times`` on their way."""
    film = Film(pick_frames(len(times) - 1, cfg.frames))
    batches = -(-len(share_of(cfg.num_images)) // cfg.batch_size)
    total = batches * (len(times) - 1)
    with tqdm(total=total, unit="step", desc="sampling", disable=process_rank() > 0) as bar:

        def watch(start: int, output: SamplerOutput) -> None:
            bar.update(output.t < times[0])
            film.watch(start, output)

        images = sample_images(
            model.denoiser, sampler, cfg.num_images, cfg.seed, cfg.batch_size, watch, guidance, edit
        )
        return images, film.frames()


def visited_times(model: TrainedModel, sampler: Sampler, edit: Edit | None) -> list[float]:
    """Return the times at which the sampler stops, the noisiest first: an edit may begin later."""
    schedule = model.denoiser.schedule
    start = 1.0 if edit is None else edit.start(sampler, schedule)
    return [t for t in sampler.times(schedule) if t <= start]


def require_edit(cfg: DictConfig) -> None:
    """Check that an edit has its pictures, and pictures their edit.

    Raises:
        UserError: they have not.
    """
    for key in EDIT_KEYS:
        taken = cfg.edit is not None and (key in cfg.edit or takes(cfg.edit, key))
        if taken and cfg[key] in (None, []):
            raise UserError(needs_value(key))
        if not taken and cfg[key] is not None:
            way_out = (
                "it is of no use to this edit"
                if cfg.edit
                else "it is for edit=inpaint, variation, interpolate or slerp"
            )
            raise UserError(f"{key}={cfg[key]}: {way_out}")


def read_pictures(cfg: DictConfig, model: TrainedModel) -> dict[str, Tensor]:
    """Return the pictures that an edit is given, by their keys, at the model's size: each [pictures, C, H, W].

    Raises:
        UserError: one cannot be read, or masks and images are not the same number.
    """
    named = {key: plain(cfg[key]) for key in PICTURES if cfg[key] is not None}
    paths = {
        key: [Path(absolute(each, key)) for each in (value if isinstance(value, list) else [value])]
        for key, value in named.items()
    }
    return read_given(paths, model.denoiser.image_shape)


def plain(value: Any) -> Any:
    """Return a value of the configuration as YAML has it."""
    return OmegaConf.to_container(value) if isinstance(value, ListConfig) else value


if __name__ == "__main__":
    main()
