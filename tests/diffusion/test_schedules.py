import copy
import math
from collections.abc import Iterator
from functools import partial
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from litdiffusion.diffusion import DDIM, EDM, X0, Schedule, q_sample, schedules
from peers import blog
from small_worlds import ALL_SCHEDULES, CONTINUOUS, SCHEDULES, GaussianData, draws, exact_denoiser, normal

T = torch.tensor([0.01, 0.1, 0.123, 0.4, 0.5, 0.77, 0.95], dtype=torch.float64)
VARIANCE_PRESERVING = {name: make for name, make in ALL_SCHEDULES.items() if name not in ("flow", "ve")}


@pytest.fixture
def float64_by_default() -> Iterator[None]:
    """The blog computes in the default precision."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def table(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def in_steps(num_steps: int) -> Tensor:
    """i / T for i = 1..T."""
    return torch.linspace(0, 1, num_steps + 1, dtype=torch.float64)[1:]


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
    schedule = schedules.Flow(num_steps=num_steps)
    wanted = in_steps(num_steps)
    torch.testing.assert_close(schedule.sigma(wanted), wanted, rtol=1e-15, atol=0)
    torch.testing.assert_close(schedule.alpha(wanted), 1 - wanted, rtol=1e-12, atol=0)
    torch.testing.assert_close(schedule.log_snr(T), ((1 - T) / T).square().log(), rtol=1e-12, atol=1e-12)
    assert schedule.has_zero_terminal_snr
    # Its views are those of the variance-preserving schedule with the same signal-to-noise ratios.
    snr = ((1 - wanted) / wanted).square()
    torch.testing.assert_close(schedule.alphas_cumprod, snr / (1 + snr))


@pytest.mark.parametrize(("beta_min", "beta_max"), [(0.1, 20.0), (0.0, 7.0), (1.0, 3.0)])
def test_vp_linear_is_the_integral_of_its_betas(beta_min, beta_max):
    schedule = schedules.VPLinear(beta_min, beta_max, num_steps=50)
    alphas_cumprod = torch.exp(-(beta_min * T + (beta_max - beta_min) * T**2 / 2))
    torch.testing.assert_close(schedule.alpha(T).square(), alphas_cumprod, rtol=1e-12, atol=0)
    torch.testing.assert_close(schedule.sigma(T).square(), 1 - alphas_cumprod, rtol=1e-9, atol=0)
    torch.testing.assert_close(schedule.alphas_cumprod, schedule.alpha(in_steps(50)).square())


def test_vp_linear_is_the_limit_of_linear():
    """With ever more steps, beta_1 and beta_T times T held at 0.1 and 20."""
    limit, fine = schedules.VPLinear().alpha(T), schedules.linear(100_000).alpha(T)
    coarse = schedules.linear(1000).alpha(T)
    assert float((fine / limit - 1).abs().max()) < 2e-3
    assert float((fine / limit - 1).abs().max()) < float((coarse / limit - 1).abs().max()) / 50


@pytest.mark.parametrize(("low", "high"), [(-15.0, 15.0), (-4.0, 9.0)])
def test_vp_cosine_is_a_cosine_between_its_bounds(low, high):
    schedule = schedules.VPCosine(low, high)
    start, end = math.atan(math.exp(-high / 2)), math.atan(math.exp(-low / 2))
    torch.testing.assert_close(schedule.alpha(T), (start + T * (end - start)).cos(), rtol=1e-9, atol=0)
    torch.testing.assert_close(schedule.sigma(T), (start + T * (end - start)).sin(), rtol=1e-9, atol=0)
    ends = schedule.log_snr(table(1e-12, 1.0))
    torch.testing.assert_close(ends, table(high, low), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("low", "high", "rho"), [(0.002, 80.0, 7.0), (0.01, 50.0, 1.0), (0.1, 3.0, 3.0)])
def test_ve_is_edms(low, high, rho):
    """Karras et al., 2206.00364, equation 5, whose step 0 is t = 1 here, and N - 1 of whose steps lead to t = 0."""
    schedule = schedules.VE(low, high, rho, num_steps=1)
    theirs = [(high ** (1 / rho) + i / 50 * (low ** (1 / rho) - high ** (1 / rho))) ** rho for i in range(50)]
    torch.testing.assert_close(schedule.sigma(1 - torch.arange(50).double() / 50), table(*theirs))
    assert bool((schedule.alpha(T) == 1).all())
    assert schedule.at(1.0) == (1, pytest.approx(high, rel=1e-12))
    assert schedule.init_noise_sigma == pytest.approx(math.hypot(1, high))
    assert not schedule.has_zero_terminal_snr
    assert float(schedule.alphas_cumprod[-1]) == pytest.approx(1 / (1 + high**2))


@pytest.mark.parametrize("name", ALL_SCHEDULES)
def test_log_snr_is_the_logarithm_of_the_ratio(name):
    """However a schedule writes it."""
    schedule = ALL_SCHEDULES[name](num_steps=60)
    snr = (schedule.alpha(T) / schedule.sigma(T)).square()
    torch.testing.assert_close(schedule.log_snr(T), snr.log(), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ALL_SCHEDULES)
def test_time_of_is_the_inverse_of_log_snr(name):
    """By bisection, and by the formula of a schedule that has one; the time nearest in (0, 1], if there is none."""
    schedule = ALL_SCHEDULES[name](num_steps=60)
    log_snr = schedule.log_snr(T)
    for time_of in (schedule.time_of, partial(Schedule.time_of, schedule)):
        torch.testing.assert_close(time_of(log_snr), T, rtol=0, atol=1e-9)
        below, above = time_of(table(-math.inf, -1e3, 1e4, 1e30)).view(2, 2)
        assert below.tolist() == pytest.approx([1, 1], abs=1e-9)
        assert bool(((above > 0) & (above < 1e-6)).all())
    assert float(schedule.time_of(log_snr[3])) == pytest.approx(float(T[3]), abs=1e-9)  # of any shape


@given(data=st.data(), num_steps=st.integers(1, 3000))
def test_a_discrete_schedule_is_its_table_to_the_bit(data, num_steps):
    """However i / T is computed, and for a number as for a tensor."""
    generator = torch.Generator().manual_seed(num_steps)
    alphas_cumprod = (
        torch.rand(num_steps, generator=generator, dtype=torch.float64).sort(descending=True).values
    )
    schedule, wanted = schedules.Discrete(alphas_cumprod), alphas_cumprod.sqrt()
    steps = torch.arange(1, num_steps + 1).double()
    for t in (steps / num_steps, steps * (1 / num_steps), in_steps(num_steps)):
        assert torch.equal(schedule.alpha(t), wanted)
    i = data.draw(st.integers(1, num_steps))
    alpha, sigma = schedule.at(i / num_steps)
    assert (alpha, sigma) == (float(wanted[i - 1]), float((1 - wanted[i - 1] ** 2).sqrt()))
    assert torch.equal(schedule.previous(steps / num_steps), (steps - 1) / num_steps)


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@given(
    times=st.lists(st.floats(1e-4, 1), min_size=2, max_size=20, unique=True),
    name=st.sampled_from(sorted(SCHEDULES)),
)
def test_between_its_steps_a_discrete_schedule_is_monotone(name, times, zero_terminal_snr):
    schedule = SCHEDULES[name](7, zero_terminal_snr=zero_terminal_snr)
    t = table(*sorted(times))
    assert bool((schedule.alpha(t).diff() <= 0).all())
    assert bool((schedule.sigma(t).diff() >= 0).all())
    inside = torch.cat((in_steps(7)[:-1] + 1e-12, in_steps(7)[1:] - 1e-12))
    nearest = (inside * 7).round() / 7  # and it is continuous
    torch.testing.assert_close(schedule.alpha(inside), schedule.alpha(nearest), rtol=0, atol=1e-9)


def test_between_its_steps_the_log_snr_is_interpolated():
    schedule = schedules.Discrete(table(0.9, 0.5, 0.0))
    log_snr = (table(0.9, 0.5) / table(0.1, 0.5)).log()
    assert float(schedule.log_snr(table(1.25 / 3))) == pytest.approx(float(log_snr @ table(0.75, 0.25)))
    # No line leads to an infinite log-SNR: there, sigma^2 and alpha are straight.
    assert float(schedule.sigma(table(0.25 / 3))) ** 2 == pytest.approx(0.25 * 0.1)
    assert float(schedule.alpha(table(2.25 / 3))) == pytest.approx(0.75 * 0.5**0.5)


@pytest.mark.parametrize("name", ALL_SCHEDULES)
def test_uniform_numbers_become_the_times_a_network_is_trained_at(name):
    """Of a discrete schedule each of the times i / T as often as any other, of a continuous one the number itself."""
    schedule = ALL_SCHEDULES[name](num_steps=6)
    u = torch.arange(24).double() / 24
    t = schedule.trained_time(u)
    if schedule.discrete:
        assert t.tolist() == pytest.approx(in_steps(6).repeat_interleave(4).tolist(), rel=1e-15)
    else:
        assert torch.equal(t[1:], u[1:])
        assert 0 < float(t[0]) < 1e-6


class Geometric(Schedule):
    """What a user may write: NCSN's geometric noise, as alpha and sigma alone (Song & Ermon, 2006.09011)."""

    low, high = 0.01, 30.0

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        return self.low * (self.high / self.low) ** t


