"""Fingerprints of image sets, so that a run is not continued on other images by mistake.

A fingerprint holds the number of images, their labels, some images pixel by pixel, all of them where they are held
in memory, and the names of their files. It depends neither on where the data lies nor on the number of processes. Two
of them are compared as far as both can tell: the same images may be stored otherwise, or be held in memory on one
machine and not on another. An image that stopped a run and has been repaired is the same image.
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
"""How many images to hash where not all are in memory."""


def fingerprint(store: ImageStore, dataset: datasets.Dataset) -> Fingerprint:
    """Return the fingerprint of a split, from its store and its data set."""
    found: Fingerprint = {"images": len(store), "decoder": f"Pillow {PIL.__version__}"}
    if "label" in dataset.column_names:
        labels = dataset.select_columns(["label"]).with_format("arrow")[:]["label"]
        found["labels"] = _digest(labels.to_numpy().astype(np.int64))
        found["class_names"] = getattr(dataset.features["label"], "names", None)  # to be read, not compared
    column = dataset.data.column("image")
    if pa.types.is_struct(column.type) and pc.struct_field(column, "bytes").null_count:
        rows = dataset._indices  # the selected rows' numbers in the table
        found["files"] = _of_names(column, None if rows is None else rows.column(0).combine_chunks())
    some = sorted({index * len(store) // SOME for index in range(SOME)})
    found["some"] = _digest(store.read(some).images.numpy())
    if isinstance(store, MemoryStore):
        found["pixels"] = _digest(store.images.numpy())
    return found


def changes(before: Fingerprint, now: Fingerprint) -> list[str]:
    """Return the names of the parts that differ; [] if both fingerprints are of the same images."""
    both = before.keys() & now.keys()
    if before.get("decoder") != now.get(
        "decoder"
    ):  # another release of the decoder may round a JPEG differently
        both -= {"some", "pixels"}
    if "pixels" in both:  # then the names of the files do not matter
        both -= {"files"}
    return sorted(name for name in both - {"decoder", "class_names"} if before[name] != now[name])


def _of_names(column: pa.ChunkedArray, rows: pa.Array | None) -> str:
    """Names of the files, below their common folder."""
    paths = pc.struct_field(column, "path")
    names = [
        "" if path is None else str(path)
        for path in (paths if rows is None else paths.take(rows)).to_pylist()
    ]
    folder = os.path.commonpath([min(names), max(names)]) if all(map(os.path.isabs, names)) else ""
    return _digest(np.frombuffer("\n".join(name[len(folder) :] for name in names).encode(), np.uint8))


def _digest(array: np.ndarray) -> str:
    return hashlib.blake2b(np.ascontiguousarray(array).data, digest_size=16).hexdigest()
