"""Guidance: a denoiser around denoisers, whatever the sampler, target and network.

The shifted world: without labels N(m, s^2), with label k N(m_k, s^2). Guided by w, its exact denoiser is that of
N(m + w (m_k - m), s^2): so guided samples must equal, image for image, those of that distribution.
"""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from litdiffusion.diffusion import (
    DDIM,
    DDPM,
    EDM,
    L2,
    X0,
    Clipped,
    Denoiser,
    Denoising,
    Guided,
    Labelled,
    Parametrization,
    Preconditioned,
    Sampler,
    Schedule,
    Uniform,
    UniformLevels,
    V,
    Velocity,
    q_sample,
    schedules,
)
from litdiffusion.diffusion.guidance import Guidance
from small_worlds import (
    SAMPLERS,
    TARGETS,
    Affine,
    Exact,
    GaussianData,
    MixtureData,
    affine_denoiser,
    draws,
    exact_denoiser,
    images,
    normal,
    times,
)

pytestmark = pytest.mark.usefixtures("one_thread")

SCHEDULE = schedules.linear(40)
NONE = 3  # the label after the last class
EVERYWHERE = (0.0, 1.0)


@dataclass
class ShiftedData(GaussianData):
    """The label moves the mean; the last label leaves it."""

    shifts: tuple[float, ...] = (-0.5, 0.1, 0.4, 0.0)

    def denoise(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        alpha, sigma = (number.to(x_t.dtype) for number in self.schedule.at(t))
        gain = alpha * self.std**2 / (alpha**2 * self.std**2 + sigma**2)
        mean = self.mean + torch.tensor(self.shifts, dtype=x_t.dtype)[labels][:, None, None, None]
        return mean + gain * (x_t - alpha * mean)


def shifted_by(scale: float, labels: Tensor, schedule: Schedule = SCHEDULE) -> ShiftedData:
    """The distribution that guidance by ``scale`` leads to, a class for each image."""
    return ShiftedData(schedule, shifts=tuple(scale * ShiftedData(schedule).shifts[k] for k in labels))


LABELS = torch.tensor([0, 2, 1, 0, 2])
X_T = normal(5, 1, 1, 1, dtype=torch.float64)


def free(
    schedule: Schedule = SCHEDULE, target: Parametrization | None = None, data: GaussianData | None = None
) -> Denoiser:
    """The exact denoiser of the shifted world, unguided."""
    return exact_denoiser(data or ShiftedData(schedule), target, num_classes=3)


def guided(denoiser: Denoiser, scale: float, interval=EVERYWHERE, labels: Tensor = LABELS) -> Denoiser:
    """Classifier-free guidance."""
    return Guided(Labelled(denoiser, labels), denoiser, scale, interval)


def drawn(sampler: Sampler, denoiser: Denoiser) -> Tensor:
    return sampler.sample(denoiser, X_T, draws(5, seed=2))


def expected(sampler: Sampler, scale: float, target: Parametrization) -> Tensor:
    """Samples of the distribution that guidance leads to, without any guidance."""
    data = shifted_by(scale, LABELS)

    class EachItsOwn(Exact):
        def forward(self, x: Tensor, c_noise: Tensor, labels: Tensor | None = None) -> Tensor:
            return super().forward(x, c_noise, torch.arange(len(x)))

    return drawn(sampler, Preconditioned(EachItsOwn(data, target), SCHEDULE, target, 1, 1))


@pytest.mark.parametrize("scale", [-1.0, 0.0, 1.0, 4.0])
@pytest.mark.parametrize("make", SAMPLERS.values(), ids=SAMPLERS)
def test_every_sampler_draws_the_shifted_distribution(make, scale):
    found = drawn(make(6), guided(free(), scale))
    torch.testing.assert_close(found, expected(make(6), scale, V()), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_every_target_is_guided_alike(target):
    found = drawn(DDPM(4), guided(free(target=target), 2.5))
    # EDM's clock is the noise in float32, from which the exact network reads the time.
    atol = 1e-4 if isinstance(target, EDM) else 1e-9
    torch.testing.assert_close(found, expected(DDPM(4), 2.5, target), rtol=1e-9, atol=atol)


@pytest.mark.parametrize("schedule", [schedules.VPCosine(), schedules.Flow()])
def test_the_mean_moves_by_the_scale_times_the_way_to_the_class(schedule):
    """The closed form: all steps of a fine schedule, each image at its own class."""
    data = [GaussianData(schedule, 0.3 + 3 * ShiftedData(schedule).shifts[k]) for k in LABELS]
    exact = torch.cat([world.flow_to_image(x[None]) for world, x in zip(data, X_T, strict=True)])
    torch.testing.assert_close(drawn(DDIM(200), guided(free(schedule), 3.0)), exact, rtol=0, atol=0.03)


@pytest.mark.parametrize("scale", [-1.0, 0.0, 0.5, 1.0, 7.5])
@pytest.mark.parametrize("target", [X0(), V(), Velocity()], ids=lambda target: type(target).__name__)
def test_the_guided_score_of_a_mixture(target, scale):
    """(1 - w) grad log p_t(x) + w grad log p_t(x | label), each by automatic differentiation."""
    data = MixtureData(schedules.Flow(num_steps=30))
    t, labels = torch.arange(1, 31).double() / 30, torch.arange(30) % 3
    x_t = normal(30, 1, 1, 1, dtype=torch.float64).requires_grad_()

    def score(labels: Tensor | None) -> Tensor:
        log_density = data.log_densities(x_t, t, labels).logsumexp(-1)
        return torch.autograd.grad(log_density.sum(), x_t)[0]

    estimate = guided(free(target=target, data=data), scale, labels=labels)(x_t.detach(), t)
    _, sigma = data.schedule.at(t)
    wanted = -sigma * ((1 - scale) * score(None) + scale * score(labels))
    torch.testing.assert_close(estimate.eps, wanted, rtol=1e-7, atol=1e-8)


# ---------------------------------------------------------------------------------------------- another guide


@pytest.mark.parametrize("scale", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("t", [0.3, times(0.1, 0.2, 0.5, 0.7, 1.0)], ids=["one", "each"])
def test_autoguidance_moves_away_from_a_weaker_denoiser(scale, t):
    """x_0(guide) + w (x_0 - x_0(guide)), with networks that have nothing in common."""
    denoiser, weak = (
        exact_denoiser(GaussianData(SCHEDULE)),
        exact_denoiser(GaussianData(SCHEDULE, -0.4, 0.9), X0()),
    )
    estimate, ours, theirs = Guided(denoiser, weak, scale)(X_T, t), denoiser(X_T, t).x0, weak(X_T, t).x0
    torch.testing.assert_close(estimate.x0, theirs + scale * (ours - theirs), rtol=1e-12, atol=1e-12)
    alpha, sigma = SCHEDULE.at(t)
    torch.testing.assert_close(alpha * estimate.x0 + sigma * estimate.eps, X_T, rtol=1e-12, atol=1e-12)


def test_autoguidance_draws_the_shifted_distribution():
    """Two Gaussians of one width: the mean moves from the guide's by w times the way between them."""
    weak, ours, wanted = (
        exact_denoiser(GaussianData(SCHEDULE, mean)) for mean in (-0.2, 0.1, -0.2 + 3 * 0.3)
    )
    found = drawn(DDPM(10), Guided(ours, weak, 3.0))
    torch.testing.assert_close(found, drawn(DDPM(10), wanted), rtol=1e-9, atol=1e-9)


def test_a_request_with_a_guide_asks_it_for_the_same_class_and_clips_at_the_end():
    """Neither the guide's clipping nor the class's absence counts: only what the two say of the class."""
    data, other = ShiftedData(SCHEDULE), ShiftedData(SCHEDULE, mean=-0.6, shifts=(0.3, 0.0, -0.3, 0.0))
    ours, weak = (Clipped(free(data=each), clip) for each, clip in ((data, "static"), (other, "dynamic")))
    asked = Guidance([2, 0], scale=4.0, guide=weak).around(ours, range(3, 8))
    labels = torch.tensor([0, 2, 0, 2, 0])
    x_t, t = 2 * X_T, 0.4
    mine, theirs = ours.core(x_t, t, labels=labels).x0, weak.core(x_t, t, labels=labels).x0
    raw = theirs + 4 * (mine - theirs)
    assert raw.abs().max() > 1
    torch.testing.assert_close(asked(x_t, t).x0, raw.clamp(-1, 1), rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------------------------------------- the calls


@pytest.mark.parametrize("make", SAMPLERS.values(), ids=SAMPLERS)
@pytest.mark.parametrize(("scale", "branches"), [(0.0, 1), (1.0, 1), (2.0, 2)])
def test_a_branch_that_does_not_count_is_not_asked(make, scale, branches):
    """Each estimate is one call, or two where both count, of the whole batch."""
    denoiser, unguided = free(), free()
    drawn(make(6), guided(denoiser, scale))
    drawn(make(6), Labelled(unguided, LABELS))
    assert denoiser.net.calls == branches * unguided.net.calls
    assert set(unguided.net.calls) == {5}


@pytest.mark.parametrize("interval", [EVERYWHERE, (0.25, 0.75), (0.5, 1.0), (0.0, 0.0)])
def test_guidance_keeps_to_its_interval(interval):
    """Inside it as guided everywhere, outside it as by scale 1, with a single call."""
    denoiser = free()
    within, everywhere, plain = (guided(denoiser, *each) for each in ((3.0, interval), (3.0,), (1.0,)))
    for t in (0.025, 0.225, 0.25, 0.275, 0.5, 0.725, 0.75, 0.775, 1.0):
        inside = interval[0] <= t <= interval[1]
        denoiser.net.calls.clear()
        estimate = within(X_T, t)
        assert denoiser.net.calls == [5, 5] if inside else [5]
        torch.testing.assert_close(estimate.x0, (everywhere if inside else plain)(X_T, t).x0)


@pytest.mark.parametrize("interval", [EVERYWHERE, (0.25, 0.75), (0.3, 0.3), (0.1 + 0.2, 1.0), (0.0, 0.0)])
@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_one_time_for_all_is_guided_as_the_same_time_for_each(scale, interval):
    """But for rounding: of mixed times, both branches are asked at each."""
    asked = guided(free(), scale, interval)
    for t in (0.025, 0.25, 0.3, 0.1 + 0.2, 0.31, 0.75, 0.775, 1.0):
        one, each = (asked(X_T, time) for time in (t, times(t, t, t, t, t)))
        torch.testing.assert_close(one.x0, each.x0, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(one.eps, each.eps, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("scale", [0.0, 3.0])
def test_an_interval_holds_for_each_image_of_mixed_times(scale):
    denoiser, t = free(), times(0.025, 0.25, 0.5, 0.75, 1)
    inside = torch.tensor([False, True, True, True, False])[:, None, None, None]
    found = guided(denoiser, scale, (0.25, 0.75))(X_T, t)
    everywhere, plain = (guided(denoiser, w)(X_T, t) for w in (scale, 1.0))
    torch.testing.assert_close(found.x0, torch.where(inside, everywhere.x0, plain.x0))
    assert not torch.allclose(everywhere.x0, plain.x0)


def test_the_flow_with_an_interval_has_a_closed_form():
    """Down to the interval the flow of the class, from there on that of the shifted mean."""
    schedule, edge = schedules.VPCosine(), 0.5
    shifts = torch.tensor(ShiftedData(schedule).shifts, dtype=torch.float64)[LABELS][:, None, None, None]
    early, late = 0.3 + shifts, 0.3 + 3 * shifts
    data = GaussianData(schedule)
    alpha_T, alpha = schedule.at(1.0)[0], schedule.at(edge)[0]
    std_T, std = data.variance_at(1.0) ** 0.5, data.variance_at(edge) ** 0.5
    at_edge = alpha * early + std * (X_T - alpha_T * early) / std_T
    exact = late + data.std * (at_edge - alpha * late) / std
    found = drawn(DDIM(200), guided(free(schedule), 3.0, (0.0, 0.5)))
    torch.testing.assert_close(found, exact, rtol=0, atol=0.03)


# -------------------------------------------------------------------------------- what else a network can do


class Told(nn.Module):
    """A network of 3 classes that can do everything, and keeps what it is told."""

    self_condition, num_classes, learned_variance = True, 3, True

    def __init__(self) -> None:
        super().__init__()
        self.told: list[tuple[Tensor, Tensor | None]] = []

    def forward(self, x: Tensor, c_noise: Tensor, self_cond: Tensor | None, labels: Tensor) -> Tensor:
        self.told.append((labels, self_cond))
        size = labels[:, None, None, None].to(x)
        feedback = 0 if self_cond is None else 0.1 * self_cond
        return torch.cat((0.3 * x + 0.2 * size + feedback, 0.1 * size + 0 * x), dim=1)


@pytest.mark.parametrize("make", SAMPLERS.values(), ids=SAMPLERS)
def test_both_branches_are_fed_the_guided_estimate(make):
    net = Told()
    schedule = schedules.linear(40, rescale=False)  # within the range where Heun looks twice
    denoiser = Guidance(LABELS, 2.0).around(affine_denoiser(schedule, V(), net=net), range(5))
    moments = list(make(4).steps(denoiser, normal(5, 1, 4, 4), draws(5)))
    asked = list(zip(net.told[::2], net.told[1::2], strict=True))
    assert all(torch.equal(own[0], LABELS) and bool((other[0] == NONE).all()) for own, other in asked)
    fed = [(own[1], other[1]) for own, other in asked]
    for _ in range(2 if make in (SAMPLERS["heun"], SAMPLERS["heun_churn"]) else 1):
        assert fed.pop(0) == (None, None)  # Heun looks twice in the first step
    estimates = [moment.x0 for moment in moments[:-1]]
    for own, other in fed:
        assert own is other
        assert any(torch.equal(own, estimate) for estimate in estimates)


def test_the_learned_variance_is_that_of_the_class():
    denoiser = affine_denoiser(SCHEDULE, V(), net=Told())
    x_t, t = normal(5, 1, 4, 4), times(*[0.5] * 5)
    found, plain = (Guidance(LABELS, w).around(denoiser, range(5))(x_t, t) for w in (2.0, 1.0))
    assert torch.equal(found.variance, plain.variance)
    torch.testing.assert_close(found.variance[1], torch.full((1, 4, 4), (0.1 * 2 + 1) / 2))


@pytest.mark.parametrize("labels", [LABELS, None])
def test_in_training_the_network_is_told_the_labels_whenever_it_is_asked(labels):
    """For the estimate that is fed back as well; without labels, that there are none."""
    net = Told()
    x0, eps, t = images(5), normal(5, 1, 4, 4), times(0.025, 0.25, 0.5, 0.75, 1)
    denoiser = affine_denoiser(SCHEDULE, V(), net=net)
    Denoising(L2(), Uniform(), UniformLevels()).losses(denoiser, x0, t, eps, labels, self_condition=True)
    wanted = torch.full((5,), NONE) if labels is None else labels
    assert [told.tolist() for told, _ in net.told] == [wanted.tolist()] * 2
    x_t = q_sample(SCHEDULE, x0, t, eps)
    assert torch.equal(net.told[1][1], denoiser(x_t, t, labels=labels).x0)


@pytest.mark.parametrize("clip", ["static", "dynamic"])
def test_clipping_comes_after_guidance(clip):
    core = Preconditioned(Exact(ShiftedData(SCHEDULE), V(), num_classes=3), SCHEDULE, V(), 1, 4)
    x_t, t = normal(5, 1, 4, 4, dtype=torch.float64), times(0.025, 0.25, 0.5, 0.75, 1)
    raw = guided(core, 9.0)(x_t, t).x0
    estimate = Guidance(LABELS, 9.0).around(Clipped(core, clip, clip_quantile=0.5), range(5))(x_t, t)
    assert float(raw.abs().max()) > 1
    assert float(estimate.x0.abs().max()) == 1
    if clip == "static":
        torch.testing.assert_close(estimate.x0, raw.clamp(-1, 1))
    alpha, sigma = SCHEDULE.at(t)
    torch.testing.assert_close(alpha * estimate.x0 + sigma * estimate.eps, x_t)


# ------------------------------------------------------------------------------------------ asking and refusing


def test_no_labels_means_no_class():
    denoiser, t = free(), times(*[0.5] * 5)
    estimate = denoiser(X_T, t).x0
    torch.testing.assert_close(estimate, GaussianData(SCHEDULE).denoise(X_T, t))
    assert torch.equal(estimate, guided(denoiser, 0.0)(X_T, t).x0)
    assert torch.equal(estimate, Guidance(None).around(denoiser, range(5))(X_T, t).x0)


@pytest.mark.parametrize(
    ("labels", "told"),
    [
        ("all", [1, 2, 0, 1, 2]),
        ([2, 0], [2, 0, 2, 0, 2]),
        (1, [1] * 5),
        (torch.tensor([0, 1]), [0, 1, 0, 1, 0]),
    ],
)
def test_images_are_of_the_classes_in_turn_by_their_numbers(labels, told):
    """Image 4 is the first of this batch."""
    denoiser = affine_denoiser(SCHEDULE, V(), net=Told())
    Guidance(labels).around(denoiser, range(4, 9))(normal(5, 1, 4, 4), 0.5)
    assert denoiser.core.net.told[0][0].tolist() == told


def test_a_request_leaves_the_denoiser_as_it_was_and_adds_no_more_than_it_needs():
    denoiser = Clipped(free())
    asked = Guidance("all", 2.0).around(denoiser, range(5))
    assert denoiser.inner is denoiser.core
    assert isinstance(asked.inner, Guided)
    assert asked.core is denoiser.core
    assert isinstance(Guidance("all").around(denoiser, range(5)).inner, Labelled)
    unconditional = affine_denoiser(SCHEDULE, V())
    assert Guidance().around(unconditional, range(5)).inner is unconditional.core


def test_labels_follow_the_denoiser_to_its_device():
    denoiser = free(schedules.linear(40)).to("meta")
    asked = Guidance("all", 2.0, (0.0, 0.5)).around(denoiser, range(5))
    assert asked.inner.labels.is_meta


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: Guidance([0, 3]).require_support(d), r"labels=\[0, 3\]: each must be one of 0\.\.2"),
        (lambda d: Guidance(-1).require_support(d), r"labels=-1: each must be one of 0\.\.2"),
        (lambda d: Guidance([]).require_support(d), r"labels=\[\]: give all"),
        (lambda d: Guidance(None, 2.0).require_support(d), "guidance_scale=2.0: .* name one by labels"),
        (lambda d: Guidance(0).require_support(affine_denoiser(SCHEDULE)), "labels=0: .* without classes"),
        (
            lambda d: Guidance("all", 2.0).require_support(affine_denoiser(SCHEDULE)),
            "guidance_scale=2.0: .* leave",
        ),
        (lambda d: Guidance("all", float("nan")), "guidance_scale=nan: must be a finite number"),
        (
            lambda d: Guidance("all", 2.0, (-0.1, 0.5)),
            r"guidance_interval=\[-0.1, 0.5\]: must be \[from, to\]",
        ),
        (lambda d: Guidance("all", 2.0, (0.6, 0.5)), "guidance_interval=.*two times"),
        (lambda d: Guidance("all", 2.0, (0.0, 1.1)), "guidance_interval=.*two times"),
        (lambda d: Guidance("all", guide=d), "guidance_scale=1: a guide changes nothing"),
    ],
)
def test_requests_that_cannot_be_met_are_refused_in_one_line(make, message):
    with pytest.raises(ValueError, match=message) as caught:
        make(free())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "guide",
    [
        exact_denoiser(GaussianData(SCHEDULE)),
        free(schedules.cosine(40)),
        Preconditioned(Exact(ShiftedData(SCHEDULE), V(), num_classes=3), SCHEDULE, V(), 1, 2),
    ],
    ids=["classes", "schedule", "size"],
)
def test_a_guide_of_another_kind_is_refused(guide):
    Guidance("all", 2.0, guide=free(target=X0())).require_support(free())
    with pytest.raises(
        ValueError, match="guide_ckpt: a guide must have the same image size, classes and schedule"
    ):
        Guidance("all", 2.0, guide=guide).require_support(free())


def test_a_guide_needs_no_classes():
    ours, weak = (affine_denoiser(SCHEDULE, V(), "none", Affine()) for _ in range(2))
    with torch.no_grad():
        weak.core.net.gain.fill_(-0.3)
    request, x_t = Guidance("all", 2.0, guide=weak), normal(2, 1, 4, 4)
    request.require_support(ours)
    estimate = request.around(ours, range(2))(x_t, 0.4).x0
    torch.testing.assert_close(estimate, 2 * ours(x_t, 0.4).x0 - weak(x_t, 0.4).x0)
