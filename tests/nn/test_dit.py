"""The diffusion transformer: its formulas, how it begins, and what it refuses."""

import numpy as np
import pytest
import torch
from torch import nn

from litdiffusion.nn import DiT
from litdiffusion.nn import dit as dit_module
from litdiffusion.nn.dit import AdaLN, DiTBlock, patchify, positions, unpatchify
from small_worlds import normal, randomized

pytestmark = pytest.mark.usefixtures("one_thread")

T = torch.tensor([0, 5])
SMALL = {"channels": 1, "dim": 8, "depth": 2, "heads": 2}
EVERYTHING = {"channels": 3, "self_condition": True, "num_classes": 3, "learned_variance": True}


def small(**options) -> DiT:
    torch.manual_seed(0)
    return randomized(DiT(**(SMALL | options)))


# ------------------------------------------------------------------------------------------------------- size


def test_the_parameters_are_those_of_the_blocks():
    """Counted by hand, for dim d, patches of p x p and c channels; the default, too."""
    for d, depth, p, c, hidden in ((8, 2, 2, 3, 32), (128, 8, 2, 1, 512)):
        patches = p * p * c * d + d
        time = 2 * (d * d + d)
        attention = d * 3 * d + 3 * d + d * d + d
        perceptron = d * hidden + hidden + hidden * d + d
        modulation = 6 * (d * d + d)
        final = 2 * (d * d + d) + d * p * p * c + p * p * c
        net = DiT(c, d, depth, heads=2)
        counted = sum(parameter.numel() for parameter in net.parameters())
        assert counted == patches + time + depth * (attention + perceptron + modulation) + final
    assert counted == 2_441_860


def test_options_add_what_they_need_and_nothing_else():
    def shapes(**options):
        return {name: tuple(value.shape) for name, value in DiT(**(SMALL | options)).state_dict().items()}

    plain = shapes()
    assert shapes(num_classes=3) == plain | {"class_embedding.weight": (4, 8)}
    assert shapes(self_condition=True) == plain | {"embed_patches.weight": (8, 8)}
    assert shapes(learned_variance=True) == plain | {"final.weight": (8, 8), "final.bias": (8,)}
    assert shapes(dropout=0.5) == plain


# --------------------------------------------------------------------------------------- patches and positions


@pytest.mark.parametrize(("size", "patch"), [((8, 8), 2), ((6, 9), 3), ((4, 12), 4), ((5, 3), 1)])
def test_patches_come_together_again(size, patch):
    images = normal(2, 3, *size)
    patches = patchify(images, patch)
    assert patches.shape == (2, size[0] * size[1] // patch**2, 3 * patch**2)
    assert torch.equal(unpatchify(patches, patch, size[0]), images)
    # The second token of the first row, pixel by pixel, channels last.
    second = images[:, :, :patch, patch : 2 * patch] if size[1] > patch else None
    if second is not None:
        assert torch.equal(patches[:, 1], second.permute(0, 2, 3, 1).flatten(1))


def published_positions(rows: int, columns: int, dim: int) -> np.ndarray:
    """As ``get_2d_sincos_pos_embed`` of DiT and MAE has it, in float64: the column ("w goes first"), then the row."""

    def embed(places: np.ndarray) -> np.ndarray:
        omega = 1.0 / 10000 ** (np.arange(dim // 4, dtype=np.float64) / (dim / 4))
        angles = np.einsum("m,d->md", places.reshape(-1), omega)
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

    column, row = np.meshgrid(np.arange(columns, dtype=np.float64), np.arange(rows, dtype=np.float64))
    return np.concatenate([embed(column), embed(row)], axis=1)


@pytest.mark.parametrize(("rows", "columns", "dim"), [(14, 14, 128), (3, 5, 8), (1, 64, 4)])
def test_positions_are_the_published_ones(rows, columns, dim):
    found = positions(rows, columns, dim)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), published_positions(rows, columns, dim), rtol=0, atol=2e-5)


def test_positions_alone_tell_patches_apart(monkeypatch):
    """Without them, shuffling the patches of an image shuffles those of the output, and does nothing else."""
    net, images = small(), normal(2, 1, 8, 8)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))

    def shuffled(x):
        return unpatchify(patchify(x, 2)[:, order], 2, 8)

    assert not torch.allclose(net(shuffled(images), T), shuffled(net(images, T)), atol=1e-3)
    monkeypatch.setattr(dit_module, "positions", lambda *_: torch.zeros(16, 8))
    torch.testing.assert_close(net(shuffled(images), T), shuffled(net(images, T)))


# ----------------------------------------------------------------------------------------------- how it begins


@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["plain", "everything"])
def test_the_output_begins_at_zero(options):
    net = DiT(**(SMALL | options))
    output = net(normal(2, options.get("channels", 1), 8, 8), T)
    assert output.count_nonzero() == 0


