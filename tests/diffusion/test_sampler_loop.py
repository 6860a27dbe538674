from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from litdiffusion.diffusion import DDIM, DDPM, schedules
from litdiffusion.diffusion.walk import Here
from small_worlds import SAMPLERS, Affine, Spy, affine_denoiser, normal

pytestmark = pytest.mark.usefixtures("one_thread")


@given(data=st.data(), total=st.integers(1, 1500))
def test_the_grid_falls_to_0_as_evenly_as_integers_can(data, total):
    count = data.draw(st.integers(1, total))
    grid = DDIM(count).times(schedules.linear(total))
    assert grid[0] == total
    assert grid[-1] == 0
    assert len(grid) == count + 1
    strides = [t - s for t, s in pairwise(grid)]
    assert min(strides) >= 1
    assert max(strides) - min(strides) <= 1
    assert all(abs(t - total * (count - i) / count) <= 0.5 for i, t in enumerate(grid))


def test_the_grid_takes_every_step_when_none_are_named():
    schedule = schedules.linear(7)
    assert DDPM().times(schedule) == DDPM(7).times(schedule) == [7, 6, 5, 4, 3, 2, 1, 0]
    assert DDPM(1).times(schedule) == [7, 0]
    assert DDIM().num_steps == 50


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="num_steps=0"):
        DDPM(0)
    with pytest.raises(ValueError, match="num_steps=-1"):
        DDIM(-1)
    with pytest.raises(ValueError, match="num_steps=8: the schedule has only 7 steps"):
        DDIM(8).times(schedules.linear(7))
    for eta in (-0.1, 1.1):
        with pytest.raises(ValueError, match=f"eta={eta}"):
            DDIM(eta=eta)


@pytest.mark.parametrize("make", SAMPLERS.values(), ids=SAMPLERS)
def test_an_image_with_its_own_generator_does_not_depend_on_its_batch(make):
    denoiser, x_T = affine_denoiser(schedules.linear(30)), normal(5, 1, 4, 4)

    def sampled(rows: slice) -> Tensor:
        seeds = range(5)[rows]
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return make(10).sample(denoiser, x_T[rows], generators)

    whole = sampled(slice(0, 5))
    assert torch.equal(whole, torch.cat([sampled(slice(0, 2)), sampled(slice(2, 5))]))
    assert not torch.equal(whole[0], whole[1])


def test_generators_and_images_must_match():
    denoiser = affine_denoiser(schedules.linear(30))
    with pytest.raises(ValueError, match="1 generators for 2 images"):
        DDPM(10).sample(denoiser, normal(2, 1, 4, 4), [torch.Generator()])


def test_one_generator_draws_for_the_whole_batch_in_order():
    denoiser, x_T = affine_denoiser(schedules.linear(30)), normal(3, 1, 4, 4)
    first = DDPM(10).sample(denoiser, x_T, torch.Generator().manual_seed(4))
    assert torch.equal(first, DDPM(10).sample(denoiser, x_T, torch.Generator().manual_seed(4)))
    assert not torch.equal(first, DDPM(10).sample(denoiser, x_T, torch.Generator().manual_seed(5)))


LOOK_ONCE = {name: make for name, make in SAMPLERS.items() if not name.startswith("heun")}


@pytest.mark.parametrize("make", LOOK_ONCE.values(), ids=LOOK_ONCE)
def test_steps_yields_every_moment_and_passes_its_estimate_on(make):
    schedule, net = schedules.linear(30), Spy()
    denoiser, x_T = affine_denoiser(schedule, net=net), normal(2, 1, 4, 4)
    moments = list(make(6).steps(denoiser, x_T, torch.Generator().manual_seed(1)))
    assert [moment.t for moment in moments] == [30, 25, 20, 15, 10, 5, 0]
    assert torch.equal(moments[0].x, x_T)
    assert torch.equal(moments[-1].x, moments[-1].x0)
    assert [call.clock.tolist() for call in net.calls] == [[t - 1] * 2 for t in (30, 25, 20, 15, 10, 5)]
    assert net.calls[0].self_cond is None
    for call, earlier, now in zip(net.calls[1:], moments[:-2], moments[1:-1], strict=True):
        assert torch.equal(call.self_cond, earlier.x0)
        assert torch.equal(call.x, now.x)
        assert torch.equal(now.x0, denoiser(now.x, torch.full((2,), now.t), earlier.x0).x0)
    sampled = make(6).sample(denoiser, x_T, torch.Generator().manual_seed(1))
    assert torch.equal(sampled, moments[-1].x)


def test_sampling_makes_no_graph_and_leaves_the_callers_gradient_mode_alone():
    denoiser = affine_denoiser(schedules.linear(5), net=Affine())
    for moment in DDIM(5).steps(denoiser, normal(1, 1, 4, 4)):
        assert not moment.x.requires_grad
        assert not moment.x0.requires_grad
        assert torch.is_grad_enabled()


class LooksBack(DDIM):
    """Notes the times it was at before each step."""

    looks_back = 2

    def step(self, here: Here) -> Tensor:
        assert all(past.past == () for past in here.past)
        self.seen.append([past.t for past in here.past])
        return super().step(here)


def test_a_multistep_sampler_sees_as_many_steps_back_as_it_wants():
    sampler = LooksBack(5)
    sampler.seen = []
    sampler.sample(affine_denoiser(schedules.linear(50)), normal(2, 1, 4, 4))
    assert sampler.seen == [[], [50], [40, 50], [30, 40], [20, 30]]
