"""What the U-Net can do beyond the blog: labels, learned variance, attention, checkpointing, any divisible size."""

import pytest
import torch
from einops import rearrange
from torch import Tensor, nn

from litdiffusion.nn import UNet
from litdiffusion.nn.attention import Attention, LinearAttention
from small_worlds import normal, randomized

pytestmark = pytest.mark.usefixtures("one_thread")

T = torch.tensor([0, 5])
SMALL = {"dim": 8, "channels": 1, "dim_mults": (1, 2), "heads": 2, "head_dim": 4}
EVERYTHING = {
    "channels": 3,
    "self_condition": True,
    "num_classes": 3,
    "learned_variance": True,
    "attention": ["none", "full"],
    "init_dim": 4,
}


def small(**options) -> UNet:
    torch.manual_seed(0)
    return randomized(UNet(**(SMALL | options)))


def gradients(net: nn.Module, output: Tensor) -> list[Tensor]:
    direction = normal(*output.shape, seed=1)
    return list(torch.autograd.grad((output * direction).sum(), list(net.parameters())))


# -------------------------------------------------------------------------------------------------- the label


def test_each_label_has_an_embedding_and_the_last_says_none():
    net, x = small(num_classes=3), normal(2, 1, 8, 8)
    assert net.class_embedding.weight.shape == (4, 32)
    outputs = [net(x, T, labels=torch.full((2,), label)) for label in range(4)]
    for i in range(4):
        for j in range(i):
            assert not torch.allclose(outputs[i], outputs[j])
    assert torch.equal(net(x, T), outputs[3])


def test_the_label_moves_the_embedded_time():
    """With embeddings of 0 the labels say nothing, and the network is the one that knows of none."""
    net, plain, x = small(num_classes=3), small(), normal(2, 1, 8, 8)
    plain.load_state_dict({k: v for k, v in net.state_dict().items() if k != "class_embedding.weight"})
    with torch.no_grad():
        net.class_embedding.weight.zero_()
        net.class_embedding.weight[1] = shift = 0.3 * normal(32, seed=4)
    torch.testing.assert_close(net(x, T, labels=torch.tensor([0, 2])), plain(x, T))
    plain.time_embedding[-1].bias.data += shift
    torch.testing.assert_close(net(x, T, labels=torch.tensor([1, 1])), plain(x, T))


def test_every_image_has_its_own_label():
    net, x = small(num_classes=3), normal(2, 1, 8, 8)
    both = net(x, T, labels=torch.tensor([2, 0]))
    for i, label in enumerate((2, 0)):
        one = slice(i, i + 1)
        torch.testing.assert_close(both[one], net(x[one], T[one], labels=torch.tensor([label])))


# ----------------------------------------------------------------------------------------------- the variance


@pytest.mark.parametrize(("channels", "out_channels"), [(1, None), (3, None), (3, 2)])
def test_a_learned_variance_doubles_the_output_and_nothing_else(channels, out_channels):
    plain = small(channels=channels, out_channels=out_channels)
    net = small(channels=channels, out_channels=out_channels, learned_variance=True)
    wanted = out_channels or channels
    assert net(normal(2, channels, 8, 8), T).shape == (2, 2 * wanted, 8, 8)
    shapes, plain_shapes = ({k: v.shape for k, v in n.state_dict().items()} for n in (net, plain))
    changed = {name for name in shapes if shapes[name] != plain_shapes[name]}
    assert changed == {"final_conv.weight", "final_conv.bias"}
    # Its first half is the target: the network without the variance, with the same weights.
    state = net.state_dict()
    state |= {name: state[name][:wanted] for name in changed}
    plain.load_state_dict(state)
    x = normal(2, channels, 8, 8)
    torch.testing.assert_close(net(x, T)[:, :wanted], plain(x, T))


# ---------------------------------------------------------------------------------------------- the attention