def test_a_schedule_needs_no_more_than_alpha_and_sigma():
    schedule, ratio = Geometric(num_steps=40), 3000.0
    x0, eps, t = normal(3, 1, 2, 2, seed=1), normal(3, 1, 2, 2), table(0.25, 0.5, 1.0)
    sigma = (0.01 * ratio**t)[:, None, None, None].float()
    torch.testing.assert_close(q_sample(schedule, x0, t, eps), x0 + sigma * eps)
    torch.testing.assert_close(
        schedule.time_of(-2 * table(0.05, 1.0, 29.0).log()), (table(5, 100, 2900)).log() / math.log(ratio)
    )
    assert schedule.init_noise_sigma == pytest.approx(math.hypot(1, 30))
    for spacing, wanted in [
        ("uniform", [1, 0.75, 0.5, 0.25, 0]),
        ("log_snr", [1, 2 / 3, 1 / 3, 0, 0]),
        ("karras", None),
    ]:
        times = DDIM(4, spacing=spacing).times(schedule)
        assert times[0] == 1
        assert times[-1] == 0
        if wanted is not None:
            assert times == pytest.approx(wanted, abs=1e-9)
    k = [schedule.at(t)[1] ** (1 / 7) for t in times[:-1]]
    assert [a - b for a, b in pairwise(k)] == pytest.approx([(k[0] - k[-1]) / 3] * 3)

    data = GaussianData(schedule)
    x_T = schedule.init_noise_sigma * normal(4, 1, 1, 1, dtype=torch.float64)
    for target in (X0(), EDM()):
        drawn = DDIM(400).sample(exact_denoiser(data, target), x_T, draws(4))
        torch.testing.assert_close(drawn, data.flow_to_image(x_T), rtol=0, atol=0.02)


