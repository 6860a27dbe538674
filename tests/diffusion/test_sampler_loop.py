from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from litdiffusion.diffusion import DDIM, DDPM, Draws, Heun, SamplerState, schedules, transition
from small_worlds import (
    CONTINUOUS,
    SAMPLERS,
    Affine,
    GaussianData,
    Spy,
    affine_denoiser,
    draws,
    exact_denoiser,
    normal,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@given(data=st.data(), total=st.integers(1, 1500))
def test_the_times_fall_to_0_as_evenly_as_steps_can(data, total):
    count = data.draw(st.integers(1, total))
    times = DDIM(count).times(schedules.linear(total))
    steps = [round(t * total) for t in times]
    assert times == [i / total for i in steps]
    assert (steps[0], steps[-1], len(steps)) == (total, 0, count + 1)
    strides = [t - s for t, s in pairwise(steps)]
    assert min(strides) >= 1
    assert max(strides) - min(strides) <= 1
    assert all(abs(i - total * (count - n) / count) <= 0.5 for n, i in enumerate(steps))


@pytest.mark.parametrize("make", CONTINUOUS.values(), ids=CONTINUOUS)
def test_continuous_times_are_exactly_even(make):
    for count in (1, 7, 3000):
        assert DDIM(count).times(make(num_steps=1000)) == [i / count for i in range(count, -1, -1)]


def test_every_step_is_taken_when_no_number_is_named():
    schedule = schedules.linear(7)
    assert DDPM().times(schedule) == DDPM(7).times(schedule) == [i / 7 for i in range(7, -1, -1)]
    assert DDPM().times(schedules.Flow(num_steps=3)) == [1, 2 / 3, 1 / 3, 0]
    assert DDPM(1).times(schedule) == [1, 0]
    assert DDIM().num_steps == 50


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="num_steps=0"):
        DDPM(0)
    with pytest.raises(ValueError, match="num_steps=-1"):
        DDIM(-1)
    with pytest.raises(ValueError, match=r"num_steps=8: must be from 1 to schedule\.num_steps=7"):
        DDIM(8).times(schedules.linear(7))
    for eta in (-0.1, 1.1):
        with pytest.raises(ValueError, match=f"eta={eta}"):
            DDIM(eta=eta)


@pytest.mark.parametrize("make", SAMPLERS.values(), ids=SAMPLERS)
def test_an_image_does_not_depend_on_its_batch(make):
    """Its random numbers are functions of its position, in one batch or another."""
    denoiser, x_T = affine_denoiser(schedules.linear(30)), normal(5, 1, 4, 4)

    def sampled(start: int, stop: int, seed: int = 4) -> Tensor:
        numbers = Draws.at(seed, "test", start=start, stop=stop)
        return make(10).sample(denoiser, x_T[start:stop], numbers)

    whole = sampled(0, 5)
    assert torch.equal(whole, torch.cat([sampled(0, 2), sampled(2, 5)]))
    assert not torch.equal(whole[0], whole[1])
    is_random = not torch.equal(whole, sampled(0, 5, seed=5))
    assert is_random == (make not in (SAMPLERS["ddim"], SAMPLERS["dpmpp_2m"], SAMPLERS["heun"]))


def test_every_step_has_noise_of_its_own():
    seen: list[Tensor] = []

    class Noisy(DDPM):
        def step(self, state: SamplerState) -> Tensor:
            seen.extend((state.noise(), state.noise()))
            return super().step(state)

    Noisy(4).sample(affine_denoiser(schedules.linear(30)), normal(2, 1, 4, 4), draws(2))
    assert len(seen) == 8
    assert len(torch.cat(seen).unique(dim=0)) == 16


LOOK_ONCE = {name: make for name, make in SAMPLERS.items() if not name.startswith("heun")}


