import pytest
import torch
from torch import Tensor, nn

from litdiffusion.nn import UNet
from peers import blog
from peers.blog_weights import carry_over, in_our_names
from small_worlds import normal, randomized

pytestmark = pytest.mark.usefixtures("one_thread")


def pair(dim: int = 8, channels: int = 1, self_condition: bool = False, **kwargs) -> tuple[nn.Module, UNet]:
    """The blog's network with no gain 1 and no bias 0, and ours with the same weights."""
    torch.manual_seed(0)
    kwargs = {"dim_mults": (1, 2, 4)} | kwargs
    theirs = randomized(blog.Unet(dim, channels=channels, self_condition=self_condition, **kwargs))
    ours = UNet(dim, channels, self_condition=self_condition, **kwargs)
    carry_over(theirs, ours)
    return theirs, ours


def small(**kwargs) -> UNet:
    torch.manual_seed(0)
    return randomized(
        UNet(**({"dim": 8, "channels": 1, "dim_mults": (1, 2), "heads": 2, "head_dim": 4} | kwargs))
    )


def test_the_blogs_settings_make_2020257_parameters():
    net = UNet(dim=28, channels=1, dim_mults=(1, 2, 4))
    assert sum(p.numel() for p in net.parameters()) == 2_020_257
    assert net.state_dict().keys() == dict(net.named_parameters()).keys()


def test_the_blogs_network_with_the_blogs_weights():
    """At the blog's size, and the whole of its clock."""
    theirs, ours = pair(dim=28)
    x, t = normal(2, 1, 28, 28), torch.tensor([0, 299])
    with torch.no_grad():
        expected = theirs(x, t)
        torch.testing.assert_close(ours(x, t), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("size", [(8, 8), (32, 32), (4, 12), (20, 8)])
@pytest.mark.parametrize("channels", [1, 3])
def test_output_and_gradients_are_the_blogs(channels, size):
    theirs, ours = pair(channels=channels)
    x, t, direction = normal(2, channels, *size), torch.tensor([0, 250]), normal(2, channels, *size, seed=1)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [net(each, t) for net, each in zip((theirs, ours), inputs, strict=True)]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-5)
    for output in outputs:
        (output * direction).sum().backward()
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad, rtol=1e-4, atol=1e-5)
    expected = in_our_names(theirs, "gradients")
    gradients = {name: p.grad for name, p in ours.named_parameters()}
    largest = max(float(g.abs().max()) for g in expected.values())
    torch.testing.assert_close(gradients, expected, rtol=1e-3, atol=1e-5 * largest)


@pytest.mark.parametrize("given", [True, False])
def test_self_conditioning_is_the_blogs(given):
    theirs, ours = pair(self_condition=True)
    x, t = normal(2, 1, 8, 8), torch.tensor([3, 7])
    earlier = normal(2, 1, 8, 8, seed=5) if given else None
    torch.testing.assert_close(ours(x, t, earlier), theirs(x, t, earlier), rtol=1e-5, atol=1e-5)
    # It matters, and its absence is an image of zeros.
    other = ours(x, t, None if given else torch.zeros_like(x))
    assert torch.equal(ours(x, t, earlier), other) is not given


def test_other_groups_and_levels_are_the_blogs():
    theirs = randomized(blog.Unet(8, dim_mults=(1, 3), channels=2, resnet_block_groups=8))
    ours = UNet(8, 2, dim_mults=(1, 3), groups=8)
    carry_over(theirs, ours)
    x, t = normal(1, 2, 6, 6), torch.tensor([11])
    torch.testing.assert_close(ours(x, t), theirs(x, t), rtol=1e-5, atol=1e-5)


def test_a_wider_or_narrower_start():
    """The blog's code breaks here; ours joins the first feature map to the last at its own width."""
    for init_dim in (4, 16):
        net = small(init_dim=init_dim)
        assert net(normal(2, 1, 8, 8), torch.tensor([0, 5])).shape == (2, 1, 8, 8)
        assert net.init_conv.out_channels == init_dim


