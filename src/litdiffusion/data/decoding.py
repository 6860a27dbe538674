"""Decode what a data set stores (files, encoded bytes, arrays) to uint8 pixels of one size.

Both stores (``stores.py``) use these functions, so their images are the same bit for bit.
"""

import re
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from io import BytesIO
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from litdiffusion.errors import UserError, short_text

# Pillow warns of large images as possible attacks, and refuses those of twice as many pixels; and it warns of garbage
# for EXIF data, without the file's name.
warnings.filterwarnings("ignore", module=r"PIL\.")

Pixels = UInt8[np.ndarray, "batch channels height width"]

NAMED = 3
"""How many unreadable images a message names; it counts the others."""


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


class UnreadableError(UserError):
    """Images that cannot be read: one argument for each, its name and the reason."""

    def __str__(self) -> str:
        count = len(self.args)
        which, them = ("image", "it") if count == 1 else (f"{count} images:", "them")
        more = f"; and {count - NAMED} more" if count > NAMED else ""
        named = "; ".join(self.args[:NAMED])
        return f"cannot read {which} {named}{more}; replace {them}, or remove {them} and choose a new run_dir"


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
        UnreadableError: some images cannot be read; each is named by its file or its row.
    """
    if isinstance(column.type, pa.BaseExtensionType):
        arrays = _arrays(column)
        if arrays.shape[1:] == (channels, *image_size):
            return arrays
        pictures = [Image.fromarray(a[0] if len(a) == 1 else np.moveaxis(a, 0, -1)) for a in arrays]
        return np.stack([to_pixels(picture, image_size, channels) for picture in pictures])
    decoded, unreadable = [], []
    for place, record in enumerate(column.to_pylist()):
        record = record or {"bytes": None, "path": None}
        source = record["path"] if record["bytes"] is None else BytesIO(record["bytes"])
        try:
            if source is None:
                raise ValueError("the row has no image")
            decoded.append(to_pixels(open_picture(source), image_size, channels))
        except Exception as error:  # Pillow's plugins raise a dozen unrelated types on damaged files
            name = record["path"] or f"in row {row_number(place)} of the data set (the first is 0)"
            unreadable.append(f"{name}: {short_text(error)}")
    if unreadable:
        raise UnreadableError(*unreadable)
    return np.stack(decoded)


def _arrays(column: pa.ChunkedArray) -> Pixels:
    """Return the pixels of an ``Array3D`` column, from Arrow's buffer."""
    values = pa.chunked_array([chunk.storage for chunk in column.chunks]).combine_chunks()
    while pa.types.is_list(values.type):
        values = values.flatten()
    pixels: Pixels = values.to_numpy().reshape(len(column), *column.type.shape)
    return pixels


def open_picture(source: str | Path | BytesIO) -> Image.Image:
    """Read a picture, the first of several in one file, rotated as its EXIF data says, at 8 bits per channel.

    Raises:
        Exception: it cannot be read; of any type, since Pillow's plugins raise what they meet.
    """
    try:
        with Image.open(source) as picture:
            deep = any(re.search(";16[BLN]", str(tile[3])) for tile in picture.tile)
            picture.load()
            loaded = picture.copy()
    except UnidentifiedImageError as error:
        raise ValueError("not an image Pillow can open") from error
    except Image.DecompressionBombError as error:
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise ValueError(f"it has more than {most:,} pixels, so make it smaller") from error
    with suppress(Exception):  # garbage for EXIF data: viewers show the picture unrotated
        ImageOps.exif_transpose(loaded, in_place=True)
    return _eight_bit(loaded, deep)


def _eight_bit(picture: Image.Image, deep: bool) -> Image.Image:
    """Convert gray of 16 bits (0 to 65535) and floats (0 to 1 if none is above 1, else 0 to 255) to 8 bits.

    Nothing in a file says that only 12 of the 16 bits are used. Such an image would come out nearly black.

    Args:
        picture: any.
        deep: whether the file has 16 bits for each channel. Of colours, Pillow reads the upper 8.

    Raises:
        ValueError: its values leave that range, or none is above a quarter of it.
    """
    is_gray = picture.mode[0] in "IF"  # modes I, I;16 and F
    if not is_gray and not deep:
        return picture
    values = np.asarray(picture) if is_gray else np.asarray(picture.convert("RGB")).astype(np.uint16) * 257
    low, high = values.min(), values.max()
    white = 65535 if picture.mode != "F" else 1 if high <= 1 else 255
    if not (low >= 0 and (white / 4 < high <= white or high == 0)):
        raise ValueError(
            f"its values run from {low:.6g} to {high:.6g}, where 0 would be black and {white} white:"
            " scale them to that range, or to 8 bits"
        )
    return Image.fromarray(np.rint(values * (255 / white)).astype(np.uint8)) if is_gray else picture


def to_pixels(picture: Image.Image, image_size: tuple[int, int], channels: int) -> UInt8[np.ndarray, "c h w"]:
    """Put transparency onto white, convert, resize the shorter side (antialiased bicubic), crop the centre.

    Raises:
        ValueError: what there is on a transparent background is white.
    """
    height, width = image_size
    if picture.has_transparency_data:
        layer = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
        if picture.convert("L").getextrema() == (255, 255) and np.ptp(np.asarray(layer)[..., 3]):
            raise ValueError("it is white on transparent, which is put onto white: give it a background")
    picture = picture.convert("L" if channels == 1 else "RGB")
    if picture.size != (width, height):
        picture = ImageOps.fit(picture, (width, height), Image.Resampling.BICUBIC)
    pixels = np.asarray(picture)
    return pixels[None] if channels == 1 else np.ascontiguousarray(np.moveaxis(pixels, -1, 0))
