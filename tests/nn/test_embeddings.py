import math

import pytest
import torch

from litdiffusion.nn.embeddings import SinusoidalEmbedding, TimeEmbedding
from peers import blog_unet


@pytest.mark.parametrize("dim", [4, 28, 64])
def test_the_embedding_is_the_blogs(dim):
    t = torch.tensor([0, 1, 150, 299, 999])
    theirs = blog_unet.SinusoidalPositionEmbeddings(dim)(t)
    torch.testing.assert_close(SinusoidalEmbedding(dim)(t), theirs, rtol=0, atol=1e-4)


def test_the_embedding_is_its_formula():
    """Sines first; frequencies from 1 to 1/10000, both on the list."""
    frequencies = [10_000 ** (-i / 3) for i in range(4)]
    embedded = SinusoidalEmbedding(8)(torch.tensor([0, 7]))
    assert embedded[0].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    expected = [math.sin(7 * f) for f in frequencies] + [math.cos(7 * f) for f in frequencies]
    assert embedded[1].tolist() == pytest.approx(expected, abs=1e-6)
    assert frequencies[0] == 1
    assert frequencies[-1] == pytest.approx(1e-4)


def test_the_embedding_tells_all_times_apart_under_autocast():
    t = torch.arange(1000)
    with torch.autocast("cpu", torch.bfloat16):
        embedded = SinusoidalEmbedding(28)(t)
    assert embedded.dtype == torch.float32
    assert torch.cdist(embedded, embedded).fill_diagonal_(1).min() > 1e-2


def test_the_embedding_saves_nothing():
    assert SinusoidalEmbedding(8).state_dict() == {}
    assert set(TimeEmbedding(8, 32).state_dict()) == {"1.weight", "1.bias", "3.weight", "3.bias"}


@pytest.mark.parametrize("dim", [7, 2, 0])
def test_impossible_dimensions_are_named(dim):
    with pytest.raises(ValueError, match=f"dim={dim}"):
        SinusoidalEmbedding(dim)
