"""Where images come from. A new source is one class here and one file in ``configs/data``."""

from litdiffusion.data.sources.base import Source, Split
from litdiffusion.data.sources.digits import Digits
from litdiffusion.data.sources.fashion_mnist import FashionMNIST
from litdiffusion.data.sources.hub import Hub
from litdiffusion.data.sources.image_folder import ImageFolder

__all__ = ["Source", "Split", "Digits", "FashionMNIST", "Hub", "ImageFolder"]
