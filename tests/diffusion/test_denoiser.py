import pytest
import torch

from litdiffusion.diffusion import X0, Denoiser, Epsilon, V, q_sample, schedules
from small_worlds import Affine, Oracle, Spy, affine_denoiser, images, normal

SCHEDULE = schedules.linear(40)
EVERY_T = torch.arange(1, 41)


@pytest.mark.parametrize("target", [Epsilon(), X0(), V()], ids=lambda t: type(t).__name__)
@pytest.mark.parametrize("clip", ["none", "static"])
def test_an_oracle_gives_image_and_noise_at_every_time(target, clip):
    x0, eps = images(40), normal(40, 1, 4, 4, seed=1)
    denoiser = Denoiser(Oracle(x0, SCHEDULE, target), SCHEDULE, target, 1, 4, clip)
    estimate = denoiser(q_sample(SCHEDULE, x0, EVERY_T, eps), EVERY_T)
    torch.testing.assert_close(estimate.x0, x0, rtol=0, atol=1e-4)
    torch.testing.assert_close(estimate.eps, eps, rtol=0, atol=1e-4)


@pytest.mark.parametrize("clip", ["none", "static"])
def test_clipping_moves_the_noise_along(clip):
    """x_t = alpha x0 + sigma eps holds for the estimate whether or not its x0 was clipped."""
    x_t = 3 * normal(40, 1, 4, 4)
    denoiser = affine_denoiser(SCHEDULE, V(), clip)
    estimate = denoiser(x_t, EVERY_T)
    alpha, sigma = SCHEDULE.at(EVERY_T)
    torch.testing.assert_close(alpha * estimate.x0 + sigma * estimate.eps, x_t)
    raw = V().x0(denoiser.output(x_t, EVERY_T)[0], x_t, alpha, sigma)
    assert raw.abs().max() > 1
    assert torch.equal(estimate.x0, raw if clip == "none" else raw.clamp(-1, 1))


@pytest.mark.parametrize("t", [1, 17, 40])
def test_one_time_for_the_whole_batch_is_that_time_for_each_image(t):
    denoiser, x_t, earlier = affine_denoiser(SCHEDULE, V(), net=Spy()), images(3), images(3, seed=1)
    one, each = (denoiser(x_t, time, earlier) for time in (t, torch.full((3,), t)))
    assert torch.equal(one.x0, each.x0)
    assert torch.equal(one.eps, each.eps)


def test_the_networks_clock_starts_at_0():
    net = Spy(self_condition=False)
    affine_denoiser(SCHEDULE, net=net)(images(2), torch.tensor([1, 40]))
    assert net.calls[0].clock.tolist() == [0, 39]


def test_only_a_self_conditioned_network_hears_of_an_earlier_estimate():
    plain, conditioned = Spy(self_condition=False), Spy(self_condition=True)
    t, earlier = torch.tensor([3, 3]), images(2, seed=5)
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
    net.forward = lambda x, t: torch.nn.Conv2d.forward(net, x)  # a network that ignores the time
    denoiser = affine_denoiser(SCHEDULE, net=net)
    x, t = images(2), torch.tensor([1, 40])
    with torch.autocast("cpu", torch.bfloat16):
        assert net(x, t).dtype == torch.bfloat16
        assert denoiser.output(x, t)[0].dtype == torch.float32
        estimate = denoiser(x, t)
    assert estimate.x0.dtype == estimate.eps.dtype == torch.float32


def test_the_fed_back_estimate_is_the_estimate_without_gradient():
    denoiser = affine_denoiser(SCHEDULE, net=Affine(self_condition=True))
    x_t, t = 2 * normal(3, 1, 4, 4), torch.tensor([1, 20, 40])
    fed_back = denoiser.self_conditioning(x_t, t)
    assert torch.equal(fed_back, denoiser(x_t, t).x0)
    assert not fed_back.requires_grad
    assert denoiser(x_t, t).x0.requires_grad


def test_epsilon_at_zero_terminal_snr_is_refused_in_one_line():
    schedule = schedules.linear(10, zero_terminal_snr=True)
    with pytest.raises(ValueError, match=r"target=epsilon.*choose target=v"):
        affine_denoiser(schedule, Epsilon())
    estimate = affine_denoiser(schedule, V())(normal(1, 1, 4, 4), torch.tensor([10]))
    assert bool(torch.isfinite(estimate.eps).all())


@pytest.mark.parametrize(("size", "shape"), [(8, (3, 8, 8)), ([4, 6], (3, 4, 6)), ((4, 6), (3, 4, 6))])
def test_another_network_changes_nothing_else(size, shape):
    denoiser = Denoiser(Affine(), SCHEDULE, V(), 3, size, clip="none")
    other = Spy()
    twin = denoiser.with_net(other)
    assert twin.net is other
    assert twin.image_shape == denoiser.image_shape == shape
    assert (twin.schedule, twin.target, twin.clip) == (denoiser.schedule, denoiser.target, "none")
    assert twin.self_condition
    assert not denoiser.self_condition
