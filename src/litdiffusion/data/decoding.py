"""Decode what a data set stores (files, encoded bytes, arrays) to uint8 pixels of one size.

Both stores (``stores.py``) use these functions, so their images are the same bit for bit.
"""

from collections.abc import Callable, Sequence
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from litdiffusion.errors import UserError, short_text

Pixels = UInt8[np.ndarray, "batch channels height width"]


def array_dataset(
    images: Pixels, labels: UInt8[np.ndarray, " batch"], class_names: Sequence[str]
) -> datasets.Dataset:
    """Wrap arrays as a ``datasets.Dataset`` without a copy (``Dataset.from_dict`` walks them pixel by pixel)."""
    features = datasets.Features(
        image=datasets.Array3D(shape=images.shape[1:], dtype="uint8"),
        label=datasets.ClassLabel(names=list(class_names)),
    )
    nested = pa.array(np.ascontiguousarray(images).reshape(-1))
    for length in reversed(images.shape[1:]):
        offsets = pa.array(np.arange(0, len(nested) + 1, length, dtype=np.int32))
        nested = pa.ListArray.from_arrays(offsets, nested)
    schema = features.arrow_schema
    image_column = pa.ExtensionArray.from_storage(schema.field("image").type, nested)
    table = pa.table([image_column, pa.array(labels.astype(np.int64))], schema=schema)
    return datasets.Dataset(datasets.table.InMemoryTable(table))


def decode_column(
    column: pa.ChunkedArray,
    image_size: tuple[int, int],
    channels: int,
    row_number: Callable[[int], int] = int,
) -> Pixels:
    """Decode the image column of an Arrow table.

    Args:
        column: images as ``datasets.Image`` stores them ({bytes, path}), or as ``Array3D`` uint8 [C, H, W].
        image_size: (height, width) of the result.
        channels: 1 (luma) or 3 (RGB).
        row_number: maps a position in the column to the row of the data set, for messages.

    Raises:
        UserError: an image cannot be read; the text names its file or its row.
    """
    if isinstance(column.type, pa.BaseExtensionType):
        arrays = _arrays(column)
        if arrays.shape[1:] == (channels, *image_size):
            return arrays
        pictures = [Image.fromarray(a[0] if len(a) == 1 else np.moveaxis(a, 0, -1)) for a in arrays]
        return np.stack([to_pixels(picture, image_size, channels) for picture in pictures])
    return np.stack(
        [
            _decode(record, image_size, channels, partial(row_number, place))
            for place, record in enumerate(column.to_pylist())
        ]
    )


def _arrays(column: pa.ChunkedArray) -> Pixels:
    """Return the pixels of an ``Array3D`` column, from Arrow's buffer."""
    values = pa.chunked_array([chunk.storage for chunk in column.chunks]).combine_chunks()
    while pa.types.is_list(values.type):
        values = values.flatten()
    pixels: Pixels = values.to_numpy().reshape(len(column), *column.type.shape)
    return pixels


def _decode(
    record: dict[str, Any] | None, image_size: tuple[int, int], channels: int, row: Callable[[], int]
) -> UInt8[np.ndarray, "c h w"]:
    if record is None:
        raise UserError(f"row {row()} of the data set (the first is 0) has no image; remove it")
    try:
        if record["bytes"] is None:
            with Path(record["path"]).open("rb") as file, Image.open(file) as picture:
                return to_pixels(picture, image_size, channels)
        with Image.open(BytesIO(record["bytes"])) as picture:
            return to_pixels(picture, image_size, channels)
    except Exception as error:  # Pillow's plugins raise a dozen unrelated types on damaged files
        name = record["path"] or f"in row {row()} of the data set (the first is 0)"
        reason = "not an image Pillow can open" if isinstance(error, UnidentifiedImageError) else error
        raise UserError(f"cannot read image {name}: {short_text(reason)}; repair or remove it") from error


def to_pixels(picture: Image.Image, image_size: tuple[int, int], channels: int) -> UInt8[np.ndarray, "c h w"]:
    """Apply the EXIF rotation, convert, resize the shorter side (antialiased bicubic), crop the centre."""
    height, width = image_size
    picture = _eight_bit(ImageOps.exif_transpose(picture))
    picture = picture.convert("L" if channels == 1 else "RGB")
    if picture.size != (width, height):
        picture = ImageOps.fit(picture, (width, height), Image.Resampling.BICUBIC)
    pixels = np.asarray(picture)
    return pixels[None] if channels == 1 else np.ascontiguousarray(np.moveaxis(pixels, -1, 0))


def _eight_bit(picture: Image.Image) -> Image.Image:
    """Convert rare modes to 8 bits: 16-bit gray by its full range, transparency onto white."""
    mode = picture.mode
    if mode.startswith("I"):  # 16-bit gray; Pillow's own conversion to "L" cuts everything above 255 to white
        deep = np.asarray(picture).astype(np.int64).clip(0, 65535)
        return Image.fromarray(((deep + 128) // 257).astype(np.uint8))
    if mode == "F":  # the range of floats is a convention: 0..1 if none is above 1, else 0..255
        values = np.nan_to_num(np.asarray(picture))
        scale = 255.0 if values.max(initial=0.0) <= 1.0 else 1.0
        return Image.fromarray((values * scale).round().clip(0, 255).astype(np.uint8))
    if picture.has_transparency_data:
        layer = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return picture
