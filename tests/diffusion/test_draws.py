import os
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kstest
from torch import Tensor

from litdiffusion.diffusion.draws import Draws, generator_at, philox, seed_of

places = st.lists(st.integers(-(2**70), 2**70) | st.text(max_size=5), max_size=4).map(tuple)
edges = st.lists(st.integers(0, 100), min_size=2, max_size=5, unique=True).map(sorted)


def rows(start: int, stop: int, *place: int | str, batch_size: int | None = None) -> Draws:
    return Draws.at(*(place or (0, "train", 5)), start=start, stop=stop, batch_size=batch_size)


# ---------------------------------------------------------------------------------------------- seeds


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
    code = "from litdiffusion.diffusion.draws import seed_of; print(seed_of(3, 'train', 7))"
    environment = os.environ | {"PYTHONHASHSEED": "1"}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert int(run.stdout) == seed_of(3, "train", 7)


def test_a_generator_is_fresh_each_time():
    first = torch.rand(3, generator=generator_at(1, "a"))
    assert torch.equal(first, torch.rand(3, generator=generator_at(1, "a")))
    assert not torch.equal(first, torch.rand(3, generator=generator_at(1, "b")))


# ---------------------------------------------------------------------------------------------- Philox


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_the_known_answers(counter, key, answer):
    """Those of philox4x32-10 in the kat_vectors of Random123, the authors' own library."""
    words, key = ([int(word, 16) for word in text.split()] for text in (counter, key))
    found = philox(tuple(torch.tensor([word]) for word in words), tuple(key))
    assert " ".join(f"{int(word):08x}" for word in found) == answer


def test_the_numbers_never_change():
    """A run that is resumed by a later version goes on as it began. Drawn by Philox since time is continuous."""
    assert seed_of(0, "train", 0, "eps") == 3536497934267039648
    draws = rows(0, 2, 0, "train", 0)
    assert draws.uniform("t").tolist() == pytest.approx([0.8625827, 0.6144812], abs=1e-7)
    assert draws.normal("eps", (3,)).flatten().tolist() == pytest.approx(
        [0.048396, 0.638243, -0.799284, 0.727057, 0.045953, 0.166546], abs=1e-6
    )
    assert draws.shared_uniform("coin") == pytest.approx(0.8559595389014, abs=1e-12)


# ---------------------------------------------------------------------------------------------- positions


@given(edges, st.integers(0, 2**40))
def test_rows_are_the_same_however_the_batch_is_shared(cuts, far):
    whole = rows(far, far + 101, batch_size=far + 101)
    normal, uniform, spread = whole.normal("eps", (2, 3)), whole.uniform("t"), whole.stratified("t")
    for start, stop in pairwise(cuts):
        part = rows(far + start, far + stop, batch_size=far + 101)
        assert torch.equal(part.normal("eps", (2, 3)), normal[start:stop])
        assert torch.equal(part.uniform("t"), uniform[start:stop])
        assert torch.equal(part.stratified("t"), spread[start:stop])
        assert part.shared_uniform("coin") == whole.shared_uniform("coin")
        assert len(part) == stop - start


def test_the_order_of_the_rows_does_not_matter():
    whole, order = rows(0, 12), torch.randperm(12)
    shuffled = Draws(whole.place, order)
    assert torch.equal(shuffled.normal("eps", (5,)), whole.normal("eps", (5,))[order])


def test_the_numbers_of_an_image_go_by_their_count():
    """However they are shaped, and whether or not it is even."""
    flat, square = rows(0, 3).normal("eps", (16,)), rows(0, 3).normal("eps", (1, 4, 4))
    assert torch.equal(flat, square.flatten(1))
    assert rows(0, 3).normal("eps", (5,)).shape == (3, 5)
    assert rows(0, 3).normal("eps", ()).shape == (3,)


def test_no_row_is_another_row():
    """Nor the row of another name, step or seed, nor one 2^32 positions away."""
    many = [
        rows(0, 1024),
        rows(2**32, 2**32 + 1024),
        rows(0, 1024, 0, "train", 6),
        rows(0, 1024, 1, "train", 5),
    ]
    drawn = torch.cat([draws.normal(name, (4,)) for draws in many for name in ("eps", "noise")])
    assert len(drawn.unique(dim=0)) == len(drawn)
    assert len(drawn.flatten().unique()) > 0.999 * drawn.numel()


