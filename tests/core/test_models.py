"""Any model goes in: convert, one training step, finalize, verify."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import get_model
from torchvision.models.detection import maskrcnn_resnet50_fpn
from torchvision.models.optical_flow import raft_small

from nm_sparsity.core import finalize, sparsify, verify


def classify(size: int) -> Callable[[nn.Module], Tensor]:
    return lambda model: model(torch.randn(2, 3, size, size)).square().mean()


def detect(model: nn.Module) -> Tensor:
    boxes = torch.tensor([[8.0, 8.0, 40.0, 40.0]])
    target = {"boxes": boxes, "labels": torch.tensor([1]), "masks": torch.ones(1, 64, 64, dtype=torch.uint8)}
    losses: dict[str, Tensor] = model([torch.rand(3, 64, 64)], [target])
    return torch.stack(list(losses.values())).sum()


def flow(model: nn.Module) -> Tensor:
    frames = torch.rand(2, 1, 3, 128, 128)
    return torch.stack(model(*frames, num_flow_updates=2)).abs().mean()


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Tensor], int]] = {
    # name: (constructor, loss, sparse weights at 2:4)
    "resnet50": (lambda: get_model("resnet50"), classify(64), 53),
    "mobilenet_v3_small": (lambda: get_model("mobilenet_v3_small"), classify(64), 42),
    "vit_b_16": (lambda: get_model("vit_b_16", image_size=32), classify(32), 49),
    "swin_t": (lambda: get_model("swin_t"), classify(64), 52),
    "convnext_tiny": (lambda: get_model("convnext_tiny"), classify(64), 40),
    "maskrcnn_resnet50_fpn": (
        lambda: maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, min_size=64, max_size=64),
        detect,
        73,  # backbone 52, pyramid 8, proposals 3, boxes 4, masks 6
    ),
    "raft_small": (lambda: raft_small(weights=None), flow, 47),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_sparsify_train_finalize_verify(name: str) -> None:
    make, loss_of, sparse_weights = MODELS[name]
    torch.manual_seed(0)
    model = make().train()
    classes = {n: type(m) for n, m in model.named_modules()}
    report = sparsify(model, "2:4", decay=100.0)
    parameters = {
        w.name: model.get_submodule(w.name.rpartition(".")[0])._parameters["weight"]
        for w in report.sparse
        if w.name.endswith(".weight")
    }
    before = {n: p.detach().clone() for n, p in parameters.items() if p is not None}
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    loss = loss_of(model)
    assert torch.isfinite(loss)
    loss.backward()
    optimizer.step()
    moved = [n for n, p in parameters.items() if p is not None and p.grad is not None and not torch.equal(p, before[n])]
    assert len(moved) > 0.8 * len(before)
    finalize(model)
    assert {n: type(m) for n, m in model.named_modules()} == classes
    assert len(verify(model, "2:4").checked) == len(report.sparse)
    # Nothing is left out but with a reason.
    assert all(w.sparse or w.note for w in report.weights)
    assert len(report.sparse) == sparse_weights
