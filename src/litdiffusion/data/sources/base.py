"""The interface of every source of images."""

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

import datasets

Split = Literal["train", "test"]

HELD_OUT = ("test", "validation", "valid", "val", "eval", "dev")
"""Names of held-out splits, in order of preference."""


class Source(ABC):
    """A data set of images with a training and a held-out split.

    Args:
        image_size: a side in pixels, or [height, width]; images of another size are resized and cropped.
        channels: 1 (gray) or 3 (RGB); images of the other kind are converted.
        flip: mirror a random half of the training images.

    Raises:
        ValueError: a value is out of range.
    """

    name: str
    """The name of this source in messages."""
    class_names: tuple[str, ...] | None = None
    """Names of the labels 0, 1, ... once a split is loaded; None where there are no labels."""
    hold_out = True
    """Whether some training images are held out where the data set has no split for that; "test" is empty if not."""

    def __init__(self, image_size: int | Sequence[int], channels: int, flip: bool) -> None:
        sides = [image_size, image_size] if isinstance(image_size, int) else list(image_size)
        if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
            raise ValueError(f"image_size={image_size}: must be a positive integer, or [height, width]")
        self.image_size = sides[0], sides[1]
        if channels not in (1, 3):
            raise ValueError(f"channels={channels}: must be 1 (gray) or 3 (RGB)")
        self.channels = channels
        self.flip = flip

    def prepare(self) -> None:  # noqa: B027  (optional)
        """Download what ``load`` needs and this machine lacks; called by one process of each machine."""

    @abstractmethod
    def load(self, split: Split) -> datasets.Dataset:
        """Open a split, images undecoded.

        Returns:
            Column "image" (``datasets.Image``, or ``Array3D`` uint8 [C, H, W]) and, where there are labels,
            "label" (int, an index into ``class_names``).

        Raises:
            UserError: the data is missing or damaged.
        """


def require_holdout(holdout: float) -> None:
    """Raise ValueError unless a fraction leaves images on both sides."""
    if not 0.0 < holdout < 1.0:
        raise ValueError(
            f"holdout={holdout}: must lie between 0 and 1, both excluded; datamodule.num_val=0 holds out none"
        )


def natural_order(name: str) -> tuple[list[str | int], str]:
    """Return what to sort names of classes by: text as text and numbers by their value, so 2 before 10."""
    parts = re.split(r"(^-?\d+|\d+)", name)
    return [int(part) if place % 2 else part for place, part in enumerate(parts)], name