@pytest.mark.parametrize("make", LOOK_ONCE.values(), ids=LOOK_ONCE)
def test_steps_yields_every_time_and_passes_its_estimate_on(make):
    schedule, net = schedules.linear(30), Spy()
    denoiser, x_T = affine_denoiser(schedule, net=net), normal(2, 1, 4, 4)
    outputs = list(make(6).steps(denoiser, x_T, draws(2)))
    assert [output.t for output in outputs] == [i / 30 for i in (30, 25, 20, 15, 10, 5, 0)]
    assert torch.equal(outputs[0].x, x_T)
    assert torch.equal(outputs[-1].x, outputs[-1].x0)
    assert [call.c_noise.tolist() for call in net.calls] == [[i - 1] * 2 for i in (30, 25, 20, 15, 10, 5)]
    assert net.calls[0].self_cond is None
    for call, earlier, now in zip(net.calls[1:], outputs[:-2], outputs[1:-1], strict=True):
        assert torch.equal(call.self_cond, earlier.x0)
        assert torch.equal(call.x, now.x)
        assert torch.equal(now.x0, denoiser(now.x, now.t, earlier.x0).x0)
    sampled = make(6).sample(denoiser, x_T, draws(2))
    assert torch.equal(sampled, outputs[-1].x)


def test_sampling_makes_no_graph_and_leaves_the_callers_gradient_mode_alone():
    denoiser = affine_denoiser(schedules.linear(5), net=Affine())
    for output in DDIM(5).steps(denoiser, normal(1, 1, 4, 4), draws(1)):
        assert not output.x.requires_grad
        assert not output.x0.requires_grad
        assert torch.is_grad_enabled()


class ThirdOrder(DDIM):
    """Notes the times it was at before each step."""

    order = 3

    def step(self, state: SamplerState) -> Tensor:
        assert all(earlier.history == () for earlier in state.history)
        self.seen.append([round(50 * earlier.t) for earlier in state.history])
        return super().step(state)


def test_a_multistep_sampler_sees_as_many_steps_back_as_its_order_needs():
    sampler = ThirdOrder(5)
    sampler.seen = []
    sampler.sample(affine_denoiser(schedules.linear(50)), normal(2, 1, 4, 4), draws(2))
    assert sampler.seen == [[], [50], [40, 50], [30, 40], [20, 30]]


# ---------------------------------------------------------------------------------------------- churn


class Climbs(Heun):
    """Notes where churn took each step."""

    def step(self, state: SamplerState) -> Tensor:
        self.seen.append(state.t)
        return super().step(state)


@pytest.mark.parametrize("name", CONTINUOUS)
@pytest.mark.parametrize("churn", [0.4, 1000.0])
def test_churn_raises_sigma_by_exactly_1_plus_gamma(name, churn):
    """In sigma / alpha, and no further than t = 1; gamma is at most sqrt(2) - 1."""
    schedule, gamma = CONTINUOUS[name](), min(churn / 8, 2**0.5 - 1)
    sampler = Climbs(8, churn=churn)
    sampler.seen = []
    x_T = schedule.init_noise_sigma * normal(1, 1, 1, 1)
    sampler.sample(exact_denoiser(GaussianData(schedule)), x_T, draws(1))
    times = sampler.times(schedule)[:-1]
    assert len(sampler.seen) == len(times)
    assert sampler.seen[0] == 1
    for t, up in zip(times[1:], sampler.seen[1:], strict=True):
        (alpha, sigma), (alpha_up, sigma_up) = schedule.at(t), schedule.at(up)
        assert sigma_up / alpha_up == pytest.approx((1 + gamma) * sigma / alpha, rel=1e-9)


def test_churn_adds_the_noise_of_the_forward_process():
    schedule, gamma = schedules.VE(), 0.25
    x_t, noise = normal(3, 1, 2, 2, dtype=torch.float64), normal(3, 1, 2, 2, seed=1, dtype=torch.float64)
    sampler = Heun(8, churn=2.0, churn_noise=1.1)
    x_up, up = sampler.churn(schedule, x_t, 0.5, lambda: noise)
    sigma = schedule.at(0.5)[1]
    torch.testing.assert_close(x_up, x_t + 1.1 * sigma * ((1 + gamma) ** 2 - 1) ** 0.5 * noise)
    assert transition(schedule, up, 0.5).v == pytest.approx(sigma**2 * ((1 + gamma) ** 2 - 1))