def test_a_block_begins_as_the_identity():
    net = DiT(**SMALL)
    tokens, condition = normal(2, 5, 8), normal(2, 8, seed=1)
    for block in net.blocks:
        assert torch.equal(block(tokens, condition), tokens)
        randomized(block.norm1.modulation)
        assert not torch.equal(block(tokens, condition), tokens)


def test_weights_begin_as_published():
    """Xavier's uniform for what works on tokens, a normal of 0.02 for time and class, biases of 0."""
    net = DiT(1, 64, 2, 2, num_classes=99)
    for name, module in net.named_modules():
        if name.startswith("time_embedding.") and isinstance(module, nn.Linear):
            assert 0.018 < float(module.weight.detach().std()) < 0.022, name
        elif isinstance(module, nn.Linear) and "modulation" not in name and name != "final":
            bound = (6 / (module.in_features + module.out_features)) ** 0.5
            assert 0.95 * bound < float(module.weight.detach().abs().max()) <= bound, name
        assert getattr(module, "bias", None) is None or module.bias.count_nonzero() == 0, name
    assert 0.018 < float(net.class_embedding.weight.detach().std()) < 0.022


def test_adaln_is_its_formula():
    norm, tokens, condition = randomized(AdaLN(8, gated=True)), normal(2, 5, 8), normal(2, 8, seed=1)
    found, gate = norm(tokens, condition)
    x, c = tokens.double(), condition.double()
    weight, bias = norm.modulation.weight.double(), norm.modulation.bias.double()
    shift, scale, expected_gate = ((c * c.sigmoid()) @ weight.T + bias)[:, None].chunk(3, dim=2)
    normalized = (x - x.mean(2, keepdim=True)) / (x.var(2, keepdim=True, correction=0) + 1e-6).sqrt()
    torch.testing.assert_close(found.double(), normalized * (1 + scale) + shift, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gate.double(), expected_gate, rtol=1e-5, atol=1e-5)


def test_attention_is_that_of_torch():
    ours, tokens = small(dim=12, heads=3).blocks[0].attention, normal(2, 5, 12)
    theirs = nn.MultiheadAttention(12, 3, batch_first=True)
    theirs.in_proj_weight.data, theirs.in_proj_bias.data = ours.to_qkv.weight.data, ours.to_qkv.bias.data
    theirs.out_proj.load_state_dict(ours.to_out.state_dict())
    torch.testing.assert_close(ours(tokens), theirs(tokens, tokens, tokens, need_weights=False)[0])


def test_gradients_reach_every_parameter_as_the_gates_open():
    """The output's layer learns first, then what modulates, then what the gates let through."""
    net = DiT(**(SMALL | EVERYTHING))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    x, earlier, wanted = (normal(2, 3, 8, 8, seed=seed) for seed in (0, 1, 2))
    learns = []
    for labels in ([0, 1], [2, 3], [0, 1]):
        optimizer.zero_grad()
        output = net(x, T, earlier, torch.tensor(labels))
        (output - torch.cat((wanted, wanted), dim=1)).square().mean().backward()
        learns.append({name for name, p in net.named_parameters() if p.grad.count_nonzero()})
        optimizer.step()
    everything = {name for name, _ in net.named_parameters()}
    assert learns[0] == {"final.weight", "final.bias"}
    assert "blocks.0.norm1.modulation.weight" in learns[1]
    assert not any(".attention." in name for name in learns[1])
    assert learns[2] == everything


# ----------------------------------------------------------------------------------------- what it depends on


@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["plain", "everything"])
@pytest.mark.parametrize("size", [(8, 8), (4, 10), (12, 2)])
def test_any_size_that_the_patches_divide(size, options):
    net = small(**options)
    channels = options.get("channels", 1)
    output = net(normal(2, channels, *size), T)
    assert output.shape == (2, channels * (2 if options else 1), *size)
    assert bool(output.isfinite().all())


def test_rows_and_columns_are_not_mixed_up():
    """Turned on its side, an image gives the turned output, if patches and positions are turned as well."""
    net, x = small(), normal(2, 1, 4, 10)

    def turn_features(weight):  # of patches of 2x2 pixels
        return weight[[0, 2, 1, 3]]

    turned = small()
    turned.embed_patches.weight.data = turn_features(net.embed_patches.weight.data.T).T.clone()
    turned.final.weight.data = turn_features(net.final.weight.data).clone()
    turned.final.bias.data = turn_features(net.final.bias.data).clone()
    places = positions(2, 5, 8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dit_module, "positions", lambda *_: places.view(2, 5, 8).transpose(0, 1).flatten(0, 1))
        found = turned(x.mT, T)
    torch.testing.assert_close(found.mT, net(x, T))


