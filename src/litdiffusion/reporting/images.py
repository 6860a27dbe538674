"""Grids and captioned strips of images.

Images are floats in [-1, 1]; every picture maps that range to 0..255, whatever the images hold, so that two pictures
can be compared. Small images are enlarged by a whole number and not smoothed.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from litdiffusion.diffusion.draws import Draws
from litdiffusion.diffusion.process import q_sample
from litdiffusion.diffusion.schedule import Schedule
from litdiffusion.system.files import whole_file

GUTTER = 2
PAPER = 255
FONT_SIZE = 13
CAPTION_HEIGHT = 20
NOISED_TIMES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


def to_uint8(images: Float[Tensor, "*shape"]) -> UInt8[Tensor, "*shape"]:
    """Clamp to [-1, 1] and round to 0..255: the exact inverse of ``x / 127.5 - 1``.

    Raises:
        ValueError: a value is NaN.
    """
    if images.isnan().any():
        raise ValueError(f"cannot show images that hold NaN ({int(images.isnan().sum())} values)")
    return ((images.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def grid(
    images: Float[Tensor, "batch channel height width"],
    columns: int | None = None,
    min_pixels: int = 56,
) -> Image.Image:
    """Lay images out row by row with thin gutters; by default up to four in one row, more in a square.

    Small images are enlarged by the smallest whole number that brings their shorter side to ``min_pixels``.

    Raises:
        ValueError: the batch is empty, has neither 1 nor 3 channels, or holds NaN; or ``columns`` is below 1.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3) or images.numel() == 0:
        shape = list(images.shape)
        raise ValueError(f"a picture needs images [batch, 1 or 3 channels, height, width], not {shape}")
    count = len(images)
    if columns is None:
        columns = 4 if count <= 4 else math.ceil(math.sqrt(count))
    columns = min(columns, count)
    if columns < 1:
        raise ValueError(f"a grid needs at least one column, not {columns}")
    scale = max(1, -(-min_pixels // min(images.shape[-2:])))
    tiles = repeat(to_uint8(images).cpu(), "n c h w -> n c (h s1) (w s2)", s1=scale, s2=scale)
    # A gutter right of and below each tile, and blank tiles to fill the last row.
    tiles = F.pad(tiles, (0, GUTTER, 0, GUTTER, 0, 0, 0, -count % columns), value=PAPER)
    pixels = rearrange(tiles, "(rows columns) c h w -> c (rows h) (columns w)", columns=columns)
    pixels = F.pad(pixels, (GUTTER, 0, GUTTER, 0), value=PAPER)
    return Image.fromarray(pixels.movedim(0, -1).squeeze(-1).numpy())


def strip(
    columns: Sequence[Float[Tensor, "picture channel height width"]], captions: Sequence[str]
) -> Image.Image:
    """Place columns of images side by side, a caption above each; row i shows image i of every column.

    Raises:
        ValueError: there are no columns or not as many captions, or ``grid`` refuses a column.
    """
    if not columns or len(columns) != len(captions):
        raise ValueError(
            f"a strip needs columns and a caption for each: {len(columns)}, {len(captions)} given"
        )
    font = ImageFont.load_default(FONT_SIZE)
    stacks = [grid(column, columns=1, min_pixels=84) for column in columns]
    # Neighbouring columns share a gutter; a caption wider than its images spreads the columns.
    text_width = math.ceil(max(font.getlength(caption) for caption in captions))
    pitch = max(stacks[0].width - GUTTER, text_width + FONT_SIZE)
    size = (pitch * len(stacks) + GUTTER, CAPTION_HEIGHT + stacks[0].height)
    canvas = Image.new(stacks[0].mode, size, "white")
    draw = ImageDraw.Draw(canvas)
    for index, (stack, caption) in enumerate(zip(stacks, captions, strict=True)):
        middle = index * pitch + (pitch + GUTTER) // 2
        draw.text((middle, CAPTION_HEIGHT // 2), caption, fill="#3c3c3c", font=font, anchor="mm")
        canvas.paste(stack, (middle - stack.width // 2, CAPTION_HEIGHT))
    return canvas


def noised_strip(
    schedule: Schedule, images: Float[Tensor, "picture channel height width"], seed: int = 0
) -> Image.Image:
    """Show x_t of each image at rising t: a row is one path x_t = alpha_t x_0 + sigma_t eps, with a fixed eps.

    Raises:
        ValueError: ``grid`` refuses the images.
    """
    x0 = images.detach().float()
    draws = Draws.at(seed, "noised strip", start=0, stop=len(x0), device=x0.device)
    eps = draws.normal("eps", tuple(x0.shape[1:]))
    return strip([q_sample(schedule, x0, t, eps) for t in NOISED_TIMES], [f"t = {t:g}" for t in NOISED_TIMES])


def save(image: Image.Image, path: Path) -> None:
    """Write a picture, whole or not at all, in the format that the suffix of ``path`` names."""
    with whole_file(path) as temporary:
        image.save(temporary)


def save_each(images: UInt8[Tensor, "picture channel height width"], folder: Path) -> None:
    """Write each image as a PNG of its own, under its number."""
    folder.mkdir(exist_ok=True)
    for number, pixels in enumerate(images.movedim(1, -1)):
        Image.fromarray(pixels.squeeze(-1).numpy()).save(folder / f"{number:06d}.png")
