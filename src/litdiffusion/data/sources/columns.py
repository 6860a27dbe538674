"""Find the columns of images and labels in a data set, and convert them to the form of ``Source.load``."""

import datasets
import numpy as np
import pyarrow as pa

from litdiffusion.data.sources.base import natural_order
from litdiffusion.errors import UserError


def find_image_column(features: datasets.Features, wanted: str, source: str) -> str:
    """Return the column of images: ``wanted``, else the one of that type or, where there is none, of that name."""
    if wanted != "auto":
        return wanted
    names = [name for name in ("image", "img") if name in features]
    found = [name for name, feature in features.items() if _holds_images(feature)]
    found = found or [name for name in names if isinstance(features[name], datasets.Value)]  # bytes, or paths
    preferred = [name for name in names if name in found]
    if not found:
        raise UserError(
            f"{source} has no column of images; it has {', '.join(features)}: name one by data.image_column"
        )
    if len(found) > 1 and not preferred:
        raise UserError(
            f"{source} has several columns of images: choose data.image_column from {', '.join(found)}"
        )
    return (preferred or found)[0]


def find_label_column(features: datasets.Features, wanted: str | None) -> str | None:
    """Return the column of labels: ``wanted``, else one of class labels, else one of any values called "label"."""
    if wanted != "auto":
        return wanted
    classes = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    values = [name for name, feature in features.items() if isinstance(feature, datasets.Value)]
    for found in (classes, values):
        preferred = [name for name in ("label", "labels") if name in found]
        if preferred:
            return preferred[0]
    return classes[0] if classes else None


def _holds_images(feature: object) -> bool:
    """Whether a column holds images; also {bytes, path} without the library's metadata, as other tools write it."""
    return isinstance(feature, datasets.Image) or (
        isinstance(feature, dict) and {"bytes"} <= set(feature) <= {"bytes", "path"}
    )


def is_labelled(dataset: datasets.Dataset, column: str, train: datasets.Dataset) -> bool:
    """Whether every row has a label, as the training split writes them."""
    return _missing(labels_of(train, column)).isdisjoint(labels_of(dataset, column))


def labels_of(dataset: datasets.Dataset, column: str) -> list[int | str | None]:
    """Return each row's label: an integer or text, the name of the class where it has one; None for anything else."""
    if column not in dataset.features:
        return [None] * len(dataset)
    try:  # one column, without reading the others (the images)
        values = dataset.select_columns([column]).with_format("arrow")[:][column].combine_chunks()
        encoded = values.dictionary_encode()
    except pa.ArrowNotImplementedError:  # lists and the like
        return [None] * len(dataset)
    feature = dataset.features[column]
    names = feature.names if isinstance(feature, datasets.ClassLabel) else None
    distinct = [*(_label(value, names) for value in encoded.dictionary.to_pylist()), None]
    places = encoded.indices.fill_null(len(distinct) - 1).to_numpy()
    labels: list[int | str | None] = np.array(distinct, dtype=object)[places].tolist()
    return labels


def _label(value: object, names: list[str] | None) -> int | str | None:
    if isinstance(value, float) and value.is_integer():  # integers with gaps, as pandas writes them
        value = int(value)
    if names is not None and isinstance(value, int):
        return names[value] if 0 <= value < len(names) else None
    return value if isinstance(value, int | str) else None


def _missing(labels: list[int | str | None]) -> set[int | None]:
    """Return what stands for "no label": None, and -1 as on the Hub, where classes are 0, 1, ...; not in {-1, 1}."""
    known = set(labels) - {None}
    others = known - {-1}
    return {None} if -1 in known and others and 0 not in others else {None, -1}


def renamed(dataset: datasets.Dataset, columns: dict[str, str]) -> datasets.Dataset:
    """Return the given columns, or those there are, under their new names, with the type of images set."""
    there = {name: new for name, new in columns.items() if name in dataset.features}
    chosen = dataset.select_columns(list(there)).rename_columns(there)
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
    """Return the splits, the training split first, with labels numbered 0, 1, ..., and the names of the classes.

    Raises:
        UserError: images without a label.
    """
    labels = [labels_of(split, "label") for split in splits]
    missing, every = _missing(labels[0]), [label for column in labels for label in column]
    if count := sum(label in missing for label in every):
        raise UserError(
            f"{source} has images without a label ({count:,} of {len(every):,}; a label is an integer or text, and"
            " -1 means none where 0 is a class)"
        )
    feature = splits[0].features["label"]
    if isinstance(feature, datasets.ClassLabel) and all(s.features["label"] == feature for s in splits):
        return splits, tuple(feature.names)
    names = sorted({str(label) for label in every}, key=natural_order)
    number = {name: index for index, name in enumerate(names)}
    numbered = [
        # Not cast_column: that would write a second copy of every image to the cache.
        split.remove_columns("label").add_column(
            "label",
            np.array([number[str(label)] for label in column]),
            feature=datasets.ClassLabel(names=names),
        )
        for split, column in zip(splits, labels, strict=True)
    ]
    return numbered, tuple(names)
