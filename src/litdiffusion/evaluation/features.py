"""Feature networks: what FID and its relatives compare images by.

A feature network is any module that maps images [N, C, H, W] in [-1, 1] to features [N, D], or to a pair of features
and class logits [N, K]. ``configs/features`` names those that come along; ``features._target_`` may name another.
"""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from tqdm import tqdm

from litdiffusion.data.stores import to_float
from litdiffusion.errors import UserError
from litdiffusion.nn.classifier import Classifier
from litdiffusion.system.processes import gathered, rank_and_number, share_of

WEIGHTS = Path(__file__).parent / "weights"


class FeatureSet(NamedTuple):
    """What a network finds in a set of images.

    Fields:
        features: float64 [N, D].
        logits: of the network's classes, float64 [N, K]; None where it has none.
    """

    features: Tensor
    logits: Tensor | None = None

    def some(self, count: int) -> "FeatureSet":
        """Return ``count`` of the images, evenly spread over the set, or all where there are no more."""
        size = len(self.features)
        if count >= size:
            return self
        rows = torch.arange(count) * size // count
        return FeatureSet(self.features[rows], None if self.logits is None else self.logits[rows])


class FashionMNISTFeatures(nn.Module):
    """The classifier of ``scripts/train_features.py``: 128 features of gray images of 28x28 pixels.

    Args:
        sha256: of the file of weights that comes along.

    Raises:
        ValueError: it is another file.
    """

    def __init__(self, sha256: str) -> None:
        super().__init__()
        path = WEIGHTS / "fashion_mnist.pt"
        if hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
            raise ValueError(f"sha256={sha256[:12]}...: {path} is another file; numbers would not compare")
        self.classifier = Classifier()
        self.classifier.load_state_dict(torch.load(path, weights_only=True))

    def forward(self, x: Float[Tensor, "batch channels h w"]) -> tuple[Tensor, Tensor]:
        """Return features and logits."""
        if x.shape[1:] != (1, 28, 28):
            raise UserError(
                f"features=fashion_mnist takes gray images of 28x28, and these are {list(x.shape[1:])}:"
                " choose features=inception or dinov2"
            )
        features = self.classifier.features(x)
        return features, self.classifier.head(features)


class TorchFidelityFeatures(nn.Module):
    """A network of the torch-fidelity package (the extra ``features``); gray images are repeated to three channels.

    Args:
        name: torch-fidelity's: ``inception-v3-compat``, ``dinov2-vit-b-14``, ...
        features: which of the network's outputs to compare by.
        logits: which of them are class logits; None for none.
        weights: a local file; None to download it.

    Raises:
        ValueError: the package is missing, or the network cannot be made.
    """

    def __init__(
        self, name: str, features: str, logits: str | None = None, weights: str | None = None
    ) -> None:
        super().__init__()
        try:
            from torch_fidelity.utils import create_feature_extractor
        except ImportError as error:
            raise ValueError('it needs torch-fidelity: pip install "litdiffusion[features]"') from error
        wanted = [features] if logits is None else [features, logits]
        self.outputs = tuple(wanted)
        try:
            self.network: Any = create_feature_extractor(
                name, wanted, feature_extractor_weights_path=weights, cuda=False, verbose=False
            )
        except Exception as error:  # a download, a file or a name: it raises whatever came up
            raise ValueError(
                f"torch-fidelity cannot make {name}: {error}; weights=FILE names a local file"
            ) from error

    def forward(self, x: Float[Tensor, "batch channels h w"]) -> Tensor | tuple[Tensor, ...]:
        """Return features, and logits where there are any."""
        pixels = ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        found: tuple[Tensor, ...] = self.network(pixels.expand(-1, 3, -1, -1))
        return found[0] if len(found) == 1 else found


@torch.no_grad()
def extract(network: nn.Module, batches: Iterable[UInt8[Tensor, "_ channels h w"]]) -> FeatureSet:
    """Return what a network finds in batches of pixels, in float64 on the CPU.

    It computes in float32, also where autocast is on: numbers that are compared and kept must not depend on whether
    a machine has bfloat16.

    Raises:
        UserError: the network does not return features [N, D], finite, with or without logits [N, K].
    """
    parameter = next(network.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    found: list[tuple[Tensor, ...]] = []
    for pixels in batches:
        with torch.autocast(device.type, enabled=False):
            result = network.eval()(to_float(pixels.to(device)))
        parts = result if isinstance(result, tuple) else (result,)
        rows = [list(each.shape[:-1]) if isinstance(each, Tensor) else None for each in parts]
        if len(parts) > 2 or any(each != [len(pixels)] for each in rows):
            raise UserError(
                f"features: {type(network).__name__} must return features [N, D], or a pair of them and logits [N, K]"
            )
        found.append(tuple(each.double().cpu() for each in parts))
        if not all(bool(each.isfinite().all()) for each in found[-1]):
            raise UserError(f"features: {type(network).__name__} returns NaN or infinity")
    return FeatureSet(*map(torch.cat, zip(*found, strict=True)))


def extract_shared(
    network: nn.Module, images: UInt8[Tensor, "_ channels h w"], batch_size: int
) -> FeatureSet:
    """Return what a network finds in images that every process holds; each looks at a part, and gets all.

    Raises:
        UserError: all images are the same; their features may differ by rounding.
    """
    if len(images) > 1 and bool((images == images[0]).all()):
        raise UserError(f"all {len(images)} images are the same: there is nothing to compare")
    mine = share_of(len(images))
    batches = torch.split(images[mine.start : mine.stop], batch_size)
    rank, _ = rank_and_number()
    parts = gathered(extract(network, tqdm(batches, desc="features", unit="batch", disable=rank > 0)))
    return joined([part for part in parts if len(part.features)])


def joined(parts: Sequence[FeatureSet]) -> FeatureSet:
    """Return several sets as one."""
    features, logits = zip(*parts, strict=True)
    return FeatureSet(torch.cat(features), None if logits[0] is None else torch.cat(logits))


def feature_hash(network: nn.Module) -> str:
    """Return what tells one network from another: classes, settings and weights, as 12 hexadecimal digits."""
    digest = hashlib.sha256(f"{type(network).__module__}.{type(network).__qualname__}".encode())
    for name, module in network.named_modules():
        settings = sorted(
            (key, value)
            for key, value in vars(module).items()
            if isinstance(value, bool | int | float | str | tuple) and key[0] != "_" and key != "training"
        )
        digest.update(f"{name} {type(module).__qualname__} {settings}".encode())
    for name, value in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]
