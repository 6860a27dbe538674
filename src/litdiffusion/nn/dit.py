"""The diffusion transformer, DiT (Peebles & Xie, 2212.09748), with adaLN-zero conditioning.

At the sizes of ``configs/net/dit.yaml`` it has 2.4 million parameters, about as many as the blog's U-Net. It differs
from the published one in what it shares with the U-Net: the embedding of the time, self-conditioning, and dropout.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int, Num
from torch import Tensor, nn

from litdiffusion.nn.attention import softmax_attention
from litdiffusion.nn.blocks import require_positive
from litdiffusion.nn.embeddings import TimeEmbedding

Tokens = Float[Tensor, "batch n dim"]
PerImage = Float[Tensor, "batch dim"]


def patchify(
    images: Float[Tensor, "batch channels h w"], size: int
) -> Float[Tensor, "batch n patch_channels"]:
    """Cut images into patches of size x size pixels, row by row; each becomes the features of one token."""
    return rearrange(images, "b c (h p1) (w p2) -> b (h w) (p1 p2 c)", p1=size, p2=size)


def unpatchify(
    patches: Float[Tensor, "batch n patch_channels"], size: int, height: int
) -> Float[Tensor, "batch channels h w"]:
    """Join patches to images of ``height`` pixels: the inverse of ``patchify``."""
    rows = height // size
    return rearrange(patches, "b (h w) (p1 p2 c) -> b c (h p1) (w p2)", h=rows, p1=size, p2=size)


def positions(
    rows: int, columns: int, dim: int, device: torch.device | None = None
) -> Float[Tensor, "n dim"]:
    """Return fixed 2D sine and cosine embeddings of a grid's places, row by row, in float32.

    The first half of the features embeds the column and the second half the row: each dim / 4 sines, then as many
    cosines, at frequencies 10000^(-i / (dim / 4)), as in the published code.
    """
    quarter = dim // 4
    frequencies = 10_000.0 ** (-torch.arange(quarter, device=device) / quarter)

    def embed(count: int) -> Float[Tensor, "count half"]:
        angles = torch.arange(count, device=device)[:, None] * frequencies
        return torch.cat((angles.sin(), angles.cos()), dim=1)

    by_column = embed(columns).expand(rows, -1, -1)
    by_row = embed(rows)[:, None].expand(-1, columns, -1)
    return rearrange(torch.cat((by_column, by_row), dim=2), "rows columns d -> (rows columns) d")


class AdaLN(nn.Module):
    """Layer norm whose scale and shift are a function of the condition: norm(x) (1 + scale) + shift.

    Where ``gated``, a gate for the branch that follows is a function of it, too. Scale, shift and gate begin at 0.
    """

    def __init__(self, dim: int, gated: bool) -> None:
        super().__init__()
        self.parts = 3 if gated else 2
        self.norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.modulation = nn.Linear(dim, self.parts * dim)

    def forward(self, x: Tokens, condition: PerImage) -> tuple[Tokens, Float[Tensor, "batch 1 dim"] | None]:
        """Return the normalized tokens and the gate, if there is one."""
        modulation = self.modulation(F.silu(condition))
        shift, scale, *gate = rearrange(modulation, "b (parts d) -> parts b 1 d", parts=self.parts)
        return self.norm(x) * (1 + scale) + shift, gate[0] if gate else None


class SelfAttention(nn.Module):
    """Multi-head softmax attention among the tokens of an image."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Linear(dim, dim * 3)
        self.to_out = nn.Linear(dim, dim)

    def forward(self, x: Tokens) -> Tokens:
        """Attend from every token to every token."""
        q, k, v = rearrange(
            self.to_qkv(x), "b n (three heads d) -> three b heads n d", three=3, heads=self.heads
        )
        return self.to_out(rearrange(softmax_attention(q, k, v), "b heads n d -> b n (heads d)"))


