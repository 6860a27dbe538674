"""Still pictures of image tensors: grids and captioned strips.

Images are floats in [-1, 1]; every picture maps that fixed range to 0..255 and nothing is ever autoscaled, so
two pictures can be compared. Pixels are enlarged by whole numbers, never smoothed.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from einops import rearrange, repeat
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from litdiffusion.diffusion.draws import Draws
from litdiffusion.diffusion.process import q_sample
from litdiffusion.diffusion.schedule import Schedule
from litdiffusion.system.files import whole_file

GUTTER = 2
PAPER, INK = 255, 60
FONT_SIZE = 13


def to_uint8(images: Float[Tensor, "*shape"]) -> UInt8[Tensor, "*shape"]:
    """Clamp to [-1, 1] and round to 0..255: the exact inverse of ``x / 127.5 - 1``.

    Raises:
        ValueError: NaN is among the values; it has no gray.
    """
    if images.isnan().any():
        raise ValueError(f"cannot show images that hold NaN ({int(images.isnan().sum())} values)")
    return ((images.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def grid(
    images: Float[Tensor, "batch channel height width"],
    columns: int | None = None,
    min_pixels: int = 56,
) -> Image.Image:
    """Lay images out row by row with thin gutters; ``columns`` defaults to a square, or one row for a few.

    Small images are enlarged by the smallest whole number that brings their shorter side to ``min_pixels``.

    Raises:
        ValueError: the batch is empty, has neither 1 nor 3 channels, or holds NaN.
    """
    _check(images)
    columns = _columns(len(images)) if columns is None else min(columns, len(images))
    if columns < 1:
        raise ValueError(f"a grid needs at least one column, not {columns}")
    tiles = _enlarge(images, min_pixels)
    height, width = tiles.shape[1:3]
    rows = -(-len(tiles) // columns)
    canvas = Image.new(
        _mode(images),
        (columns * (width + GUTTER) + GUTTER, rows * (height + GUTTER) + GUTTER),
        _shade(images, PAPER),
    )
    for index, tile in enumerate(tiles):
        row, column = divmod(index, columns)
        place = (GUTTER + column * (width + GUTTER), GUTTER + row * (height + GUTTER))
        canvas.paste(Image.fromarray(tile.numpy()), place)
    return canvas


def strip(
    columns: Sequence[Float[Tensor, "picture channel height width"]],
    captions: Sequence[str],
    min_pixels: int = 84,
) -> Image.Image:
    """Set columns of pictures side by side, each under its caption; row i shows picture i of every column.

    Raises:
        ValueError: the captions are not as many as the columns, or a column is one that ``grid`` refuses.
    """
    if len(columns) != len(captions):
        raise ValueError(f"{len(columns)} columns need as many captions, not {len(captions)}")
    if not columns:
        raise ValueError("a strip needs at least one column")
    font = ImageFont.load_default(FONT_SIZE)
    stacks = [grid(column, columns=1, min_pixels=min_pixels) for column in columns]
    text_width = math.ceil(max(font.getlength(caption) for caption in captions))
    text_height = math.ceil(sum(font.getmetrics()) if isinstance(font, ImageFont.FreeTypeFont) else FONT_SIZE)
    # Neighbouring stacks share a gutter; a caption that is wider than its picture spreads the columns.
    pitch = max(stacks[0].width - GUTTER, text_width + FONT_SIZE)
    head = text_height + 2 * GUTTER
    canvas = Image.new(
        stacks[0].mode,
        (pitch * len(stacks) + GUTTER, head + stacks[0].height),
        _shade(columns[0], PAPER),
    )
    draw = ImageDraw.Draw(canvas)
    for index, (stack, caption) in enumerate(zip(stacks, captions, strict=True)):
        middle = index * pitch + (pitch + GUTTER) // 2
        draw.text((middle, head // 2), caption, fill=_shade(columns[0], INK), font=font, anchor="mm")
        canvas.paste(stack, (middle - stack.width // 2, head))
    return canvas


def noised_strip(
    schedule: Schedule,
    images: Float[Tensor, "picture channel height width"],
    times: Sequence[float] = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0),
    seed: int = 0,
    min_pixels: int = 84,
) -> Image.Image:
    """Show x_t of each image at each of ``times`` in [0, 1].

    A picture keeps one eps along its row, so the row shows a single path x_t = alpha_t x_0 + sigma_t eps.

    Raises:
        ValueError: a time lies outside [0, 1], or the images are ones that ``grid`` refuses.
    """
    _check(images)
    for t in times:
        if not 0 <= t <= 1:
            raise ValueError(f"t = {t} lies outside [0, 1]")
    x0 = images.detach().float()
    eps = Draws.at(seed, "noised strip", start=0, stop=len(x0), device=x0.device).normal(
        "eps", tuple(x0.shape[1:])
    )
    noised = [q_sample(schedule, x0, float(t), eps) for t in times]
    return strip(noised, [f"t = {t:g}" for t in times], min_pixels)


def save(image: Image.Image, path: Path) -> None:
    """Write a picture, whole or not at all, in the format that the suffix of ``path`` names."""
    with whole_file(path) as temporary:
        image.save(temporary)


def _check(images: Tensor) -> None:
    if images.ndim != 4 or images.shape[1] not in (1, 3) or images.numel() == 0:
        shape = list(images.shape)
        raise ValueError(f"a picture needs images [batch, 1 or 3 channels, height, width], not {shape}")


def _columns(count: int) -> int:
    """A few images fit one row; more make a square."""
    return count if count <= 4 else math.ceil(math.sqrt(count))


def _enlarge(images: Tensor, min_pixels: int) -> Tensor:
    """Images as uint8 [batch, height, width] or [batch, height, width, 3], each pixel a square block."""
    scale = max(1, -(-min_pixels // min(images.shape[-2:])))
    tiles = repeat(to_uint8(images).cpu(), "b c h w -> b (h s1) (w s2) c", s1=scale, s2=scale)
    return rearrange(tiles, "b h w 1 -> b h w") if tiles.shape[-1] == 1 else tiles


def _mode(images: Tensor) -> str:
    return "L" if images.shape[1] == 1 else "RGB"


def _shade(images: Tensor, gray: int) -> int | tuple[int, int, int]:
    return gray if images.shape[1] == 1 else (gray, gray, gray)
