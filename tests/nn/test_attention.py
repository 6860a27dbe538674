import pytest
import torch
from torch import nn
from torch.nn import functional

from litdiffusion.nn.attention import Attention, LinearAttention, softmax_attention
from peers import blog_unet
from peers.blog_weights import carry_over
from small_worlds import normal, randomized

pytestmark = pytest.mark.usefixtures("one_thread")

PAIRS = {"full": (Attention, blog_unet.Attention), "linear": (LinearAttention, blog_unet.LinearAttention)}


def with_the_blogs_weights(kind: str, dim: int, heads: int, head_dim: int) -> tuple[nn.Module, nn.Module]:
    ours, theirs = (make(dim, heads, head_dim) for make in PAIRS[kind])
    carry_over(randomized(theirs), ours)
    return ours, theirs


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize(("dim", "heads", "head_dim"), [(28, 4, 32), (12, 2, 4), (5, 1, 3)])
@pytest.mark.parametrize("size", [(4, 4), (3, 5), (1, 1)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_attention_is_the_blogs(kind, dim, heads, head_dim, size, channels_last):
    ours, theirs = with_the_blogs_weights(kind, dim, heads, head_dim)
    x = normal(2, dim, *size)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [net(each) for net, each in zip((ours, theirs), inputs, strict=True)]
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)
    for output in outputs:
        (output * normal(*output.shape, seed=1)).sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.to_qkv.weight.grad, theirs.to_qkv.weight.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", PAIRS)
def test_attention_survives_large_activations(kind):
    """Softmax of 1e4 must not overflow."""
    ours, _ = with_the_blogs_weights(kind, 8, 2, 4)
    assert bool(torch.isfinite(ours(1e4 * normal(2, 8, 4, 4))).all())


@pytest.mark.parametrize("kind", PAIRS)
def test_pixels_have_no_order(kind):
    """Attention has no positions: a permutation of pixels goes through it."""
    ours, _ = with_the_blogs_weights(kind, 8, 2, 4)
    x = normal(2, 8, 4, 4)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))

    def shuffled(image):
        return image.flatten(2)[..., order].view_as(image)

    torch.testing.assert_close(ours(shuffled(x)), shuffled(ours(x)), rtol=1e-5, atol=1e-5)


def test_full_attention_is_the_formula():
    torch.manual_seed(0)
    ours = Attention(6, heads=1, head_dim=5)
    x = normal(1, 6, 2, 3)
    rows = x.flatten(2)[0].T
    q, k, v = (rows @ w.T for w in ours.to_qkv.weight[..., 0, 0].chunk(3))
    weights = (q @ k.T / 5**0.5).softmax(-1)
    expected = (weights @ v) @ ours.to_out.weight[..., 0, 0].T + ours.to_out.bias
    torch.testing.assert_close(ours(x)[0].flatten(1).T, expected)


def test_full_attention_under_bfloat16_is_that_of_float32_rounded():
    q, k, v = (normal(2, 3, 6, 4, seed=seed).bfloat16().requires_grad_() for seed in range(3))
    expected = functional.scaled_dot_product_attention(
        *(each.detach().float() for each in (q, k, v))
    ).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        output = softmax_attention(q, k, v)
    torch.testing.assert_close(output, expected, rtol=0, atol=0)
    output.sum().backward()
    assert {each.grad.dtype for each in (q, k, v)} == {torch.bfloat16}
