import pytest
import torch

from litdiffusion.diffusion import (
    EDM,
    X0,
    Clipped,
    Epsilon,
    Guided,
    Labelled,
    Preconditioned,
    V,
    q_sample,
    schedules,
)
from small_worlds import ALL_SCHEDULES, TARGETS, Affine, Oracle, Spy, affine_denoiser, images, normal, times

SCHEDULE = schedules.linear(40)
EVERY_T = torch.arange(1, 41).double() / 40
CLIPS = ["none", "static"]
DEFINED = [
    (schedule, target)
    for schedule in ("linear", "vp_cosine", "flow", "ve")
    for target in TARGETS
    if schedule != "flow" or TARGETS[target].defined_at_zero_snr
]


@pytest.mark.parametrize(("name", "target"), DEFINED, ids=str)
@pytest.mark.parametrize("clip", CLIPS)
def test_an_oracle_gives_image_and_noise_at_every_time(target, clip, name):
    schedule = ALL_SCHEDULES[name](num_steps=40)
    target = TARGETS[target]
    x0, eps = images(40).double(), normal(40, 1, 4, 4, seed=1, dtype=torch.float64)
    denoiser = Clipped(Preconditioned(Oracle(x0, schedule, target), schedule, target, 1, 4), clip)
    x_t = q_sample(schedule, x0, EVERY_T, eps)
    estimate = denoiser(x_t, EVERY_T)
    # EDM's clock is log(sigma / alpha) / 4 in float32, and so the oracle's idea of the time is rounded.
    atol = 2e-4 if isinstance(target, EDM) else 1e-9
    torch.testing.assert_close(estimate.x0, x0, rtol=0, atol=atol)
    alpha, sigma = schedule.at(EVERY_T)
    torch.testing.assert_close(alpha * estimate.x0 + sigma * estimate.eps, x_t, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("clip", CLIPS)
def test_clipping_moves_the_noise_along(clip):
    """x_t = alpha x0 + sigma eps holds for the estimate whether or not its x0 was clipped."""
    x_t = 3 * normal(40, 1, 4, 4)
    denoiser = affine_denoiser(SCHEDULE, V(), clip)
    estimate = denoiser(x_t, EVERY_T)
    alpha, sigma = (number.float() for number in SCHEDULE.at(EVERY_T))
    torch.testing.assert_close(alpha * estimate.x0 + sigma * estimate.eps, x_t)
    raw = denoiser.core.estimate(denoiser.core.output(x_t, EVERY_T)[0], x_t, EVERY_T).x0
    torch.testing.assert_close(raw, alpha * x_t - sigma * denoiser.core.output(x_t, EVERY_T)[0])
    assert raw.abs().max() > 1
    assert torch.equal(estimate.x0, raw if clip == "none" else raw.clamp(-1, 1))


@pytest.mark.parametrize("name", ALL_SCHEDULES)
@pytest.mark.parametrize("target", [V(), EDM()], ids=["v", "edm"])
@pytest.mark.parametrize("t", [1 / 40, 0.4321, 39 / 40])
def test_one_time_for_the_whole_batch_is_that_time_for_each_image(t, target, name):
    schedule = ALL_SCHEDULES[name](num_steps=40)
    if schedule.has_zero_terminal_snr and not target.defined_at_zero_snr:
        schedule = schedules.cosine(40)
    denoiser = affine_denoiser(schedule, target, net=Spy())
    x_t, earlier = images(3), images(3, seed=1)
    one, each = (denoiser(x_t, time, earlier) for time in (t, times(t, t, t)))
    torch.testing.assert_close(one.x0, each.x0)
    torch.testing.assert_close(one.eps, each.eps)


def test_the_networks_clock_counts_the_steps_from_0_and_edms_the_noise():
    net = Spy(self_condition=False)
    affine_denoiser(SCHEDULE, net=net)(images(3), times(1 / 40, 1, 0.5125))
    assert net.calls[0].c_noise.tolist() == [0, 39, pytest.approx(19.5)]
    schedule = schedules.VE()
    affine_denoiser(schedule, EDM(), net=net)(images(2), schedule.time_of(-2 * times(0.1, 40.0).log()))
    assert net.calls[1].c_noise.tolist() == pytest.approx((times(0.1, 40.0).log() / 4).tolist(), rel=1e-5)
    assert net.calls[0].c_noise.dtype == net.calls[1].c_noise.dtype == torch.float32


def test_the_network_is_given_the_scaled_image():
    net, schedule, t = Spy(self_condition=False), schedules.VE(), times(0.2, 1.0)
    denoiser = affine_denoiser(schedule, EDM(0.3), net=net)
    x_t = q_sample(schedule, images(2), t, normal(2, 1, 4, 4))
    denoiser(x_t, t)
    sigma = schedule.at(t)[1].float()
    torch.testing.assert_close(net.calls[0].x, x_t / (0.09 + sigma**2).sqrt())


@pytest.mark.parametrize(
    ("target", "size"), [(V(), 80), (Epsilon(), 80), (EDM(), 1)], ids=["v", "epsilon", "edm"]
)
def test_exploding_noise_is_told_from_input_that_is_scaled(target, size):
    assert Preconditioned(Spy(), schedules.VE(), target, 1, 4).largest_input == pytest.approx(size, rel=1e-3)


def test_only_a_self_conditioned_network_hears_of_an_earlier_estimate():
    plain, conditioned = Spy(self_condition=False), Spy(self_condition=True)
    t, earlier = times(0.1, 0.1), images(2, seed=5)
    for net in (plain, conditioned):
        denoiser = affine_denoiser(SCHEDULE, net=net)
        assert denoiser.self_condition is net.self_condition
        denoiser(images(2), t, earlier)
        denoiser(images(2), t)
    assert [call.self_cond for call in plain.calls] == [None, None]
    assert conditioned.calls[0].self_cond is earlier
    assert conditioned.calls[1].self_cond is None


def test_output_and_estimate_are_float32_under_autocast():
    net = torch.nn.Conv2d(1, 1, 3, padding=1)
    net.forward = lambda x, c_noise: torch.nn.Conv2d.forward(net, x)  # a network that ignores the time
    denoiser = affine_denoiser(SCHEDULE, net=net)
    x, t = images(2), times(1 / 40, 1)
    with torch.autocast("cpu", torch.bfloat16):
        assert net(x, t).dtype == torch.bfloat16
        assert denoiser.core.output(x, t)[0].dtype == torch.float32
        estimate = denoiser(x, t)
    assert estimate.x0.dtype == estimate.eps.dtype == torch.float32


@pytest.mark.parametrize("target", [Epsilon(), EDM()], ids=["epsilon", "edm"])
@pytest.mark.parametrize("schedule", [schedules.linear(10, zero_terminal_snr=True), schedules.Flow()])
def test_a_target_that_is_undefined_at_zero_terminal_snr_is_refused_in_one_line(schedule, target):
    name = type(target).__name__.lower()
    with pytest.raises(ValueError, match=rf"target={name}: .*use target=v"):
        affine_denoiser(schedule, target)
    estimate = affine_denoiser(schedule, V())(normal(1, 1, 4, 4), times(1.0))
    assert bool(torch.isfinite(estimate.eps).all())


class Labelling(Affine):
    """An ``Affine`` of three classes."""

    num_classes = 3

    def forward(self, x, c_noise, self_cond=None, labels=None):
        return (1 + labels[:, None, None, None]) * super().forward(x, c_noise, self_cond) / 4


@pytest.mark.parametrize(("size", "shape"), [(8, (3, 8, 8)), ([4, 6], (3, 4, 6)), ((4, 6), (3, 4, 6))])
def test_another_network_changes_nothing_else(size, shape):
    """Whatever is around it, the original included; tables and networks are shared."""
    core = Preconditioned(Labelling(), SCHEDULE, V(), 3, size)
    guided = Guided(Labelled(core, torch.tensor([1, 2])), guide=core, scale=2.0, interval=(0.1, 0.9))
    denoiser = Clipped(guided, "dynamic", 0.9)
    other = Labelling(self_condition=True)
    twin = denoiser.with_net(other)
    assert twin.core.net is other
    assert denoiser.core.net is core.net is not other
    for each in (twin, twin.inner, twin.core):
        assert each.schedule is SCHEDULE
        assert each.image_shape == shape
        assert each.num_classes == 3
    assert (twin.core.target, twin.clip, twin.clip_quantile) == (core.target, "dynamic", 0.9)
    assert (twin.inner.scale, twin.inner.low, twin.inner.high) == (2.0, 0.1, 0.9)
    assert twin.inner.inner.labels is guided.inner.labels
    assert denoiser.inner is guided


def test_a_composition_around_a_denoiser_keeps_what_is_inside():
    """``with_core`` puts guidance between the network and what clips its estimates."""
    core = Preconditioned(Labelling(), SCHEDULE, X0(), 1, 4)
    labels = torch.tensor([2, 0])
    asked = Clipped(core).with_core(lambda inner: Labelled(inner, labels))
    assert isinstance(asked, Clipped)
    assert isinstance(asked.inner, Labelled)
    assert asked.core is core
    x_t, t = 5 * images(2), times(0.2, 0.9)
    raw = core(x_t, t, labels=labels).x0
    assert raw.abs().max() > 1
    assert torch.equal(asked(x_t, t).x0, raw.clamp(-1, 1))
    assert asked.device == core.device == torch.device("cpu")
    assert asked.to("meta").device.type == "meta"
