"""The running mean is the one that is written down, stands where the weights are, and is gone again."""

from common.train.ema import EMA

import pytest
import torch


def test_the_mean_is_that_of_its_decay_and_shorter_at_first():
    weight = torch.zeros(3)
    average, expected = EMA([weight], decay=0.5), torch.zeros(3)
    for n in range(1, 30):
        weight += torch.tensor([1.0, -2.0, 0.5])
        average.update()
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * weight
        assert average.mean[0].allclose(expected, rtol=1e-5, atol=1e-6)
    assert (average.mean[0] / weight).allclose(torch.tensor(1 - 1 / 29), atol=1e-3), "a step behind"


def test_after_a_step_the_decay_is_2_of_11_after_two_3_of_12_and_never_more_than_asked():
    weight = torch.nn.Parameter(torch.zeros(1))
    one, other = EMA([weight], decay=0.9), EMA([weight], decay=0.2)
    with torch.no_grad():
        weight += 1
    for expected, capped in ((9 / 11, 9 / 11), (1 - 2 / 11 * 3 / 12, 1 - 2 / 11 * 0.2)):
        one.update()
        other.update()
        assert one.mean[0].item() == pytest.approx(expected, abs=1e-7)
        assert other.mean[0].item() == pytest.approx(capped, abs=1e-7)
    assert (one.steps, weight.item(), weight.requires_grad) == (2, 1.0, True)
    assert not one.mean[0].requires_grad


def test_it_stands_where_the_weights_are_and_they_come_back():
    flat = torch.nn.Parameter(torch.arange(4.0))
    view = flat.data[2:]
    average = EMA([flat], decay=0.9)
    with torch.no_grad():
        flat += 10
    assert torch.equal(average.mean[0], torch.arange(4.0))
    average.update()
    mean = average.mean[0].clone()
    with pytest.raises(KeyboardInterrupt), average.in_place():
        assert torch.equal(flat.data, mean)
        assert torch.equal(view, mean[2:])
        raise KeyboardInterrupt
    assert torch.equal(flat.data, torch.arange(4.0) + 10)
    assert torch.equal(average.mean[0], mean)


def test_it_goes_on_from_what_was_saved():
    weight = torch.ones(2)
    one = EMA([weight], decay=0.9)
    weight += 1
    one.update()
    assert sorted(one.state_dict()) == ["mean", "steps"]
    other = EMA([torch.zeros(2)], decay=0.9)
    kept = other.mean[0]
    other.load_state_dict(one.state_dict())
    assert (other.steps, other.mean[0] is kept) == (1, True)
    assert torch.equal(kept, one.mean[0])
    one.update()
    assert not torch.equal(kept, one.mean[0]), "a copy"


def test_as_many_weights_as_means_or_it_is_an_error():
    average = EMA([torch.ones(1), torch.ones(1)], decay=0.9)
    with pytest.raises(ValueError, match="zip"):
        average.load_state_dict({"mean": [torch.zeros(1)], "steps": 3})
    average.weights.pop()
    with pytest.raises(ValueError, match="zip"):
        average.update()
    with pytest.raises(ValueError, match="zip"), average.in_place():
        pass
