"""Find the columns of images and labels in a data set, and convert them to the form of ``Source.load``."""

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from litdiffusion.errors import UserError


def find_image_column(features: datasets.Features, wanted: str, source: str) -> str:
    """Return the column of images: ``wanted``, else the one of that type, preferably "image" or "img"."""
    if wanted != "auto":
        if wanted not in features:
            raise UserError(f"{source} has no column {wanted!r}; it has {', '.join(features)}")
        return wanted
    found = [name for name, feature in features.items() if _holds_images(feature)]
    preferred = [name for name in ("image", "img") if name in found]
    if not found:
        raise UserError(
            f"{source} has no column of images; it has {', '.join(features)}: name one by data.image_column"
        )
    if len(found) > 1 and not preferred:
        raise UserError(
            f"{source} has several columns of images: choose data.image_column from {', '.join(found)}"
        )
    return (preferred or found)[0]


def find_label_column(features: datasets.Features, wanted: str | None, source: str) -> str | None:
    """Return the column of labels: ``wanted``, else one of class labels, else one of integers called "label"."""
    if wanted is None:
        return None
    if wanted != "auto":
        if wanted not in features:
            raise UserError(f"{source} has no column {wanted!r}; it has {', '.join(features)}")
        return wanted
    classes = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    integers = [
        name
        for name, feature in features.items()
        if isinstance(feature, datasets.Value) and "int" in feature.dtype
    ]
    for found in (classes, integers):
        preferred = [name for name in ("label", "labels") if name in found]
        if preferred:
            return preferred[0]
    return classes[0] if classes else None


def _holds_images(feature: object) -> bool:
    """Whether a column holds images; also {bytes, path} without the library's metadata, as other tools write it."""
    return isinstance(feature, datasets.Image) or (
        isinstance(feature, dict) and set(feature) == {"bytes", "path"}
    )


def is_labelled(dataset: datasets.Dataset, column: str) -> bool:
    """Whether every row has a label; data sets write a missing one as null or as -1."""
    values = _column(dataset, column)
    return values.null_count == 0 and not (
        pa.types.is_integer(values.type) and (pc.min(values).as_py() or 0) < 0
    )


def renamed(dataset: datasets.Dataset, columns: dict[str, str]) -> datasets.Dataset:
    """Return the given columns under their new names, with the type of images set."""
    chosen = dataset.select_columns(list(columns)).rename_columns(
        {a: b for a, b in columns.items() if a != b}
    )
    if isinstance(chosen.features["image"], datasets.Image):
        return chosen
    try:
        return chosen.cast_column("image", datasets.Image())
    except (TypeError, ValueError, pa.ArrowException) as error:
        column = next(iter(columns))
        raise UserError(
            f"column {column!r} holds no images: its type is {dataset.features[column]}"
        ) from error


def with_class_labels(
    splits: list[datasets.Dataset], source: str
) -> tuple[list[datasets.Dataset], tuple[str, ...]]:
    """Return the splits with their labels numbered 0, 1, ..., and the names of the classes."""
    if not all(is_labelled(split, "label") for split in splits):
        raise UserError(f"{source} has images without a label; ignore the labels by data.label_column=null")
    feature = splits[0].features["label"]
    if isinstance(feature, datasets.ClassLabel):
        return splits, tuple(feature.names)
    columns = [_column(split, "label") for split in splits]
    if not all(pa.types.is_integer(c.type) or pa.types.is_string(c.type) for c in columns):
        raise UserError(
            f"labels of {source} must be integers or text, not {columns[0].type}: see data.label_column"
        )
    values = sorted(set().union(*(column.unique().to_pylist() for column in columns)))
    names = tuple(str(value) for value in values)
    numbered = []
    for split, column in zip(splits, columns, strict=True):
        index = pc.index_in(column, value_set=pa.array(values, type=column.type))
        feature = datasets.ClassLabel(names=list(names))
        # Not cast_column: that would write a second copy of every image to the cache.
        numbered.append(
            split.remove_columns("label").add_column(
                "label", np.asarray(index, dtype=np.int64), feature=feature
            )
        )
    return numbered, names


def _column(dataset: datasets.Dataset, name: str) -> pa.Array:
    """Return one whole column without reading the others (the images)."""
    return dataset.select_columns([name]).with_format("arrow")[:][name].combine_chunks()
