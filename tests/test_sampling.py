import math

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from litdiffusion.diffusion import (
    DDIM,
    DDPM,
    EDM,
    X0,
    Clipped,
    DPMSolverPP2M,
    Draws,
    Guided,
    Heun,
    Labelled,
    Preconditioned,
    Sampler,
    V,
    schedules,
)
from litdiffusion.diffusion.editing import Edit, Inpaint, Interpolate, Variation
from litdiffusion.diffusion.guidance import Guidance
from litdiffusion.diffusion.likelihood import prior_bits
from litdiffusion.sampling import sample_images
from small_worlds import Affine, GaussianData, Spy, affine_denoiser, exact_denoiser, images, normal

pytestmark = pytest.mark.usefixtures("one_thread")

SCHEDULE = schedules.cosine(20)
SAMPLERS = [DDPM(5), DDIM(5), DDIM(5, eta=0.5)]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=["ddpm", "ddim", "ddim_eta"])
def test_an_image_is_the_same_in_any_batch(sampler):
    denoiser = affine_denoiser(SCHEDULE, V(), net=Spy())
    whole = sample_images(denoiser, sampler, 7, seed=3)
    assert whole.shape == (7, 1, 4, 4)
    for batch_size in (1, 2, 3, 7, 100):
        assert torch.equal(sample_images(denoiser, sampler, 7, 3, batch_size), whole)
    assert torch.equal(sample_images(denoiser, sampler, 3, seed=3), whole[:3])
    assert not torch.equal(sample_images(denoiser, sampler, 7, seed=4), whole)
    assert len(whole.unique(dim=0)) == 7


def noise_of(start: int, stop: int, name: str = "x_T") -> Tensor:
    """That of images of seed 0."""
    return Draws.at(0, "sample", start=start, stop=stop).normal(name, (1, 4, 4))


def test_images_start_from_noise_of_their_own():
    seen = {}
    sampler = DDIM(4)
    sample_images(
        affine_denoiser(SCHEDULE), sampler, 5, 0, 2, lambda first, output: seen.setdefault(first, output)
    )
    assert list(seen) == [0, 2, 4]
    for first, output in seen.items():
        assert output.t == 1
        assert torch.equal(output.x, noise_of(first, min(first + 2, 5)))


def test_a_watcher_sees_every_time_of_every_batch():
    seen = []
    images = sample_images(
        affine_denoiser(SCHEDULE), DDIM(4), 3, 0, 2, lambda first, output: seen.append((first, output.t))
    )
    assert seen == [(first, t) for first in (0, 2) for t in (1.0, 0.75, 0.5, 0.25, 0.0)]
    assert images.shape == (3, 1, 4, 4)


def test_images_are_clamped_float32_of_the_denoisers_shape():
    class Loud(Affine):
        def forward(self, x, c_noise):
            return -100 * torch.ones_like(x)

    denoiser = Preconditioned(Loud(), SCHEDULE, V(), 3, (4, 6))
    images = sample_images(denoiser, DDIM(5), 2, 0)
    assert images.shape == (2, 3, 4, 6)
    assert images.dtype == torch.float32
    assert float(images.max()) == 1  # far outside before
    assert float(images.min()) >= -1


