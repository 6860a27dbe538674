"""What a set of images is known by, so that a run does not go on with other images unawares.

A fingerprint names the number of images, their labels, some images pixel by pixel, all of them where they are held
in memory, and what is stored of them (the names and sizes of files, or the sizes of encoded images). It depends
neither on where the data lies nor on the number of processes. Two of them are compared as far as both can tell:
the same images may be stored otherwise, or be held in memory on one machine and not on another.
"""

import hashlib
import os
from typing import Any

import datasets
import numpy as np
import PIL
import pyarrow as pa
import pyarrow.compute as pc

from litdiffusion.data.stores import ImageStore, MemoryStore

Fingerprint = dict[str, Any]

SOME = 64
"""Images that are looked at where not all can be."""

MOST_FILES = 10_000
"""Files whose sizes are looked at; the names count in any case."""


def fingerprint(store: ImageStore, dataset: datasets.Dataset) -> Fingerprint:
    """Return the fingerprint of a split, given as it is served and as it is stored."""
    found: Fingerprint = {"images": len(store), "decoder": _decoder()}
    if "label" in dataset.column_names:
        labels = dataset.select_columns(["label"]).with_format("arrow")[:]["label"]
        found["labels"] = _digest(labels.to_numpy().astype(np.int64))
    column = dataset.data.column("image")
    if pa.types.is_struct(column.type):
        rows = dataset._indices  # the rows that ``select`` has left, by their numbers in the table
        found["stored"] = _of_storage(column, None if rows is None else rows.column(0).combine_chunks())
    found["some"] = _digest(store.read(_spread(len(store), SOME)).images.numpy())
    if isinstance(store, MemoryStore):
        found["pixels"] = _digest(store.images.numpy())
    return found


def changes(before: Fingerprint, now: Fingerprint) -> list[str]:
    """Return in what respects two fingerprints tell different images; [] where they tell the same."""
    both = before.keys() & now.keys()
    if before.get("decoder") != now.get("decoder"):  # other releases of a decoder round a JPEG otherwise
        both -= {"some", "pixels"}
    if "pixels" in both:  # then how they are stored is of no importance
        both -= {"stored"}
    return sorted(name for name in both - {"decoder"} if before[name] != now[name])


def _of_storage(column: pa.ChunkedArray, rows: pa.Array | None) -> str:
    """Sizes of the encoded images, or, where they are files, the names below their common folder and the sizes."""
    sizes = pc.binary_length(pc.struct_field(column, "bytes"))
    paths = pc.struct_field(column, "path")
    if rows is not None:
        sizes, paths = sizes.take(rows), paths.take(rows)
    if sizes.null_count == 0:
        return _digest(sizes.to_numpy().astype(np.int64))
    names = ["" if path is None else str(path) for path in paths.to_pylist()]
    folder = os.path.commonpath([min(names), max(names)]) if all(map(os.path.isabs, names)) else ""
    relative = "\n".join(name[len(folder) :] for name in names)
    on_disk = [_size(names[index]) for index in _spread(len(names), MOST_FILES)]
    return _digest(np.frombuffer(relative.encode(), np.uint8), np.array(on_disk, np.int64))


def _size(path: str) -> int:
    """The size of a file; whoever decodes it will say that it is missing."""
    try:
        return os.stat(path).st_size  # noqa: PTH116  (a Path for each file of a large set would take longer)
    except OSError:
        return -1


def _spread(size: int, count: int) -> list[int]:
    """At most ``count`` of ``range(size)``, at equal distances."""
    return [index * size // count for index in range(count)] if size > count else list(range(size))


def _digest(*arrays: np.ndarray) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for array in arrays:
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _decoder() -> str:
    return f"Pillow {PIL.__version__}"
