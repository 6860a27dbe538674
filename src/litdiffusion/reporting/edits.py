"""The picture of an edit: the given images beside what was drawn from each."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from litdiffusion.reporting.images import strip

COLUMNS, MAX_ROWS = 10, 8
"""Drawn images in a row, and rows; the rest is left out."""


def edit_strip(
    given: Mapping[str, Tensor], drawn: Float[Tensor, "drawn channels height width"]
) -> Image.Image:
    """Show each given image on the left and what was drawn from it in rows beside it; ``image2`` on the right.

    Args:
        given: by their keys on the command line: ``image`` [given, C, H, W], and perhaps ``mask`` [masks, 1, H, W],
            shown as a checkerboard on the image where that is redrawn, and ``image2`` [1, C, H, W].
        drawn: image i was drawn from given image i modulo their number.

    Raises:
        ValueError: ``strip`` refuses the images.
    """
    image = given["image"]
    rows = [
        (owner, row)
        for owner in range(min(len(image), len(drawn)))
        for row in torch.split(drawn[owner :: len(image)], COLUMNS)
    ][:MAX_ROWS]
    owners = [owner for owner, _ in rows]
    columns = {"image": image[owners]}
    if "mask" in given:
        mask = given["mask"][[owner % len(given["mask"]) for owner in owners]]
        odd = (torch.arange(image.shape[-2])[:, None] + torch.arange(image.shape[-1])) % 2
        columns["draw here"] = torch.where(mask, odd * 0.8 - 0.4, image[owners])
    width = max(len(row) for _, row in rows)
    filled = [F.pad(row, (0, 0, 0, 0, 0, 0, 0, width - len(row)), value=1.0) for _, row in rows]
    for i, column in enumerate(torch.stack(filled, dim=1)):
        columns["drawn" if width == 1 else f"drawn {i + 1}"] = column
    if "image2" in given:
        columns["image2"] = given["image2"].expand(len(rows), -1, -1, -1)
    return strip(list(columns.values()), list(columns))
