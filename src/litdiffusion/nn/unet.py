"""The U-Net of The Annotated Diffusion Model, part for part.

At ``dim=28, dim_mults=(1, 2, 4), channels=1`` it has 2,020,257 parameters. To change a brick, see
``blocks.py``; to change how bricks are stacked, this is the file.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Float, Num
from torch import Tensor, nn

from litdiffusion.nn.attention import Attention, LinearAttention
from litdiffusion.nn.blocks import Downsample, ResnetBlock, Upsample
from litdiffusion.nn.embeddings import TimeEmbedding

Images = Float[Tensor, "batch dim h w"]
Skips = tuple[Float[Tensor, "batch skip h w"], Float[Tensor, "batch skip h w"]]
Resampled = Float[Tensor, "batch dim2 h2 w2"]
Times = Float[Tensor, "batch time"]


class Residual(nn.Module):
    """x + layer(norm(x)), with one group over all channels as the norm."""

    def __init__(self, dim: int, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.norm = nn.GroupNorm(1, dim)

    def forward(self, x: Float[Tensor, "batch dim h w"]) -> Float[Tensor, "batch dim h w"]:
        """Apply the layer and add its input."""
        return x + self.layer(self.norm(x))


class Stage(nn.Module):
    """One resolution: two residual blocks, linear attention, and the way to the next resolution."""

    def __init__(
        self, block1: nn.Module, block2: nn.Module, attention: nn.Module, resample: nn.Module
    ) -> None:
        super().__init__()
        self.block1 = block1
        self.block2 = block2
        self.attention = attention
        self.resample = resample


class DownStage(Stage):
    """On the way down, each residual block leaves a skip for the way up."""

    def forward(self, x: Images, time: Times) -> tuple[Resampled, Skips]:
        """Return the input of the next resolution, and the two skips."""
        first = self.block1(x, time)
        second = self.attention(self.block2(first, time))
        return self.resample(second), (first, second)


class UpStage(Stage):
    """On the way up, each residual block takes a skip as further channels, last in first out."""

    def forward(self, x: Images, time: Times, skips: Skips) -> Resampled:
        """Return the input of the next resolution."""
        first, second = skips
        x = self.block1(torch.cat((x, second), dim=1), time)
        x = self.block2(torch.cat((x, first), dim=1), time)
        return self.resample(self.attention(x))


class UNet(nn.Module):
    """Predict one image from another: noisy image and time in, the target's image out.

    Args:
        dim: channels of the first resolution, and of the sinusoidal embedding. Even.
        channels: image channels.
        dim_mults: channels of each resolution, in multiples of ``dim``; each but the last halves the image.
        init_dim: channels of the first convolution; ``dim`` when None.
        out_channels: output channels; ``channels`` when None.
        self_condition: take an earlier estimate of x0 as further input channels (2208.04202).
        groups: groups of every group norm; must divide every width.
        dropout: probability, in the second block of each residual block.
        heads, head_dim: shape of every attention.
    """

    def __init__(
        self,
        dim: int,
        channels: int,
        dim_mults: Sequence[int] = (1, 2, 4),
        init_dim: int | None = None,
        out_channels: int | None = None,
        self_condition: bool = False,
        groups: int = 4,
        dropout: float = 0.0,
        heads: int = 4,
        head_dim: int = 32,
    ) -> None:
        super().__init__()
        init_dim = dim if init_dim is None else init_dim
        widths = [init_dim, *(dim * mult for mult in dim_mults)]
        for width in (*widths, dim):
            if width % groups:
                raise ValueError(f"groups={groups} does not divide a width of {width} channels")
        self.channels = channels
        self.self_condition = self_condition
        self.num_halvings = len(dim_mults) - 1
        time_dim = dim * 4

        def block(dim_in: int, dim_out: int) -> ResnetBlock:
            return ResnetBlock(dim_in, dim_out, time_dim, groups, dropout)

        def attention(width: int, kind: type[Attention] | type[LinearAttention]) -> Residual:
            return Residual(width, kind(width, heads, head_dim))

        def same_size(dim_in: int, dim_out: int) -> nn.Conv2d:
            return nn.Conv2d(dim_in, dim_out, 3, padding=1)

        self.init_conv = nn.Conv2d(channels * (2 if self_condition else 1), init_dim, 1)
        self.time_embedding = TimeEmbedding(dim, time_dim)

        pairs = list(pairwise(widths))
        last = len(pairs) - 1
        self.downs = nn.ModuleList(
            DownStage(
                block(narrow, narrow),
                block(narrow, narrow),
                attention(narrow, LinearAttention),
                (Downsample if level < last else same_size)(narrow, wide),
            )
            for level, (narrow, wide) in enumerate(pairs)
        )
        middle = widths[-1]
        self.mid_block1 = block(middle, middle)
        self.mid_attention = attention(middle, Attention)
        self.mid_block2 = block(middle, middle)
        self.ups = nn.ModuleList(
            UpStage(
                block(wide + narrow, wide),
                block(wide + narrow, wide),
                attention(wide, LinearAttention),
                (Upsample if level > 0 else same_size)(wide, narrow),
            )
            for level, (narrow, wide) in reversed(list(enumerate(pairs)))
        )
        self.final_block = block(init_dim * 2, dim)
        self.final_conv = nn.Conv2d(dim, channels if out_channels is None else out_channels, 1)

    def forward(
        self,
        x: Float[Tensor, "batch channels h w"],
        t: Num[Tensor, " batch"],
        self_cond: Float[Tensor, "batch channels h w"] | None = None,
    ) -> Float[Tensor, "batch out_channels h w"]:
        """Predict from images ``x`` at times ``t`` (counted from 0), and perhaps an estimate of x0.

        Raises:
            ValueError: height or width cannot be halved ``len(dim_mults) - 1`` times.
        """
        height, width = x.shape[-2:]
        if height % 2**self.num_halvings or width % 2**self.num_halvings:
            raise ValueError(
                f"an image of {height}x{width} pixels cannot be halved {self.num_halvings} times"
            )
        if self.self_condition:
            x = torch.cat((torch.zeros_like(x) if self_cond is None else self_cond, x), dim=1)

        # A one-channel image fits both memory formats: the first feature map is where channels-last begins.
        x = self.init_conv(x).contiguous(memory_format=torch.channels_last)
        first = x
        time = self.time_embedding(t)

        skips = []
        for stage in self.downs:
            x, pair = stage(x, time)
            skips.append(pair)

        x = self.mid_block2(self.mid_attention(self.mid_block1(x, time)), time)

        for stage in self.ups:
            x = stage(x, time, skips.pop())

        return self.final_conv(self.final_block(torch.cat((x, first), dim=1), time))
