"""Fashion-MNIST: 70,000 gray images of garments, 28x28, in ten classes (Xiao et al., 2017, 1708.07747)."""

import logging
from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np
from jaxtyping import UInt8

from litdiffusion.data.decoding import array_dataset
from litdiffusion.data.idx import read_idx
from litdiffusion.data.sources.base import Source, Split
from litdiffusion.data.sources.hub import Splits, load_from_hub
from litdiffusion.errors import UserError

log = logging.getLogger(__name__)

FILES: dict[Split, tuple[str, str]] = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
HUB_NAME = "zalando-datasets/fashion_mnist"
THREE_WAYS = (
    "get it by `make data`, by `apt install dataset-fashion-mnist`, "
    "or give data.path=DIR with the four IDX files (online, it comes from the Hub by itself)"
)


class FashionMNIST(Source):
    """Fashion-MNIST from a local folder, else from Debian's package, else from the Hub.

    Args:
        path: folder with the four IDX files, gzipped or not; it need not exist.
        image_size: see ``Source``.
        channels: see ``Source``.
        flip: see ``Source``.
    """

    name = "Fashion-MNIST"

    def __init__(
        self, path: str | Path, image_size: int | Sequence[int] = 28, channels: int = 1, flip: bool = True
    ) -> None:
        super().__init__(image_size, channels, flip)
        self.path = Path(path).expanduser()

    def prepare(self) -> None:
        """Download it from the Hub if it is not on this machine."""
        if find_folder(self.path) is None:
            self._from_hub()

    def load(self, split: Split) -> datasets.Dataset:
        """Read the two files of the split, or the copy from the Hub."""
        self.class_names = CLASSES
        folder = find_folder(self.path)
        if folder is None:
            return self._from_hub()[split].select_columns(["image", "label"])
        log.info("%s: %s split from %s", self.name, split, folder)
        images, labels = read_split(folder, split)
        return array_dataset(images[:, None], labels, CLASSES)

    def _from_hub(self) -> Splits:
        try:
            return load_from_hub(HUB_NAME)
        except UserError as error:
            raise UserError(
                f"no Fashion-MNIST in {self.path} or {DEBIAN_FOLDER}, and {error}: {THREE_WAYS}"
            ) from error


def find_folder(path: Path) -> Path | None:
    """Return the first of ``path`` and Debian's folder that holds the data; None if neither does.

    Raises:
        UserError: ``path`` is a file, or a folder holds only some of the four files.
    """
    if path.is_file():
        raise UserError(f"data.path={path} is a file; give the folder with the four IDX files")
    names = [name for pair in FILES.values() for name in pair]
    for folder in (path, DEBIAN_FOLDER):
        missing = [name for name in names if _find_file(folder, name) is None]
        if not missing:
            return folder
        if len(missing) < len(names):
            raise UserError(f"{folder} lacks {', '.join(missing)} (or .gz); complete it with `make data`")
    return None


def read_split(
    folder: Path, split: Split
) -> tuple[UInt8[np.ndarray, "batch height width"], UInt8[np.ndarray, " batch"]]:
    """Read the images and labels of a split from IDX files.

    Raises:
        UserError: a file is missing, damaged, or does not fit the other; the text names it.
    """
    image_file, label_file = (_find_file(folder, name) or folder / name for name in FILES[split])
    images, labels = read_idx(image_file, ndim=3), read_idx(label_file, ndim=1)
    if len(images) != len(labels) or len(images) == 0:
        raise UserError(f"{image_file} has {len(images)} images, {label_file} {len(labels)} labels")
    if 0 in images.shape:
        raise UserError(f"{image_file} has images of {images.shape[1]} x {images.shape[2]} pixels")
    if labels.max() >= len(CLASSES):
        raise UserError(
            f"{label_file} has label {labels.max()}; Fashion-MNIST's run from 0 to {len(CLASSES) - 1}"
        )
    return images, labels


def _find_file(folder: Path, name: str) -> Path | None:
    return next((file for file in (folder / name, folder / f"{name}.gz") if file.is_file()), None)
