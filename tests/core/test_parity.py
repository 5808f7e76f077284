"""SR-STE against a literal rendering of the paper's listing, step by step."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nm_sparsity.core import sparsify


class Published(torch.autograd.Function):
    """Forward: argsort the magnitudes of each group, zero the M - N smallest. Backward: g + lambda (1 - mask) W."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, n: int, m: int, decay: float) -> Tensor:
        last = weight.movedim(1, -1)
        groups = last.detach().abs().reshape(-1, m)
        smallest = torch.argsort(groups, dim=1)[:, : m - n]
        mask = torch.ones_like(groups).scatter_(1, smallest, 0).reshape(last.shape).movedim(-1, 1)
        ctx.save_for_backward(weight, mask)
        ctx.decay = decay
        return weight * mask

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        weight, mask = ctx.saved_tensors
        return grad + ctx.decay * (1 - mask) * weight, None, None, None


class PublishedNet(nn.Module):
    def __init__(self, n: int, m: int, decay: float) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(8, 16, 3), nn.Linear(16, 4)
        self.how = n, m, decay

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.conv2d(x, Published.apply(self.conv.weight, *self.how), self.conv.bias).relu().mean((2, 3))
        return F.linear(hidden, Published.apply(self.linear.weight, *self.how), self.linear.bias)


class Net(PublishedNet):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.conv(x).relu().mean((2, 3)))


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9, "weight_decay": 1e-2}, {"momentum": 0.9, "nesterov": True}])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 8)])
def test_twenty_sgd_steps_equal_the_published_listing(options: dict[str, Any], n: int, m: int) -> None:
    torch.manual_seed(0)
    published = PublishedNet(n, m, decay=0.05).double()
    ours = Net(n, m, decay=0.05).double()
    ours.load_state_dict(published.state_dict())
    sparsify(ours, f"{n}:{m}", method="sr-ste", decay=0.05)
    theirs_optimizer = torch.optim.SGD(published.parameters(), lr=0.1, **options)
    our_optimizer = torch.optim.SGD(ours.parameters(), lr=0.1, **options)
    flips = 0
    for _ in range(20):
        x, y = torch.randn(16, 8, 5, 5, dtype=torch.float64), torch.randint(4, (16,))
        before = ours.conv.weight.detach() != 0
        for model, optimizer in ((published, theirs_optimizer), (ours, our_optimizer)):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        flips += int(((ours.conv.weight.detach() != 0) != before).sum())
        for a, b in zip(published.parameters(), ours.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    assert flips > 0, "the masks never moved: the comparison would show nothing"
