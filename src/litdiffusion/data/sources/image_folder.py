"""Any folder of images."""

import logging
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

import datasets
import pyarrow as pa
from PIL import Image

from litdiffusion.data.sources.base import HELD_OUT, Source, Split, natural_order, require_holdout
from litdiffusion.diffusion.draws import seed_of
from litdiffusion.errors import UserError, short_text

log = logging.getLogger(__name__)

RESULTS = {"provenance.json", "sample.json"}
"""Files by which a folder that ``train`` or ``sample`` has written is known."""
DRAWN = {"samples", "wandb", "curves.png", "grid.png", "denoising.gif"}
"""What there is, or holds, a picture in such a folder."""


class Files(NamedTuple):
    """Images of a split: paths relative to the split's own folder, sorted."""

    root: Path
    paths: list[Path]

    @property
    def folders(self) -> set[str] | None:
        """The first-level subfolders; None if some image lies in none."""
        return None if any(len(path.parts) == 1 for path in self.paths) else {p.parts[0] for p in self.paths}


class ImageFolder(Source):
    """All images of a folder, at any depth, in the formats that Pillow opens; of several frames or pages, the first.

    Subfolders are classes, in natural order, if there are at least two and every image is in one. Beside a
    subfolder ``train``, ``test`` (else ``validation``, ``val``, ...) is the held-out split. Otherwise a
    fraction is held out by a hash of each path, so that adding images does not move the others from one split to
    the other. A warning names what is left out: other files, hidden ones, pictures that this program has drawn.

    Args:
        path: the folder.
        image_size: see ``Source``.
        channels: see ``Source``.
        flip: see ``Source``.
        holdout: fraction held out if there is no such subfolder.
    """

    def __init__(
        self,
        path: str | Path,
        image_size: int | Sequence[int] = 32,
        channels: int = 3,
        flip: bool = False,
        holdout: float = 0.1,
    ) -> None:
        super().__init__(image_size, channels, flip)
        require_holdout(holdout)
        self.path = Path(path).expanduser()
        self.name = str(self.path)
        self.holdout = holdout
        self._splits: dict[Split, Files] | None = None

    def load(self, split: Split) -> datasets.Dataset:
        """List the files without opening them."""
        if self._splits is None:
            self._splits = self._find()
            self.class_names = _classes(self._splits["train"], self._splits["test"])
            names = self.class_names
            found = f"{len(names)} classes, {', '.join(names)}" if names else "no classes"
            log.info("%s: %s", self.name, short_text(found))
        root, paths = self._splits[split]
        full = pa.array([str(root / path) for path in paths], pa.string())
        columns = [pa.StructArray.from_arrays([pa.nulls(len(paths), pa.binary()), full], ["bytes", "path"])]
        features = datasets.Features(image=datasets.Image())
        if self.class_names is not None:
            features["label"] = datasets.ClassLabel(names=list(self.class_names))
            number = {name: i for i, name in enumerate(self.class_names)}
            columns.append(pa.array([number[path.parts[0]] for path in paths], pa.int64()))
        table = pa.table(columns, schema=features.arrow_schema)
        return datasets.Dataset(datasets.table.InMemoryTable(table))

    def _find(self) -> dict[Split, Files]:
        if not self.path.exists():
            raise UserError(f"data.path={self.path}: there is no such folder")
        if not self.path.is_dir():
            raise UserError(f"data.path={self.path} is a file; give a folder of images")
        paths, left_out = _find_images(self.path)
        folders = {path.parts[0].lower(): path.parts[0] for path in paths if len(path.parts) > 1}
        held_out = next((name for name in HELD_OUT if name in folders), None)
        splits = [Files(self.path, paths)]
        if "train" in folders and (held_out or len(folders) == 1):
            chosen = [folders[name] for name in ("train", held_out) if name]
            splits = [
                Files(self.path / name, [p.relative_to(name) for p in paths if p.parts[0] == name])
                for name in chosen
            ]
            unused = len(paths) - sum(len(split.paths) for split in splits)
            left_out[f"images outside {' and '.join(chosen)}"] = unused
        others = ", ".join(f"{kind} ({count})" for kind, count in (+left_out).most_common()) or "nothing"
        if len(splits) == 1 and len(splits[0].paths) < 1 + self.hold_out:
            one = "only one image, and holding one out takes two (datamodule.num_val=0 holds out none)"
            raise UserError(
                f"data.path={self.path} has {one if splits[0].paths else 'no images'}; looked for what Pillow opens"
                f" (.png, .jpg, ...), at any depth; left out: {short_text(others)}"
            )
        if left_out.total():
            log.warning("%s: left out: %s", self.name, short_text(others))
        train, *tests = splits
        return {"train": train, "test": tests[0]} if tests else _hold_out(train, self.holdout * self.hold_out)