def test_sigmoid_is_symmetric():
    alphas_cumprod = schedules.sigmoid(10).alphas_cumprod
    assert float(alphas_cumprod[4]) == pytest.approx(0.5, abs=1e-15)
    torch.testing.assert_close(alphas_cumprod[:4], (1 - alphas_cumprod[5:9]).flip(0))


@pytest.mark.parametrize("make", VARIANCE_PRESERVING.values(), ids=VARIANCE_PRESERVING)
def test_views_agree_with_their_definitions(make):
    schedule, t = make(num_steps=60), in_steps(60)
    betas, alphas_cumprod, log_snr = schedule.betas, schedule.alphas_cumprod, schedule.log_snr(t)
    assert schedule.num_steps == 60 == len(betas) == len(alphas_cumprod)
    assert betas.dtype == alphas_cumprod.dtype == log_snr.dtype == torch.float64
    torch.testing.assert_close((1 - betas).cumprod(0), alphas_cumprod, rtol=1e-10, atol=1e-15)
    torch.testing.assert_close(log_snr, (alphas_cumprod / (1 - alphas_cumprod)).log(), rtol=1e-8, atol=1e-10)
    alpha, sigma = schedule.at(torch.cat((table(0), t)))
    torch.testing.assert_close((alpha**2 + sigma**2).flatten(), torch.ones(61, dtype=torch.float64))


@pytest.mark.parametrize("name", ALL_SCHEDULES)
def test_at_gives_one_number_for_a_time_and_one_of_each_image_for_times(name):
    """The same ones, in float64; at the clean image 1 and 0, whatever the functions' limits are."""
    schedule, t = ALL_SCHEDULES[name](num_steps=10), table(0, 0.1, 0.237, 1)
    alpha, sigma = schedule.at(t)
    assert alpha.shape == sigma.shape == (4, 1, 1, 1)
    assert alpha.dtype == sigma.dtype == torch.float64
    assert schedule.at(0.0) == (1, 0)
    for i, time in enumerate(t.tolist()):
        assert schedule.at(time) == (float(alpha[i]), float(sigma[i]))
    torch.testing.assert_close(alpha[1:].flatten(), schedule.alpha(t[1:]), rtol=0, atol=0)
    torch.testing.assert_close(sigma[1:].flatten(), schedule.sigma(t[1:]), rtol=0, atol=0)


@given(name=st.sampled_from(sorted(ALL_SCHEDULES)), num_steps=st.integers(1, 3000))
def test_snr_falls_at_every_step_for_any_number_of_steps(name, num_steps):
    schedule = ALL_SCHEDULES[name](num_steps=num_steps)
    assert schedule.num_steps == num_steps
    t = torch.cat((table(0), in_steps(num_steps)))
    alpha, sigma = (number.flatten() for number in schedule.at(t))
    assert (float(alpha[0]), float(sigma[0])) == (1, 0)
    assert bool((schedule.log_snr(t[1:]).diff() < 0).all())
    assert bool((alpha.diff() < 0).all()) or name == "ve"
    assert bool((sigma.diff() >= 0).all())  # close to 1, float64 cannot tell neighbours apart


