"""Muon beside the singular value decomposition and torch's own optimizers."""

import pytest
import torch
from torch import nn
from torch.optim import AdamW

from litdiffusion.nn import UNet
from litdiffusion.training.muon import Muon, orthogonalized
from small_worlds import normal

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("shape", [(24, 24), (16, 90), (90, 16)])
def test_singular_vectors_stay_and_values_come_near_1(shape):
    matrix = normal(*shape)
    U, _, Vt = torch.linalg.svd(matrix, full_matrices=False)
    found = U.mT @ orthogonalized(matrix) @ Vt.mT  # in the matrix's own singular vectors
    torch.testing.assert_close(found, found.diagonal().diag(), rtol=0, atol=2e-5)
    assert ((found.diagonal() > 0.65) & (found.diagonal() < 1.25)).all()


def test_the_scale_does_not_matter_and_nothing_stays_nothing():
    matrix = normal(16, 40)
    torch.testing.assert_close(orthogonalized(matrix * 1e-4), orthogonalized(matrix), rtol=0, atol=2e-3)
    assert orthogonalized(torch.zeros(16, 40)).count_nonzero() == 0
    low_rank = normal(16, 2) @ normal(2, 40, seed=1)
    values = torch.linalg.svdvals(orthogonalized(low_rank))
    assert values.isfinite().all()
    assert bool((values[:2] > 0.65).all())
    assert bool((values < 1.25).all())


def stepped(
    optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], steps: int = 4, first: int = 0
) -> None:
    for step in range(first, first + steps):
        for number, parameter in enumerate(parameters):
            parameter.grad = normal(*parameter.shape, seed=10 * step + number)
        optimizer.step()


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_a_matrix_moves_as_by_torchs_muon(weight_decay):
    """Torch iterates in bfloat16, so its steps are as coarse."""
    ours, theirs = (nn.Parameter(normal(32, 20)) for _ in range(2))
    stepped(Muon([ours], lr=0.1, weight_decay=weight_decay), [ours])
    stepped(torch.optim.Muon([theirs], lr=0.1, weight_decay=weight_decay, nesterov=True), [theirs])
    assert float((ours - normal(32, 20)).detach().abs().max()) > 0.05
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.02)


def test_a_filter_is_a_row():
    filters, matrix = nn.Parameter(normal(16, 4, 3, 3)), nn.Parameter(normal(16, 4, 3, 3).flatten(1))
    for step in range(3):
        gradient = normal(16, 4, 3, 3, seed=step)
        filters.grad, matrix.grad = gradient, gradient.flatten(1)
    stepped_filters, stepped_matrix = Muon([filters]), Muon([matrix])
    stepped_filters.step()
    stepped_matrix.step()
    assert torch.equal(filters.flatten(1), matrix)


def test_all_else_moves_as_by_adamw():
    def rest() -> list[nn.Parameter]:
        return [nn.Parameter(normal(*shape)) for shape in [(40,), (20, 3), (8, 1, 1, 1)]]

    ours, theirs = rest(), rest()
    stepped(Muon([nn.Parameter(normal(16, 16)), *ours], adam_lr=0.03, weight_decay=0.1), ours)
    stepped(AdamW(theirs, lr=0.03, betas=(0.9, 0.99), weight_decay=0.1), theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)


def test_which_parameters_of_a_network_are_matrices():
    net = UNet(dim=16, channels=1, dim_mults=(1, 2))
    optimizer = Muon(net.parameters())
    matrices = set(map(id, optimizer.param_groups[0]["params"]))
    names = {name for name, parameter in net.named_parameters() if id(parameter) not in matrices}
    assert {"init_conv.weight", "final_conv.weight", "init_conv.bias"} <= names
    assert {name for name in names if name.endswith("weight") and "norm" not in name} == {
        "init_conv.weight",
        "final_conv.weight",
    }
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(net.parameters()))


def test_it_goes_on_from_its_state():
    def parameters() -> list[nn.Parameter]:
        return [nn.Parameter(normal(16, 20)), nn.Parameter(normal(5))]

    through, before = parameters(), parameters()
    stepped(Muon(through), through, steps=4)
    first = Muon(before)
    stepped(first, before, steps=2)
    second = Muon(before, lr=7.0)
    second.load_state_dict(first.state_dict())
    stepped(second, before, steps=2, first=2)
    for one, other in zip(through, before, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"lr": -1}, "lr=-1"), ({"momentum": 1.0}, "momentum=1.0"), ({"min_side": 99}, "optimizer=adamw")],
)
def test_what_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Muon([nn.Parameter(normal(16, 16))], **options)
