import pytest
import torch
from torch import nn
from torch.nn import functional

from litdiffusion.nn import UNet
from litdiffusion.nn.blocks import (
    Block,
    Downsample,
    GroupNorm,
    ResnetBlock,
    Upsample,
    WeightStandardizedConv2d,
    fold_weight_standardization,
)
from peers import blog_unet
from peers.blog_weights import carry_over
from small_worlds import normal, randomized

pytestmark = pytest.mark.usefixtures("one_thread")


def test_filters_have_mean_0_and_variance_1():
    conv = randomized(WeightStandardizedConv2d(8, 5, 3))
    filters = conv.standardized_weight().flatten(1)
    torch.testing.assert_close(filters.mean(1), torch.zeros(5), rtol=0, atol=1e-6)
    raw = conv.weight.flatten(1).var(1, correction=0)
    torch.testing.assert_close(filters.var(1, correction=0), raw / (raw + 1e-5))


def test_the_scale_of_the_weights_hardly_matters_and_their_mean_not_at_all():
    conv, other = WeightStandardizedConv2d(8, 5, 3), WeightStandardizedConv2d(8, 5, 3)
    with torch.no_grad():
        other.weight.copy_(100 * conv.weight + 3)
        other.bias.copy_(conv.bias)
        x = normal(1, 8, 4, 4)
        torch.testing.assert_close(other(x), conv(x), rtol=0.01, atol=0.01)


@pytest.mark.parametrize("channels_last", [False, True])
def test_weight_standardized_convolution_is_the_blogs(channels_last):
    theirs = randomized(blog_unet.WeightStandardizedConv2d(8, 6, 3, padding=1))
    ours = WeightStandardizedConv2d(8, 6, 3, padding=1)
    ours.load_state_dict(theirs.state_dict())
    x = normal(2, 8, 5, 7)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
    for conv in (ours, theirs):
        (conv(x) * normal(2, 6, 5, 7, seed=1)).sum().backward()
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.bias.grad, theirs.bias.grad)


def test_standardization_is_float32_with_one_eps_under_autocast():
    """Filters of standard deviation 1e-3 to 1: bfloat16's eps of 1e-3 would shrink the small ones away."""
    conv = WeightStandardizedConv2d(8, 4, 3, padding=1)
    with torch.no_grad():
        conv.weight.copy_(
            normal(4, 8, 3, 3) * torch.tensor([1e-3, 1e-2, 0.1, 1.0]).view(4, 1, 1, 1) + normal(4, 1, 1, 1)
        )
    exact, x = conv.standardized_weight(), normal(2, 8, 5, 5)
    with torch.autocast("cpu", torch.bfloat16):
        inside = conv.standardized_weight()
        output = conv(x)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, exact)
    expected = functional.conv2d(
        x.bfloat16(), exact.bfloat16(), conv.bias.bfloat16(), padding=1
    )  # only the convolution itself is in bfloat16
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output, expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_group_norm_computes_in_float32_whatever_the_precision_of_its_input(dtype):
    norm = randomized(GroupNorm(2, 8))
    x = normal(2, 8, 5, 7).to(dtype).requires_grad_()
    expected = functional.group_norm(x.detach().float(), 2, norm.weight, norm.bias, norm.eps).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        output = norm(x)
    assert output.dtype == dtype
    torch.testing.assert_close(output, expected, rtol=0, atol=0)
    output.sum().backward()
    assert x.grad.dtype == dtype
    assert norm.weight.grad.dtype == torch.float32
    assert norm.to(dtype)(x).dtype == dtype
    assert norm.double()(x.double()).dtype == torch.float64


@pytest.mark.parametrize("time", [False, True])
def test_block_is_the_blogs(time):
    theirs = randomized(blog_unet.Block(8, 12, groups=4))
    ours = Block(8, 12, groups=4)
    carry_over(theirs, ours)
    x = normal(2, 8, 5, 7)
    scale_shift = (normal(2, 12, 1, 1, seed=1), normal(2, 12, 1, 1, seed=2)) if time else None
    torch.testing.assert_close(ours(x, scale_shift), theirs(x, scale_shift), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dim_out", [8, 12])
def test_resnet_block_is_the_blogs(dim_out):
    theirs = randomized(blog_unet.ResnetBlock(8, dim_out, time_emb_dim=6, groups=4))
    ours = ResnetBlock(8, dim_out, time_dim=6, groups=4)
    carry_over(theirs, ours)
    x, time = normal(2, 8, 5, 7), normal(2, 6, seed=1)
    torch.testing.assert_close(ours(x, time), theirs(x, time), rtol=1e-5, atol=1e-5)
    assert isinstance(ours.shortcut, nn.Identity) is (dim_out == 8)


def test_downsampling_is_the_blogs():
    ours, theirs = Downsample(3, 5), blog_unet.downsample(3, 5)
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(normal(2, 3, 4, 6)), theirs(normal(2, 3, 4, 6)))


@pytest.mark.parametrize("size", [(4, 6), (1, 1), (7, 3)])
def test_upsampling_by_one_transposed_convolution_is_the_blogs_by_two_layers(size):
    ours, theirs = Upsample(3, 5).double(), blog_unet.upsample(3, 5).double()
    ours.load_state_dict(theirs[1].state_dict())
    inputs = [normal(2, 3, *size).double().requires_grad_() for _ in range(2)]
    images = [ours(inputs[0]), theirs(inputs[1])]
    torch.testing.assert_close(*images)
    for image in images:
        (image**2).sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    torch.testing.assert_close(ours.weight.grad, theirs[1].weight.grad)


def test_downsampling_turns_patches_into_channels():
    down = Downsample(1, 4)
    with torch.no_grad():
        down[1].weight.copy_(torch.eye(4).view(4, 4, 1, 1))
        down[1].bias.zero_()
    patches = down(torch.arange(16.0).view(1, 1, 4, 4))
    assert patches[0, :, 0, 0].tolist() == [0, 1, 4, 5]
    assert patches[0, :, 1, 1].tolist() == [10, 11, 14, 15]


@pytest.mark.parametrize(
    "arguments",
    [
        {"padding": 1},
        {"padding": (2, 0)},
        {"padding": "same", "padding_mode": "circular"},
        {"stride": 2, "bias": False},
        {"dilation": 2},
        {"groups": 4},
    ],
)
def test_a_folded_convolution_computes_exactly_the_same(arguments):
    conv = randomized(WeightStandardizedConv2d(8, 4, 3, **arguments))
    plain = conv.folded()
    assert type(plain) is nn.Conv2d
    x = normal(2, 8, 9, 9)
    assert torch.equal(plain(x), conv(x))
    assert not any(parameter.requires_grad for parameter in plain.parameters())


def test_folding_a_network_leaves_its_output_and_no_standardization():
    torch.manual_seed(0)
    net = randomized(UNet(8, 1, (1, 2), heads=2, head_dim=4)).eval()
    x, t = normal(2, 1, 8, 8), torch.tensor([0, 200])
    with torch.no_grad():
        expected = net(x, t)
        folded = fold_weight_standardization(net)
        assert folded is net
        assert torch.equal(net(x, t), expected)
    assert not any(isinstance(module, WeightStandardizedConv2d) for module in net.modules())
