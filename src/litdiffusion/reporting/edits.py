"""The picture of an edit: what was given beside what was drawn, each under a caption."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from litdiffusion.reporting.images import strip

COLUMNS = 10
"""Drawn images in a row."""


def edit_strip(
    given: Mapping[str, Tensor], drawn: Float[Tensor, "drawn channels height width"], max_rows: int = 8
) -> Image.Image:
    """Show given images on the left, and what was drawn from each in rows beside it; ``image2`` on the right.

    Args:
        given: by the keys of the command line: ``image`` [given, C, H, W], and perhaps ``mask`` [masks, 1, H, W],
            shown as the image with a checkerboard where it is drawn anew, and ``image2`` [1, C, H, W].
        drawn: image i belongs to given image i modulo their number.
        max_rows: the rest is left out.

    Raises:
        ValueError: the images are ones that ``strip`` refuses.
    """
    image = given["image"]
    number = torch.arange(len(drawn)) % len(image)
    rows, owners = [], []
    for owner in range(min(len(image), len(drawn))):
        for row in torch.split(drawn[number == owner], COLUMNS):
            rows.append(row)
            owners.append(owner)
    rows, owners = rows[:max_rows], owners[:max_rows]
    width = max(map(len, rows))
    blank = torch.ones_like(drawn[0])
    columns = [torch.stack([row[i] if i < len(row) else blank for row in rows]) for i in range(width)]
    captions = ["drawn" if width == 1 else f"drawn {i + 1}" for i in range(width)]
    if "mask" in given:
        mask = given["mask"][[owner % len(given["mask"]) for owner in owners]]
        columns.insert(0, torch.where(mask, _checkerboard(image), image[owners]))
        captions.insert(0, "draw here")
    columns.insert(0, image[owners])
    captions.insert(0, "image")
    if "image2" in given:
        columns.append(given["image2"].expand(len(rows), -1, -1, -1))
        captions.append("image2")
    return strip(columns, captions)


def _checkerboard(images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "height width"]:
    height, width = images.shape[-2:]
    odd = (torch.arange(height)[:, None] + torch.arange(width)) % 2
    return odd * 0.8 - 0.4
