import pytest
import torch
from torch import nn

from nm_sparsity.core import MaskTracker, SparsityError, sparsify


def test_sad_is_the_l1_distance_of_masks() -> None:
    net = nn.Sequential(nn.Linear(8, 2, bias=False), nn.Linear(4, 1, bias=False), nn.Linear(3, 1))
    with torch.no_grad():
        net[0].weight.copy_(torch.arange(16.0).reshape(2, 8) + 1)
        net[1].weight.copy_(torch.tensor([[4.0, 3, 2, 1]]))
    sparsify(net, "2:4")
    tracker = MaskTracker(net)
    assert tracker.update().total_sad == 0
    with torch.no_grad():
        net[1]._parameters["weight"].copy_(torch.tensor([[4.0, 0, 2, 1]]))
    flips = tracker.update()
    # Position 1 left, position 2 entered: two entries of the mask differ.
    assert flips.sad == {"0.weight": 0, "1.weight": 2}
    assert flips.sizes == {"0.weight": 16, "1.weight": 4}
    assert flips.rate == 2 / 20
    assert flips.rates() == {"0.weight": 0, "1.weight": 0.5}
    with torch.no_grad():
        net[1]._parameters["weight"].copy_(torch.tensor([[4.0, 3, 2, 1]]))
    assert tracker.update().total_sad == 2, "counted from the last update"


def test_a_dense_model_has_no_flips() -> None:
    flips = MaskTracker(nn.Linear(4, 4)).update()
    assert (flips.total_sad, flips.rate) == (0, 0.0)


def test_a_weight_of_another_shape_is_another_weight() -> None:
    net = nn.Sequential(nn.Linear(8, 4))
    sparsify(net, "2:4")
    tracker = MaskTracker(net)
    net[0].weight = nn.Parameter(torch.randn(1024, 8))
    with pytest.raises(SparsityError, match="not those that MaskTracker began with"):
        tracker.update()
