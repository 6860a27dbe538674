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


def read_images(path: Path) -> UInt8[Tensor, "images channels h w"]:
    """Return the images of a file or folder.

    Args:
        path: an .npz file with uint8 images [N, H, W, C] or [N, H, W] under ``images`` or ``arr_0``, or a folder of
            PNG files of one size, read in the order of their names.

    Raises:
        UserError: there are none, or they are not such images.
    """
    if not path.exists():
        raise UserError(f"images={path}: there is no such file or folder")
    pixels = _folder(path) if path.is_dir() else _npz(path)
    if pixels.ndim == 3:
        pixels = pixels[..., None]
    shape = list(pixels.shape)
    if pixels.dtype != np.uint8:
        values = (
            f"from {pixels.min():g} to {pixels.max():g}" if pixels.size and pixels.dtype.kind in "fiu" else ""
        )
        raise UserError(
            f"images={path}: {pixels.dtype} {values}; they must be uint8 from 0 to 255, such as"
            " ((x + 1) * 127.5).round() of images in [-1, 1]"
        )
    if pixels.ndim != 4 or shape[3] not in (1, 3):
        raise UserError(
            f"images={path}: an array of shape {shape}; it must be [N, H, W, C] with 1 or 3 channels"
        )
    if len(pixels) < 2:
        raise UserError(f"images={path}: {len(pixels)} image(s); two are the least that can be measured")
    if pixels.max() <= 1:
        raise UserError(f"images={path}: no value is above 1; they must run from 0 to 255: multiply by 255")
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))


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
                gray = picture.mode in ("1", "L")
                pictures.append(np.asarray(picture.convert("L" if gray else "RGB")))
        except (OSError, ValueError, SyntaxError) as error:
            raise UserError(f"images={path}: {file.name} cannot be read") from error
        if pictures[-1].shape != pictures[0].shape:
            shapes = [list(each.shape) for each in (pictures[0], pictures[-1])]
            raise UserError(f"images={path}: {files[0].name} is {shapes[0]} and {file.name} {shapes[1]}")
    return np.stack(pictures)
