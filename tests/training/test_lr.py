from itertools import pairwise

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from litdiffusion.training.lr import constant, warmup_cosine


def rates(make, steps: int, lr: float = 0.2) -> list[float]:
    """The rate of each optimizer step, as a training loop meets it."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler = make(optimizer)
    assert isinstance(scheduler, LambdaLR)
    met = []
    for _ in range(steps):
        met.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return met


def test_constant_is_constant():
    assert rates(constant, 4) == [0.2] * 4


def test_warm_up_rises_from_above_0_to_the_whole_rate():
    met = rates(lambda optimizer: constant(optimizer, warmup_steps=4), 7)
    assert met == pytest.approx([0.2 * n / 5 for n in (1, 2, 3, 4, 5, 5, 5)])


@pytest.mark.parametrize("final_factor", [0.0, 0.1])
def test_cosine_at_its_key_steps(final_factor):
    met = rates(lambda o: warmup_cosine(o, 24, warmup_steps=4, final_factor=final_factor), 30, lr=1.0)
    assert met[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert met[14] == pytest.approx((1 + final_factor) / 2)  # half way from step 4 to step 24
    assert met[9] == pytest.approx(final_factor + (1 - final_factor) * (1 + 0.5**0.5) / 2)
    assert met[24:] == pytest.approx([final_factor] * 6)
    assert all(later < earlier for earlier, later in pairwise(met[4:25]))


def test_cosine_without_warm_up_starts_at_the_whole_rate():
    assert rates(lambda optimizer: warmup_cosine(optimizer, 10), 1) == [0.2]


@pytest.mark.parametrize("warmup_steps", [5, 10, 1000])
def test_a_warm_up_takes_at_most_half_of_the_run(warmup_steps):
    met = rates(lambda optimizer: warmup_cosine(optimizer, 10, warmup_steps=warmup_steps), 12, lr=1.0)
    assert met[:6] == pytest.approx([n / 6 for n in range(1, 7)])
    assert met[10:] == pytest.approx([0, 0])


def test_a_run_of_one_step_takes_it_at_the_whole_rate():
    assert rates(lambda optimizer: warmup_cosine(optimizer, 1, warmup_steps=500), 1) == [0.2]
