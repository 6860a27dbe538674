"""Images made elsewhere, to be measured: an .npz file or a folder of PNGs."""

import zipfile
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from litdiffusion.errors import UserError

KEYS = ("images", "arr_0")
"""Where an .npz file has its images: under our key, or the one of OpenAI's tools."""


def read_images(
    path: Path, shape: tuple[int, int, int] | None = None
) -> UInt8[Tensor, "images channels h w"]:
    """Return the images of a file or folder.

    Args:
        path: an .npz file with uint8 images [N, H, W, C] or [N, H, W] under ``images`` or ``arr_0``, or a folder of
            PNG files of one size, read in the order of their names.
        shape: channels, height and width that they must have.

    Raises:
        UserError: there are none, or they are not such images.
    """
    if not path.exists():
        raise UserError(f"images={path}: there is no such file or folder")
    pixels = _folder(path) if path.is_dir() else _npz(path)
    if pixels.ndim == 3:
        pixels = pixels[..., None]
    if pixels.dtype != np.uint8:
        values = ""
        if pixels.size and pixels.dtype.kind in "fiu":
            values = f" from {pixels.min():g} to {pixels.max():g}"
            values = values if np.isfinite(pixels).all() else " with NaN or infinity"
        raise UserError(
            f"images={path}: {pixels.dtype}{values}; they must be uint8 from 0 to 255:"
            " (x * 255).round() of images in [0, 1], ((x + 1) * 127.5).round() of images in [-1, 1]"
        )
    if pixels.ndim != 4 or pixels.shape[3] not in (1, 3):
        raise UserError(
            f"images={path}: an array of shape {list(pixels.shape)}; it must be [N, H, W, C] with 1 or 3 channels"
        )
    if len(pixels) < 2:
        raise UserError(f"images={path}: {len(pixels)} image(s); two are the least that can be measured")
    if pixels.max(initial=0) == 1:
        raise UserError(f"images={path}: no value is above 1; they must run from 0 to 255: multiply by 255")
    images = torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))
    if shape is not None and images.shape[1:] != shape:
        raise UserError(
            f"images={path}: they are {list(images.shape[1:])} (channels, height, width), and those of the data"
            f" {list(shape)}: give data=... of that size"
        )
    return images


def _npz(path: Path) -> np.ndarray:
    try:
        archive = np.load(path, allow_pickle=False)
        if isinstance(archive, np.ndarray):
            raise UserError(f"images={path}: a single array; save it by np.savez(FILE, images=...)")
        with archive:
            for key in KEYS:
                if key in archive:
                    found: np.ndarray = archive[key]
                    return found
            names = ", ".join(archive) or "nothing"
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"images={path}: not an .npz file of arrays, or a damaged one") from error
    raise UserError(f"images={path}: it holds {names}; the images must be under {' or '.join(KEYS)}")


def _folder(path: Path) -> np.ndarray:
    files = sorted(each for each in path.iterdir() if each.suffix.lower() == ".png")
    if not files:
        raise UserError(f"images={path}: there is no .png file in this folder")
    pictures: list[np.ndarray] = []
    for file in files:
        try:
            with Image.open(file) as picture:
                alpha, deep = picture.has_transparency_data, ";16" in str(picture.tile)
                if alpha or deep:
                    what = "an alpha channel" if alpha else "16 bits for each channel"
                    raise UserError(
                        f"images={path}: {file.name} has {what}; save it as gray or RGB, with 8 bits"
                    )
                gray = picture.mode in ("1", "L")
                pictures.append(np.asarray(picture.convert("L" if gray else "RGB")))
        except (OSError, ValueError, SyntaxError) as error:
            raise UserError(f"images={path}: {file.name} cannot be read") from error
        if pictures[-1].shape != pictures[0].shape:
            shapes = [list(each.shape) for each in (pictures[0], pictures[-1])]
            raise UserError(f"images={path}: {files[0].name} is {shapes[0]} and {file.name} {shapes[1]}")
    return np.stack(pictures)
