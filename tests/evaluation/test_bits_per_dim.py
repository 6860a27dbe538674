from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from litdiffusion.data.stores import Batch
from litdiffusion.diffusion import L2, Denoiser, Denoising, Draws, Uniform, UniformLevels, V, schedules
from litdiffusion.errors import UserError
from litdiffusion.evaluation import BitsPerDim, Model
from litdiffusion.evaluation.bits_per_dim import bound_parts, strata
from small_worlds import Affine, Spy, affine_denoiser, images, normal, variational_bound

pytestmark = pytest.mark.usefixtures("one_thread")

T = 12
OBJECTIVE = Denoising(L2(), Uniform(), UniformLevels())


def denoiser(net=None, num_steps: int = T) -> Denoiser:
    return affine_denoiser(schedules.cosine(num_steps), V(), net=net or Affine())


def on_levels(count: int) -> Tensor:
    return ((images(count) + 1) * 127.5).round() / 127.5 - 1


def bits_per_dim(*given) -> Tensor:
    return bound_parts(*given).total


def exact(model: Denoiser, x0: Tensor, first: int = 0):
    draws = positions(first, first + len(x0))

    def noise(t: Tensor) -> Tensor:
        step = round(float(t[0]) * model.schedule.num_steps)
        return draws.normal("decoder" if step == 1 else f"stratum {step - 2}", (1, 4, 4))

    return variational_bound(model, x0, noise, "beta")


def positions(start: int, stop: int) -> Draws:
    return Draws.at("bits per dim", start=start, stop=stop)


class Offsets(Draws):
    """Draws whose image i of n has the i-th of n offsets."""

    def stratified(self, name: str) -> Tensor:
        return (self.positions + 0.5) / len(self)


# ---------------------------------------------------------------------------------------------- the estimator


@given(num_steps=st.integers(2, 60), num_times=st.integers(2, 70))
def test_every_time_is_as_likely_as_any_other_and_no_two_are_the_same(num_steps, num_times):
    """Over all offsets each of 2..T comes up n times: with the factor (T - 1) / n, once on the average."""
    n = min(num_times, num_steps) - 1
    # As many positions as offsets, each with its own.
    steps = torch.stack(strata(Offsets.at(start=0, stop=num_steps - 1), num_steps, num_times), dim=1)
    assert steps.shape == (num_steps - 1, n)
    assert bool((steps.diff(dim=1) > 0).all())
    counts = torch.bincount(steps.flatten(), minlength=num_steps + 1)
    assert counts.tolist() == [0, 0] + [n] * (num_steps - 1)


@pytest.mark.parametrize("num_times", [2, 3, 6])
def test_the_mean_of_the_estimates_over_all_offsets_is_the_bound(num_times, monkeypatch):
    """Of the same noise in every stratum, so that an offset decides about the time alone."""
    x0, model, eps = on_levels(3), denoiser(num_steps=7), normal(3, 1, 4, 4)
    monkeypatch.setattr(Draws, "normal", lambda *_: eps)
    estimates = []
    for offset in range(6):
        place = (offset + 0.5) / 6
        monkeypatch.setattr(Draws, "stratified", lambda draws, _, place=place: 0 * draws.positions + place)
        estimates.append(bits_per_dim(model, x0, 5, num_times, "beta").double())
    estimates = torch.stack(estimates)
    torch.testing.assert_close(estimates.mean(0), exact(model, x0, 5).total.double(), rtol=1e-6, atol=0)
    assert float(estimates.std(0).min()) > 1e-3  # and no estimate is the bound itself


@pytest.mark.parametrize("num_times", [None, T, T + 70])
def test_all_times_are_the_bound_itself(num_times):
    x0, model = on_levels(3), denoiser()
    torch.testing.assert_close(bits_per_dim(model, x0, 2, num_times, "beta"), exact(model, x0, 2).total)


