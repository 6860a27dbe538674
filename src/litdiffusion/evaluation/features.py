"""Feature networks: what FID and its relatives compare images by.

A feature network is any module that maps images [N, C, H, W] in [-1, 1] to features [N, D], or to a pair of features
and class logits [N, K]. ``configs/features`` names those that come along; ``features._target_`` may name another.
"""

import hashlib
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.backends import cudnn
from tqdm import tqdm

from litdiffusion.data.stores import to_float
from litdiffusion.errors import UserError, short_text
from litdiffusion.evaluation.dinov2 import vision_transformer
from litdiffusion.nn.classifier import Classifier
from litdiffusion.reporting.images import to_uint8
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
        self.name, self.outputs = name, tuple(wanted)
        path, load = weights, torch.hub.load
        try:
            if weights is not None:
                state = torch.load(weights, map_location="cpu", weights_only=True)  # runs no code of the file
                if name.startswith(
                    "dinov2"
                ):  # of which torch-fidelity takes what torch.hub makes, and no file
                    path, load = None, lambda *_: vision_transformer(state)
            with patch.object(torch.hub, "load", load):
                self.network: Any = create_feature_extractor(
                    name, wanted, feature_extractor_weights_path=path, cuda=False, verbose=False
                )
        except Exception as error:  # a download, a file or a name: it raises whatever came up
            reason = re.split(r"\. |\n", str(error))[0]
            raise ValueError(
                f"weights={weights}: they make no {name} ({reason})"
                if weights
                else f"torch-fidelity cannot make {name}: {reason}; weights=FILE names a local file"
            ) from error

    def forward(self, x: Float[Tensor, "batch channels h w"]) -> Tensor | tuple[Tensor, ...]:
        """Return features, and logits where there are any."""
        found: tuple[Tensor, ...] = self.network(to_uint8(x).expand(-1, 3, -1, -1))
        return found[0] if len(found) == 1 else found


def require_features(network: nn.Module, image_shape: tuple[int, int, int]) -> None:
    """Make sure, before anything is drawn or trained, that a network takes images of this shape.

    Raises:
        UserError: it does not, or returns no features.
    """
    pixels = torch.arange(math.prod(image_shape)).remainder(256).to(torch.uint8)
    try:
        extract(network, [pixels.reshape(1, *image_shape)])
    except RuntimeError as error:  # torch's, of shapes that do not fit
        raise UserError(
            f"features: {type(network).__name__} cannot take images of {list(image_shape)}: {short_text(error)}"
        ) from error


@torch.no_grad()
def extract(network: nn.Module, batches: Iterable[UInt8[Tensor, "_ channels h w"]]) -> FeatureSet:
    """Return what a network finds in batches of pixels, in float64 on the CPU.

    It computes in float32, also where autocast or TF32 is on: numbers that are compared and kept must not depend on
    what a machine has.

    Raises:
        UserError: the network does not return features [N, D], finite, with or without logits [N, K].
    """
    parameter = next(network.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    found: list[tuple[Tensor, ...]] = []
    for pixels in batches:
        with torch.autocast(device.type, enabled=False), cudnn.flags(enabled=True, allow_tf32=False):
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
    """Return what a network finds in images that every process holds; each looks at a part, and gets all."""
    mine = share_of(len(images))
    batches = torch.split(images[mine.start : mine.stop], batch_size)
    rank, _ = rank_and_number()
    parts = gathered(extract(network, tqdm(batches, desc="features", unit="batch", disable=rank > 0)))
    return joined([part for part in parts if len(part.features)])


def joined(parts: Sequence[FeatureSet]) -> FeatureSet:
    """Return several sets as one."""
    features, logits = zip(*parts, strict=True)
    return FeatureSet(torch.cat(features), None if logits[0] is None else torch.cat(logits))


def module_hash(module: nn.Module) -> str:
    """Return what tells one module from another: classes, settings and weights, as 12 hexadecimal digits."""
    digest = hashlib.sha256(f"{type(module).__module__}.{type(module).__qualname__}".encode())
    for name, part in module.named_modules():
        settings = sorted(
            (key, value)
            for key, value in vars(part).items()
            if isinstance(value, bool | int | float | str | tuple) and key[0] != "_" and key != "training"
        )
        digest.update(f"{name} {type(part).__qualname__} {settings}".encode())
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]