def test_more_output_channels_than_image_channels():
    assert small(out_channels=6, channels=3)(normal(2, 3, 8, 8), torch.tensor([0, 5])).shape == (2, 6, 8, 8)


def test_every_image_has_its_own_time():
    net, x, t = small(), normal(1, 1, 8, 8), torch.tensor([0, 7])
    both = net(x.expand(2, -1, -1, -1), t)
    assert not torch.allclose(both[0], both[1])
    for i in range(2):
        torch.testing.assert_close(both[i : i + 1], net(x, t[i : i + 1]))


def test_time_may_be_a_fraction():
    net, x = small(), normal(1, 1, 8, 8)
    torch.testing.assert_close(net(x, torch.tensor([3.0])), net(x, torch.tensor([3])))
    assert not torch.allclose(net(x, torch.tensor([3.5])), net(x, torch.tensor([3])))


def test_dropout_acts_in_training_only():
    net, plain = small(dropout=0.5), small()
    net.load_state_dict(plain.state_dict())
    x, t = normal(2, 1, 8, 8), torch.tensor([0, 5])
    torch.testing.assert_close(net.eval()(x, t), plain(x, t))
    net.train()
    torch.manual_seed(0)
    first = net(x, t)
    assert not torch.allclose(first, net(x, t))
    torch.manual_seed(0)
    assert torch.equal(first, net(x, t))


def test_dropout_is_in_the_second_block_of_every_residual_block():
    rates = {name: m.p for name, m in small(dropout=0.3).named_modules() if isinstance(m, nn.Dropout)}
    assert len(rates) == 2 * (2 * 2 + 2 + 2 * 2 + 1)
    assert all(p == (0.3 if "block2.dropout" in name else 0.0) for name, p in rates.items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"groups": 3}, "groups=3 does not divide a width of 8 channels"),
        ({"groups": 8, "dim": 28}, "groups=8 does not divide a width of 28 channels"),
        ({"init_dim": 6}, "groups=4 does not divide a width of 6 channels"),
        (
            {"dim_mults": (1, 2), "dim": 6, "groups": 4, "init_dim": 8},
            "groups=4 does not divide a width of 6",
        ),
    ],
)
def test_groups_that_do_not_divide_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        small(**arguments)


@pytest.mark.parametrize("channels", [1, 3])
def test_feature_maps_are_channels_last_inside(channels):
    """A transpose on the way would cost more than the convolution it feeds."""
    net, formats = small(channels=channels, dim_mults=(1, 2, 4)), {}

    def watch(name: str):
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            formats[name] = all(
                x.is_contiguous(memory_format=torch.channels_last) for x in (inputs[0], output)
            )

        return hook

    for name, module in net.named_modules():
        if type(module).__name__ in ("ResnetBlock", "Attention", "LinearAttention", "Residual"):
            module.register_forward_hook(watch(name))
    net(normal(2, channels, 8, 8), torch.tensor([0, 5]))
    assert len(formats) == 4 * 3 + 3 + 2 * 2 * 3 + 2
    assert [name for name, good in formats.items() if not good] == []


@pytest.mark.parametrize("self_condition", [False, True])
def test_bfloat16_autocast_is_finite_and_close_at_both_ends_of_time(self_condition):
    net = small(self_condition=self_condition)
    x, t = normal(4, 1, 8, 8), torch.tensor([0, 1, 299, 999])
    exact = net(x, t).detach()
    with torch.autocast("cpu", torch.bfloat16):
        output = net(x, t)
    torch.testing.assert_close(output.float(), exact, rtol=0, atol=0.05 * float(exact.abs().max()))
    output.float().square().mean().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad.dtype == torch.float32, name
        assert bool(torch.isfinite(parameter.grad).all()), name


def test_every_parameter_is_used():
    net = small(self_condition=True)
    net(normal(2, 1, 8, 8), torch.tensor([0, 5]), normal(2, 1, 8, 8, seed=1)).square().mean().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []
