"""What a denoiser asks of its network: the contract that any network keeps, from this package or from elsewhere."""

from typing import Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor


@runtime_checkable
class Network(Protocol):
    """An ``nn.Module`` that a ``Denoiser`` can be built around.

    The simplest network declares nothing, is called as ``net(x, c_noise)`` and returns a tensor of x's shape.
    What it can do beyond that it declares by the attributes below; one that it lacks has the default given here. It
    is passed ``self_cond`` and ``labels`` only if it declares that it takes them.

    A network that ``configs/net`` offers also has ``channels``, ``self_condition``, ``num_classes`` and
    ``learned_variance`` among its constructor's arguments, and no preset sets any other.

    Attributes:
        self_condition: takes an earlier estimate of x_0 as ``self_cond`` (Chen et al., 2208.04202).
        num_classes: takes ``labels``; how many classes it can be asked for, or None if it knows of none.
        learned_variance: returns the variance as well (Nichol & Dhariwal, 2102.09672).
        size_multiple: height and width of every image must be multiples of it.
    """

    self_condition: bool = False
    num_classes: int | None = None
    learned_variance: bool = False
    size_multiple: int = 1

    def __call__(
        self,
        x: Float[Tensor, "batch channels h w"],
        c_noise: Float[Tensor, " batch"],
        /,
        self_cond: Float[Tensor, "batch channels h w"] | None = None,
        labels: Int[Tensor, " batch"] | None = None,
    ) -> Float[Tensor, "batch out_channels h w"]:
        """Return F(x; c_noise), to which the denoiser's parametrization gives a meaning.

        Args:
            x: noisy images, scaled by the parametrization's c_in.
            c_noise: how noisy each of them is, on the parametrization's scale: T t - 1 from 0 to T - 1, or
                log(sigma / alpha) / 4 for EDM.
            self_cond: an earlier estimate of x_0; None, the same as zeros, where there is none yet.
            labels: the class of each image, 0..num_classes - 1, or num_classes for "no class in particular"; None
                means that for the whole batch.

        Returns:
            As many channels as x, in any floating-point type; twice as many where the variance is learned. The
            second half is then v: it places the logarithm of each step's variance at the fraction (v + 1) / 2 of
            the way from beta-tilde's to beta's.
        """
        ...
