"""scikit-learn's handwritten digits: 1,797 real images of 8x8 pixels that come with the library."""

from collections.abc import Sequence

import datasets
import numpy as np

from litdiffusion.data.decoding import array_dataset
from litdiffusion.data.sources.base import Source, Split


class Digits(Source):
    """The digits 0 to 9, 8x8, gray; every sixth image is held out. Nothing is downloaded.

    Source: the test part of UCI's "Optical Recognition of Handwritten Digits".
    """

    name = "digits"

    def __init__(self, image_size: int | Sequence[int] = 8, channels: int = 1, flip: bool = False) -> None:
        super().__init__(image_size, channels, flip)

    def load(self, split: Split) -> datasets.Dataset:
        """Scale the 17 gray levels 0..16 to 0..255."""
        import sklearn.datasets  # here, since every other start would wait a second for it

        digits = sklearn.datasets.load_digits()
        held_out = (np.arange(len(digits.target)) % 6 == 5) & self.hold_out
        chosen = held_out == (split == "test")
        pixels = np.rint(digits.images[chosen] * (255 / 16)).astype(np.uint8)
        self.class_names = tuple(map(str, digits.target_names))
        return array_dataset(pixels[:, None], digits.target[chosen].astype(np.uint8), self.class_names)
