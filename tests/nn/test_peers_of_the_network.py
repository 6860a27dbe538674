"""Embedding and attention beside torch's and diffusers' own, in float64 where they allow it."""

import pytest
import torch
from diffusers.models.attention_processor import Attention as DiffusersAttention
from diffusers.models.embeddings import get_timestep_embedding
from torch import nn

from litdiffusion.nn.attention import Attention
from litdiffusion.nn.embeddings import SinusoidalEmbedding
from small_worlds import normal, randomized

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("dim", [4, 28, 128])
@pytest.mark.parametrize("max_period", [10_000, 100])
def test_the_embedding_is_diffusers_with_sines_first_and_a_shift_of_1(dim, max_period):
    t = torch.tensor([0, 1, 37, 500, 999])
    theirs = get_timestep_embedding(
        t, dim, flip_sin_to_cos=False, downscale_freq_shift=1, max_period=max_period
    )
    # Angles up to 999 in float32: an ulp there is 6e-5.
    torch.testing.assert_close(SinusoidalEmbedding(dim, max_period)(t), theirs, rtol=0, atol=2e-4)


@pytest.mark.parametrize("options", [{"flip_sin_to_cos": True}, {"downscale_freq_shift": 0}])
def test_with_other_settings_theirs_is_another_embedding(options):
    t = torch.tensor([37, 500])
    theirs = get_timestep_embedding(t, 28, **({"downscale_freq_shift": 1} | options))
    assert not torch.allclose(SinusoidalEmbedding(28)(t), theirs, atol=0.1)


def ours(dim: int, heads: int, head_dim: int) -> Attention:
    return randomized(Attention(dim, heads, head_dim)).double()


@pytest.mark.parametrize(("dim", "heads", "head_dim"), [(12, 2, 5), (8, 4, 2), (16, 1, 16)])
@pytest.mark.parametrize("size", [(4, 4), (3, 5)])
def test_attention_is_diffusers(dim, heads, head_dim, size):
    attention, x = ours(dim, heads, head_dim), normal(2, dim, *size, dtype=torch.float64)
    theirs = DiffusersAttention(dim, heads=heads, dim_head=head_dim, bias=False).double()
    q, k, v = attention.to_qkv.weight[:, :, 0, 0].chunk(3)
    theirs.load_state_dict(
        {
            "to_q.weight": q,
            "to_k.weight": k,
            "to_v.weight": v,
            "to_out.0.weight": attention.to_out.weight[:, :, 0, 0],
            "to_out.0.bias": attention.to_out.bias,
        }
    )
    expected = theirs(x.flatten(2).mT).mT.view_as(x)
    torch.testing.assert_close(attention(x), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("dim", "heads"), [(12, 3), (8, 1)])
def test_attention_is_torchs(dim, heads):
    """Torch's own module has heads * head_dim = dim."""
    attention, x = ours(dim, heads, dim // heads), normal(2, dim, 3, 4, dtype=torch.float64)
    theirs = nn.MultiheadAttention(dim, heads, bias=False, batch_first=True).double()
    with torch.no_grad():
        theirs.in_proj_weight.copy_(attention.to_qkv.weight[:, :, 0, 0])
        theirs.out_proj.weight.copy_(attention.to_out.weight[:, :, 0, 0])
    rows = x.flatten(2).mT
    out, _ = theirs(rows, rows, rows)
    expected = (out + attention.to_out.bias).mT.reshape(x.shape)
    torch.testing.assert_close(attention(x), expected, rtol=1e-9, atol=1e-9)
