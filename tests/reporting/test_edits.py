import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from litdiffusion.reporting.edits import COLUMNS, MAX_ROWS, edit_strip
from litdiffusion.reporting.images import strip


def flat(*shades: float, channels: int = 1, size: int = 4) -> Tensor:
    """One image of each shade."""
    return torch.tensor(shades).reshape(-1, 1, 1, 1).expand(-1, channels, size, size)


def same(one: Image.Image, other: Image.Image) -> bool:
    return one.mode == other.mode and np.array_equal(np.asarray(one), np.asarray(other))


def test_an_image_stands_beside_what_was_drawn_from_it():
    picture = edit_strip({"image": flat(0.5)}, flat(-0.5, 0.0, 0.2))
    columns = [flat(0.5), flat(-0.5), flat(0.0), flat(0.2)]
    assert same(picture, strip(columns, ["image", "drawn 1", "drawn 2", "drawn 3"]))
    assert same(
        edit_strip({"image": flat(0.5)}, flat(0.1)), strip([flat(0.5), flat(0.1)], ["image", "drawn"])
    )


def test_each_of_several_images_has_a_row_and_gaps_are_white():
    picture = edit_strip({"image": flat(0.5, 0.6)}, flat(0.0, 0.1, 0.2))
    columns = [flat(0.5, 0.6), flat(0.0, 0.1), flat(0.2, 1.0)]
    assert same(picture, strip(columns, ["image", "drawn 1", "drawn 2"]))


def test_many_images_drawn_from_one_wrap_into_further_rows():
    drawn = flat(*(i / 30 for i in range(COLUMNS + 1)))
    picture = edit_strip({"image": flat(0.5), "image2": flat(-1.0)}, drawn)
    columns = [flat(0.5, 0.5), torch.stack((drawn[0], drawn[-1]))]
    columns += [torch.stack((image, flat(1.0)[0])) for image in drawn[1:COLUMNS]]
    captions = ["image", *(f"drawn {i + 1}" for i in range(COLUMNS)), "image2"]
    assert same(picture, strip([*columns, flat(-1.0, -1.0)], captions))
    many = flat(*(i / 90 for i in range(COLUMNS * MAX_ROWS + 1)))
    assert same(edit_strip({"image": flat(0.5)}, many), edit_strip({"image": flat(0.5)}, many[:-1]))


@pytest.mark.parametrize("channels", [1, 3])
def test_a_checkerboard_shows_the_redrawn_pixels(channels):
    mask = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    mask[..., 2:] = True
    picture = edit_strip({"image": flat(0.5, channels=channels), "mask": mask}, flat(0.0, channels=channels))
    shown = flat(0.5, channels=channels).clone()
    shown[..., 2:] = torch.tensor([[-0.4, 0.4], [0.4, -0.4], [-0.4, 0.4], [0.4, -0.4]])
    columns = [flat(0.5, channels=channels), shown, flat(0.0, channels=channels)]
    assert same(picture, strip(columns, ["image", "draw here", "drawn"]))
