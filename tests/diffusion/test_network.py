"""The contract between a denoiser and its network."""

import inspect

import pytest
import torch
from torch import Tensor, nn

from litdiffusion.diffusion import Network, Preconditioned, V, schedules
from litdiffusion.nn import DiT, UNet
from small_worlds import images, times

SCHEDULE = schedules.linear(40)
T = times(1 / 40, 1)


class Plain(nn.Module):
    """Declares nothing, and takes nothing but images and a clock."""

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        return x * (1 + c_noise[:, None, None, None])


class Whole(nn.Module, Network):
    """Names the contract as its base, and so inherits what it does not declare."""

    num_classes = 3

    def forward(
        self, x: Tensor, c_noise: Tensor, self_cond: None = None, labels: Tensor | None = None
    ) -> Tensor:
        assert labels is not None
        return x * labels[:, None, None, None]


def test_a_network_that_declares_nothing_has_the_defaults():
    denoiser = Preconditioned(Plain(), SCHEDULE, V(), 1, 5)
    assert (denoiser.self_condition, denoiser.num_classes, denoiser.learned_variance) == (False, None, False)
    x_t = images(2)
    output, variance = denoiser.output(x_t, T, self_cond=x_t, labels=torch.tensor([1, 2]))
    assert torch.equal(output, x_t * torch.tensor([1.0, 40.0])[:, None, None, None])
    assert variance is None
    assert not isinstance(Plain(), Network)  # it lacks the attributes, and need not have them


def test_a_network_may_inherit_the_defaults():
    net = Whole()
    assert isinstance(net, Network)
    assert (net.self_condition, net.learned_variance, net.size_multiple) == (False, False, 1)
    output, _ = Preconditioned(net, SCHEDULE, V(), 1, 4).output(images(2), T)
    assert torch.equal(output, 3 * images(2))  # none of its three classes


@pytest.mark.parametrize("net", [UNet(8, 1, (1, 2, 4)), DiT(1, 8, 1, 2, patch_size=4)], ids=["unet", "dit"])
def test_the_networks_here_keep_it(net):
    assert isinstance(net, Network)
    asked = list(inspect.signature(Network.__call__).parameters.values())[1:]
    taken = list(inspect.signature(net.forward).parameters.values())
    assert [p.name for p in taken[2:]] == [p.name for p in asked[2:]] == ["self_cond", "labels"]
    # These take whole numbers for c_noise, too, as the blog passes them.
    allowed = [str(p.annotation).replace("Num[", "Float[") for p in taken]
    assert allowed == [str(p.annotation) for p in asked]
    Preconditioned(net, SCHEDULE, V(), 1, (8, 12))
    for size in (6, (8, 10), (10, 8)):
        with pytest.raises(ValueError, match=r"image_size=\d+x\d+: .* multiples of 4"):
            Preconditioned(net, SCHEDULE, V(), 1, size)
