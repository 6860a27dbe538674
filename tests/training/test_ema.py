import pytest
import torch
from torch import nn

from litdiffusion.training.ema import EMA, no_average


def net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2, bias=False))


def test_the_decay_warms_up_to_its_value():
    ema = EMA(0.999)
    assert [ema.decay_at(n) for n in (1, 2, 10, 90)] == pytest.approx([2 / 11, 3 / 12, 11 / 20, 91 / 100])
    assert ema.decay_at(8989) < 0.999
    assert [ema.decay_at(n) for n in (8990, 8991, 10**6)] == pytest.approx([0.999] * 3)
    assert EMA(0.5).decay_at(10) == 0.5
    assert EMA().decay == 0.999


def test_an_update_is_the_formula_for_every_weight():
    ema, raw, averaged = EMA(0.3), net(0), EMA.copy_of(net(1))
    expected = [p.clone() for p in averaged.parameters()]
    for step in range(1, 6):
        with torch.no_grad():
            for p in raw.parameters():
                p.add_(0.1 * step)
        ema.update(averaged, raw, step)
        d = min(0.3, (1 + step) / (10 + step))
        expected = [d * a + (1 - d) * p for a, p in zip(expected, raw.parameters(), strict=True)]
    torch.testing.assert_close(list(averaged.parameters()), [p.detach() for p in expected])


def test_the_average_is_a_copy_that_no_gradient_reaches():
    raw = net(0)
    averaged = EMA.copy_of(raw)
    assert all(p.requires_grad for p in raw.parameters())
    assert not any(p.requires_grad for p in averaged.parameters())
    torch.testing.assert_close(averaged.state_dict(), raw.state_dict())
    EMA(0.0).update(averaged, raw, 1)
    assert all(a is not p for a, p in zip(averaged.parameters(), raw.parameters(), strict=True))
    assert not any(p.requires_grad for p in averaged.parameters())


def test_decay_0_follows_the_weights_exactly():
    raw, averaged = net(0), EMA.copy_of(net(1))
    EMA(0.0).update(averaged, raw, 7)
    assert all(torch.equal(a, p) for a, p in zip(averaged.parameters(), raw.parameters(), strict=True))


def test_the_weights_themselves_stay():
    raw = net(0)
    before = {name: value.clone() for name, value in raw.state_dict().items()}
    EMA(0.9).update(EMA.copy_of(net(1)), raw, 3)
    torch.testing.assert_close(raw.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("decay", [-0.1, 1.0, 2.0])
def test_impossible_decays_are_named(decay):
    with pytest.raises(ValueError, match=f"decay={decay}"):
        EMA(decay)


def test_no_average_is_none():
    assert no_average() is None