def _find_images(folder: Path) -> tuple[list[Path], Counter[str]]:
    """Return the paths of the images below a folder, relative to it and sorted, and what else there is, counted."""
    formats = Image.registered_extensions()
    suffixes = {suffix for suffix in formats if Image.MIME.get(formats[suffix], "").startswith("image/")}
    found: list[Path] = []
    others: Counter[str] = Counter()
    visited: set[str] = set()
    for parent, subfolders, files in os.walk(folder, onerror=_refuse, followlinks=True):
        real, names = os.path.realpath(parent), {*files, *subfolders}
        if real in visited:  # a link may lead to a parent
            others["links to folders read already"] += 1
            subfolders.clear()
            continue
        visited.add(real)
        hidden = {name for name in names if name[0] == "." or name == "__MACOSX"}
        drawn = names & DRAWN if names & RESULTS else set()
        others.update({"hidden": len(hidden), "drawn by litdiffusion": len(drawn)})
        for name in set(files) - hidden - drawn:
            path = os.path.join(parent, name)  # noqa: PTH118  (a Path only for those that are kept)
            suffix = os.path.splitext(name)[1].lower()  # noqa: PTH122
            if suffix not in suffixes:
                others[ascii(suffix)[1:-1] or "without a suffix"] += 1
            elif not os.path.isfile(path) and os.path.exists(path):  # noqa: PTH110, PTH113
                others["pipes or devices"] += 1  # which could block; a broken link is none, and fails later
            else:
                found.append(Path(_named_in_unicode(path)).relative_to(folder))
        subfolders[:] = sorted(set(subfolders) - hidden - drawn)
    return sorted(found), others


def _named_in_unicode(path: str) -> str:
    try:
        path.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{path!a}: the name of this image is not in UTF-8; rename it") from error
    return path


def _refuse(error: OSError) -> NoReturn:
    raise UserError(f"cannot read the folder {error.filename}: {error.strerror}") from error


def _hold_out(images: Files, fraction: float) -> dict[Split, Files]:
    """Hold out the images whose hash is below ``fraction``: at least one image and not all, or none if it is 0."""
    hashes = {path: seed_of("holdout", path.as_posix()) / 2**63 for path in images.paths}
    ranked = sorted(hashes.values())
    threshold = min(max(fraction, ranked[1]), ranked[-1]) if fraction else 0.0
    return {
        "train": Files(images.root, [path for path in images.paths if hashes[path] >= threshold]),
        "test": Files(images.root, [path for path in images.paths if hashes[path] < threshold]),
    }


def _classes(train: Files, test: Files) -> tuple[str, ...] | None:
    """Return the names of the classes; None if the folders are no classes.

    Raises:
        UserError: the held-out split has a class that the training split lacks.
    """
    classes, held_out = train.folders, test.folders
    if classes is None or held_out is None:
        return None
    if train.root == test.root:  # one folder, split by hash: a small class may be in one split only
        classes = classes | held_out
    elif unknown := held_out - classes:
        raise UserError(
            f"{test.root} has class folders that {train.root} lacks: {', '.join(sorted(unknown))}"
        )
    return tuple(sorted(classes, key=natural_order)) if len(classes) > 1 else None