class Moody(Affine):
    """Different in training, and able to fail."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)
        self.modes: set[bool] = set()
        self.fails = False

    def forward(self, x, c_noise):
        self.modes.add(self.dropout.training)
        if self.fails:
            raise RuntimeError("a bug")
        return self.dropout(x)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_the_network_samples_in_evaluation_mode_and_is_left_as_it_was(training, fails):
    net = Moody()
    denoiser = affine_denoiser(SCHEDULE, V(), net=net).train(training)
    net.fails = fails
    if fails:
        with pytest.raises(RuntimeError, match="a bug"):
            sample_images(denoiser, DDIM(3), 2, 0)
    else:
        sample_images(denoiser, DDIM(3), 2, 0)
    assert net.modes == {False}
    assert net.training is net.dropout.training is training


def test_sampling_draws_nothing_from_the_global_generator():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    images = sample_images(affine_denoiser(SCHEDULE), DDPM(5), 2, 0)
    assert torch.equal(torch.rand(3), expected)
    assert not images.requires_grad
    assert not torch.equal(images, normal(2, 1, 4, 4))


class Conditional(Affine):
    """Draws brighter for higher classes; remembers what it was asked for."""

    num_classes = 4

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[list[int]] = []

    def forward(self, x, c_noise, labels):
        self.asked.append(labels.tolist())
        return super().forward(x, c_noise) - 0.1 * labels[:, None, None, None]


@pytest.mark.parametrize(
    ("labels", "drawn"),
    [
        ("all", [0, 1, 2, 3, 0, 1]),
        (None, [4, 4, 4, 4, 4, 4]),
        (2, [2, 2, 2, 2, 2, 2]),
        ([3, 1, 1], [3, 1, 1, 3, 1, 1]),
        (torch.tensor([0, 3]), [0, 3, 0, 3, 0, 3]),
    ],
)
@pytest.mark.parametrize("batch_size", [2, 5, 6])
def test_image_i_draws_class_i_modulo_their_number_in_any_batch(labels, drawn, batch_size):
    net = Conditional()
    sample_images(
        affine_denoiser(SCHEDULE, V(), net=net), DDIM(2), 6, 0, batch_size, guidance=Guidance(labels)
    )
    # Two steps for each batch.
    for step in (0, 1):
        assert [label for batch in net.asked[step::2] for label in batch] == drawn


def test_classes_come_in_turn_unless_others_are_named():
    net, other = Conditional(), Conditional()
    implicit = sample_images(affine_denoiser(SCHEDULE, V(), net=net), DDIM(2), 6, 0)
    assert torch.equal(
        implicit,
        sample_images(affine_denoiser(SCHEDULE, V(), net=other), DDIM(2), 6, 0, guidance=Guidance("all")),
    )
    assert net.asked[0] == [0, 1, 2, 3, 0, 1]
    assert sample_images(affine_denoiser(SCHEDULE), DDIM(2), 6, 0, guidance=Guidance("all")).shape == (
        6,
        1,
        4,
        4,
    )


def test_guidance_is_asked_for_where_and_as_firmly_as_said():
    net = Conditional()
    denoiser = affine_denoiser(SCHEDULE, V(), clip="none", net=net)
    drawn = sample_images(denoiser, DDIM(4), 2, 0, guidance=Guidance([1], 3.0, [0.4, 0.6]))
    # Times 1, 0.75, 0.5 and 0.25: at 0.5 alone the network is asked for no class, too.
    assert net.asked == [[1, 1], [1, 1], [1, 1], [4, 4], [1, 1]]
    core = denoiser.core
    guided = Clipped(Guided(Labelled(core, torch.tensor([1, 1])), core, 3.0, (0.4, 0.6)), "none")
    draws = Draws.at(0, "sample", start=0, stop=2)
    expected = DDIM(4).sample(guided, noise_of(0, 2), draws)
    assert torch.equal(drawn, expected.clamp(-1, 1))


def test_autoguidance_moves_away_from_the_weaker_model():
    """x_0 = x_0(guide) + scale (x_0 - x_0(guide)), before it is clipped."""
    strong, weak = (affine_denoiser(SCHEDULE, V(), clip="none") for _ in range(2))
    with torch.no_grad():
        weak.core.net.gain.mul_(0.5)
    drawn = sample_images(strong, DDIM(4), 2, 0, guidance=Guidance(scale=2.0, guide=weak))
    expected = DDIM(4).sample(
        Guided(strong.core, weak.core, 2.0), noise_of(0, 2), Draws.at(0, "sample", start=0, stop=2)
    )
    assert torch.equal(drawn, expected.clamp(-1, 1))
    assert not torch.equal(drawn, sample_images(strong, DDIM(4), 2, 0))
    # Of two models that are the same, nothing is exaggerated.
    same = sample_images(strong, DDIM(4), 2, 0, guidance=Guidance(scale=2.0, guide=strong))
    torch.testing.assert_close(same, sample_images(strong, DDIM(4), 2, 0))


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"labels": 4}, "labels=4: each must be one of 0..3"),
        ({"labels": [0, -1]}, r"labels=\[0, -1\]: each must be one of 0..3"),
        ({"labels": []}, r"labels=\[\]: give all"),
        ({"labels": "cat"}, "labels=cat: give all"),
        ({"labels": True}, "labels=True: give all"),
        ({"labels": [1, True]}, "labels=.*: give all"),
        ({"labels": None, "scale": 2.0}, "guidance_scale=2.0: .* labels"),
        ({"scale": float("inf")}, "guidance_scale=inf"),
        ({"interval": [0.5, 0.2]}, "guidance_interval="),
        ({"interval": [0.0, 1.1]}, "guidance_interval="),
        ({"interval": [0.0]}, "guidance_interval="),
    ],
)
def test_what_a_conditional_network_cannot_draw_is_refused(asked, words):
    net = Conditional()
    with pytest.raises(ValueError, match=words):
        sample_images(affine_denoiser(SCHEDULE, V(), net=net), DDIM(2), 6, 0, guidance=Guidance(**asked))
    assert net.asked == []


@pytest.mark.parametrize(
    ("sampler", "asked", "words"),
    [
        (DDIM(2), {"labels": [0]}, "labels=.*without classes"),
        (DDIM(2), {"scale": 2.0}, "guidance_scale=2.0: .*without classes"),
        (DDPM(2, variance="learned"), {}, "variance=learned"),
        (DDIM(21), {}, "num_steps=21: must be from 1 to schedule.num_steps=20"),
    ],
)
def test_what_a_plain_network_cannot_draw_is_refused(sampler, asked, words):
    net = Spy()
    with pytest.raises(ValueError, match=words):
        sample_images(affine_denoiser(SCHEDULE, V(), net=net), sampler, 6, 0, guidance=Guidance(**asked))
    assert net.calls == []


@pytest.mark.parametrize("sampler", SAMPLERS, ids=["ddpm", "ddim", "ddim_eta"])
def test_edits_see_which_image_they_draw(sampler):
    given, mask = images(3), torch.arange(16).reshape(4, 4) < 6
    denoiser = affine_denoiser(SCHEDULE, V())
    for edit in (Inpaint(given, mask, 2), Variation(given, 0.5), Interpolate(given[0], given[1], 7, 0.5)):
        whole = sample_images(denoiser, sampler, 7, 3, edit=edit)
        for batch_size in (1, 3):
            assert torch.equal(sample_images(denoiser, sampler, 7, 3, batch_size, edit=edit), whole)
        assert len(whole.unique(dim=0)) == 7
        if isinstance(edit, Inpaint):
            assert torch.equal(whole[..., ~mask], given[[0, 1, 2, 0, 1, 2, 0]][..., ~mask])


def test_a_path_between_equal_images_is_one_image_whatever_the_sampler():
    image = images(1)
    drawn = sample_images(
        affine_denoiser(SCHEDULE, V()), DDPM(5), 3, 0, edit=Interpolate(image, image, 3, 0.8)
    )
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize(
    "sampler",
    [
        DDPM(200),
        DDIM(100, eta=1),
        DDIM(100),
        DPMSolverPP2M(60, spacing="log_snr"),
        Heun(40, spacing="karras"),
    ],
    ids=lambda sampler: type(sampler).__name__,
)
@pytest.mark.parametrize("edit", [None, Variation(torch.zeros(1, 1, 1), strength=1.0)], ids=["plain", "edit"])
@pytest.mark.parametrize("target", [X0(), EDM()], ids=["x0", "edm"])
def test_a_schedule_may_end_in_larger_noise_than_1(sampler: Sampler, edit: Edit | None, target) -> None:
    data = GaussianData(schedules.VE(sigma_max=20.0), mean=0.1, std=0.2)
    drawn = sample_images(exact_denoiser(data, target), sampler, 800, seed=0, batch_size=800, edit=edit)
    assert float(drawn.mean()) == pytest.approx(0.1, abs=0.04)
    assert float(drawn.std()) == pytest.approx(0.2, rel=0.1)


def test_the_prior_of_such_a_schedule_is_as_wide() -> None:
    """KL( N(x_0, 20^2) || N(0, 1 + 20^2) ), in bits."""
    bits = prior_bits(schedules.VE(sigma_max=20.0), torch.full((1, 1, 1, 1), 0.5, dtype=torch.float64))
    exact = kl_divergence(Normal(0.5, 20.0), Normal(0.0, 401**0.5)) / math.log(2)
    assert float(bits) == pytest.approx(float(exact), rel=1e-3)
