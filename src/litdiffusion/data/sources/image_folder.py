"""Any folder of images."""

import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

import datasets
import pyarrow as pa

from litdiffusion.data.sources.base import Source, Split, require_holdout
from litdiffusion.diffusion.draws import seed_of
from litdiffusion.errors import UserError

EXTENSIONS = (
    *(".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif"),
    *(".tif", ".tiff", ".ppm", ".pgm", ".pbm"),
)
HELD_OUT = ("test", "val", "validation", "valid")
"""Names of held-out subfolders, in order of preference."""


class Files(NamedTuple):
    """Images of a split: paths relative to the split's own folder, sorted."""

    root: Path
    paths: list[Path]

    @property
    def folders(self) -> set[str] | None:
        """The first-level subfolders; None if some image lies in none."""
        return None if any(len(path.parts) == 1 for path in self.paths) else {p.parts[0] for p in self.paths}


class ImageFolder(Source):
    """All images of a folder, at any depth.

    Subfolders are classes if there are at least two and every image is in one. Beside a subfolder ``train``,
    ``test`` (else ``val``, ``validation``, ``valid``) is the held-out split. Otherwise a fraction is held out by
    a hash of each path, so that adding images does not move the others from one split to the other.

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
        flip: bool = True,
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
        everything = _images_in(self.path)
        subfolders = {path.parts[0].lower(): path.parts[0] for path in everything if len(path.parts) > 1}
        root = self.path
        if "train" in subfolders:
            for name in HELD_OUT:
                if name in subfolders:
                    train, test = (self.path / subfolders[part] for part in ("train", name))
                    return {"train": Files(train, _images_in(train)), "test": Files(test, _images_in(test))}
            root = self.path / subfolders["train"]
            everything = _images_in(root)
        if len(everything) < 1 + self.hold_out:
            what = (
                "no images"
                if not everything
                else "only one image; at least 2 are needed, one of them to hold out"
            )
            raise UserError(
                f"data.path={self.path} has {what} (looked for {' '.join(EXTENSIONS)} at any depth)"
            )
        return _hold_out(root, everything, self.holdout * self.hold_out)


def _images_in(folder: Path) -> list[Path]:
    """Return the relative paths of the images below a folder, by extension, sorted, without hidden ones."""
    return sorted(path.relative_to(folder) for path in _walk(folder))


def _walk(folder: Path) -> Iterator[Path]:
    visited: set[str] = set()
    for parent, subfolders, files in os.walk(folder, onerror=_refuse, followlinks=True):
        real = os.path.realpath(parent)
        # A link may lead to a parent, so each folder is visited once.
        subfolders[:] = [] if real in visited else [s for s in subfolders if s[0] not in "._"]
        if real not in visited:
            named = (f for f in files if f[0] != "." and f.lower().endswith(EXTENSIONS))
            paths = (os.path.join(parent, f) for f in named)  # noqa: PTH118  (a Path only for those that are kept)
            yield from (Path(_named_in_unicode(path)) for path in paths if not _is_special(path))
        visited.add(real)


def _is_special(path: str) -> bool:
    """Whether it is a pipe, a socket or a device, which could block; a broken link is not, and fails later."""
    try:
        return not stat.S_ISREG(os.stat(path).st_mode)  # noqa: PTH116  (as above)
    except OSError:
        return False


def _named_in_unicode(path: str) -> str:
    try:
        path.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{path!a}: the name of this image is not in UTF-8; rename it") from error
    return path


def _refuse(error: OSError) -> NoReturn:
    raise UserError(f"cannot read the folder {error.filename}: {error.strerror}") from error


def _hold_out(root: Path, paths: list[Path], fraction: float) -> dict[Split, Files]:
    """Hold out the images whose hash is below ``fraction``: at least one image and not all, or none if it is 0."""
    hashes = {path: seed_of("holdout", path.as_posix()) / 2**63 for path in paths}
    ranked = sorted(hashes.values())
    threshold = min(max(fraction, ranked[1]), ranked[-1]) if fraction else 0.0
    return {
        "train": Files(root, [path for path in paths if hashes[path] >= threshold]),
        "test": Files(root, [path for path in paths if hashes[path] < threshold]),
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
    return tuple(sorted(classes)) if len(classes) > 1 else None
