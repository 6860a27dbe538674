"""Small worlds of images: real files and data sets, a few pixels each."""

from pathlib import Path

import numpy as np
from PIL import Image

from litdiffusion.data.idx import write_idx

REPOSITORY = Path(__file__).parents[2]
FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


def noise(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def save_images(folder: Path, count: int, size: tuple[int, int] = (9, 7), suffix: str = ".png") -> list[Path]:
    """Write ``count`` RGB images of noise, (height, width) pixels each; no two are alike."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{i:03d}{suffix}" for i in range(count)]
    for i, path in enumerate(paths):
        Image.fromarray(noise(hash_of(folder, i), *size, 3)).save(path)
    return paths


def hash_of(folder: Path, number: int) -> int:
    return sum(folder.name.encode()) * 1000 + number


def small_copy(folder: Path, suffix: str = "") -> dict[str, np.ndarray]:
    """Fashion-MNIST in form, with 20 training and 5 test images of noise."""
    folder.mkdir(exist_ok=True)
    values = {
        FILES[0]: noise(0, 20, 28, 28),
        FILES[1]: noise(1, 20) % 10,
        FILES[2]: noise(2, 5, 28, 28),
        FILES[3]: noise(3, 5) % 10,
    }
    for name, value in values.items():
        write_idx(folder / f"{name}{suffix}", value)
    return values
