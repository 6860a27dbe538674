"""The reverse process as an animated GIF of modest size."""

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


MAX_IMAGES = 16
"""More would be too small to follow."""


class Film:
    """Watches images come out of the noise, and keeps what a GIF shows of the first ones.

    Args:
        moments: which moments to keep, counted from the noise (0).
    """

    def __init__(self, moments: Collection[int]) -> None:
        self._moments = set(moments)
        self._seen: Counter[int] = Counter()
        self._kept: list[tuple[int, Float[Tensor, "batch channels h w"]]] = []

    def watch(self, start: int, output: SamplerOutput) -> None:
        """Keep this moment of this batch, if it is to be shown."""
        index = self._seen[start]
        self._seen[start] += 1
        if index in self._moments and start < MAX_IMAGES:
            # On the CPU only when all is drawn: sampling would wait for each. A view would keep the whole batch.
            self._kept.append((index, output.x[: MAX_IMAGES - start].to(torch.float32, copy=True)))

    def frames(self) -> list[Float[Tensor, "batch channels h w"]]:
        """Return the moments in order, each of the first images; every process must call this, each gets all."""
        parts: dict[int, list[Tensor]] = {}
        mine = [(index, images.cpu()) for index, images in self._kept]
        for index, images in (each for kept in gathered(mine) for each in kept):
            parts.setdefault(index, []).append(images)
        return [torch.cat(parts[index]) for index in sorted(parts)]


def pick_frames(num_steps: int, num_frames: int = 60) -> list[int]:
    """Choose which of a sampler's ``num_steps`` + 1 moments to show: evenly spaced, the first and the last too.

    Returns:
        Rising indices in 0..num_steps, ``num_frames`` of them or as many as there are.

    Raises:
        ValueError: there are no steps, or fewer than two frames are asked for.
    """
    if num_steps < 1 or num_frames < 2:
        raise ValueError(f"cannot pick {num_frames} frames of {num_steps} steps: at least 2 frames, 1 step")
    if num_steps < num_frames:
        return list(range(num_steps + 1))
    return [round(i * num_steps / (num_frames - 1)) for i in range(num_frames)]


def save_gif(
    frames: Sequence[Float[Tensor, "batch channel height width"]],
    path: Path,
    *,
    max_images: int = MAX_IMAGES,
    columns: int | None = None,
    min_pixels: int = 56,
    max_bytes: int = 800_000,
    milliseconds: int = 50,
    hold_milliseconds: int = 1500,
) -> None:
    """Write frames in [-1, 1] as a looping GIF of grids; the last frame stays for ``hold_milliseconds``.

    Noise does not compress, and a GIF of it would take many megabytes. So ``max_bytes`` is shared among the
    frames and each gets as many shades as fit its share: few while all is noise, where nobody can tell, and
    more as the picture clears. The last frame has them all. No frame goes below 4 grays or 32 colours, so
    large grids and colour may take more than ``max_bytes``.

    Args:
        frames: batches of one shape, the noisiest first.
        path: the file, written whole or not at all.
        max_images: images of each batch that are shown.
        columns: as in ``grid``.
        min_pixels: as in ``grid``.
        max_bytes: the size of the file, within some tenths.
        milliseconds: time for each frame but the last; GIF counts in hundredths of a second.
        hold_milliseconds: time for the last frame.

    Raises:
        ValueError: there are no frames, their shapes differ, or one of them is refused by ``grid``.
    """
    if not frames:
        raise ValueError("a GIF needs at least one frame")
    if len({frame.shape for frame in frames}) > 1:
        raise ValueError(f"the frames of a GIF differ in shape: {sorted({tuple(f.shape) for f in frames})}")
    *moving, last = (grid(frame[:max_images], columns, min_pixels) for frame in frames)
    end = _shaded(last, 256)
    share = (max_bytes - _size(end)) // max(1, len(moving))
    pictures = [*(_within(picture, share) for picture in moving), end]
    with whole_file(path) as temporary:
        pictures[0].save(
            temporary,
            format="GIF",
            save_all=True,
            append_images=pictures[1:],
            duration=[milliseconds] * len(moving) + [hold_milliseconds],
            loop=0,
            disposal=1,
        )


def _within(picture: Image.Image, share: int) -> Image.Image:
    """The picture in as many shades as its share of bytes allows."""
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
    """Grays are spaced evenly from black to white; colours are chosen to suit the picture."""
    if picture.mode == "L":
        steps = shades - 1
        shaded = picture.point(
            [255 - round(round(value / 255 * steps) * 255 / steps) for value in range(256)]
        )
        # White first: Pillow reads a later frame whose palette runs from black to white with the first's palette.
        shaded.putpalette([255 - index // 3 for index in range(768)])
        return shaded
    paletted = picture.quantize(shades, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    # The gutters' white shares its palette entry with the lightest pixels, and would change from frame to frame.
    palette = paletted.getpalette() or []
    lightest = max(range(0, len(palette), 3), key=lambda entry: sum(palette[entry : entry + 3]))
    palette[lightest : lightest + 3] = [PAPER] * 3
    paletted.putpalette(palette)
    return paletted
