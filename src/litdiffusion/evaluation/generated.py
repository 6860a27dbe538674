"""The images that a model is judged by: drawn once, in parts, so that an interruption loses little."""

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from torch import Tensor
from tqdm import tqdm

from litdiffusion.data.arrays import read_images
from litdiffusion.diffusion import Denoiser, Sampler, SamplerOutput
from litdiffusion.errors import UserError
from litdiffusion.evaluation.comparison import to_pixels
from litdiffusion.evaluation.features import module_hash
from litdiffusion.sampling import network_evaluations, sample_images
from litdiffusion.system.files import whole_file, write_text
from litdiffusion.system.processes import gathered, rank_and_number, share_of

log = logging.getLogger(__name__)

PART = 256
"""Images between two saves."""


def drawn(
    denoiser: Denoiser,
    sampler: Sampler,
    num_images: int,
    seed: int,
    batch_size: int,
    folder: Path,
    origin: Mapping[str, Any],
) -> tuple[UInt8[Tensor, "num_images channels h w"], dict[str, Any]]:
    """Draw images into ``folder/samples.npz``, or return those that are there; every process must call this.

    Args:
        denoiser: to sample from.
        sampler: how.
        num_images: how many.
        seed: of the noise.
        batch_size: images at a time.
        folder: holds ``samples.npz`` and ``samples.json``, and meanwhile ``parts/``.
        origin: what the denoiser is known by.

    Returns:
        The images, and what they depend on, as ``samples.json`` records it.

    Raises:
        UserError: the folder holds images that are not of this command; or those drawn are not finite.
    """
    rank, _ = rank_and_number()
    num_steps = len(sampler.times(denoiser.schedule)) - 1
    request = {
        **origin,
        "model_hash": module_hash(denoiser),  # a training repeated writes other weights at the same place
        "sampler": type(sampler).__name__,
        "num_steps": num_steps,
        "network_evaluations": network_evaluations(denoiser, sampler),
        "sampler_settings": {
            key: str(value) for key, value in vars(sampler).items() if not key.startswith("_")
        },
        "num_images": num_images,
        "seed": seed,
    }
    samples, note, parts = folder / "samples.npz", folder / "samples.json", folder / "parts"
    if gathered(samples.exists() and not note.exists())[0]:
        raise UserError(
            f"out={folder} holds a samples.npz that is not of this command: choose another folder"
        )
    if rank == 0 and note.exists() and _noted(note) != json.loads(json.dumps(request)):
        log.info("%s holds images of another request: they are replaced", folder)
        samples.unlink(missing_ok=True)
        shutil.rmtree(parts, ignore_errors=True)
        note.unlink()  # last, or a kill would leave parts of which nothing tells what they are
    is_done, count = gathered((samples.exists(), len(list(parts.glob("[0-9]*.npy")))))[0]
    if is_done:
        return read_images(samples), request
    if rank == 0:
        parts.mkdir(exist_ok=True)
        write_text(note, json.dumps(request, indent=2) + "\n")
    sizes = {start: min(PART, num_images - start) for start in range(0, num_images, PART)[count:]}
    total = num_steps * sum(-(-len(share_of(size)) // batch_size) for size in sizes.values())
    with tqdm(total=total, unit="step", desc="sampling", disable=rank > 0) as bar:

        def watch(start: int, output: SamplerOutput) -> None:
            bar.update(output.t < 1)

        for start, size in sizes.items():
            part = to_pixels(sample_images(denoiser, sampler, size, seed, batch_size, watch, first=start))
            if rank == 0:
                with whole_file(parts / f"{start:07d}.npy") as temporary:
                    np.save(temporary, part.permute(0, 2, 3, 1).numpy())
    if rank == 0:
        images = np.concatenate([np.load(parts / f"{start:07d}.npy") for start in range(0, num_images, PART)])
        with whole_file(samples) as temporary:
            np.savez_compressed(temporary, images=images)
        shutil.rmtree(parts)
    gathered(rank)  # the others wait for the file
    return read_images(samples), request


def _noted(note: Path) -> Any:
    """Return the request that a folder's images are of."""
    try:
        return json.loads(note.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
