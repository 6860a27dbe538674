"""Self-attention over the pixels of a feature map, full and linear.

Both work on rows (batch, position, channel), a view of a channels-last feature map, so nothing is copied. Their 1x1
convolutions keep their names and shapes from the blog's checkpoints, and are applied as matrix products.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from litdiffusion.nn.blocks import GroupNorm


def softmax_attention(
    q: Float[Tensor, "batch heads n d"],
    k: Float[Tensor, "batch heads n d"],
    v: Float[Tensor, "batch heads n d"],
) -> Float[Tensor, "batch heads n d"]:
    """Scaled dot-product attention. On the CPU, torch's backward pass is several times faster in float32."""
    if not (q.device.type == "cpu" and q.dtype == torch.bfloat16):
        return F.scaled_dot_product_attention(q, k, v)
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float()).to(q.dtype)


def _rows(x: Float[Tensor, "batch dim h w"]) -> Float[Tensor, "batch hw dim"]:
    return rearrange(x, "b c h w -> b (h w) c")


class Attention(nn.Module):
    """Multi-head softmax attention (Vaswani et al., 1706.03762): cost grows with (h w)^2."""

    def __init__(self, dim: int, heads: int = 4, head_dim: int = 32) -> None:
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Conv2d(dim, heads * head_dim * 3, 1, bias=False)
        self.to_out = nn.Conv2d(heads * head_dim, dim, 1)

    def forward(self, x: Float[Tensor, "batch dim h w"]) -> Float[Tensor, "batch dim h w"]:
        """Attend from every pixel to every pixel."""
        qkv = F.linear(_rows(x), self.to_qkv.weight.flatten(1))
        q, k, v = rearrange(qkv, "b n (three heads d) -> three b heads n d", three=3, heads=self.heads)
        out = rearrange(softmax_attention(q, k, v), "b heads n d -> b n (heads d)")
        out = F.linear(out, self.to_out.weight.flatten(1), self.to_out.bias)
        return rearrange(out, "b (h w) c -> b c h w", h=x.shape[2])


class LinearAttention(nn.Module):
    """Linear attention: the cost grows with h w (Shen et al., 1812.01243).

        y_n = W_o . sum_m  softmax_d(q_n) softmax_m(k_m)^T  v_m,          v_m = W_v x_m

    Everything after the two softmaxes is linear, so the products are taken in the cheapest order: keys times the
    ``dim`` input channels before W_v, and W_o times each image's (d x d) context. Where ``dim`` is smaller than
    ``heads * head_dim``, as at the U-Net's full resolution, this saves a third of the operations and the two
    largest intermediate tensors.
    """

    def __init__(self, dim: int, heads: int = 4, head_dim: int = 32) -> None:
        super().__init__()
        self.heads = heads
        self.scale = head_dim**-0.5
        self.to_qkv = nn.Conv2d(dim, heads * head_dim * 3, 1, bias=False)
        self.to_out = nn.Conv2d(heads * head_dim, dim, 1)
        self.norm = GroupNorm(1, dim)

    def forward(self, x: Float[Tensor, "batch dim h w"]) -> Float[Tensor, "batch dim h w"]:
        """Attend from every pixel to every pixel, through one context matrix per head."""
        rows = _rows(x)
        w_q, w_k, w_v = self.to_qkv.weight.flatten(1).chunk(3)
        w_v = rearrange(w_v, "(heads e) c -> heads c e", heads=self.heads)
        w_o = rearrange(self.to_out.weight, "c (heads e) 1 1 -> heads e c", heads=self.heads)

        q = rearrange(F.linear(rows, w_q), "b n (heads d) -> b n heads d", heads=self.heads).softmax(-1)
        q = rearrange(q, "b n heads d -> b n (heads d)")
        # Positions last, so that the softmax over them reads contiguous memory. Without the expanded view of w_k,
        # matmul would compute the transpose.
        k = (w_k.expand(len(rows), -1, -1) @ rows.mT).softmax(-1)
        context = rearrange(k @ rows, "b (heads d) c -> b heads d c", heads=self.heads) @ (w_v @ w_o)
        out = q @ (rearrange(context, "b heads d c -> b (heads d) c") * self.scale) + self.to_out.bias
        return self.norm(rearrange(out, "b (h w) c -> b c h w", h=x.shape[2]))
