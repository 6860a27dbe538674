import os
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from litdiffusion.randomness import (
    BLOCK,
    generator_at,
    image_generators,
    normal_positions,
    seed_of,
    uniform_positions,
)

places = st.lists(st.integers(-(2**70), 2**70) | st.text(max_size=5), max_size=4).map(tuple)
edges = st.lists(st.integers(0, 100), min_size=2, max_size=5, unique=True).map(sorted)


@given(places, places)
def test_different_places_have_different_seeds(one, other):
    assert (seed_of(*one) == seed_of(*other)) is (one == other)
    assert 0 <= seed_of(*one) < 2**63


def test_a_number_is_not_its_name_and_places_do_not_run_together():
    assert (
        len({seed_of(*place) for place in [(1, 2), ("1", 2), (12,), ("1, 2",), (1, 2, ""), (2, 1), ()]}) == 7
    )


def test_seeds_are_the_same_in_every_process():
    """Python's own hash is not."""
    code = "from litdiffusion.randomness import seed_of; print(seed_of(3, 'train', 7))"
    environment = os.environ | {"PYTHONHASHSEED": "1"}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert int(run.stdout) == seed_of(3, "train", 7)


def test_the_numbers_never_change():
    """A run that is resumed by a later version goes on as it began."""
    assert seed_of(0, "train", 0, "eps") == 3536497934267039648
    assert uniform_positions(0, 2, 0, "t").tolist() == pytest.approx([0.8157067, 0.9823368], abs=1e-6)


def test_a_generator_is_fresh_each_time():
    first = torch.rand(3, generator=generator_at(1, "a"))
    assert torch.equal(first, torch.rand(3, generator=generator_at(1, "a")))
    assert not torch.equal(first, torch.rand(3, generator=generator_at(1, "b")))


@given(edges)
def test_rows_are_the_same_however_the_batch_is_shared(cuts):
    whole = normal_positions((2, 3), 0, 101, 5, "eps")
    for start, stop in pairwise(cuts):
        assert torch.equal(normal_positions((2, 3), start, stop, 5, "eps"), whole[start:stop])
    numbers = uniform_positions(0, 101, 5, "t")
    assert torch.equal(uniform_positions(cuts[0], cuts[-1], 5, "t"), numbers[cuts[0] : cuts[-1]])


def test_no_row_is_another_row():
    rows = normal_positions((), 0, 4096, 0, "eps")
    assert len(rows.unique()) > 4090
    blocks = rows.view(-1, BLOCK)
    assert len(blocks.unique(dim=0)) == len(blocks)


def test_draws_have_the_moments_of_their_distribution():
    count = 200_000
    normal = normal_positions((), 0, count, 0, "eps")
    for power, moment, spread in [(1, 0, 1), (2, 1, 2**0.5), (3, 0, 15**0.5), (4, 3, 96**0.5)]:
        assert float(normal.pow(power).mean()) == pytest.approx(moment, abs=5 * spread / count**0.5)
    uniform = uniform_positions(0, count, 0, "t")
    assert 0 <= float(uniform.min()) < float(uniform.max()) < 1
    assert float(uniform.mean()) == pytest.approx(1 / 2, abs=5 * 12**-0.5 / count**0.5)
    # Neighbouring blocks, whose places differ by one, are unrelated.
    blocks = normal.view(-1, BLOCK)
    correlation = float((blocks[1:] * blocks[:-1]).mean())
    assert abs(correlation) < 5 / count**0.5


def test_the_global_generator_is_left_alone():
    torch.manual_seed(7)
    expected = torch.rand(4)
    torch.manual_seed(7)
    first = normal_positions((3,), 0, 40, 0, "eps")
    image_generators(0, 0, 4)
    assert torch.equal(torch.rand(4), expected)
    assert torch.equal(normal_positions((3,), 0, 40, 0, "eps"), first)


def test_an_image_has_its_generator_in_any_batch():
    whole = [torch.randn(3, generator=g) for g in image_generators(9, 0, 6)]
    for start, stop in ((0, 2), (2, 6), (5, 6)):
        part = [torch.randn(3, generator=g) for g in image_generators(9, start, stop)]
        assert all(torch.equal(a, b) for a, b in zip(part, whole[start:stop], strict=True))
    assert not torch.equal(whole[0], whole[1])
    assert not torch.equal(whole[0], torch.randn(3, generator=image_generators(10, 0, 1)[0]))
