from itertools import pairwise

import pytest
import torch

from litdiffusion.data.stores import Batch
from litdiffusion.diffusion import L2, Objective, Uniform, V, schedules
from litdiffusion.evaluation import HeldOutLoss, Model
from litdiffusion.evaluation.held_out import held_out_losses
from small_worlds import Affine, affine_denoiser, images

pytestmark = pytest.mark.usefixtures("one_thread")

OBJECTIVE = Objective(L2(), Uniform())


class Labelled(Affine):
    """An ``Affine`` whose gain goes by the label."""

    num_classes = 3

    def forward(self, x, clock, self_cond=None, labels=None):
        return (1 + labels[:, None, None, None]) * super().forward(x, clock, self_cond) / 4


@pytest.mark.parametrize("self_condition", [False, True])
def test_each_images_label_is_told(self_condition):
    denoiser = affine_denoiser(schedules.cosine(30), V(), net=Labelled(self_condition))
    x0, labels = images(3), torch.tensor([2, 0, 1])
    losses, t = held_out_losses(denoiser, OBJECTIVE, x0, 4, labels)
    for row in range(3):
        one = slice(row, row + 1)
        alone, its_t = held_out_losses(denoiser, OBJECTIVE, x0[one], 4 + row, labels[one])
        torch.testing.assert_close(losses[one], alone)
        assert int(t[row]) == int(its_t)
    others, _ = held_out_losses(denoiser, OBJECTIVE, x0, 4, torch.tensor([0, 1, 2]))
    unlabelled, _ = held_out_losses(denoiser, OBJECTIVE, x0, 4)
    none, _ = held_out_losses(denoiser, OBJECTIVE, x0, 4, torch.tensor([3, 3, 3]))
    assert not torch.isclose(losses, others).any()
    torch.testing.assert_close(unlabelled, none)


@pytest.mark.parametrize("cuts", [(), (7,), (3, 16, 19)])
def test_the_report_does_not_depend_on_the_batches(cuts):
    denoiser = affine_denoiser(schedules.cosine(30), V(), net=Labelled())
    x0, labels = images(20), torch.arange(20) % 3
    batches = [
        Batch(x0[start:stop], labels[start:stop], start, index)
        for index, (start, stop) in enumerate(pairwise([0, *cuts, 20]))
    ]
    losses, t = held_out_losses(denoiser, OBJECTIVE, x0, 0, labels)
    metric = HeldOutLoss()
    for batch in batches:
        metric.update(Model(denoiser, OBJECTIVE), batch)
    found = metric.compute()
    assert found[""] == pytest.approx(float(losses.mean()), rel=1e-6)
    tenths = [found.pop(f"_t{i:02d}") for i in range(10)]
    for i, loss in enumerate(tenths):  # t = 3 i + 1 .. 3 i + 3
        assert loss == pytest.approx(float(losses[(t > 3 * i) & (t <= 3 * i + 3)].mean()), rel=1e-6)
    assert found.keys() == {""}


def test_the_weights_that_are_not_averaged_are_measured_beside_them():
    averaged, raw = (affine_denoiser(schedules.cosine(30), V()) for _ in range(2))
    raw.net.gain.data += 0.1
    metric, batch = HeldOutLoss(), Batch(images(20), None, 0, 0)
    metric.update(Model(averaged, OBJECTIVE, raw), batch)
    for denoiser, suffix in ((averaged, ""), (raw, "_raw")):
        alone = HeldOutLoss()
        alone.update(Model(denoiser, OBJECTIVE), batch)
        assert metric.compute()[suffix] == alone.compute()[""]
    assert metric.compute()[""] != metric.compute()["_raw"]