@pytest.mark.parametrize("kind", ["linear", "full", "none"])
def test_one_word_chooses_the_attention_of_every_resolution(kind):
    net = small(attention=kind, dim_mults=(1, 2, 2))
    stages = [*net.downs, *net.ups]
    if kind == "none":
        assert all(isinstance(stage.attention, nn.Identity) for stage in stages)
    else:
        layer = {"linear": LinearAttention, "full": Attention}[kind]
        assert all(type(stage.attention.layer) is layer for stage in stages)
    assert type(net.mid_attention.layer) is Attention  # the middle is always full
    assert net(normal(2, 1, 8, 8), T).shape == (2, 1, 8, 8)


def test_a_list_chooses_the_attention_of_each_resolution_on_both_ways():
    net = small(attention=["none", "linear", "full"], dim_mults=(1, 2, 2))

    def kinds(stages) -> list[str]:
        return [type(getattr(stage.attention, "layer", None)).__name__ for stage in stages]

    assert kinds(net.downs) == ["NoneType", "LinearAttention", "Attention"]
    assert kinds(net.ups) == ["Attention", "LinearAttention", "NoneType"]
    # On the way down before the image is halved, on the way up after it was doubled: the same resolution.
    sizes = {}
    for name, module in net.named_modules():
        if isinstance(module, Attention | LinearAttention):
            module.register_forward_hook(
                lambda module, inputs, output, name=name: sizes.setdefault(name, output.shape[-1])
            )
    net(normal(2, 1, 16, 16), T)
    assert sizes["downs.1.attention.layer"] == sizes["ups.1.attention.layer"] == 8
    assert sizes["downs.2.attention.layer"] == sizes["ups.0.attention.layer"] == 4


# ------------------------------------------------------------------------------------- gradient checkpointing


@pytest.mark.parametrize(
    "options", [{}, {"dropout": 0.4}, EVERYTHING], ids=["plain", "dropout", "everything"]
)
def test_checkpointing_changes_neither_output_nor_gradients(options):
    options = dict(options)
    nets = [small(**options, checkpoint_gradients=checkpoint).train() for checkpoint in (False, True)]
    channels = options.get("channels", 1)
    x, further = normal(2, channels, 8, 8), {}
    if "num_classes" in options:
        further = {"labels": torch.tensor([1, 3]), "self_cond": normal(2, channels, 8, 8, seed=2)}
    results = []
    for net in nets:
        torch.manual_seed(7)  # dropout must be drawn again as it was
        output = net(x, T, **further)
        results.append((output, gradients(net, output)))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


def test_checkpointing_keeps_only_the_inputs_of_blocks():
    """Counted: what autograd keeps for the backward pass. It is the reason to checkpoint at all."""

    def kept(net: UNet) -> int:
        sizes: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            sizes[x.data_ptr()] = x.numel()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            net(x, T).sum()
        return sum(sizes.values())

    x = normal(2, 1, 16, 16)
    whole, checkpointed = (
        small(attention="none", checkpoint_gradients=choice).train() for choice in (False, True)
    )
    assert kept(checkpointed) < 0.5 * kept(whole)


def test_checkpointing_rests_outside_of_training():
    """Without gradients there is nothing to keep: blocks run once, and no second time."""
    net, calls = small(checkpoint_gradients=True), []
    net.mid_block1.block1.register_forward_hook(lambda *_: calls.append(1))
    x = normal(2, 1, 8, 8)
    net.eval()(x, T).sum().backward()
    assert len(calls) == 1
    with torch.no_grad():
        net.train()(x, T)
    assert len(calls) == 2
    net(x, T).sum().backward()
    assert len(calls) == 4


def test_checkpointing_works_under_bfloat16():
    nets = [small(checkpoint_gradients=choice).train() for choice in (False, True)]
    results = []
    for net in nets:
        with torch.autocast("cpu", torch.bfloat16):
            output = net(normal(2, 1, 8, 8), T)
        results.append(gradients(net, output.float()))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


# -------------------------------------------------------------------------------------------------- the sizes


