"""Classifier-free guidance: one network call, whatever the sampler, target and network.

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
    L2,
    X0,
    Denoiser,
    Guidance,
    Objective,
    Sampler,
    Schedule,
    Target,
    Uniform,
    V,
    Velocity,
    q_sample,
    schedules,
)
from small_worlds import (
    SAMPLERS,
    TARGETS,
    Affine,
    Exact,
    GaussianData,
    MixtureData,
    affine_denoiser,
    exact_denoiser,
    images,
    normal,
)

pytestmark = pytest.mark.usefixtures("one_thread")

SCHEDULE = schedules.linear(40)
NONE = 3  # the label after the last class


@dataclass
class ShiftedData(GaussianData):
    """The label moves the mean; the last label leaves it."""

    shifts: tuple[float, ...] = (-0.5, 0.1, 0.4, 0.0)

    def denoise(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        alpha, sigma = self.schedule.at(t, x_t.dtype)
        gain = alpha * self.std**2 / (alpha**2 * self.std**2 + sigma**2)
        mean = self.mean + torch.tensor(self.shifts, dtype=x_t.dtype)[labels][:, None, None, None]
        return mean + gain * (x_t - alpha * mean)


def shifted_by(scale: float, labels: Tensor, schedule: Schedule = SCHEDULE) -> ShiftedData:
    """The distribution that guidance by ``scale`` leads to, a class for each image."""
    return ShiftedData(schedule, shifts=tuple(scale * ShiftedData(schedule).shifts[k] for k in labels))


LABELS = torch.tensor([0, 2, 1, 0, 2])
X_T = normal(5, 1, 1, 1, dtype=torch.float64)


def drawn(sampler: Sampler, denoiser: Denoiser) -> Tensor:
    return sampler.sample(denoiser, X_T, torch.Generator().manual_seed(2))


def expected(sampler: Sampler, scale: float, target: Target) -> Tensor:
    """Samples of the distribution that guidance leads to, without any guidance."""
    data = shifted_by(scale, LABELS)

    class EachItsOwn(Exact):
        def forward(self, x_t: Tensor, clock: Tensor, labels: Tensor | None = None) -> Tensor:
            return super().forward(x_t, clock, torch.arange(len(x_t)))

    net = EachItsOwn(data, target)
    return drawn(sampler, Denoiser(net, SCHEDULE, target, 1, 1, clip="none"))


@pytest.mark.parametrize("scale", [-1.0, 0.0, 1.0, 4.0])
@pytest.mark.parametrize("make", SAMPLERS.values(), ids=SAMPLERS)
def test_every_sampler_draws_the_shifted_distribution(make, scale):
    denoiser = exact_denoiser(ShiftedData(SCHEDULE), num_classes=3)
    guided = denoiser.guided(Guidance(LABELS, scale))
    torch.testing.assert_close(drawn(make(6), guided), expected(make(6), scale, V()), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_every_target_is_guided_alike(target):
    denoiser = exact_denoiser(ShiftedData(SCHEDULE), target, num_classes=3)
    guided = denoiser.guided(Guidance(LABELS, 2.5))
    torch.testing.assert_close(drawn(DDPM(10), guided), expected(DDPM(10), 2.5, target), rtol=1e-9, atol=1e-9)


def test_the_mean_moves_by_the_scale_times_the_way_to_the_class():
    """The closed form: all steps of a fine schedule, each image at its own class."""
    schedule = schedules.cosine(1000)
    guided = exact_denoiser(ShiftedData(schedule), num_classes=3).guided(Guidance(LABELS, 3.0))
    data = [GaussianData(schedule, 0.3 + 3 * ShiftedData(schedule).shifts[k]) for k in LABELS]
    exact = torch.cat([world.flow_to_image(x[None]) for world, x in zip(data, X_T, strict=True)])
    torch.testing.assert_close(drawn(DDIM(200), guided), exact, rtol=0, atol=0.03)


@pytest.mark.parametrize("scale", [-1.0, 0.0, 0.5, 1.0, 7.5])
@pytest.mark.parametrize("target", [X0(), V(), Velocity()], ids=lambda target: type(target).__name__)
def test_the_guided_score_of_a_mixture(target, scale):
    """(1 - w) grad log p_t(x) + w grad log p_t(x | label), each by automatic differentiation."""
    data = MixtureData(schedules.flow(30))
    t, labels = torch.arange(1, 31), torch.arange(30) % 3
    x_t = normal(30, 1, 1, 1, dtype=torch.float64).requires_grad_()

    def score(labels: Tensor | None) -> Tensor:
        log_density = data.log_densities(x_t, t, labels).logsumexp(-1)
        return torch.autograd.grad(log_density.sum(), x_t)[0]

    guided = exact_denoiser(data, target, num_classes=3).guided(Guidance(labels, scale))
    estimate = guided(x_t.detach(), t)
    _, sigma = data.schedule.at(t, torch.float64)
    wanted = -sigma * ((1 - scale) * score(None) + scale * score(labels))
    torch.testing.assert_close(estimate.eps, wanted, rtol=1e-7, atol=1e-8)


# ------------------------------------------------------------------------------------------------- the calls


@pytest.mark.parametrize("make", SAMPLERS.values(), ids=SAMPLERS)
@pytest.mark.parametrize(("scale", "branches"), [(0.0, 1), (1.0, 1), (2.0, 2)])
def test_both_branches_share_one_network_call(make, scale, branches):
    denoiser = exact_denoiser(ShiftedData(SCHEDULE), num_classes=3)
    unguided = exact_denoiser(ShiftedData(SCHEDULE), num_classes=3)
    drawn(make(6), denoiser.guided(Guidance(LABELS, scale)))
    drawn(make(6), unguided.guided(Guidance(LABELS)))
    assert denoiser.net.calls == [branches * size for size in unguided.net.calls]
    assert set(unguided.net.calls) == {5}


@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.25, 0.75), (0.5, 1.0), (0.0, 0.0)])
def test_guidance_keeps_to_its_interval(interval):
    """Inside it as guided everywhere, outside it as by scale 1, with a call of half the size."""
    denoiser = exact_denoiser(ShiftedData(SCHEDULE), num_classes=3)
    within = denoiser.guided(Guidance(LABELS, 3.0, interval))
    everywhere, plain = (denoiser.guided(Guidance(LABELS, scale)) for scale in (3.0, 1.0))
    for t in (1, 9, 10, 11, 20, 29, 30, 31, 40):
        times = torch.full((5,), t)
        inside = interval[0] <= t / 40 <= interval[1]
        denoiser.net.calls.clear()
        estimate = within(X_T, times)
        assert denoiser.net.calls == [10 if inside else 5]
        torch.testing.assert_close(estimate.x0, (everywhere if inside else plain)(X_T, times).x0)


@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.25, 0.75), (0.3, 0.3), (0.1 + 0.2, 1.0), (0.0, 0.0)])
@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_one_time_for_all_is_guided_as_the_same_time_for_each(scale, interval):
    denoiser = exact_denoiser(ShiftedData(SCHEDULE), num_classes=3)
    guided = denoiser.guided(Guidance(LABELS, scale, interval))
    for t in range(1, 41):
        one, each = (guided(X_T, time) for time in (t, torch.full((5,), t)))
        assert torch.equal(one.x0, each.x0)
        assert torch.equal(one.eps, each.eps)
    assert denoiser.net.calls[::2] == denoiser.net.calls[1::2]


def test_labels_follow_the_denoiser_to_its_device():
    denoiser = exact_denoiser(ShiftedData(schedules.linear(40)), num_classes=3).to("meta")
    guidance = denoiser.guided(Guidance(LABELS, 2.0, (0.0, 0.5))).guidance
    assert guidance.labels.is_meta
    assert (guidance.scale, guidance.interval) == (2.0, (0.0, 0.5))
    with pytest.raises(ValueError, match="labels: each must be one of"):
        denoiser.guided(Guidance(LABELS + 1))


@pytest.mark.parametrize("scale", [0.0, 3.0])
def test_an_interval_holds_for_each_image_of_mixed_times(scale):
    denoiser = exact_denoiser(ShiftedData(SCHEDULE), num_classes=3)
    times = torch.tensor([1, 10, 20, 30, 40])
    inside = torch.tensor([False, True, True, True, False])[:, None, None, None]
    found = denoiser.guided(Guidance(LABELS, scale, (0.25, 0.75)))(X_T, times)
    everywhere, plain = (denoiser.guided(Guidance(LABELS, w))(X_T, times) for w in (scale, 1.0))
    torch.testing.assert_close(found.x0, torch.where(inside, everywhere.x0, plain.x0))
    assert not torch.allclose(everywhere.x0, plain.x0)


def test_the_flow_with_an_interval_has_a_closed_form():
    """Down to the interval the flow of the class, from there on that of the shifted mean."""
    schedule, edge = schedules.cosine(1000), 500
    guided = exact_denoiser(ShiftedData(schedule), num_classes=3).guided(Guidance(LABELS, 3.0, (0.0, 0.5)))
    shifts = torch.tensor(ShiftedData(schedule).shifts, dtype=torch.float64)[LABELS][:, None, None, None]
    early, late = 0.3 + shifts, 0.3 + 3 * shifts
    data = GaussianData(schedule)
    alpha_T, alpha = float(schedule.alpha[-1]), float(schedule.alpha[edge])
    std_T, std = data.variance_at(1000) ** 0.5, data.variance_at(edge) ** 0.5
    at_edge = alpha * early + std * (X_T - alpha_T * early) / std_T
    exact = late + data.std * (at_edge - alpha * late) / std
    torch.testing.assert_close(drawn(DDIM(200), guided), exact, rtol=0, atol=0.03)


# -------------------------------------------------------------------------------- what else a network can do


class Told(nn.Module):
    """A network of 3 classes that can do everything, and keeps what it is told."""

    self_condition, num_classes, learned_variance = True, 3, True

    def __init__(self) -> None:
        super().__init__()
        self.told: list[tuple[Tensor, Tensor | None]] = []

    def forward(self, x: Tensor, clock: Tensor, self_cond: Tensor | None, labels: Tensor) -> Tensor:
        self.told.append((labels, self_cond))
        size = labels[:, None, None, None].to(x)
        feedback = 0 if self_cond is None else 0.1 * self_cond
        return torch.cat((0.3 * x + 0.2 * size + feedback, 0.1 * size + 0 * x), dim=1)


@pytest.mark.parametrize("make", SAMPLERS.values(), ids=SAMPLERS)
def test_both_branches_are_fed_the_guided_estimate(make):
    net = Told()
    schedule = schedules.linear(40, rescale=False)  # within the range where Heun looks twice
    denoiser = affine_denoiser(schedule, V(), net=net).guided(Guidance(LABELS, 2.0))
    moments = list(make(4).steps(denoiser, normal(5, 1, 4, 4), torch.Generator().manual_seed(3)))
    assert all(torch.equal(labels, torch.cat((LABELS, torch.full((5,), NONE)))) for labels, _ in net.told)
    assert net.told[0][1] is None
    fed = [self_cond for _, self_cond in net.told[1:]]
    if make in (SAMPLERS["heun"], SAMPLERS["heun_churn"]):
        assert fed.pop(0) is None  # the second look of the first step
    estimates = [moment.x0 for moment in moments[:-1]]
    for self_cond in fed:
        assert torch.equal(self_cond[:5], self_cond[5:])
        assert any(torch.equal(self_cond[:5], estimate) for estimate in estimates)


def test_the_learned_variance_is_that_of_the_class():
    net = Told()
    denoiser = affine_denoiser(SCHEDULE, V(), net=net)
    x_t, t = normal(5, 1, 4, 4), torch.full((5,), 20)
    guided = denoiser.guided(Guidance(LABELS, 2.0))(x_t, t)
    assert torch.equal(guided.variance, denoiser.guided(Guidance(LABELS))(x_t, t).variance)
    torch.testing.assert_close(guided.variance[1], torch.full((1, 4, 4), (0.1 * 2 + 1) / 2))


@pytest.mark.parametrize("labels", [LABELS, None])
def test_in_training_the_network_is_told_the_labels_whenever_it_is_asked(labels):
    """For the estimate that is fed back as well; without labels, that there are none."""
    net = Told()
    x0, eps, t = images(5), normal(5, 1, 4, 4), torch.tensor([1, 10, 20, 30, 40])
    denoiser = affine_denoiser(SCHEDULE, V(), net=net)
    Objective(L2(), Uniform())(denoiser, x0, t, eps, feed_back=True, labels=labels)
    wanted = torch.full((5,), NONE) if labels is None else labels
    assert [told.tolist() for told, _ in net.told] == [wanted.tolist()] * 2
    x_t = q_sample(SCHEDULE, x0, t, eps)
    assert torch.equal(net.told[1][1], denoiser.self_conditioning(x_t, t, labels))


@pytest.mark.parametrize("clip", ["static", "dynamic"])
def test_clipping_comes_after_guidance(clip):
    denoiser = Denoiser(
        Exact(ShiftedData(SCHEDULE), V(), num_classes=3), SCHEDULE, V(), 1, 4, clip, clip_quantile=0.5
    )
    x_t, t = normal(5, 1, 4, 4, dtype=torch.float64), torch.tensor([1, 10, 20, 30, 40])
    free = Denoiser(denoiser.net, SCHEDULE, V(), 1, 4, "none").guided(Guidance(LABELS, 9.0))(x_t, t).x0
    estimate = denoiser.guided(Guidance(LABELS, 9.0))(x_t, t)
    assert float(free.abs().max()) > 1
    assert float(estimate.x0.abs().max()) == 1
    alpha, sigma = SCHEDULE.at(t, torch.float64)
    torch.testing.assert_close(alpha * estimate.x0 + sigma * estimate.eps, x_t)


# ------------------------------------------------------------------------------------------ asking and refusing


def test_no_labels_means_no_class():
    denoiser = exact_denoiser(ShiftedData(SCHEDULE), num_classes=3)
    t = torch.full((5,), 20)
    free = denoiser(X_T, t).x0
    torch.testing.assert_close(free, GaussianData(SCHEDULE).denoise(X_T, t))
    assert torch.equal(free, denoiser.guided(Guidance(LABELS, 0.0))(X_T, t).x0)
    assert torch.equal(free, denoiser.guided(Guidance(LABELS, 2.0)).guided(None)(X_T, t).x0)


def test_guiding_leaves_the_denoiser_as_it_was_and_another_network_leaves_the_guidance():
    denoiser = exact_denoiser(ShiftedData(SCHEDULE), num_classes=3)
    guidance = Guidance(LABELS, 2.0)
    guided = denoiser.guided(guidance)
    assert denoiser.guidance is None
    assert guided.guidance is guidance
    assert (guided.net, guided.schedule) == (denoiser.net, denoiser.schedule)
    other = Exact(ShiftedData(SCHEDULE), V(), num_classes=3)
    assert guided.with_net(other).guidance is guidance
    assert denoiser.net is not other


@pytest.mark.parametrize("labels", [[0, 3], [-1, 0]])
def test_labels_that_are_no_class_are_refused(labels):
    denoiser = exact_denoiser(ShiftedData(SCHEDULE), num_classes=3)
    with pytest.raises(ValueError, match=r"labels: each must be one of 0\.\.2"):
        denoiser.guided(Guidance(torch.tensor(labels)))


def test_a_network_without_classes_is_not_guided():
    with pytest.raises(ValueError, match="labels: this network was trained without class labels"):
        affine_denoiser(SCHEDULE, net=Affine()).guided(Guidance(LABELS))


@pytest.mark.parametrize("interval", [(-0.1, 0.5), (0.6, 0.5), (0.0, 1.1)])
def test_an_interval_outside_of_0_to_1_is_refused(interval):
    with pytest.raises(ValueError, match=r"guidance_interval=.*fractions of T"):
        Guidance(LABELS, 2.0, interval)
