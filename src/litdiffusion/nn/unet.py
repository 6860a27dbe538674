"""The U-Net of The Annotated Diffusion Model.

At ``dim=28, dim_mults=(1, 2, 4), channels=1`` it has the blog's 2,020,257 parameters. Patches, class labels, learned
variance, dropout, other kinds of attention and gradient checkpointing are additions, off by default. Its layers are
in ``blocks.py`` and ``attention.py``.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Num
from torch import Tensor, nn

from litdiffusion.nn.attention import Attention, LinearAttention
from litdiffusion.nn.blocks import Downsample, GroupNorm, ResnetBlock, Upsample, require_positive
from litdiffusion.nn.embeddings import TimeEmbedding

AttentionKind = Literal["linear", "full", "none"]
ATTENTION: dict[str, type[Attention] | type[LinearAttention] | None] = {
    "linear": LinearAttention,
    "full": Attention,
    "none": None,
}

Images = Float[Tensor, "batch dim h w"]
Skips = tuple[Float[Tensor, "batch skip h w"], Float[Tensor, "batch skip h w"]]
Resampled = Float[Tensor, "batch dim2 h2 w2"]
Times = Float[Tensor, "batch time"]


class Residual(nn.Module):
    """x + layer(norm(x)), with one group over all channels as the norm."""

    def __init__(self, dim: int, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.norm = GroupNorm(1, dim)

    def forward(self, x: Float[Tensor, "batch dim h w"]) -> Float[Tensor, "batch dim h w"]:
        """Apply the layer and add its input."""
        return x + self.layer(self.norm(x))


class Stage(nn.Module):
    """One resolution: two residual blocks, attention, and the resampling to the next resolution."""

    def __init__(
        self, block1: nn.Module, block2: nn.Module, attention: nn.Module, resample: nn.Module
    ) -> None:
        super().__init__()
        self.block1 = block1
        self.block2 = block2
        self.attention = attention
        self.resample = resample


class DownStage(Stage):
    """A stage of the encoder; each residual block adds a skip connection."""

    def forward(self, x: Images, time: Times) -> tuple[Resampled, Skips]:
        """Return the input of the next resolution, and the two skips."""
        first = self.block1(x, time)
        second = self.attention(self.block2(first, time))
        return self.resample(second), (first, second)


class UpStage(Stage):
    """A stage of the decoder; each residual block takes a skip as further channels, last in, first out."""

    def forward(self, x: Images, time: Times, skips: Skips) -> Resampled:
        """Return the input of the next resolution."""
        first, second = skips
        x = self.block1(torch.cat((x, second), dim=1), time)
        x = self.block2(torch.cat((x, first), dim=1), time)
        return self.resample(self.attention(x))


class UNet(nn.Module):
    """Predict an image, such as the noise, from a noisy image and its time.

    Args:
        dim: channels of the first resolution, and of the sinusoidal embedding. Even.
        channels: image channels.
        dim_mults: channels of each resolution, in multiples of ``dim``; each but the last halves the image.
        init_dim: channels of the first convolution; ``dim`` when None.
        patch_size: pixels on a side of the square that becomes one position of the first resolution.
        out_channels: output channels; ``channels`` when None.
        self_condition: take an earlier estimate of x0 as further input channels (2208.04202).
        groups: groups of every group norm; must divide every width.
        dropout: probability, in the second block of each residual block.
        heads, head_dim: shape of every attention.
        attention: the kind at each resolution, ``linear``, ``full`` or ``none``; one word for all of them.
        num_classes: take a class label in 0..num_classes, the last one for "no class"; None for no labels.
        learned_variance: return twice the output channels: the target, then the variance (2102.09672).
        checkpoint_gradients: in training, keep only the input of each residual block and recompute the rest in the
            backward pass: a third more time for a fraction of the memory.

    Raises:
        ValueError: a number is out of range, or ``groups`` does not divide a width.
    """

    def __init__(
        self,
        dim: int,
        channels: int,
        dim_mults: Sequence[int] = (1, 2, 4),
        init_dim: int | None = None,
        patch_size: int = 1,
        out_channels: int | None = None,
        self_condition: bool = False,
        groups: int = 4,
        dropout: float = 0.0,
        heads: int = 4,
        head_dim: int = 32,
        attention: AttentionKind | Sequence[AttentionKind] = "linear",
        num_classes: int | None = None,
        learned_variance: bool = False,
        checkpoint_gradients: bool = False,
    ) -> None:
        super().__init__()
        init_dim = dim if init_dim is None else init_dim
        out_channels = channels if out_channels is None else out_channels
        kinds = [attention] * len(dim_mults) if isinstance(attention, str) else list(attention)
        if len(kinds) != len(dim_mults) or not set(kinds) <= set(ATTENTION):
            raise ValueError(
                f"attention={attention}: give one of {', '.join(ATTENTION)}, or one for each of dim_mults"
            )
        require_positive(
            dim=dim, channels=channels, init_dim=init_dim, out_channels=out_channels, groups=groups
        )
        require_positive(heads=heads, head_dim=head_dim, num_classes=num_classes, patch_size=patch_size)
        if not dim_mults or min(dim_mults) < 1:
            raise ValueError(f"dim_mults={list(dim_mults)}: give at least one, each at least 1")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout={dropout}: must lie in [0, 1)")
        widths = [init_dim, *(dim * mult for mult in dim_mults)]
        for width in (*widths, dim):
            if width % groups:
                common = math.gcd(*widths, dim)
                fitting = [str(number) for number in range(1, common + 1) if common % number == 0]
                raise ValueError(
                    f"groups={groups} does not divide a width of {width} channels (dim={dim},"
                    f" dim_mults={list(dim_mults)}); these do: {', '.join(fitting)}"
                )
        self.channels = channels
        self.self_condition = self_condition
        self.num_classes = num_classes
        self.learned_variance = learned_variance
        self.patch_size = patch_size
        self.size_multiple = patch_size * 2 ** (len(dim_mults) - 1)
        time_dim = dim * 4

        def block(dim_in: int, dim_out: int) -> ResnetBlock:
            return ResnetBlock(dim_in, dim_out, time_dim, groups, dropout, checkpoint_gradients)

        def attend(width: int, kind: str) -> nn.Module:
            layer = ATTENTION[kind]
            return nn.Identity() if layer is None else Residual(width, layer(width, heads, head_dim))

        def same_size(dim_in: int, dim_out: int) -> nn.Conv2d:
            return nn.Conv2d(dim_in, dim_out, 3, padding=1)

        self.init_conv = nn.Conv2d(channels * (2 if self_condition else 1) * patch_size**2, init_dim, 1)
        self.time_embedding = TimeEmbedding(dim, time_dim)
        if num_classes is not None:
            self.class_embedding = nn.Embedding(num_classes + 1, time_dim)

        pairs = list(pairwise(widths))
        last = len(pairs) - 1
        self.downs = nn.ModuleList(
            DownStage(
                block(narrow, narrow),
                block(narrow, narrow),
                attend(narrow, kinds[level]),
                (Downsample if level < last else same_size)(narrow, wide),
            )
            for level, (narrow, wide) in enumerate(pairs)
        )
        middle = widths[-1]
        self.mid_block1 = block(middle, middle)
        self.mid_attention = attend(middle, "full")
        self.mid_block2 = block(middle, middle)
        self.ups = nn.ModuleList(
            UpStage(
                block(wide + narrow, wide),
                block(wide + narrow, wide),
                attend(wide, kinds[level]),
                (Upsample if level > 0 else same_size)(wide, narrow),
            )
            for level, (narrow, wide) in reversed(list(enumerate(pairs)))
        )
        self.final_block = block(init_dim * 2, dim)
        self.final_conv = nn.Conv2d(dim, out_channels * (2 if learned_variance else 1) * patch_size**2, 1)

    def forward(
        self,
        x: Float[Tensor, "batch channels h w"],
        t: Num[Tensor, " batch"],
        self_cond: Float[Tensor, "batch channels h w"] | None = None,
        labels: Int[Tensor, " batch"] | None = None,
    ) -> Float[Tensor, "batch out_channels h w"]:
        """Predict from images ``x`` at times ``t`` (counted from 0), and optionally an estimate of x0 and labels.

        Raises:
            ValueError: height or width is no multiple of ``size_multiple``.
        """
        height, width = x.shape[-2:]
        if height % self.size_multiple or width % self.size_multiple:
            raise ValueError(
                f"an image of {height}x{width} pixels: this network takes multiples of {self.size_multiple}"
            )
        if self.self_condition:
            x = torch.cat((torch.zeros_like(x) if self_cond is None else self_cond, x), dim=1)

        # A one-channel image is in both memory formats; from the first feature map on, all is channels-last.
        x = self.init_conv(F.pixel_unshuffle(x, self.patch_size)).contiguous(
            memory_format=torch.channels_last
        )
        first = x
        time = self.time_embedding(t)
        if self.num_classes is not None:
            nothing = torch.full(t.shape, self.num_classes, device=t.device)
            time = time + self.class_embedding(nothing if labels is None else labels)

        skips = []
        for stage in self.downs:
            x, pair = stage(x, time)
            skips.append(pair)

        x = self.mid_block2(self.mid_attention(self.mid_block1(x, time)), time)

        for stage in self.ups:
            x = stage(x, time, skips.pop())

        x = self.final_conv(self.final_block(torch.cat((x, first), dim=1), time))
        return F.pixel_shuffle(x, self.patch_size)
