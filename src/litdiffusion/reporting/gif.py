"""The reverse process as an animated GIF of limited size."""

import io
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from litdiffusion.diffusion import SamplerOutput
from litdiffusion.reporting.images import PAPER, grid
from litdiffusion.system.files import whole_file
from litdiffusion.system.processes import gathered

GRAYS = (256, 128, 64, 48, 32, 24, 16, 12, 8, 6, 4)
COLOURS = (256, 128, 64, 48, 32)
FRAME_MILLISECONDS, LAST_MILLISECONDS = 50, 1500
MAX_IMAGES = 16
"""More would be too small to follow."""


class Film:
    """Keeps what is shown of a sampling process: the first images, and the estimates of x_0, at some of their times.

    Args:
        kept: which of the times to keep, by index; 0 is the noise.
    """

    def __init__(self, kept: Collection[int]) -> None:
        self._indices = set(kept)
        self._seen: Counter[int] = Counter()
        self._kept: list[tuple[int, SamplerOutput]] = []

    def watch(self, start: int, output: SamplerOutput) -> None:
        """Take the next output for the batch that begins with image ``start``."""
        index = self._seen[start]
        self._seen[start] += 1
        if index in self._indices and start < MAX_IMAGES:
            # Moved to the CPU at the end, since sampling would wait for each copy; a view would keep the batch.
            x, x0 = (
                each[: MAX_IMAGES - start].to(torch.float32, copy=True) for each in (output.x, output.x0)
            )
            self._kept.append((index, SamplerOutput(output.t, x, x0)))

    def steps(self) -> list[SamplerOutput]:
        """Return the kept times, in order, on the CPU. Every process must call this, and gets them all."""
        parts: dict[int, list[SamplerOutput]] = {}
        mine = [(index, SamplerOutput(kept.t, kept.x.cpu(), kept.x0.cpu())) for index, kept in self._kept]
        for index, kept in (each for of_one in gathered(mine) for each in of_one):
            parts.setdefault(index, []).append(kept)
        return [
            SamplerOutput(
                of_all[0].t, torch.cat([each.x for each in of_all]), torch.cat([each.x0 for each in of_all])
            )
            for _, of_all in sorted(parts.items())
        ]

    def frames(self) -> list[Float[Tensor, "batch channels h w"]]:
        """Return the first images at the kept times. Every process must call this, and gets them all."""
        return [step.x for step in self.steps()]


def pick_frames(num_steps: int, num_frames: int = 60) -> list[int]:
    """Choose evenly among a sampler's ``num_steps`` + 1 times, with the first and the last.

    Returns:
        Rising indices in 0..num_steps: ``num_frames``, or all where there are fewer.

    Raises:
        ValueError: ``num_steps`` is below 1, or ``num_frames`` below 2.
    """
    if num_steps < 1 or num_frames < 2:
        raise ValueError(f"cannot pick {num_frames} frames of {num_steps} steps: at least 2 frames, 1 step")
    last = min(num_frames - 1, num_steps)
    return [round(i * num_steps / last) for i in range(last + 1)]


def save_gif(
    frames: Sequence[Float[Tensor, "batch channel height width"]],
    path: Path,
    *,
    max_images: int = MAX_IMAGES,
    columns: int | None = None,
    max_bytes: int = 800_000,
) -> None:
    """Write frames in [-1, 1] as a looping GIF of grids that pauses on its last frame.

    Noise does not compress, and a GIF of it would take many megabytes. So the frames share ``max_bytes``, and each
    has as many shades as fit its share: few while all is noise, where it does not show, more as the images emerge,
    and all in the last frame. The file can be larger than ``max_bytes`` where the least shades (4 grays or 32
    colours) take more than that, as with large grids.

    Args:
        frames: batches of one shape, the noisiest first.
        path: the file, written whole or not at all.
        max_images: how many images of each batch are shown.
        columns: as in ``grid``.
        max_bytes: the size of the file, roughly.

    Raises:
        ValueError: there are no frames, their shapes differ, or ``grid`` refuses one.
    """
    if not frames:
        raise ValueError("a GIF needs at least one frame")
    if len({frame.shape for frame in frames}) > 1:
        raise ValueError(f"the frames of a GIF differ in shape: {sorted({tuple(f.shape) for f in frames})}")
    *moving, last = (grid(frame[:max_images], columns) for frame in frames)
    end = _shaded(last, 256)
    share = (max_bytes - _size(end)) // max(1, len(moving))
    pictures = [*(_within(picture, share) for picture in moving), end]
    with whole_file(path) as temporary:
        pictures[0].save(
            temporary,
            format="GIF",
            save_all=True,
            append_images=pictures[1:],
            duration=[FRAME_MILLISECONDS] * len(moving) + [LAST_MILLISECONDS],
            loop=0,
            disposal=1,
        )


def _within(picture: Image.Image, share: int) -> Image.Image:
    """Return the picture in as many shades as fit ``share`` bytes."""
    for shades in COLOURS if picture.mode == "RGB" else GRAYS:
        candidate = _shaded(picture, shades)
        if _size(candidate) <= share:
            break
    return candidate


def _size(picture: Image.Image) -> int:
    buffer = io.BytesIO()
    picture.save(buffer, format="GIF")
    return buffer.tell()


def _shaded(picture: Image.Image, shades: int) -> Image.Image:
    """Return the picture in evenly spaced grays, or in the colours that suit it best."""
    if picture.mode == "L":
        steps = shades - 1
        shaded = picture.point([255 - round(round(gray / 255 * steps) * 255 / steps) for gray in range(256)])
        # From white to black: Pillow reads a later frame of the opposite palette, its default, by the first's.
        shaded.putpalette([255 - index // 3 for index in range(768)])
        return shaded
    paletted = picture.quantize(shades, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    # The gutters share an entry with the lightest pixels: made white, it does not change from frame to frame.
    palette = paletted.getpalette() or []
    lightest = max(range(0, len(palette), 3), key=lambda entry: sum(palette[entry : entry + 3]))
    palette[lightest : lightest + 3] = [PAPER] * 3
    paletted.putpalette(palette)
    return paletted
