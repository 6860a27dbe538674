from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from litdiffusion.diffusion import (
    DDIM,
    DDPM,
    Denoiser,
    DPMSolverPP2M,
    Draws,
    Guided,
    Heun,
    Labelled,
    Preconditioned,
    Sampler,
    Schedule,
    V,
    schedules,
)
from litdiffusion.diffusion.editing import Edit, Inpaint, Interpolate, Slerp, Variation
from small_worlds import (
    SAMPLERS,
    Affine,
    Exact,
    GaussianData,
    MixtureData,
    affine_denoiser,
    draws,
    images,
    normal,
)

pytestmark = pytest.mark.usefixtures("one_thread")

SCHEDULE = schedules.cosine(1000)
RIGHT = torch.tensor([[False, True]])
every_sampler = pytest.mark.parametrize("make", SAMPLERS.values(), ids=SAMPLERS)


@dataclass
class PairData:
    """Images of two pixels: each N(mean, std^2), and correlated."""

    schedule: Schedule
    mean: float = 0.2
    std: float = 0.4
    correlation: float = 0.9

    def denoise(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """E[x_0 | x_t]: the two pixels' mean and half their difference are independent."""
        alpha, sigma = (number.to(x_t.dtype) for number in self.schedule.at(t))
        x0 = torch.full_like(x_t, self.mean)
        for part, share in (
            (x_t + x_t.flip(-1), 1 + self.correlation),
            (x_t - x_t.flip(-1), 1 - self.correlation),
        ):
            variance = self.std**2 * share
            expected = 2 * alpha * self.mean if share > 1 else 0
            x0 = x0 + alpha * variance / (alpha**2 * variance + sigma**2) * (part - expected) / 2
        return x0

    def mean_of_one_given(self, other: float) -> float:
        return self.mean + self.correlation * (other - self.mean)

    @property
    def std_of_one_given_the_other(self) -> float:
        return self.std * (1 - self.correlation**2) ** 0.5


def exact(
    data: PairData | GaussianData | MixtureData, size: tuple[int, int] = (1, 2), **options: int
) -> Preconditioned:
    return Preconditioned(Exact(data, V(), **options), data.schedule, V(), 1, size)


def drawn(
    edit: Edit, sampler: Sampler, denoiser: Denoiser, eps: Tensor, seed: int = 0, first: int = 0
) -> Tensor:
    numbers = Draws.at(seed, "test", start=first, stop=first + len(eps))
    return list(edit.steps(sampler, denoiser, eps, numbers, first))[-1].x


class NoNoise(Draws):
    """Every random number is 0, its mean."""

    def normal(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return torch.zeros(len(self), *shape)


def pair(left: float, right: float) -> Tensor:
    return torch.tensor([[[[left, right]]]], dtype=torch.float64)


# Inpainting


@every_sampler
@pytest.mark.parametrize("repeats", [1, 3])
def test_known_pixels_come_out_exactly_and_the_others_are_drawn(make, repeats):
    image, mask = images(3, channels=1), torch.zeros(4, 4, dtype=torch.bool)
    mask[1:3, :2] = True
    out = drawn(
        Inpaint(image, mask, repeats), make(8), affine_denoiser(schedules.linear(30)), normal(3, 1, 4, 4)
    )
    assert torch.equal(out[..., ~mask], image[..., ~mask])
    assert bool((out[..., mask] != image[..., mask]).all())


@every_sampler
def test_where_pixels_are_independent_the_known_ones_change_nothing(make):
    data = GaussianData(SCHEDULE)
    x_T = normal(4000, 1, 1, 2, dtype=torch.float64)
    out = drawn(Inpaint(pair(0.9, 0.0), RIGHT, repeats=2), make(15), exact(data), x_T)[..., 1]
    # A step that is repeated has no history: DPM-Solver++'s is DDIM's then.
    same = DDIM if make is DPMSolverPP2M else make
    plain = same(15).sample(exact(data), x_T, draws(4000, seed=1))[..., 1]
    # Against the data for all, and against plain sampling, whose own error at these times is shared.
    assert float(out.mean()) == pytest.approx(data.mean, abs=0.05)
    assert float(out.mean()) == pytest.approx(float(plain.mean()), abs=0.03)
    assert float(out.std()) == pytest.approx(float(plain.std()), rel=0.05)


def test_known_pixels_are_at_the_noise_level_of_each_time():
    eps = normal(4000, 1, 1, 2, dtype=torch.float64)
    outputs = Inpaint(pair(0.9, 0.0), RIGHT, 2).steps(
        DDPM(10), exact(GaussianData(SCHEDULE)), eps, draws(4000)
    )
    seen = 0
    for output in outputs:
        if 0 < output.t < 1:
            known, (alpha, sigma) = output.x[..., 0], SCHEDULE.at(output.t)
            assert float(known.mean()) == pytest.approx(alpha * 0.9, abs=0.05)
            assert float(known.std()) == pytest.approx(sigma, rel=0.05)
            seen += 1
    assert seen == 9


@pytest.mark.parametrize("make", [DDPM, DDIM, DPMSolverPP2M, Heun])
def test_the_more_repeats_the_better_the_halves_fit(make):
    # Everything here is linear: a run in which each random number is its mean is the mean of all runs.
    data = PairData(SCHEDULE)
    wanted = data.mean_of_one_given(0.8)
    errors = []
    for repeats in (1, 2, 4):
        edit = Inpaint(pair(0.8, 0.0), RIGHT, repeats)
        *_, out = edit.steps(
            make(20), exact(data), torch.zeros_like(pair(0, 0)), NoNoise((), torch.arange(1))
        )
        errors.append(abs(float(out.x[..., 1]) - wanted))
    plain = data.mean - wanted
    assert errors[0] < 0.6 * abs(plain)
    assert errors[1] < 0.75 * errors[0]
    assert errors[2] < 0.75 * errors[1]


def test_many_repeats_draw_from_the_conditional_distribution():
    data, x_T = PairData(SCHEDULE), normal(2000, 1, 1, 2, dtype=torch.float64)
    once, often = (
        drawn(Inpaint(pair(0.8, 0.0), RIGHT, repeats), DDIM(40), exact(data), x_T)[..., 1]
        for repeats in (1, 12)
    )
    wanted, spread = data.mean_of_one_given(0.8), data.std_of_one_given_the_other
    assert float(often.mean()) == pytest.approx(wanted, abs=0.05)
    assert float(often.std()) == pytest.approx(spread, rel=0.1)
    assert abs(float(once.mean()) - wanted) > 0.2
    assert float(once.std()) > 1.3 * spread


# Variation


@every_sampler
def test_full_strength_is_plain_sampling(make):
    denoiser, x_T = affine_denoiser(schedules.linear(30)), normal(3, 1, 4, 4)
    out = drawn(Variation(images(3), 1.0), make(8), denoiser, x_T, seed=4)
    assert torch.equal(out, make(8).sample(denoiser, x_T, draws(3, seed=4)))


@pytest.mark.parametrize("schedule", [SCHEDULE, schedules.VE()], ids=["cosine", "ve"])
@pytest.mark.parametrize(
    ("strength", "start"), [(0.34, 0.3), (0.36, 0.4), (0.001, 0.1), (0.97, 0.9), (0.5, 0.5), (1, 1.0)]
)
def test_a_variation_begins_with_the_image_noised_to_the_nearest_of_the_samplers_times(
    strength, start, schedule
):
    image, eps = images(3), normal(3, 1, 4, 4)
    edit = Variation(image, strength)
    outputs = list(edit.steps(DDIM(10), affine_denoiser(schedule), eps, draws(3)))
    assert edit.start(DDIM(10), schedule) == start
    assert [output.t for output in outputs] == [i / 10 for i in range(round(10 * start), -1, -1)]
    alpha, sigma = schedule.at(start)
    noised = schedule.init_noise_sigma * eps if start == 1 else alpha * image + sigma * eps
    assert torch.allclose(outputs[0].x, noised, atol=1e-6)


@pytest.mark.parametrize("strength", [0.2, 0.5, 0.8])
def test_a_variation_lies_where_the_flow_leads(strength):
    data = GaussianData(SCHEDULE)
    image, x_T = normal(50, 1, 1, 2, seed=1, dtype=torch.float64), normal(50, 1, 1, 2, dtype=torch.float64)
    out = drawn(Variation(image, strength), DPMSolverPP2M(100), exact(data), x_T)
    alpha, sigma = SCHEDULE.at(strength)
    x_t = alpha * image + sigma * x_T
    flow = data.mean + data.std * (x_t - data.mean_at(strength)) / data.variance_at(strength) ** 0.5
    assert torch.allclose(out, flow, atol=2e-3)


@every_sampler
def test_the_weaker_a_variation_the_closer_to_its_image(make):
    data = GaussianData(SCHEDULE)
    image, x_T = data.mean + data.std * normal(500, 1, 1, 2, seed=1), normal(500, 1, 1, 2)
    distances = [
        float((drawn(Variation(image, strength), make(20), exact(data), x_T) - image).square().mean())
        for strength in (0.05, 0.2, 0.5, 1.0)
    ]
    assert distances[:3] == sorted(distances[:3])
    # Churn makes half the way as good as all of it: then the two differ by chance, which is 4 % of each at most.
    assert distances[2] < (1.08 if make is SAMPLERS["heun_churn"] else 1) * distances[3]
    assert distances[0] < 0.1 * distances[-1]
    # Two independent images are this far apart.
    assert distances[-1] == pytest.approx(2 * data.std**2, rel=0.15)


def test_one_step_back_costs_what_the_noise_hides():
    data = GaussianData(SCHEDULE)
    image, x_T = data.mean + data.std * normal(5000, 1, 1, 2, seed=1), normal(5000, 1, 1, 2)
    out = drawn(Variation(image, 0.1), DDPM(10), exact(data), x_T)
    assert float((out - image).square().mean()) == pytest.approx(data.posterior_variance(0.1), rel=0.05)


# Interpolation


def test_a_path_begins_with_the_mean_of_both_images_at_one_noise():
    one, two, eps = images(1, seed=1), images(1, seed=2), normal(1, 1, 4, 4)
    edit = Interpolate(one, two, 5, 0.3)
    outputs = list(edit.steps(DDIM(10), affine_denoiser(SCHEDULE), eps.expand(5, 1, 4, 4), draws(5)))
    alpha, sigma = SCHEDULE.at(0.3)
    assert outputs[0].t == 0.3
    for share, x in zip((0, 0.25, 0.5, 0.75, 1), outputs[0].x, strict=True):
        mean_of_both = (1 - share) * (alpha * one + sigma * eps) + share * (alpha * two + sigma * eps)
        assert torch.allclose(x, mean_of_both[0], atol=1e-6)


@every_sampler
def test_the_ends_of_a_path_are_nearly_the_images(make):
    data = GaussianData(SCHEDULE)
    ends = [data.mean + data.std * normal(1, 1, 4, 4, seed=seed) for seed in (1, 2)]
    out = drawn(Interpolate(*ends, 7, strength=0.02), make(50), exact(data, (4, 4)), normal(7, 1, 4, 4))
    apart = float((ends[0] - ends[1]).abs().mean())
    for row, end in ((0, ends[0]), (6, ends[1])):
        assert float((out[row] - end).abs().mean()) < 0.2 * apart
    middle = (ends[0] + ends[1]) / 2
    assert float((out[3] - middle).abs().mean()) < 0.2 * apart


def test_a_path_through_noise_comes_back_to_its_images_and_keeps_the_noise_level():
    data = GaussianData(SCHEDULE)
    ends = [data.mean + data.std * normal(1, 1, 4, 4, seed=seed, dtype=torch.float64) for seed in (1, 2)]
    denoiser, sampler = exact(data, (4, 4)), DDIM(50)
    outputs = list(
        Slerp(*ends, 5).steps(sampler, denoiser, torch.zeros(5, 1, 4, 4, dtype=torch.float64), draws(5))
    )
    assert torch.allclose(outputs[-1].x[0], ends[0][0], atol=0.02)
    assert torch.allclose(outputs[-1].x[4], ends[1][0], atol=0.02)

    one, two = (sampler.invert(denoiser, end, 3).flatten() for end in ends)
    theta = torch.acos(one @ two / (one.norm() * two.norm()))
    for i, x_T in enumerate(outputs[0].x.flatten(1)):
        weights = torch.sin((1 - i / 4) * theta), torch.sin(i / 4 * theta)
        assert torch.allclose(x_T, (weights[0] * one + weights[1] * two) / torch.sin(theta), atol=1e-9)


def test_a_path_from_an_image_to_itself_stands_still():
    image = normal(1, 1, 4, 4)
    outputs = list(
        Slerp(image, image, 3).steps(
            DDIM(50), exact(GaussianData(SCHEDULE), (4, 4)), normal(3, 1, 4, 4), draws(3)
        )
    )
    assert torch.allclose(outputs[0].x[1], outputs[0].x[0], atol=1e-4)
    assert torch.allclose(outputs[-1].x, image.expand(3, 1, 4, 4), atol=0.03)


# All of them


def edits(size: int = 4) -> dict[str, Edit]:
    mask = torch.arange(size * size).reshape(size, size) % 3 == 0
    one, two = images(1, size=size, seed=8), images(1, size=size, seed=9)
    return {
        "inpaint": Inpaint(images(2, size=size), mask, repeats=2),
        "variation": Variation(images(3, size=size), 0.7),
        "interpolate": Interpolate(one, two, 5, 0.7),
        "slerp": Slerp(one, two, 5),
    }


@pytest.mark.parametrize("make", [DDPM, DDIM, Heun], ids=["ddpm", "ddim", "heun"])
@pytest.mark.parametrize("name", edits())
def test_an_edited_image_does_not_depend_on_its_batch(name, make):
    edit, x_T = edits()[name], normal(5, 1, 4, 4)
    denoiser = affine_denoiser(schedules.linear(30), net=Affine(self_condition=True))

    def rows(first: int, last: int) -> Tensor:
        return drawn(edit, make(4), denoiser, x_T[first:last], first=first)

    whole = rows(0, 5)
    assert torch.equal(whole, torch.cat([rows(0, 1), rows(1, 3), rows(3, 5)]))
    assert len(whole.unique(dim=0)) == 5


def test_drawn_image_i_belongs_to_given_image_i_modulo_their_number():
    denoiser, x_T, given = affine_denoiser(SCHEDULE), normal(1, 1, 4, 4).expand(5, 1, 4, 4), images(2)
    masks = torch.rand(2, 1, 4, 4) < 0.5
    filled = drawn(Inpaint(given, masks, 1), DDIM(5), denoiser, x_T, first=3)
    varied = drawn(Variation(given, 0.3), DDIM(5), denoiser, x_T, first=3)
    for i in range(5):
        owner = (3 + i) % 2
        assert torch.equal(filled[i][~masks[owner]], given[owner][~masks[owner]])
        assert bool((filled[i][masks[owner]] != given[owner][masks[owner]]).all())
        assert torch.equal(varied[i], drawn(Variation(given[owner], 0.3), DDIM(5), denoiser, x_T[:1])[0])


@every_sampler
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_labels_and_guidance_steer_every_edit(make, scale):
    data, count = MixtureData(SCHEDULE), 500
    first, last = (torch.full((1, 1, 1, 2), data.means[k], dtype=torch.float64) for k in (0, 2))
    x_T = normal(count, 1, 1, 2, dtype=torch.float64)
    plain = exact(data, num_classes=3)
    denoiser = Guided(Labelled(plain, torch.full((count,), 2)), plain, scale)
    for edit in (Inpaint(first, RIGHT, 1), Variation(first, 1.0), Interpolate(first, last, count, 1.0)):
        right = drawn(edit, make(10), denoiser, x_T)[..., 1]
        # Guidance moves the mean on, away from the other classes: with churn, by up to 0.1.
        beyond = float(right.mean()) - data.means[2]
        assert abs(beyond) < 0.03 if scale == 1 else 0.02 < beyond < 0.11
    assert set(plain.net.calls) == {count}


def test_inversion_is_guided_as_the_way_back_is():
    data = MixtureData(SCHEDULE)
    ends = [torch.full((1, 1, 1, 2), value, dtype=torch.float64) for value in (0.65, 0.75)]
    denoiser = Labelled(exact(data, num_classes=3), torch.tensor([2, 2, 2]))
    out = drawn(Slerp(*ends, 3), DDIM(50), denoiser, torch.zeros(3, 1, 1, 2, dtype=torch.float64))
    assert torch.allclose(out[[0, 2]], torch.cat(ends), atol=0.03)


@pytest.mark.parametrize(
    ("make_edit", "words"),
    [
        (lambda x: Inpaint(x, torch.ones(4, 4), 0), "repeats=0"),
        (lambda x: Variation(x, 0.0), "strength=0.0"),
        (lambda x: Variation(x, 1.5), "strength=1.5"),
        (lambda x: Variation(x, float("nan")), "strength=nan"),
        (lambda x: Interpolate(x, x, 1), "num_images=1"),
        (lambda x: Interpolate(x, x, 3, -0.1), "strength=-0.1"),
        (lambda x: Interpolate(x, images(2), 3), "image2: .* this holds 2"),
        (lambda x: Slerp(images(2), x, 3), "image: .* this holds 2"),
        (lambda x: Slerp(x, x, 3, iterations=0), "iterations=0"),
        (lambda x: Inpaint(images(1, channels=3), torch.ones(4, 4)), r"image: \[3, 4, 4\].*\[1, 4, 4\] is drawn"),
        (lambda x: Variation(images(1, size=8)), r"image: \[1, 8, 8\]"),
        (lambda x: Inpaint(x, torch.ones(8, 8)), r"mask: \[1, 8, 8\]"),
        (lambda x: Inpaint(x, torch.ones(1, 3, 4, 4)), r"mask: \[3, 4, 4\]"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_named(make_edit, words):
    with pytest.raises(ValueError, match=words):
        drawn(make_edit(images(1)), DDIM(5), affine_denoiser(schedules.linear(30)), normal(1, 1, 4, 4))


@pytest.mark.parametrize("make", [lambda x: Variation(x, 0.1), lambda x: Interpolate(x, x, 3, 0.1)])
def test_one_step_is_refused_rather_than_the_image_forgotten(make):
    with pytest.raises(ValueError, match=r"strength=0\.1: a sampler of 1 step"):
        make(images(1)).steps(DDIM(1), affine_denoiser(SCHEDULE), normal(3, 1, 4, 4), draws(3))


def test_a_path_through_noise_goes_up_by_the_times_it_comes_down():
    class Uneven(DDIM):
        def times(self, schedule: Schedule) -> list[float]:
            return [1.0, 0.7, 0.5, 0.35, 0.25, 0.18, 0.12, 0.08, 0.05, 0.03, 0.015, 0.005, 0.0]

    data, ends = GaussianData(SCHEDULE), [normal(1, 1, 4, 4, seed=s, dtype=torch.float64) for s in (1, 2)]
    zeros = torch.zeros(3, 1, 4, 4, dtype=torch.float64)
    out = drawn(Slerp(*ends, 3, iterations=20), Uneven(), exact(data, (4, 4)), zeros)
    assert torch.allclose(out[0], ends[0][0], atol=1e-3)
    assert torch.allclose(out[2], ends[1][0], atol=1e-3)