def test_time_labels_and_the_earlier_estimate_matter():
    net = small(num_classes=3, self_condition=True)
    x, earlier = normal(2, 1, 8, 8), normal(2, 1, 8, 8, seed=1)
    labelled = [net(x, T, labels=torch.full((2,), label)) for label in range(4)]
    for i in range(4):
        for j in range(i):
            assert not torch.allclose(labelled[i], labelled[j])
    assert torch.equal(net(x, T), labelled[3])  # the last says "none"
    assert torch.equal(net(x, T), net(x, T, torch.zeros_like(x)))
    assert not torch.allclose(net(x, T), net(x, T, earlier))
    assert not torch.allclose(net(x, T), net(x, T + 1))


def test_each_image_is_on_its_own():
    net, x = small(num_classes=3), normal(2, 1, 8, 8)
    both = net(x, T, labels=torch.tensor([2, 0]))
    for i, label in enumerate((2, 0)):
        one = slice(i, i + 1)
        torch.testing.assert_close(both[one], net(x[one], T[one], labels=torch.tensor([label])))


def test_the_earlier_estimate_comes_before_the_image():
    """As in the U-Net: without weights for its channels, the network is the one that is not told of it."""
    net, plain = small(self_condition=True, patch_size=1), small(patch_size=1)
    state = net.state_dict()
    plain.load_state_dict(state | {"embed_patches.weight": state["embed_patches.weight"][:, 1:]})
    with torch.no_grad():
        net.embed_patches.weight[:, 0] = 0
    x, earlier = normal(2, 1, 4, 4), normal(2, 1, 4, 4, seed=1)
    torch.testing.assert_close(net(x, T, earlier), plain(x, T))


def test_dropout_zeroes_what_a_layer_adds():
    block = randomized(DiTBlock(64, 2, 4.0, dropout=0.6))
    tokens = normal(4, 16, 64)
    added = block(tokens, normal(4, 64, seed=1)) - tokens
    share = float((added == 0).float().mean())
    assert share == pytest.approx(0.6**2, abs=0.03)  # by both layers


def test_dropout_works_in_training_alone():
    net, plain, x = small(dropout=0.5), small(), normal(2, 1, 8, 8)
    assert not torch.allclose(net.train()(x, T), net(x, T))
    assert torch.equal(net.eval()(x, T), plain(x, T))


@pytest.mark.parametrize("channels", [1, 3])
def test_memory_layout_changes_nothing(channels):
    net, x = small(channels=channels), normal(2, channels, 8, 12)
    expected = net(x, T)
    torch.testing.assert_close(net(x.to(memory_format=torch.channels_last), T), expected)
    strided = normal(2, channels, 16, 24)
    strided[:, :, ::2, ::2] = x
    torch.testing.assert_close(net(strided[:, :, ::2, ::2], T), expected)


@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["plain", "everything"])
def test_it_works_under_bfloat16(options):
    net = small(**options)
    x = normal(2, options.get("channels", 1), 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        output = net(x, T)
    output.float().sum().backward()
    torch.testing.assert_close(output.float(), net(x, T), rtol=0.1, atol=0.1)
    assert all(bool(p.grad.isfinite().all()) for p in net.parameters())


def test_a_block_is_attention_and_perceptron_each_behind_its_gate():
    block = randomized(DiTBlock(8, 2, 4.0, 0.0))
    tokens, condition = normal(2, 5, 8), normal(2, 8, seed=1)
    normalized, gate = block.norm1(tokens, condition)
    middle = tokens + gate * block.attention(normalized)
    normalized, gate = block.norm2(middle, condition)
    narrow, _, wide = block.mlp
    hidden = torch.nn.functional.gelu(narrow(normalized), approximate="tanh")
    torch.testing.assert_close(block(tokens, condition), middle + gate * wide(hidden), rtol=1e-6, atol=1e-6)


# -------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("size", [(8, 9), (9, 8), (1, 1)])
def test_a_size_that_the_patches_do_not_divide_is_named(size):
    with pytest.raises(
        ValueError, match=f"an image of {size[0]}x{size[1]} pixels cannot be cut into patches of 2x2"
    ):
        small()(normal(2, 1, *size), T)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": 0}, "channels=0"),
        ({"dim": 0}, "dim=0"),
        ({"dim": 6}, "dim=6: must be a multiple of 4"),
        ({"heads": 3}, "dim=8: .*heads=3"),
        ({"depth": 0}, "depth=0"),
        ({"heads": 0}, "heads=0"),
        ({"patch_size": 0}, "patch_size=0"),
        ({"mlp_ratio": 0.0}, "mlp_ratio=0.0"),
        ({"mlp_ratio": float("nan")}, "mlp_ratio=nan"),
        ({"num_classes": 0}, "num_classes=0"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"dropout": -0.1}, "dropout=-0.1"),
    ],
)
def test_impossible_options_are_named(options, message):
    with pytest.raises(ValueError, match=message) as caught:
        small(**options)
    assert "\n" not in str(caught.value)
