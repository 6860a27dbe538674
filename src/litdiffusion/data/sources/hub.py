"""Image data sets of the Hugging Face Hub, and local ones that the ``datasets`` library opens."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import datasets
import datasets.config
import huggingface_hub.constants
import torch
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from litdiffusion.data.sources.base import HELD_OUT, Source, Split, require_holdout
from litdiffusion.data.sources.columns import (
    find_image_column,
    find_label_column,
    is_labelled,
    renamed,
    with_class_labels,
)
from litdiffusion.diffusion.draws import generator_at
from litdiffusion.errors import UserError, short_text

log = logging.getLogger(__name__)


Splits = dict[str, datasets.Dataset]


class Hub(Source):
    """Any image data set of the Hub, or of a local folder or file of Parquet.

    Args:
        name: "owner/name" on the Hub, or a path: a folder that ``datasets`` can open, or one Parquet file.
        image_size: see ``Source``.
        channels: see ``Source``.
        flip: see ``Source``.
        config: which of the data set's configurations, if it has several.
        revision: commit or tag on the Hub; None for the newest.
        image_column: "auto" finds it by its type.
        label_column: "auto" finds it by its type or name, and ignores labels that are incomplete; None for no labels.
        train_split: the split to train on, or parts of splits as the library writes them: "train[:1000]",
            "train[10%:]", "train+test".
        test_split: the split held out, written alike; "auto" takes test, else validation, else a fixed random
            ``holdout`` of the training split.
        holdout: fraction held out if there is no held-out split.
    """

    def __init__(
        self,
        name: str,
        image_size: int | Sequence[int] = 32,
        channels: int = 3,
        flip: bool = False,
        config: str | None = None,
        revision: str | None = None,
        image_column: str = "auto",
        label_column: str | None = "auto",
        train_split: str = "train",
        test_split: str = "auto",
        holdout: float = 0.1,
    ) -> None:
        super().__init__(image_size, channels, flip)
        require_holdout(holdout)
        self.name = name
        self.config = config
        self.revision = revision
        self.image_column = image_column
        self.label_column = label_column
        self.train_split = train_split
        self.test_split = test_split
        self.holdout = holdout
        self._splits: list[datasets.Dataset] | None = None

    def prepare(self) -> None:
        """Download the data set and convert it to memory-mapped Arrow in the library's cache."""
        self._open()

    def load(self, split: Split) -> datasets.Dataset:
        """Open a split from the cache."""
        if self._splits is None:
            self._splits = self._choose(self._open())
        train, *tests = self._splits
        if not tests:
            train, *tests = hold_out(train, self.holdout * self.hold_out, self.name)
        return train if split == "train" else tests[0]

    def _open(self) -> Splits:
        path = Path(self.name).expanduser()
        if path.exists():
            return _load_local(path, self.config)
        if path.is_absolute() or self.name.startswith((".", "~")) or path.suffix == ".parquet":
            raise UserError(f"data.name={self.name}: there is no such file or folder")
        return load_from_hub(self.name, self.config, self.revision)

    def _choose(self, found: Splits) -> list[datasets.Dataset]:
        """Choose the training split, and the held-out one if there is one, in the form of ``Source.load``."""
        train, parts = select_split(found, self.train_split, self.name)
        for wanted in (self.image_column, self.label_column):
            if wanted not in ("auto", None, *train.features):
                raise UserError(f"{self.name} has no column {wanted!r}; it has {', '.join(train.features)}")
        image = find_image_column(train.features, self.image_column, self.name)
        label = find_label_column(train.features, self.label_column)
        if label == image:
            raise UserError(
                f"column {image!r} of {self.name} cannot be both image and label: set data.image_column and"
                " data.label_column to different ones"
            )
        columns = {image: "image"} if label is None else {image: "image", label: "label"}
        if self.test_split != "auto":
            test, held_out = select_split(found, self.test_split, self.name)
            if shared := _overlap(parts, held_out):
                log.warning("%s: %s held-out images are trained on, too", self.name, f"{shared:,}")
            tests = [test]
            if image not in tests[0].features:
                raise UserError(f"split {self.test_split!r} of {self.name} has no column {image!r}")
        else:
            used = {name for name, _ in parts}
            named = [found[name] for name in HELD_OUT if name in found and name not in used]
            tests = [split for split in named if image in split.features]
            # Competitions publish test images with the labels blanked out.
            if label is not None and is_labelled(train, label, train):
                tests = [split for split in tests if is_labelled(split, label, train)]
        chosen = [renamed(split, columns) for split in [train, *tests[:1]]]
        if label is not None:
            try:
                chosen, self.class_names = with_class_labels(chosen, self.name)
            except UserError as error:
                if self.label_column != "auto":
                    raise UserError(f"{error}; ignore the labels by data.label_column=null") from error
                log.warning("%s: its labels are ignored", error)
                chosen = [split.select_columns("image") for split in chosen]
        return chosen


