"""A small convolutional classifier, whose last layer but one serves as the features of image metrics."""

from jaxtyping import Float
from torch import Tensor, nn

WIDTHS = (32, 64, 96, 128, 128)
NUM_FEATURES = WIDTHS[-1]


class Classifier(nn.Module):
    """Five 3x3 convolutions, two halvings, the mean over positions, one linear layer.

    Args:
        channels: of the images.
        num_classes: how many.
    """

    def __init__(self, channels: int = 1, num_classes: int = 10) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i, (before, after) in enumerate(zip((channels, *WIDTHS), WIDTHS, strict=False)):
            layers += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
            if i in (0, 2):
                layers.append(nn.MaxPool2d(2))
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(NUM_FEATURES, num_classes)

    def features(self, x: Float[Tensor, "batch channels h w"]) -> Float[Tensor, "batch features"]:
        """Return the features of images in [-1, 1]: 128 numbers of at least 0 for each."""
        maps: Tensor = self.body(x)
        return maps.mean((2, 3))

    def forward(self, x: Float[Tensor, "batch channels h w"]) -> Float[Tensor, "batch classes"]:
        """Return the logits of images in [-1, 1]."""
        logits: Tensor = self.head(self.features(x))
        return logits