@pytest.mark.parametrize(
    ("size", "dim_mults"),
    [
        ((28, 28), (1, 2, 4)),
        ((32, 32), (1, 1, 2, 2)),
        ((64, 64), (1, 1, 2, 2)),
        ((20, 20), (1, 2, 2)),
        ((36, 36), (1, 2, 2)),
        ((12, 12), (1, 2, 2)),
        ((12, 36), (1, 2, 2)),
        ((20, 8), (1, 2, 2)),
        ((7, 5), (1,)),
        ((64, 32), (1, 1, 1, 1, 1)),
    ],
)
@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["plain", "everything"])
def test_any_size_that_can_be_halved(size, dim_mults, options):
    attention = ["none"] * (len(dim_mults) - 1) + ["full"] if options else "linear"
    net = small(**(options | {"dim_mults": dim_mults, "attention": attention}))
    channels = net.channels
    output = net(normal(2, channels, *size), T)
    assert output.shape == (2, channels * (2 if options else 1), *size)
    assert bool(torch.isfinite(output).all())
    assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients(net, output))


def test_height_and_width_are_not_mixed_up():
    """A network without attention commutes with transposing, if its filters are transposed along."""
    net, turned = small(attention="none"), small(attention="none")
    with torch.no_grad():
        for module in turned.modules():
            if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
                module.weight.copy_(module.weight.transpose(2, 3).clone())
        for stage in turned.downs[
            :1
        ]:  # a patch's four pixels are channels of the 1x1 convolution that follows
            weight = stage.resample[1].weight
            out, four = weight.shape[:2]
            patches = weight.view(out, four // 4, 2, 2).transpose(2, 3)
            weight.copy_(patches.reshape(out, four, 1, 1).clone())
    x = normal(2, 1, 12, 20)
    torch.testing.assert_close(turned(x.mT, T), net(x, T).mT, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [(30, 28), (28, 30), (7, 7)])
@pytest.mark.parametrize("options", [{"dim_mults": (1, 1, 1)}, {"dim_mults": (1, 1), "patch_size": 2}])
def test_a_size_that_cannot_be_halved_is_named(size, options):
    with pytest.raises(ValueError, match=f"an image of {size[0]}x{size[1]} pixels: .* multiples of 4"):
        small(**options)(normal(1, 1, *size), torch.tensor([0]))


# --------------------------------------------------------------------------------------------- patches


def test_patches_are_channels_of_a_smaller_image():
    options = {"self_condition": True, "learned_variance": True}
    net = small(channels=2, patch_size=2, **options)
    of_channels = small(channels=8, **options)
    # The noisy image's channels come after those of the estimate in both, and the variance after the target.
    of_channels.load_state_dict(net.state_dict())
    x, estimate = normal(2, 2, 8, 12), normal(2, 2, 8, 12, seed=1)

    def patches(images):
        return rearrange(images, "b c (h p) (w q) -> b (c p q) h w", p=2, q=2)

    output = net(x, T, estimate)
    assert output.shape == (2, 4, 8, 12)
    expected = of_channels(patches(x), T, patches(estimate))
    torch.testing.assert_close(patches(output), expected, rtol=1e-5, atol=1e-5)
    assert net.size_multiple == 2 * of_channels.size_multiple


# --------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": 0}, "channels=0"),
        ({"out_channels": 0}, "out_channels=0"),
        ({"init_dim": 0}, "init_dim=0"),
        ({"dim": 0}, "dim=0"),
        ({"dim": 2, "groups": 2, "init_dim": 2}, "dim=2"),
        ({"dim": 9, "groups": 3}, "dim=9"),
        ({"dim_mults": ()}, r"dim_mults=\[\]"),
        ({"dim_mults": (1, 0)}, r"dim_mults=\[1, 0\]"),
        ({"groups": 0}, "groups=0"),
        ({"heads": 0}, "heads=0"),
        ({"head_dim": -1}, "head_dim=-1"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"dropout": -0.1}, "dropout=-0.1"),
        ({"num_classes": 0}, "num_classes=0"),
        ({"num_classes": -2}, "num_classes=-2"),
        ({"attention": ["linear"]}, r"attention=\['linear'\]: give one of linear, full, none"),
        ({"attention": ["linear"] * 3}, "attention=.*or one for each of dim_mults"),
    ],
)
def test_impossible_options_are_named(options, message):
    with pytest.raises(ValueError, match=message) as caught:
        small(**options)
    assert "\n" not in str(caught.value)