Parts = list[tuple[str, range]]
"""Names of splits and the rows used of each."""


def select_split(found: Splits, spec: str, source: str) -> tuple[datasets.Dataset, Parts]:
    """Return a split, or parts of splits as ``datasets`` writes them, and which parts those are.

    Raises:
        UserError: there is no such split, no row in a part of it, or the same row in two.
    """
    lengths = {name: len(split) for name, split in found.items()}
    if spec in found:
        return found[spec], [(spec, range(lengths[spec]))]
    try:
        read = datasets.ReadInstruction.from_spec(spec).to_absolute(lengths)
    except (ValueError, AssertionError) as error:
        reason = short_text(error)
        raise UserError(f"{source} has no split {spec!r}; it has {', '.join(found)} ({reason})") from error
    parts = [(part.splitname, range(part.from_, min(part.to, lengths[part.splitname]))) for part in read]
    for name, rows in parts:
        if not rows:
            raise UserError(
                f"{spec!r} takes no images from {name!r} of {source}, which has {lengths[name]:,}"
            )
    if _overlap(parts, parts) > sum(len(rows) for _, rows in parts):
        raise UserError(f"{spec!r} takes some images of {source} twice")
    return datasets.concatenate_datasets([found[name].select(rows) for name, rows in parts]), parts


def _overlap(these: Parts, those: Parts) -> int:
    """Count the rows of one that are in the other."""
    pairs = [(a, b) for name, a in these for other, b in those if name == other]
    return sum(max(0, min(a.stop, b.stop) - max(a.start, b.start)) for a, b in pairs)


def load_from_hub(name: str, config: str | None = None, revision: str | None = None) -> Splits:
    """Load a data set of the Hub, or an earlier download if the Hub cannot be reached.

    One request first tests whether the Hub answers: ``datasets`` itself would retry for half a minute.

    Raises:
        UserError: there is no such data set, or neither the Hub nor an earlier download is available.
    """
    try:
        if datasets.config.HF_HUB_OFFLINE:
            raise ConnectionError("HF_HUB_OFFLINE or HF_DATASETS_OFFLINE is set")
        huggingface_hub.HfApi().dataset_info(
            name, revision=revision, timeout=huggingface_hub.constants.HF_HUB_ETAG_TIMEOUT
        )
    except GatedRepoError as error:
        raise UserError(
            f"the data set {name} is gated: ask for access on its page, then `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(f"the data set {name} has no revision {revision}") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UserError(
            f"the Hub has no data set {name!r}, nor is it a local path (a private one needs `hf auth login`)"
        ) from error
    except (
        Exception
    ) as unreachable:  # the errors of the HTTP library differ between versions of the Hub client
        with _offline(), _quiet():
            try:
                loaded: Splits = datasets.load_dataset(name, config, revision=revision)
            except Exception as error:
                raise UserError(
                    f"the Hub cannot be reached for {name} ({short_text(unreachable)}), "
                    "nor is there an earlier download of it"
                ) from error
        log.warning(
            "the Hub cannot be reached; using the latest earlier download of %s, its revision unchecked", name
        )
        return loaded
    return _load(name, lambda: datasets.load_dataset(name, config, revision=revision))


def hold_out(train: datasets.Dataset, fraction: float, source: str) -> list[datasets.Dataset]:
    """Split rows at random, the same way every time: at least one row in each part, or all in the first for 0."""
    size = len(train)
    if size < 2 and fraction:
        raise UserError(
            f"{source} has {size} images; at least 2 are needed, one of them to hold out (datamodule.num_val=0 holds"
            " out none)"
        )
    held = min(max(round(size * fraction), 1), size - 1) if fraction else 0
    order = torch.randperm(size, generator=generator_at("holdout", size))
    return [train.select(rows.sort().values.numpy()) for rows in (order[held:], order[:held])]


def _load_local(path: Path, config: str | None) -> Splits:
    if path.is_file():
        if path.suffix != ".parquet":
            raise UserError(
                f"data.name={path} is a file, but not of Parquet; for a folder of images use data=image_folder"
            )
        return _load(str(path), lambda: datasets.load_dataset("parquet", data_files={"train": str(path)}))
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        return _load(str(path), lambda: datasets.load_from_disk(str(path)))
    return _load(str(path), lambda: datasets.load_dataset(str(path), config))


def _load(what: str, loading: Callable[[], datasets.Dataset | Splits]) -> Splits:
    try:
        with _quiet():
            loaded = loading()
    except Exception as error:  # the library's builders raise whatever their file formats raise
        raise UserError(f"cannot load the data set {what}: {short_text(error.__cause__ or error)}") from error
    return {"train": loaded} if isinstance(loaded, datasets.Dataset) else loaded


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the library from logging errors that our message contains."""
    before = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(before)


@contextmanager
def _offline() -> Iterator[None]:
    """Keep both libraries off the network, as HF_HUB_OFFLINE=1 does for a whole process."""
    before = datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE = before
