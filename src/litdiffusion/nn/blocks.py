"""The layers of the U-Net: weight-standardized convolutions, residual blocks, resampling.

All of them keep feature maps channels-last in memory.
"""

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def require_positive(**sizes: int | None) -> None:
    """Check that sizes are at least 1; None is one that is not given.

    Raises:
        ValueError: naming the first that is not.
    """
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise ValueError(f"{name}={size}: must be at least 1")


class WeightStandardizedConv2d(nn.Conv2d):
    """A convolution whose filters have mean 0 and variance 1 (Qiao et al., 1903.10520).

        W_hat = (W - mean(W)) / sqrt(var(W) + eps)         mean and variance over each output filter

    This is a layer norm of the flattened filters. It is computed in float32 under any autocast: bfloat16 would
    round the small variances of the filters too coarsely.
    """

    eps = 1e-5

    def standardized_weight(self) -> Float[Tensor, "out in kh kw"]:
        """Return W_hat in float32."""
        with torch.autocast(self.weight.device.type, enabled=False):
            filters = self.weight.float().flatten(1)
            return F.layer_norm(filters, filters.shape[1:], eps=self.eps).view_as(self.weight)

    def forward(self, x: Float[Tensor, "batch in h w"]) -> Float[Tensor, "batch out h2 w2"]:
        """Convolve with W_hat."""
        weight = self.standardized_weight().to(self.weight.dtype)
        return self._conv_forward(x, weight, self.bias)

    def folded(self) -> nn.Conv2d:
        """Return a plain convolution that computes the same, for inference, where the weights are constant."""
        names = ["in_channels", "out_channels", "kernel_size", "stride"]
        names += ["padding", "dilation", "groups", "padding_mode"]
        arguments: dict[str, Any] = {name: getattr(self, name) for name in names}
        plain = nn.Conv2d(**arguments, bias=self.bias is not None)
        state = {"weight": self.standardized_weight().detach()}
        if self.bias is not None:
            state["bias"] = self.bias.detach()
        plain.load_state_dict(state)
        return plain.to(self.weight.device, self.weight.dtype).requires_grad_(False)


class GroupNorm(nn.GroupNorm):
    """Group norm (Wu & He, 1803.08494); on the CPU, half precision is computed in float32 and converted back.

    On the CPU torch's bfloat16 kernel takes twice as long as its float32 kernel with both conversions. On GPUs
    autocast itself chooses float32.
    """

    def forward(self, x: Float[Tensor, "batch dim h w"]) -> Float[Tensor, "batch dim h w"]:
        """Normalize."""
        if x.device.type != "cpu" or x.dtype not in (torch.bfloat16, torch.float16):
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            weight, bias = self.weight.float(), self.bias.float()
            return F.group_norm(x.float(), self.num_groups, weight, bias, self.eps).to(x.dtype)


class Block(nn.Module):
    """Convolution, group norm, optional scale and shift by the time, SiLU, optional dropout."""

    def __init__(self, dim: int, dim_out: int, groups: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv = WeightStandardizedConv2d(dim, dim_out, 3, padding=1)
        self.norm = GroupNorm(groups, dim_out)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Float[Tensor, "batch in h w"],
        scale_shift: tuple[Float[Tensor, "batch out 1 1"], Float[Tensor, "batch out 1 1"]] | None = None,
    ) -> Float[Tensor, "batch out h w"]:
        """Apply the block."""
        x = self.norm(self.conv(x))
        if scale_shift is not None:
            scale, shift = scale_shift
            x = torch.addcmul(shift, x, scale + 1)
        return self.dropout(F.silu(x))


class ResnetBlock(nn.Module):
    """Two blocks and a shortcut (He et al., 1512.03385); the time scales and shifts the output of the first.

    With ``checkpoint``, only the input is kept for the backward pass, which recomputes the rest.
    """

    def __init__(
        self,
        dim: int,
        dim_out: int,
        time_dim: int,
        groups: int,
        dropout: float = 0.0,
        checkpoint: bool = False,
    ) -> None:
        super().__init__()
        self.checkpoint = checkpoint
        self.time_mlp = nn.Sequential(nn.SiLU(), nn.Linear(time_dim, dim_out * 2))
        self.block1 = Block(dim, dim_out, groups)
        self.block2 = Block(dim_out, dim_out, groups, dropout)
        self.shortcut = nn.Conv2d(dim, dim_out, 1) if dim != dim_out else nn.Identity()

    def forward(
        self, x: Float[Tensor, "batch in h w"], time: Float[Tensor, "batch time"]
    ) -> Float[Tensor, "batch out h w"]:
        """Apply the block at the embedded time."""
        if self.checkpoint and self.training and torch.is_grad_enabled():
            result: Tensor = checkpoint(self._forward, x, time, use_reentrant=False)
            return result
        return self._forward(x, time)

    def _forward(
        self, x: Float[Tensor, "batch in h w"], time: Float[Tensor, "batch time"]
    ) -> Float[Tensor, "batch out h w"]:
        scale, shift = rearrange(self.time_mlp(time), "b (two c) -> two b c 1 1", two=2)
        h = self.block2(self.block1(x, (scale, shift)))
        return h + self.shortcut(x)


class PatchesToChannels(nn.Module):
    """Pixel unshuffling by 2 with a channels-last result, which torch's own has on the CPU only."""

    def forward(self, x: Float[Tensor, "batch in h w"]) -> Float[Tensor, "batch out h2 w2"]:
        """Turn each 2x2 patch into channels."""
        patches = rearrange(x, "b c (h p1) (w p2) -> b h w (c p1 p2)", p1=2, p2=2)
        return rearrange(patches, "b h w c -> b c h w")


class Downsample(nn.Sequential):
    """Halve height and width: each 2x2 patch becomes channels, then a 1x1 convolution mixes them."""

    def __init__(self, dim: int, dim_out: int) -> None:
        super().__init__(PatchesToChannels(), nn.Conv2d(dim * 4, dim_out, 1))


class Upsample(nn.Conv2d):
    """Double height and width by repeating pixels, then smooth with a 3x3 convolution.

    Repeating pixels is a transposed convolution with a 2x2 box of ones. Both are computed as one transposed
    convolution of stride 2, whose 4x4 filters are the 3x3 ones convolved with that box: the same sums with 4/9
    of the multiplications, and without the repeated pixels in memory.
    """

    def __init__(self, dim: int, dim_out: int) -> None:
        super().__init__(dim, dim_out, 3, padding=1)

    def forward(self, x: Float[Tensor, "batch in h w"]) -> Float[Tensor, "batch out h2 w2"]:
        """Return twice the height and width."""
        widened = 4 * F.avg_pool2d(F.pad(self.weight, (1, 1, 1, 1)), kernel_size=2, stride=1)
        # A transposed convolution mirrors its filters and has the input channels first.
        weight = rearrange(widened.flip(2, 3), "o i kh kw -> i o kh kw")
        return F.conv_transpose2d(x, weight, self.bias, stride=2, padding=1)


def fold_weight_standardization(net: nn.Module) -> nn.Module:
    """Replace every weight-standardized convolution in ``net`` by a plain one, in place; return ``net``."""
    for name, child in net.named_children():
        if isinstance(child, WeightStandardizedConv2d):
            setattr(net, name, child.folded())
        else:
            fold_weight_standardization(child)
    return net
