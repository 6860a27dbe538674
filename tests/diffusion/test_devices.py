import pytest
import torch

from litdiffusion.diffusion.devices import to_device


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        ("cuda:1", ["page-locked", {"non_blocking": True}]),
        ("meta", [{"non_blocking": True}]),
        ("mps", [{}]),
        ("cpu", [{}]),
    ],
)
def test_a_copy_to_a_gpu_is_from_page_locked_memory_and_not_waited_for(device, expected, monkeypatch):
    found = []

    def to(x: torch.Tensor, where: torch.device, **how: bool) -> torch.Tensor:
        assert where == torch.device(device)
        found.append(how)
        return x

    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: found.append("page-locked") or x)
    monkeypatch.setattr(torch.Tensor, "to", to)
    to_device(torch.ones(3), torch.device(device))
    assert found == expected


def test_a_copy_to_the_host_is_waited_for(monkeypatch):
    """Or it could be read before it is there."""
    found = []
    monkeypatch.setattr(torch.Tensor, "to", lambda x, where, **how: found.append(how) or x)
    to_device(torch.empty(3, device="meta"), torch.device("cpu"))
    assert found == [{}]


def test_what_is_there_already_stays_as_it_is():
    for x in (torch.ones(3), torch.empty(3, device="meta")):
        assert to_device(x, x.device) is x
