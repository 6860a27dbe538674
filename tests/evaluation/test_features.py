"""Feature networks: what they return, what is kept of real images, and what is refused."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from litdiffusion.data.datamodule import ImageDataModule
from litdiffusion.data.sources import Digits
from litdiffusion.data.stores import to_float
from litdiffusion.errors import UserError
from litdiffusion.evaluation import reference
from litdiffusion.evaluation.features import FeatureSet, extract, module_hash, require_features
from litdiffusion.evaluation.reference import real_features

PIXELS = torch.randint(0, 256, (10, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


class WithClasses(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.flatten(1), x.mean((2, 3)).repeat(1, 3)


class Wrong(nn.Module):
    def __init__(self, returned: object) -> None:
        super().__init__()
        self.returned = returned

    def forward(self, x: Tensor) -> object:
        return self.returned


def test_features_of_batches_are_those_of_all() -> None:
    found = extract(WithClasses(), torch.split(PIXELS, 3))
    assert torch.equal(found.features, to_float(PIXELS).flatten(1).double())
    assert found.logits is not None
    assert found.logits.shape == (10, 3)
    assert found.logits.dtype == torch.float64
    assert extract(nn.Flatten(), [PIXELS]).logits is None


@pytest.mark.parametrize(
    "returned",
    [
        None,
        torch.zeros(10),
        torch.zeros(9, 4),
        torch.zeros(10, 4, 4),
        (torch.zeros(10, 4),) * 3,
        (torch.zeros(10, 4), 1),
    ],
)
def test_what_a_network_must_return(returned: object) -> None:
    with pytest.raises(UserError, match=r"Wrong must return features \[N, D\]"):
        extract(Wrong(returned), [PIXELS])


def test_infinite_features_are_refused() -> None:
    with pytest.raises(UserError, match="Wrong returns NaN or infinity"):
        extract(Wrong(torch.full((10, 4), torch.nan)), [PIXELS])


@pytest.mark.parametrize(
    ("network", "reason"),
    [
        (
            nn.Sequential(nn.Flatten(), nn.Linear(10, 2)),
            r"Sequential cannot take images of \[1, 8, 8\]: mat1",
        ),
        (nn.Conv2d(1, 1, 3), r"Conv2d must return features \[N, D\]"),
    ],
)
def test_a_network_that_does_not_take_the_images(network: nn.Module, reason: str) -> None:
    require_features(nn.Flatten(), (1, 8, 8))
    with pytest.raises(UserError, match=reason):
        require_features(network, (1, 8, 8))


def test_features_are_of_full_precision_under_autocast() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 8))
    with torch.autocast("cpu", torch.bfloat16):
        found = extract(net, [PIXELS])
    assert torch.equal(found.features, extract(net, [PIXELS]).features)


def test_features_are_of_full_precision_where_convolutions_may_use_tf32() -> None:
    class Flag(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.full((len(x), 1), float(torch.backends.cudnn.allow_tf32))

    before = torch.backends.cudnn.allow_tf32
    assert extract(Flag(), [PIXELS]).features.max() == 0
    assert torch.backends.cudnn.allow_tf32 == before


def test_some_of_a_set_are_evenly_spread() -> None:
    whole = FeatureSet(torch.arange(10.0)[:, None])
    assert whole.some(4).features.flatten().tolist() == [0, 2, 5, 7]
    assert whole.some(20) is whole


def test_the_hash_is_of_class_and_weights() -> None:
    one, other = nn.BatchNorm1d(3), nn.BatchNorm1d(3)  # with a weight that is a single number
    nn.init.zeros_(one.weight)
    names = {module_hash(net) for net in (one, other, nn.Flatten(), WithClasses())}
    assert len(names) == 4
    other.load_state_dict(one.state_dict())
    assert module_hash(other) == module_hash(one)
    assert module_hash(nn.AvgPool2d(2)) != module_hash(nn.AvgPool2d(4))  # settings count too


def test_real_features_are_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = ImageDataModule(Digits(), 100, seed=0)
    pixels = torch.cat([batch.images for batch in data.in_order("test")])
    found = real_features(data, "test", WithClasses(), tmp_path / "cache", "hash")
    assert torch.equal(found.features, to_float(pixels).flatten(1).double())
    monkeypatch.setattr(reference, "extract", None)
    again = real_features(
        ImageDataModule(Digits(), 64, seed=3), "test", WithClasses(), tmp_path / "cache", "hash"
    )
    assert all(torch.equal(a, b) for a, b in zip(again, found, strict=True))
    monkeypatch.undo()
    [kept] = (tmp_path / "cache").iterdir()
    kept.write_bytes(kept.read_bytes()[:100])
    assert torch.equal(
        real_features(data, "test", WithClasses(), tmp_path / "cache", "hash").features, found.features
    )


def test_a_folder_that_cannot_be_written_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    real_features(ImageDataModule(Digits(), 100, seed=0), "test", nn.Flatten(), tmp_path / "file", "hash")
    assert "the next evaluation computes these features again" in caplog.text