@pytest.mark.parametrize("num_times", [None, 2, 9])
def test_prior_and_decoder_are_always_exact(num_times):
    x0, model = on_levels(3), denoiser()
    total, prior, decoder = bound_parts(model, x0, 2, num_times, "beta")
    bound = exact(model, x0, 2)
    torch.testing.assert_close(prior, bound.prior)
    torch.testing.assert_close(decoder, bound.terms[:, 0])
    assert bool((total > prior + decoder).all())


def test_images_side_by_side_have_offsets_spread_over_their_strata():
    """Of 100 images, the mean of any of the 5 times lies in the middle of its stratum of 200."""
    steps = torch.stack(strata(positions(0, 100), 1001, 6), dim=1).double()
    middles = 2 + 200 * torch.arange(5) + 99.5
    torch.testing.assert_close(steps.mean(0), middles.double(), rtol=0, atol=3.0)


def test_one_time_can_stand_for_no_others():
    with pytest.raises(ValueError, match="num_times=1: must be at least 2"):
        bits_per_dim(denoiser(), on_levels(2), 0, 1, "beta")
    model, x0 = denoiser(num_steps=1), on_levels(2)
    for num_times in (1, 2, None):  # T = 1 has no others
        torch.testing.assert_close(bits_per_dim(model, x0, 0, num_times, "beta"), exact(model, x0).total)


# ---------------------------------------------------------------------------------------------- what is fixed


@pytest.mark.parametrize("num_times", [None, 4])
def test_an_image_is_measured_the_same_in_any_batch(num_times):
    x0, model = on_levels(20), denoiser()
    whole = bits_per_dim(model, x0, 0, num_times, "beta")
    for cuts in ((7, 19), (16,)):
        edges = [0, *cuts, 20]
        shares = [bits_per_dim(model, x0[a:b], a, num_times, "beta") for a, b in pairwise(edges)]
        torch.testing.assert_close(torch.cat(shares), whole)
    elsewhere = bits_per_dim(model, x0, 1, num_times, "beta")
    assert not torch.isclose(elsewhere, whole).any()


def test_noise_is_another_in_every_stratum_and_at_every_position():
    net = Spy(self_condition=False)
    bits_per_dim(denoiser(net, num_steps=4), 0 * on_levels(3), 0, None, "beta")
    schedule = schedules.cosine(4)
    eps = torch.cat([call.x / schedule.at((i + 1) / 4)[1] for i, call in enumerate(net.calls)])
    across = torch.corrcoef(eps.flatten(1))
    assert len(eps.flatten().unique()) == eps.numel()
    assert float((across - torch.eye(12)).abs().max()) < 0.9


@pytest.mark.parametrize("self_condition", [False, True])
def test_the_network_is_called_once_for_each_time_without_gradient(self_condition):
    net = Spy(self_condition)
    bits_per_dim(denoiser(net), on_levels(3), 0, 5, "beta")
    assert len(net.calls) == 5 * (1 + self_condition)
    assert not any(call.grad_enabled for call in net.calls)
    assert net.calls[0].c_noise.tolist() == [0, 0, 0]
    assert len(set(net.calls[-1].c_noise.tolist())) > 1  # each image goes by its own offset


# ---------------------------------------------------------------------------------------------- labels


class Classes(Affine):
    """An ``Affine`` whose gain goes by the label, of which it keeps what it was told."""

    num_classes = 3

    def forward(self, x, c_noise, self_cond=None, labels=None):
        self.told = labels.tolist()
        return (1 + labels[:, None, None, None]) * super().forward(x, c_noise) / 4


class Scaled(Affine):
    """An ``Affine`` whose gains are those of ``Classes`` for one label."""

    def __init__(self, label: int) -> None:
        super().__init__()
        self.label = label

    def forward(self, x, c_noise, self_cond=None):
        return (1 + self.label) * super().forward(x, c_noise) / 4


