"""The running mean is the one that is written down, stands where the weights are, and is gone again."""

from common.average import Average

import pytest
import torch


def test_the_mean_is_that_of_its_decay_and_shorter_at_first():
    weight = torch.zeros(3)
    average, expected = Average([weight], decay=0.5), torch.zeros(3)
    for n in range(1, 30):
        weight += torch.tensor([1.0, -2.0, 0.5])
        average.update()
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * weight
        torch.testing.assert_close(average.mean[0], expected)
    assert (average.mean[0] / weight).allclose(torch.tensor(1 - 1 / 29), atol=1e-3), "a step behind"


def test_it_stands_where_the_weights_are_and_they_come_back():
    flat = torch.nn.Parameter(torch.arange(4.0))
    view = flat.data[2:]
    average = Average([flat], decay=0.9)
    with torch.no_grad():
        flat += 10
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
    one = Average([weight], decay=0.9)
    one.update()
    other = Average([torch.zeros(2)], decay=0.9)
    other.load_state_dict(one.state_dict())
    assert other.steps == one.steps
    assert torch.equal(other.mean[0], one.mean[0])
