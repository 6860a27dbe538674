"""The images that a model is judged by: drawn once, in parts, so that an interruption loses little."""

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor
from tqdm import tqdm

from litdiffusion.data.arrays import read_images
from litdiffusion.diffusion import Denoiser, Sampler, SamplerOutput
from litdiffusion.errors import UserError
from litdiffusion.reporting.images import to_uint8
from litdiffusion.sampling import sample_images
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
    request: Mapping[str, Any],
) -> UInt8[Tensor, "num_images channels h w"]:
    """Draw images into ``folder/samples.npz``, or return those that are there; every process must call this.

    Args:
        denoiser: to sample from.
        sampler: how.
        num_images: how many.
        seed: of the noise.
        batch_size: images at a time.
        folder: holds ``samples.npz`` and ``samples.json``, and meanwhile ``parts/``.
        request: what the images depend on, as ``samples.json`` records it.

    Raises:
        UserError: the folder holds images that are not of this command, or those drawn are not finite.
    """
    rank, _ = rank_and_number()
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
    is_done, count = gathered((samples.exists(), len(list(parts.glob("*.npy")))))[0]
    if is_done:
        return read_images(samples)
    if rank == 0:
        parts.mkdir(exist_ok=True)
        write_text(note, json.dumps(request, indent=2) + "\n")
    starts = range(0, num_images, PART)
    steps = len(sampler.times(denoiser.schedule)) - 1
    images = [np.load(parts / f"{start:07d}.npy") for start in starts[:count]] if rank == 0 else []
    total = (
        sum(-(-len(share_of(min(PART, num_images - start))) // batch_size) for start in starts[count:])
        * steps
    )
    with tqdm(total=total, unit="step", desc="sampling", disable=rank > 0) as bar:

        def watch(start: int, output: SamplerOutput) -> None:
            bar.update(output.t < 1)

        for start in starts[count:]:
            size = min(PART, num_images - start)
            part = sample_images(denoiser, sampler, size, seed, batch_size, watch, first=start)
            if not part.isfinite().all():
                raise UserError(
                    "the images came out infinite or NaN: use an earlier checkpoint, or weights=raw"
                )
            if rank == 0:
                images.append(to_uint8(part).permute(0, 2, 3, 1).numpy())
                with whole_file(parts / f"{start:07d}.npy") as temporary:
                    np.save(temporary, images[-1])
    if rank == 0:
        with whole_file(samples) as temporary:
            np.savez_compressed(temporary, images=np.concatenate(images))
        shutil.rmtree(parts)
    found = gathered(np.concatenate(images) if rank == 0 else None)[0]
    assert found is not None
    return torch.from_numpy(found).permute(0, 3, 1, 2).contiguous()


def _noted(note: Path) -> Any:
    """Return the request that a folder's images are of."""
    try:
        return json.loads(note.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