def test_rows_and_names_are_independent():
    """Correlations of neighbours in every direction, of numbers and of their squares."""
    a = torch.stack([rows(0, 300).normal(name, (256,)) for name in ("eps", "noise 0", "noise 1")])
    for x in (a, (a.square() - 1) / 2**0.5):
        x = x.double()
        for pair in (
            (x[:, 1:], x[:, :-1]),
            (x[..., 1:], x[..., :-1]),
            (x[1:], x[:-1]),
            (x[..., :128], x[..., 128:]),
        ):
            product = (pair[0] * pair[1]).flatten()
            assert abs(float(product.mean())) < 5 / len(product) ** 0.5


# ---------------------------------------------------------------------------------------------- distributions


def test_draws_have_the_moments_of_their_distribution():
    count = 200_000
    normal = rows(0, count // 4).normal("eps", (4,)).flatten()
    for power, moment, spread in [(1, 0, 1), (2, 1, 2**0.5), (3, 0, 15**0.5), (4, 3, 96**0.5)]:
        assert float(normal.pow(power).mean()) == pytest.approx(moment, abs=5 * spread / count**0.5)
    uniform = rows(0, count).uniform("t")
    assert 0 <= float(uniform.min()) < float(uniform.max()) < 1
    assert float(uniform.mean()) == pytest.approx(1 / 2, abs=5 * 12**-0.5 / count**0.5)


def test_draws_follow_their_distribution():
    """Kolmogorov and Smirnov's test, in the middle and in the tails."""
    normal = rows(0, 100).normal("eps", (1000,)).flatten().double()
    assert kstest(normal.numpy(), "norm").pvalue > 0.01
    assert 3.8 < float(normal.abs().max()) < 6  # of 100,000
    assert kstest(rows(0, 50_000).uniform("t").numpy(), "uniform").pvalue > 0.01
    coins = [rows(0, 1, 0, "train", step).shared_uniform("coin") for step in range(2000)]
    assert kstest(coins, "uniform").pvalue > 0.01


def test_one_name_gives_unrelated_numbers_of_each_kind_and_size():
    draws = rows(0, 50_000)
    kinds = [draws.uniform("a") - 0.5, *(draws.normal("a", (n,))[:, 0] for n in (1, 2, 3, 7))]
    correlations = torch.corrcoef(torch.stack([*kinds, *(kind.abs() for kind in kinds)]))
    correlations.fill_diagonal_(0)
    assert float(correlations.abs().max()) < 5 / 50_000**0.5


def test_the_ends_of_the_bits_are_finite(monkeypatch):
    """The logarithm of Box and Muller never meets 0, and a uniform number never is 1."""
    for bits in (0, 2**32 - 1):
        words = lambda self, count, *name, bits=bits: torch.full((len(self), count), bits)  # noqa: E731
        monkeypatch.setattr(Draws, "_bits", words)
        assert bool(rows(0, 2).normal("eps", (4,)).isfinite().all())
        assert 0 <= float(rows(0, 2).uniform("t")[0]) < 1


@given(size=st.integers(1, 300), seed=st.integers(0, 100))
def test_each_image_of_a_batch_draws_from_its_own_slice(size, seed):
    spread = rows(0, size, seed, "train", 0, batch_size=size).stratified("t")
    assert (spread * size).floor().tolist() == list(range(size))
    assert float(spread.max()) < 1
    torch.testing.assert_close(
        spread * size % 1, rows(0, size, seed, "train", 0).uniform("t").double(), rtol=0, atol=1e-9
    )


@given(first=st.integers(0, 10**6), count=st.integers(1, 400))
def test_a_fixed_set_fills_every_tenth_in_every_run_of_positions(first, count):
    spread = rows(first, first + count).stratified("t")
    assert 0 <= float(spread.min()) <= float(spread.max()) < 1
    in_tenths = torch.bincount((spread * 10).long(), minlength=10)
    # Independent draws stray by sqrt(count / 10), several times over.
    assert float((in_tenths - count / 10).abs().max()) < 3
    assert torch.equal(spread, rows(first, first + count, 7, "any other place").stratified("offset"))


def test_the_global_generator_is_left_alone():
    torch.manual_seed(7)
    expected = torch.rand(4)
    torch.manual_seed(7)
    first = everything(rows(0, 40, batch_size=40))
    generator_at(0, "dropout")
    assert torch.equal(torch.rand(4), expected)
    assert torch.equal(everything(rows(0, 40, batch_size=40)), first)


def everything(draws: Draws) -> Tensor:
    of_all = draws.normal("eps", (3,)).sum(1) + draws.uniform("t") + draws.stratified("t")
    return of_all + draws.shared_uniform("coin") + draws.seed("dropout", 3) / 2**63
