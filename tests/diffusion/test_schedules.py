import copy
import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from litdiffusion.diffusion import Schedule, schedules
from peers import blog
from small_worlds import ALL_SCHEDULES, SCHEDULES


@pytest.fixture
def float64_by_default() -> Iterator[None]:
    """The blog computes in the default precision."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def table(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.usefixtures("float64_by_default")
@pytest.mark.parametrize("num_steps", [2, 300, 1000])
@pytest.mark.parametrize(
    ("ours", "theirs", "arguments"),
    [
        (schedules.linear, blog.linear_betas, {"rescale": False}),
        (schedules.quadratic, blog.quadratic_betas, {"rescale": False}),
        (schedules.sigmoid_beta, blog.sigmoid_betas, {"rescale": False}),
        (schedules.cosine, blog.cosine_betas, {"beta_min": 1e-4, "beta_max": 0.9999}),
    ],
)
def test_betas_are_the_blogs(ours, theirs, arguments, num_steps):
    torch.testing.assert_close(ours(num_steps, **arguments).betas, theirs(num_steps), rtol=1e-10, atol=1e-14)


def test_the_blogs_last_step_is_short_of_noise_and_rescaling_mends_it():
    assert float(schedules.linear(300, rescale=False).alphas_cumprod[-1]) == pytest.approx(0.048, abs=5e-4)
    assert float(schedules.linear(300).alphas_cumprod[-1]) == pytest.approx(3.4e-5, abs=5e-7)
    # DDPM's own setting, where rescaling changes nothing.
    ddpm = schedules.linear(1000, rescale=False).alphas_cumprod
    assert float(ddpm[-1]) == pytest.approx(4.0358e-5, rel=1e-4)
    assert torch.equal(schedules.linear(1000).alphas_cumprod, ddpm)


@pytest.mark.parametrize("make", [schedules.linear, schedules.quadratic, schedules.sigmoid_beta])
def test_rescaling_multiplies_the_betas_by_1000_over_num_steps(make):
    plain, rescaled = make(250, rescale=False).betas, make(250).betas
    torch.testing.assert_close(rescaled, 4 * plain, rtol=1e-9, atol=0)
    assert float(make(5).betas.max()) == pytest.approx(0.999)  # 0.02 * 200 would be a variance of 4


def test_cosine_is_improved_ddpms():
    T, s = 1000, 0.008

    def f(t: int) -> float:
        return math.cos((t / T + s) / (1 + s) * math.pi / 2) ** 2

    schedule = schedules.cosine(T)
    betas = [min(1 - f(t) / f(t - 1), 0.999) for t in range(1, T + 1)]
    torch.testing.assert_close(schedule.betas, table(*betas), rtol=1e-9, atol=1e-13)
    unclipped = [f(t) / f(0) for t in range(1, T)]
    torch.testing.assert_close(schedule.alphas_cumprod[:-1], table(*unclipped), rtol=1e-9, atol=0)
    assert float(schedule.betas[-1]) == pytest.approx(0.999)
    assert float(schedule.betas[0]) < 1e-4  # no floor: the blog's is 1e-4


@pytest.mark.parametrize(("start", "end", "tau"), [(-3.0, 3.0, 1.0), (-3.0, 3.0, 0.7), (0.0, 3.0, 0.3)])
def test_sigmoid_is_jabris(start, end, tau):
    T = 40

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    alphas_cumprod = schedules.sigmoid(T, start, end, tau).alphas_cumprod
    for t in (1, 10, 20, 39):
        numerator = sigmoid(end / tau) - sigmoid((t / T * (end - start) + start) / tau)
        expected = numerator / (sigmoid(end / tau) - sigmoid(start / tau))
        assert float(alphas_cumprod[t - 1]) == pytest.approx(expected, rel=1e-12)
    assert float(alphas_cumprod[-1]) == pytest.approx(1e-9)  # the paper's floor


@pytest.mark.parametrize("num_steps", [1, 4, 1000])
def test_flow_is_the_straight_path_to_pure_noise(num_steps):
    schedule = schedules.flow(num_steps)
    wanted = table(*(t / num_steps for t in range(num_steps + 1)))
    torch.testing.assert_close(schedule.sigma, wanted, rtol=1e-15, atol=0)
    torch.testing.assert_close(schedule.alpha, 1 - wanted, rtol=1e-12, atol=0)
    assert schedule.has_zero_terminal_snr
    # Its views are those of the variance-preserving schedule with the same signal-to-noise ratios.
    snr = ((1 - wanted[1:]) / wanted[1:]).square()
    torch.testing.assert_close(schedule.alphas_cumprod, snr / (1 + snr))


def test_sigmoid_is_symmetric():
    alphas_cumprod = schedules.sigmoid(10).alphas_cumprod
    assert float(alphas_cumprod[4]) == pytest.approx(0.5, abs=1e-15)
    torch.testing.assert_close(alphas_cumprod[:4], (1 - alphas_cumprod[5:9]).flip(0))


@pytest.mark.parametrize("make", SCHEDULES.values(), ids=SCHEDULES)
def test_views_agree_with_their_definitions(make):
    schedule = make(60)
    betas, alphas_cumprod = schedule.betas, schedule.alphas_cumprod
    assert schedule.num_steps == 60 == len(betas) == len(alphas_cumprod) == len(schedule.log_snr)
    assert betas.dtype == alphas_cumprod.dtype == schedule.log_snr.dtype == torch.float64
    torch.testing.assert_close((1 - betas).cumprod(0), alphas_cumprod, rtol=1e-10, atol=1e-15)
    torch.testing.assert_close(
        schedule.log_snr, (alphas_cumprod / (1 - alphas_cumprod)).log(), rtol=1e-8, atol=1e-10
    )
    torch.testing.assert_close(schedule.alpha**2 + schedule.sigma**2, torch.ones(61, dtype=torch.float64))


def test_at_gives_one_number_per_image_in_float32():
    schedule = schedules.linear(10)
    alpha, sigma = schedule.at(torch.tensor([0, 1, 10]))
    assert alpha.shape == sigma.shape == (3, 1, 1, 1)
    assert alpha.dtype == sigma.dtype == torch.float32
    assert alpha[0] == 1
    assert sigma[0] == 0
    assert float(alpha[1]) == pytest.approx(float((1 - schedule.betas[0]).sqrt()), rel=1e-6)
    assert float(sigma[2]) == pytest.approx(float((1 - schedule.alphas_cumprod[-1]).sqrt()), rel=1e-6)


@given(name=st.sampled_from(sorted(SCHEDULES)), num_steps=st.integers(1, 3000))
def test_snr_falls_at_every_step_for_any_number_of_steps(name, num_steps):
    schedule = SCHEDULES[name](num_steps)
    assert schedule.num_steps == num_steps
    assert schedule.alpha[0] == 1
    assert schedule.sigma[0] == 0
    assert bool((schedule.log_snr.diff() < 0).all())
    assert bool((schedule.alpha.diff() < 0).all())
    assert bool((schedule.sigma.diff() >= 0).all())  # close to 1, float64 cannot tell neighbours apart


@pytest.mark.parametrize("make", SCHEDULES.values(), ids=SCHEDULES)
def test_zero_terminal_snr_is_exact_and_leaves_the_first_step(make):
    plain, shifted = make(50), make(50, zero_terminal_snr=True)
    assert shifted.has_zero_terminal_snr
    assert not plain.has_zero_terminal_snr
    assert shifted.alpha[-1] == 0
    assert shifted.sigma[-1] == 1
    assert shifted.log_snr[-1] == -math.inf
    torch.testing.assert_close(shifted.alpha[:2], plain.alpha[:2], rtol=1e-15, atol=0)
    # Between the two it is a shift and a scale of sqrt(alpha_bar) (Lin et al., algorithm 1).
    a1, aT = plain.alpha[1], plain.alpha[-1]
    torch.testing.assert_close(shifted.alpha[1:], (plain.alpha[1:] - aT) * a1 / (a1 - aT))


@pytest.mark.parametrize(
    "change", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.float(), copy.deepcopy]
)
def test_tables_keep_their_precision(change):
    plain = schedules.cosine(30)
    changed = change(torch.nn.ModuleDict({"schedule": schedules.cosine(30)}))["schedule"]
    assert changed.alpha.dtype == changed.sigma.dtype == torch.float64
    assert torch.equal(changed.alpha, plain.alpha)
    assert torch.equal(changed.sigma, plain.sigma)


def test_tables_follow_the_device():
    moved = torch.nn.ModuleDict({"schedule": schedules.cosine(30)}).to("meta")["schedule"]
    assert moved.alpha.device.type == moved.sigma.device.type == "meta"
    assert moved.alpha.dtype == torch.float64


def test_the_numbers_at_a_time_are_on_the_host_wherever_the_tables_are():
    plain = schedules.cosine(30, zero_terminal_snr=True)
    moved = copy.deepcopy(plain).to("meta")
    numbers = list(zip(plain.alpha.tolist(), plain.sigma.tolist(), strict=True))
    assert [moved.at_time(t) for t in range(31)] == numbers
    assert torch.equal(moved.host_log_snr, plain.log_snr)
    assert moved.has_zero_terminal_snr
    assert moved.terminal_std == plain.terminal_std


def test_tables_are_no_part_of_a_checkpoint():
    assert schedules.linear(10).state_dict() == {}


def test_from_betas_multiplies():
    schedule = schedules.from_betas(table(0.1, 0.2, 0.5))
    torch.testing.assert_close(schedule.alphas_cumprod, table(0.9, 0.72, 0.36))
    torch.testing.assert_close(schedule.alpha, table(1, 0.9**0.5, 0.72**0.5, 0.6))
    torch.testing.assert_close(schedule.sigma, table(0, 0.1**0.5, 0.28**0.5, 0.8))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: schedules.linear(0), "at least 1 step"),
        (lambda: schedules.cosine(-3), "at least 1 step"),
        (lambda: schedules.sigmoid(0), "at least 1 step"),
        (lambda: schedules.linear(10, beta_start=0.0), r"every beta must lie in \(0, 1\)"),
        (lambda: schedules.linear(10, beta_start=-0.1), r"every beta must lie in \(0, 1\)"),
        (lambda: schedules.linear(10, beta_end=1.0, rescale=False), r"every beta must lie in \(0, 1\)"),
        (lambda: schedules.quadratic(10, beta_start=-0.1), "beta_start"),
        (lambda: schedules.cosine(10, beta_max=1.0), r"every beta must lie in \(0, 1\)"),
        (lambda: schedules.cosine(10, s=-1.0), r"every beta must lie in \(0, 1\)"),
        (lambda: schedules.sigmoid(10, tau=0.0), "tau"),
        (lambda: schedules.sigmoid(10, start=3.0, end=-3.0), "start"),
        (lambda: schedules.sigmoid(10, start=1.0, end=1.0), "start"),
        (lambda: schedules.linear(1, zero_terminal_snr=True), "zero_terminal_snr.*at least 2"),
        (lambda: Schedule(table(1), table(0)), "at least 1"),
        (lambda: Schedule(table(0.9, 0.5), table(0, 0.5)), "clean image"),
        (lambda: Schedule(table(1, 0.5), table(0.1, 0.5)), "clean image"),
        (lambda: Schedule(table(1, 0.5, 0.6), table(0, 0.5, 0.5)), "must fall"),
        (lambda: Schedule(table(1, 0.5, 0.5), table(0, 0.5, 0.5)), "must fall"),
        (lambda: Schedule(table(1, math.nan), table(0, 0.5)), "must fall"),
        (lambda: Schedule(table(1, 0.5), table(0, 0)), "must fall"),
        (lambda: Schedule(table(1, 0.9, -0.5), table(0, 0.5, 0.8)), "negative"),
        (lambda: Schedule(table(1, 0.9), table(0, -0.5)), "negative"),
    ],
)
def test_impossible_schedules_are_refused_in_one_line(make, message):
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("make", ALL_SCHEDULES.values(), ids=ALL_SCHEDULES)
@pytest.mark.parametrize("num_steps", [1, 7, 300])
def test_sampling_begins_with_standard_noise_on_every_schedule_of_ours(make, num_steps):
    assert make(num_steps).terminal_std == pytest.approx(1, abs=1e-15)