class DiTBlock(nn.Module):
    """Attention, then a perceptron; each gated by the condition, so that the block begins as the identity."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float, dropout: float) -> None:
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.norm1 = AdaLN(dim, gated=True)
        self.attention = SelfAttention(dim, heads)
        self.norm2 = AdaLN(dim, gated=True)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, dim))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tokens, condition: PerImage) -> Tokens:
        """Apply the block."""
        for norm, layer in ((self.norm1, self.attention), (self.norm2, self.mlp)):
            normalized, gate = norm(x, condition)
            x = x + gate * self.dropout(layer(normalized))
        return x


class DiT(nn.Module):
    """Predict from images x at times t, [batch, channels, height, width] -> the same shape. A ``Network``.

    Args:
        channels: image channels.
        dim: features of each token; a multiple of 4 and of ``heads``.
        depth: how many blocks.
        heads: of every attention, of dim / heads features each.
        patch_size: side in pixels of the square that becomes one token; the cost grows with its inverse 4th power.
        mlp_ratio: hidden features of each perceptron, in multiples of ``dim``.
        self_condition: take an earlier estimate of x0 as further input channels (2208.04202).
        num_classes: take a class label in 0..num_classes, the last one for "no class"; None for no labels.
        learned_variance: return twice the channels: the target, then the variance (2102.09672).
        dropout: probability, on the outputs of attention and perceptron.

    Raises:
        ValueError: a number is out of range.
    """

    def __init__(
        self,
        channels: int,
        dim: int = 128,
        depth: int = 8,
        heads: int = 4,
        patch_size: int = 2,
        mlp_ratio: float = 4.0,
        self_condition: bool = False,
        num_classes: int | None = None,
        learned_variance: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        require_positive(channels=channels, dim=dim, depth=depth, heads=heads)
        require_positive(patch_size=patch_size, num_classes=num_classes)
        if dim % 4 or dim % heads:
            raise ValueError(f"dim={dim}: must be a multiple of 4, for the positions, and of heads={heads}")
        if not dim * mlp_ratio >= 1:
            raise ValueError(f"mlp_ratio={mlp_ratio}: must leave each perceptron a hidden feature")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout={dropout}: must lie in [0, 1)")
        self.self_condition = self_condition
        self.num_classes = num_classes
        self.learned_variance = learned_variance
        self.size_multiple = patch_size
        self.dim = dim
        pixels = patch_size**2
        self.embed_patches = nn.Linear(pixels * channels * (2 if self_condition else 1), dim)
        self.time_embedding = TimeEmbedding(dim, dim)
        if num_classes is not None:
            self.class_embedding = nn.Embedding(num_classes + 1, dim)
        self.blocks = nn.ModuleList(DiTBlock(dim, heads, mlp_ratio, dropout) for _ in range(depth))
        self.final_norm = AdaLN(dim, gated=False)
        self.final = nn.Linear(dim, pixels * channels * (2 if learned_variance else 1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights as published; every block begins as the identity, and the output at 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        for module in self.time_embedding:
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
        for module in self.modules():
            if isinstance(module, AdaLN):
                nn.init.zeros_(module.modulation.weight)
        nn.init.zeros_(self.final.weight)

    def forward(
        self,
        x: Float[Tensor, "batch channels h w"],
        t: Num[Tensor, " batch"],
        self_cond: Float[Tensor, "batch channels h w"] | None = None,
        labels: Int[Tensor, " batch"] | None = None,
    ) -> Float[Tensor, "batch out_channels h w"]:
        """Predict from images ``x`` at times ``t`` (counted from 0), and optionally an estimate of x0 and labels.

        Raises:
            ValueError: height or width is no multiple of ``patch_size``.
        """
        height, width = x.shape[-2:]
        patch = self.size_multiple
        if height % patch or width % patch:
            raise ValueError(
                f"an image of {height}x{width} pixels cannot be cut into patches of {patch}x{patch}"
            )
        if self.self_condition:
            x = torch.cat((torch.zeros_like(x) if self_cond is None else self_cond, x), dim=1)
        places = positions(height // patch, width // patch, self.dim, x.device)
        tokens = self.embed_patches(patchify(x, patch)) + places
        condition = self.time_embedding(t)
        if self.num_classes is not None:
            nothing = torch.full(t.shape, self.num_classes, device=t.device)
            condition = condition + self.class_embedding(nothing if labels is None else labels)
        for block in self.blocks:
            tokens = block(tokens, condition)
        tokens, _ = self.final_norm(tokens, condition)
        return unpatchify(self.final(tokens), patch, height)