@pytest.mark.parametrize("make", SCHEDULES.values(), ids=SCHEDULES)
def test_zero_terminal_snr_is_exact_and_leaves_the_first_step(make):
    plain, shifted, t = make(50), make(50, zero_terminal_snr=True), in_steps(50)
    assert shifted.has_zero_terminal_snr
    assert not plain.has_zero_terminal_snr
    assert shifted.at(1.0) == (0, 1)
    assert float(shifted.log_snr(table(1.0))) == -math.inf
    assert shifted.at(1 / 50) == pytest.approx(plain.at(1 / 50), rel=1e-15)
    # Between the two it is a shift and a scale of sqrt(alpha_bar) (Lin et al., algorithm 1).
    a1, aT = plain.at(1 / 50)[0], plain.at(1.0)[0]
    torch.testing.assert_close(shifted.alpha(t), (plain.alpha(t) - aT) * a1 / (a1 - aT))


@pytest.mark.parametrize(
    "change", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.float(), copy.deepcopy]
)
@pytest.mark.parametrize("name", ["cosine", *CONTINUOUS])
def test_schedules_keep_their_precision(name, change):
    plain = ALL_SCHEDULES[name](num_steps=30)
    changed = change(torch.nn.ModuleDict({"schedule": ALL_SCHEDULES[name](num_steps=30)}))["schedule"]
    assert all(table.dtype == torch.float64 for table in changed.buffers())
    for found, wanted in zip(changed.at(T), plain.at(T), strict=True):
        assert torch.equal(found, wanted)


def test_the_numbers_at_a_time_are_on_the_host_and_those_of_times_where_the_times_are():
    plain = schedules.cosine(30, zero_terminal_snr=True)
    moved = torch.nn.ModuleDict({"schedule": copy.deepcopy(plain)}).to("meta")["schedule"]
    assert [moved.at(i / 30) for i in range(31)] == [plain.at(i / 30) for i in range(31)]
    assert torch.equal(moved.log_snr(T), plain.log_snr(T))
    assert moved.has_zero_terminal_snr
    assert moved.init_noise_sigma == plain.init_noise_sigma
    assert moved.table.dtype == torch.float64
    for number in moved.at(T.to("meta")):
        assert (number.device.type, number.dtype, number.shape) == ("meta", torch.float64, (len(T), 1, 1, 1))


def test_tables_are_no_part_of_a_checkpoint():
    assert schedules.linear(10).state_dict() == {}


def test_from_betas_multiplies():
    schedule = schedules.from_betas(table(0.1, 0.2, 0.5))
    torch.testing.assert_close(schedule.alphas_cumprod, table(0.9, 0.72, 0.36))
    torch.testing.assert_close(schedule.alpha(in_steps(3)), table(0.9**0.5, 0.72**0.5, 0.6))
    torch.testing.assert_close(schedule.sigma(in_steps(3)), table(0.1**0.5, 0.28**0.5, 0.8))


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
        (lambda: schedules.Discrete(table()), "at least 1"),
        (lambda: schedules.Discrete(table(0.5, 0.6)), "must fall"),
        (lambda: schedules.Discrete(table(0.5, 0.5)), "must fall"),
        (lambda: schedules.Discrete(table(1, 0.5)), "must fall"),
        (lambda: schedules.Discrete(table(0.5, math.nan)), "must fall"),
        (lambda: schedules.Discrete(table(0.5, -0.1)), "must fall"),
        (lambda: schedules.VPLinear(beta_min=-0.1), "beta_min=-0.1"),
        (lambda: schedules.VPLinear(3.0, 3.0), "beta_max=3.0"),
        (lambda: schedules.VPCosine(2.0, 1.0), "log_snr_min=2.0"),
        (lambda: schedules.VE(sigma_min=0.0), "sigma_min=0.0"),
        (lambda: schedules.VE(2.0, 1.0), "sigma_max=1.0"),
        (lambda: schedules.VE(rho=0.0), "rho=0.0"),
        *((partial(kind, num_steps=0), "at least 1 step") for kind in CONTINUOUS.values()),
    ],
)
def test_impossible_schedules_are_refused_in_one_line(make, message):
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ALL_SCHEDULES)
@pytest.mark.parametrize("num_steps", [1, 7, 300])
def test_sampling_begins_with_standard_noise_on_every_schedule_but_the_variance_exploding(name, num_steps):
    size = math.hypot(1, 80) if name == "ve" else 1
    assert ALL_SCHEDULES[name](num_steps=num_steps).init_noise_sigma == pytest.approx(size, rel=1e-15)
