"""On Gaussian data the probability flow has a closed form: samplers show the order that their papers claim."""

import pytest
import torch
from torch import Tensor

from litdiffusion.diffusion import DDIM, DPMSolverPP2M, Heun, Sampler, Schedule, schedules
from small_worlds import TARGETS, GaussianData, exact_denoiser

pytestmark = pytest.mark.usefixtures("one_thread")

FINE = 8000  # times so dense that rounding a grid to them does not show
X_T = torch.linspace(-2, 2, 5, dtype=torch.float64)[:, None, None, None]

# Where the flow is smooth in the grid's own variable: then the order shows from a few dozen steps on.
SMOOTH = [("cosine", "log_snr"), ("flow", "log_snr"), ("linear", "log_snr"), ("linear", "quadratic")]


@pytest.fixture(scope="module")
def fine() -> dict[str, Schedule]:
    return {name: getattr(schedules, name)(FINE) for name in ("cosine", "flow", "linear")}


def error(sampler: Sampler, data: GaussianData) -> float:
    denoiser = exact_denoiser(data)
    return float((sampler.sample(denoiser, X_T) - data.flow_to_image(X_T)).abs().max())


def orders(make: type[Sampler], data: GaussianData, grid: str, num_steps: tuple[int, ...]) -> Tensor:
    """How many halvings of the error each doubling of the steps brings."""
    errors = torch.tensor([error(make(count, grid=grid), data) for count in num_steps])
    return errors.log2().diff().neg()


@pytest.mark.parametrize(("make", "order"), [(DDIM, 1), (Heun, 2), (DPMSolverPP2M, 2)])
@pytest.mark.parametrize(("name", "grid"), SMOOTH)
def test_the_error_falls_with_the_order_of_the_method(fine, name, grid, make, order):
    early, late = orders(make, GaussianData(fine[name]), grid, (25, 50, 100)).tolist()
    assert early == pytest.approx(order, abs=0.3)
    assert late == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("name", ["cosine", "flow", "linear"])
@pytest.mark.parametrize("grid", ["uniform", "quadratic"])
def test_ddim_is_of_first_order_on_every_grid(fine, name, grid):
    found = orders(DDIM, GaussianData(fine[name]), grid, (25, 50))
    assert float(found) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("name", ["cosine", "flow", "linear"])
@pytest.mark.parametrize("grid", ["uniform", "quadratic"])
def test_second_order_is_worth_its_name(fine, name, grid):
    """With as many looks at the network, both methods are much closer than DDIM."""
    data = GaussianData(fine[name])
    first = error(DDIM(60, grid=grid), data)
    assert error(Heun(30, grid=grid), data) < first / 2
    assert error(DPMSolverPP2M(60, grid=grid), data) < first / 5


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_the_flow_is_the_same_for_every_target(target):
    """The network's output is another, the estimate of x_0 is not."""
    data = GaussianData(schedules.cosine(100))
    for sampler in (DDIM(20), Heun(20), DPMSolverPP2M(20)):
        expected = sampler.sample(exact_denoiser(data), X_T)
        sampled = sampler.sample(exact_denoiser(data, target), X_T)
        torch.testing.assert_close(sampled, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("make", [DDIM, Heun, DPMSolverPP2M])
def test_a_point_mass_is_met_exactly_in_any_number_of_steps(make):
    """Without spread, x_0 is the same everywhere on the way: no solver has an error to make."""
    for schedule in (schedules.linear(100), schedules.flow(100)):
        data = GaussianData(schedule, std=0.0)
        for num_steps in (1, 2, 3, 10):
            sampled = make(num_steps).sample(exact_denoiser(data), X_T)
            torch.testing.assert_close(sampled, torch.full_like(X_T, data.mean), rtol=0, atol=1e-12)