def test_a_class_conditional_network_is_told_each_images_label():
    net, x0 = Classes(), on_levels(3)
    found = bits_per_dim(denoiser(net), x0, 4, 6, "beta", torch.tensor([2, 0, 1]))
    assert net.told == [2, 0, 1]
    for row, label in enumerate((2, 0, 1)):
        alone = bits_per_dim(denoiser(Scaled(label)), x0[row : row + 1], 4 + row, 6, "beta")
        torch.testing.assert_close(found[row : row + 1], alone)


def test_without_labels_it_is_told_that_there_are_none():
    net = Classes()
    bits_per_dim(denoiser(net), on_levels(2), 0, 3, "beta")
    assert net.told == [3, 3]


def test_a_plain_network_never_sees_the_labels():
    x0, labels = on_levels(2), torch.tensor([7, 8])
    plain = bits_per_dim(denoiser(), x0, 0, 3, "beta")
    assert torch.equal(bits_per_dim(denoiser(), x0, 0, 3, "beta", labels), plain)


def test_labels_of_other_data_are_refused():
    with pytest.raises(ValueError, match=r"labels: .*0\.\.2"):
        bits_per_dim(denoiser(Classes()), on_levels(2), 0, 3, "beta", torch.tensor([0, 3]))


# ---------------------------------------------------------------------------------------------- what is reported


def measured(metric: BitsPerDim, model: Denoiser, x0: Tensor, labels: Tensor | None, *cuts: int):
    for index, (start, stop) in enumerate(pairwise([0, *cuts, len(x0)])):
        batch = Batch(x0[start:stop], None if labels is None else labels[start:stop], start, index)
        metric.update(Model(model, OBJECTIVE), batch)
    return metric.compute()


@pytest.mark.parametrize("cuts", [(), (4,), (3, 6), (5, 7)])
def test_the_metric_is_the_mean_over_the_first_images(cuts):
    x0, labels = on_levels(10), torch.arange(10) % 3
    metric = BitsPerDim(5, 7, "beta_tilde")
    found = measured(metric, denoiser(Classes()), x0, labels, *cuts)
    parts = bound_parts(denoiser(Classes()), x0[:5], 0, 7, "beta_tilde", labels[:5])
    assert found == {
        "": pytest.approx(float(parts.total.mean()), rel=1e-5),
        "_prior": pytest.approx(float(parts.prior.mean()), rel=1e-5),
        "_decoder": pytest.approx(float(parts.decoder.mean()), rel=1e-5),
    }
    assert metric.extent() == {"bits_per_dim_images": 5, "bits_per_dim_times": 7}


def test_the_report_says_on_what_it_rests():
    x0 = on_levels(4)
    every_time, too_many = BitsPerDim(100), BitsPerDim(9, T + 5)
    measured(every_time, denoiser(), x0, None, 2)
    assert every_time.extent() == {"bits_per_dim_images": 4, "bits_per_dim_times": T}
    measured(too_many, denoiser(), x0, None)
    assert too_many.extent()["bits_per_dim_times"] == T


def test_no_images_ask_for_nothing():
    net, metric = Spy(), BitsPerDim(0, 5)
    assert measured(metric, denoiser(net), on_levels(4), None) == {}
    assert metric.extent() == {}
    assert net.calls == []


def test_the_network_sees_no_more_images_than_are_measured():
    net, metric = Spy(False), BitsPerDim(2, 2)
    measured(metric, denoiser(net), on_levels(5), None, 2, 4)
    assert [len(call.c_noise) for call in net.calls] == [2, 2]
    assert metric.extent()["bits_per_dim_images"] == 2


@pytest.mark.parametrize(("num_images", "num_times"), [(-1, 2), (1, 1)])
def test_what_cannot_be_measured_is_refused(num_images, num_times):
    with pytest.raises(ValueError, match="must be at least"):
        BitsPerDim(num_images, num_times)


def test_a_variance_that_was_not_learned_is_refused():
    with pytest.raises(UserError, match="variance=learned: this network"):
        BitsPerDim(1, variance="learned").require_support(denoiser())
    BitsPerDim(1).require_support(denoiser())
