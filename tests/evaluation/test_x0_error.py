from itertools import pairwise

import pytest
import torch

from litdiffusion.data.stores import Batch
from litdiffusion.diffusion import L1, X0, Objective, Uniform, schedules
from litdiffusion.evaluation import Model, X0MeanAbsoluteError
from litdiffusion.evaluation.held_out import held_out_losses
from litdiffusion.evaluation.x0_error import x0_errors
from small_worlds import Affine, affine_denoiser, images

pytestmark = pytest.mark.usefixtures("one_thread")

OBJECTIVE = Objective(L1(), Uniform())


class Labelled(Affine):
    """An ``Affine`` whose gain goes by the label."""

    num_classes = 3

    def forward(self, x, clock, self_cond=None, labels=None):
        return (1 + labels[:, None, None, None]) * super().forward(x, clock, self_cond) / 4


@pytest.mark.parametrize("self_condition", [False, True])
def test_it_is_the_l1_loss_of_a_network_that_predicts_x0(self_condition):
    """Of the same draws: where x_0 itself is the target, and nothing is clipped, the two are one."""
    net = Labelled(self_condition)
    denoiser = affine_denoiser(schedules.cosine(30), X0(), clip="none", net=net)
    x0, labels = images(20), torch.arange(20) % 3
    errors, t = x0_errors(denoiser, x0, 3, labels)
    losses, same_t = held_out_losses(denoiser, OBJECTIVE, x0, 3, labels)
    torch.testing.assert_close(errors, losses)
    assert torch.equal(t, same_t)


def test_the_estimate_is_clipped_as_in_sampling():
    far = affine_denoiser(schedules.cosine(30), X0(), clip="static")
    far.net.time_gain.data.fill_(1000.0)
    x0 = images(4).clamp(-1, 1)
    errors, t = x0_errors(far, x0, 0)
    torch.testing.assert_close(errors[t > 1], (1 - x0).mean((1, 2, 3))[t > 1])


@pytest.mark.parametrize("cuts", [(), (7,), (3, 16, 19)])
def test_the_metric_is_the_mean_as_a_whole_and_by_noise_level(cuts):
    denoiser = affine_denoiser(schedules.cosine(30), X0(), net=Labelled())
    x0, labels, metric = images(20), torch.arange(20) % 3, X0MeanAbsoluteError()
    for start, stop in pairwise([0, *cuts, 20]):
        metric.update(Model(denoiser, OBJECTIVE), Batch(x0[start:stop], labels[start:stop], start, 0))
    found = metric.compute()
    errors, t = x0_errors(denoiser, x0, 0, labels)
    assert found[""] == pytest.approx(float(errors.mean()), rel=1e-6)
    for i in range(10):  # t = 3 i + 1 .. 3 i + 3
        mean = float(errors[(t > 3 * i) & (t <= 3 * i + 3)].mean())
        assert found[f"_t{i:02d}"] == pytest.approx(mean, rel=1e-6)
