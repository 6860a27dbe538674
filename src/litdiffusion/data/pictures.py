"""Read the pictures that edits start from, at a model's size and in [-1, 1]."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor

from litdiffusion.data.decoding import open_picture, to_pixels
from litdiffusion.errors import UserError, short_text

Shape = tuple[int, int, int]
"""Channels, height, width."""

WHITE = 128


def read_given(paths: Mapping[str, Sequence[Path]], shape: Shape) -> dict[str, Tensor]:
    """Read the pictures of an edit: for each key one tensor [pictures, C, H, W].

    ``mask`` becomes true or false, one for each ``image``; all others are images.

    Raises:
        UserError: one cannot be read, or there are several masks and not as many images.
    """
    given = {
        key: torch.stack([read_image(key, path, shape) for path in named])
        for key, named in paths.items()
        if key != "mask"
    }
    if "mask" in paths:
        masks, images = paths["mask"], paths["image"]
        if len(masks) not in (1, len(images)):
            raise UserError(f"mask: {len(masks)} masks for {len(images)} images; give one, or one for each")
        pairs = zip(cycle(masks), images, strict=False)
        given["mask"] = torch.stack([read_mask("mask", mask, image, shape) for mask, image in pairs])
    return given


def read_image(key: str, path: Path, shape: Shape) -> Float[Tensor, "channels h w"]:
    """Read a picture, and bring it to ``shape`` and [-1, 1] as data sources do.

    Raises:
        UserError: the file is missing or cannot be read; the line begins with ``key=path``.
    """
    channels, height, width = shape
    picture = _open(key, path)
    try:
        return torch.tensor(to_pixels(picture, (height, width), channels)) / 127.5 - 1
    except ValueError as error:
        raise UserError(f"{key}={path}: {error}") from error


def read_mask(key: str, path: Path, over: Path, shape: Shape) -> Bool[Tensor, "1 h w"]:
    """Read the mask of the picture ``over``: true where it is white; what is transparent is black.

    It is stretched to the size of that picture first, then both are cropped alike.

    Raises:
        UserError: as for ``read_image``; or no pixel is white.
    """
    _, height, width = shape
    mask = _open(key, path)
    if mask.has_transparency_data:  # in an image it becomes white: here that would redraw everything
        black = Image.new("RGBA", mask.size, "black")
        mask = Image.alpha_composite(black, mask.convert("RGBA"))
    gray = Image.fromarray(to_pixels(mask, (mask.height, mask.width), 1)[0])
    gray = gray.resize(_open("image", over).size, Image.Resampling.BILINEAR)
    white = torch.tensor(to_pixels(gray, (height, width), 1) >= WHITE)
    if not bool(white.any()):
        raise UserError(f"{key}={path}: no pixel of it is white, so nothing would be redrawn")
    return white


def _open(key: str, path: Path) -> Image.Image:
    """Return a picture in memory, rotated as its EXIF data says."""
    if not path.is_file():
        raise UserError(f"{key}={path}: there is no such file")
    try:
        return open_picture(path)
    except Exception as error:  # Pillow's plugins raise a dozen unrelated types on damaged files
        raise UserError(f"{key}={path}: cannot be read as a picture: {short_text(error)}") from error
