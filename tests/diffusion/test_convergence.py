"""On Gaussian data the probability flow has a closed form: samplers show the order that their papers claim."""

import pytest
import torch
from torch import Tensor

from litdiffusion.diffusion import (
    DDIM,
    Denoiser,
    DPMSolverPP2M,
    Estimate,
    Heun,
    Sampler,
    SamplerState,
    schedules,
    transition,
)
from small_worlds import CONTINUOUS, TARGETS, GaussianData, draws, exact_denoiser

pytestmark = pytest.mark.usefixtures("one_thread")

FINE = 8000  # steps so fine that rounding times to them does not show
X_T = torch.linspace(-2, 2, 5, dtype=torch.float64)[:, None, None, None]
SCHEDULES = {
    "cosine": schedules.cosine(FINE),
    "linear": schedules.linear(FINE),
    "flow": schedules.Flow(),
    "ve": schedules.VE(),
    "vp_cosine": schedules.VPCosine(),
}

# Where the flow is smooth in the spacing's own variable: then the order shows from a few dozen steps on.
SMOOTH = [
    ("cosine", "log_snr"),
    ("linear", "log_snr"),
    ("linear", "quadratic"),
    ("flow", "log_snr"),
    ("ve", "log_snr"),
    ("vp_cosine", "log_snr"),
]
# And where, moreover, the last step is short.
KARRAS = ["flow", "ve", "vp_cosine"]


class ExactDenoiser(Denoiser):
    """E[x_0 | x_t] itself, at times in float64: a network's clock is in float32."""

    def __init__(self, data: GaussianData) -> None:
        super().__init__()
        self.data, self.schedule = data, data.schedule
        self.image_shape, self.num_classes = (1, 1, 1), None
        self.self_condition = self.learned_variance = False
        self.calls = 0

    def forward(self, x_t: Tensor, t: float, self_cond: object = None, labels: object = None) -> Estimate:
        self.calls += 1
        return self.data.estimate(x_t, t)

    @property
    def core(self) -> Denoiser:
        return self

    def with_core(self, change) -> Denoiser:
        return change(self)


def error(sampler: Sampler, data: GaussianData) -> float:
    x_T = data.schedule.init_noise_sigma * X_T
    drawn = sampler.sample(ExactDenoiser(data), x_T, draws(5))
    return float((drawn - data.flow_to_image(x_T)).abs().max())


def orders(make: type[Sampler], data: GaussianData, spacing: str, num_steps: tuple[int, ...]) -> Tensor:
    """How many halvings of the error each doubling of the steps brings."""
    errors = torch.tensor([error(make(count, spacing=spacing), data) for count in num_steps])
    return errors.log2().diff().neg()


@pytest.mark.parametrize(("make", "order"), [(DDIM, 1), (Heun, 2), (DPMSolverPP2M, 2)])
@pytest.mark.parametrize(("name", "spacing"), SMOOTH)
def test_the_error_falls_with_the_order_of_the_method(name, spacing, make, order):
    early, late = orders(make, GaussianData(SCHEDULES[name]), spacing, (25, 50, 100)).tolist()
    assert early == pytest.approx(order, abs=0.3)
    assert late == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("name", ["cosine", "flow", "linear", "vp_cosine"])
@pytest.mark.parametrize("spacing", ["uniform", "quadratic"])
def test_ddim_is_of_first_order_with_every_spacing(name, spacing):
    found = orders(DDIM, GaussianData(SCHEDULES[name]), spacing, (25, 50))
    assert float(found) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("make", [Heun, DPMSolverPP2M])
@pytest.mark.parametrize("name", KARRAS)
def test_karras_spacing_shows_the_second_order(name, make):
    """Its last step, from sigma = 0.002, has an error of its own, but a small one."""
    early, late = orders(make, GaussianData(SCHEDULES[name]), "karras", (20, 40, 80)).tolist()
    assert early > 1.6
    assert late > 1.6


@pytest.mark.parametrize("name", ["cosine", "flow", "linear"])
@pytest.mark.parametrize("spacing", ["uniform", "quadratic"])
def test_second_order_is_worth_its_name(name, spacing):
    """With as many looks at the network, both methods are much closer than DDIM."""
    data = GaussianData(SCHEDULES[name])
    first = error(DDIM(60, spacing=spacing), data)
    assert error(Heun(30, spacing=spacing), data) < first / 2
    assert error(DPMSolverPP2M(60, spacing=spacing), data) < first / 5


class Midpoint(Sampler):
    """The midpoint method, as an outsider would write it: with k = sigma / alpha, d(x / alpha) / dk = eps.

    The first step from pure noise, where alpha is 0, and the last, at whose end there is no eps, are DDIM's.
    """

    def step(self, state: SamplerState) -> Tensor:
        t, s = state.t, state.s
        middle = (t + s) / 2
        half, whole = transition(state.schedule, t, middle), transition(state.schedule, t, s)
        if s == 0 or whole.a == 0:
            return whole.alpha_s * state.estimate.x0 + whole.sigma_s * state.estimate.eps
        x_middle = half.alpha_s * state.estimate.x0 + half.sigma_s * state.estimate.eps
        eps = state.denoise(x_middle, middle).eps
        return state.x_t / whole.a + (whole.sigma_s - whole.sigma_t / whole.a) * eps


@pytest.mark.parametrize(
    ("name", "spacing"),
    [("ve", "log_snr"), ("flow", "log_snr"), ("vp_cosine", "log_snr"), ("linear", "log_snr")],
)
def test_a_midpoint_solver_from_outside_is_of_second_order(name, spacing):
    """Its middle times lie between the times of the spacing, and between the steps of a table."""
    data = GaussianData(SCHEDULES[name])
    early, late = orders(Midpoint, data, spacing, (25, 50, 100)).tolist()
    assert early == pytest.approx(2, abs=0.3)
    assert late == pytest.approx(2, abs=0.15)
    denoiser = ExactDenoiser(data)
    Midpoint(10, spacing).sample(denoiser, data.schedule.init_noise_sigma * X_T, draws(5))
    assert denoiser.calls == 19 - data.schedule.has_zero_terminal_snr


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize(
    "schedule", [schedules.cosine(100), schedules.VE(num_steps=100)], ids=["cosine", "ve"]
)
def test_the_flow_is_the_same_for_every_target(schedule, target):
    """The network's output is another, the estimate of x_0 is not; EDM's clock says the time in float32 only."""
    data, x_T = GaussianData(schedule), schedule.init_noise_sigma * X_T
    for sampler in (DDIM(20), Heun(20), DPMSolverPP2M(20)):
        expected = sampler.sample(ExactDenoiser(data), x_T, draws(5))
        sampled = sampler.sample(exact_denoiser(data, target), x_T, draws(5))
        tolerance = 1e-6 if target is TARGETS["edm"] else 1e-9
        torch.testing.assert_close(sampled, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("make", [DDIM, Heun, DPMSolverPP2M])
def test_a_point_mass_is_met_exactly_in_any_number_of_steps(make):
    """Without spread, x_0 is the same everywhere on the way: no solver has an error to make."""
    for schedule in (schedules.linear(100), *(kind() for kind in CONTINUOUS.values())):
        data = GaussianData(schedule, std=0.0)
        for num_steps in (1, 2, 3, 10):
            sampled = make(num_steps).sample(ExactDenoiser(data), X_T, draws(5))
            torch.testing.assert_close(sampled, torch.full_like(X_T, data.mean), rtol=0, atol=1e-12)
