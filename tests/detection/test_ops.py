"""The stand-in for mmcv's compiled operators, against references written out by hand."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import nm_sparsity.detection.plugin  # noqa: F401  registers the stand-in
from nm_sparsity.core.errors import SparsityError
from nm_sparsity.detection import ops

mmcv_ops = pytest.importorskip("mmcv.ops")


DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")),
]


def reference_nms(boxes: Tensor, scores: Tensor, threshold: float, offset: int) -> list[int]:
    """Greedy: take the best, drop what overlaps it by more than the threshold."""
    left, kept = scores.argsort(descending=True).tolist(), []
    while left:
        best = left.pop(0)
        kept.append(best)

        def overlap(other: int, best: int = best) -> float:
            low, high = torch.maximum(boxes[best], boxes[other]), torch.minimum(boxes[best], boxes[other])
            inner = ((high[2:] - low[:2] + offset).clamp(min=0)).prod()
            areas = [(boxes[i, 2:] - boxes[i, :2] + offset).prod() for i in (best, other)]
            return float(inner / (areas[0] + areas[1] - inner))

        left = [other for other in left if overlap(other) <= threshold]
    return kept


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), count=st.integers(0, 30), offset=st.sampled_from([0, 1]))
def test_nms_equals_the_greedy_reference(seed: int, count: int, offset: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * 20
    boxes = torch.cat([corner, corner + 1 + torch.rand(count, 2, generator=generator) * 15], 1)
    scores = torch.randperm(count, generator=generator).float()
    kept = mmcv_ops.nms(boxes, scores, 0.5, offset=offset)[1] if count else torch.empty(0)
    assert kept.tolist() == reference_nms(boxes, scores, 0.5, offset)


def reference_roi_align(features: Tensor, roi: Tensor, size: int, scale: float, samples: int, aligned: bool) -> Tensor:
    """One box by its definition: the mean of bilinear samples on a regular grid in each bin."""
    image, shift = int(roi[0]), 0.5 if aligned else 0.0
    x1, y1, x2, y2 = (roi[1:] * scale - shift).tolist()
    width, height = x2 - x1, y2 - y1
    if not aligned:
        width, height = max(width, 1.0), max(height, 1.0)
    channels, rows, columns = features.shape[1:]

    def bilinear(y: float, x: float) -> Tensor:
        if y < -1 or y > rows or x < -1 or x > columns:
            return features.new_zeros(channels)
        y, x = min(max(y, 0), rows - 1), min(max(x, 0), columns - 1)
        top, left = int(y), int(x)
        bottom, right = min(top + 1, rows - 1), min(left + 1, columns - 1)
        at = features[image]
        upper = at[:, top, left] * (1 - (x - left)) + at[:, top, right] * (x - left)
        lower = at[:, bottom, left] * (1 - (x - left)) + at[:, bottom, right] * (x - left)
        return upper * (1 - (y - top)) + lower * (y - top)

    result = features.new_zeros(channels, size, size)
    for i in range(size):
        for j in range(size):
            points = [
                bilinear(
                    y1 + height / size * (i + (a + 0.5) / samples),
                    x1 + width / size * (j + (b + 0.5) / samples),
                )
                for a in range(samples)
                for b in range(samples)
            ]
            result[:, i, j] = torch.stack(points).mean(0)
    return result


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("aligned", [True, False])
def test_roi_align_equals_its_definition(aligned: bool, device: str) -> None:
    torch.manual_seed(0)
    features = torch.rand(2, 3, 9, 11, dtype=torch.float64)
    rois = torch.tensor(
        [[0, 2.0, 3.0, 30.0, 28.0], [1, -6.0, -4.0, 12.0, 50.0], [1, 5.0, 5.0, 5.5, 6.0]], dtype=torch.float64
    )
    got = mmcv_ops.roi_align(features.to(device), rois.to(device), (4, 4), 0.25, 2, "avg", aligned).cpu()
    expected = torch.stack([reference_roi_align(features, roi, 4, 0.25, 2, aligned) for roi in rois])
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("samples", [0, 2])
def test_roi_align_gradient(samples: int, device: str) -> None:
    torch.manual_seed(0)
    features = torch.rand(1, 2, 6, 6, dtype=torch.float64, device=device, requires_grad=True)
    rois = torch.tensor([[0, 1.0, 2.0, 20.0, 17.0], [0, 3.3, 0.2, 9.0, 22.0]], dtype=torch.float64, device=device)
    # On a GPU, the gradients of overlapping boxes are summed in any order.
    assert torch.autograd.gradcheck(
        lambda x: mmcv_ops.roi_align(x, rois, (3, 3), 0.25, samples, "avg", True), (features,), nondet_tol=1e-12
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(device: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    wide = torch.rand(1, 2, 6, 6, device=device).to(dtype).float().requires_grad_()
    narrow = wide.detach().to(dtype).requires_grad_()
    boxes = torch.tensor([[1.0, 2.0, 20.0, 17.0], [1.0, 3.0, 20.0, 17.0], [3.25, 0.25, 9.0, 22.0]], device=device)
    rois = torch.cat([torch.zeros(3, 1, device=device), boxes], 1)
    results = [mmcv_ops.roi_align(x, rois.to(x.dtype), (3, 3), 0.25, 2, "avg", True) for x in (wide, narrow)]
    for result in results:
        result.float().square().sum().backward()
    assert results[1].dtype == narrow.grad.dtype == dtype
    torch.testing.assert_close(results[1].float(), results[0], rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(narrow.grad.float(), wide.grad, rtol=3e-2, atol=3e-2)
    kept = mmcv_ops.nms(boxes.to(dtype), torch.tensor([0.5, 0.75, 0.25], device=device, dtype=dtype), 0.5)[1]
    assert kept.tolist() == [1, 2]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("weighted", [False, True])
def test_focal_loss_equals_its_formula_and_gradient(weighted: bool, device: str) -> None:
    torch.manual_seed(0)
    logits = torch.randn(7, 3, dtype=torch.float64, device=device, requires_grad=True)
    labels = torch.tensor([0, 1, 2, 2, 0, 1, 1] if weighted else [0, 1, 2, 3, 3, 0, 1], device=device)  # 3: background
    weight = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64, device=device) if weighted else None

    def loss(x: Tensor) -> Tensor:
        return mmcv_ops.sigmoid_focal_loss(x, labels, 2.0, 0.25, weight, "sum")

    p, positive = logits.sigmoid(), torch.nn.functional.one_hot(labels, 4)[:, :3].bool()
    expected = torch.where(positive, -0.25 * (1 - p) ** 2 * p.log(), -0.75 * p**2 * (1 - p).log())
    if weight is not None:
        expected = expected * weight[labels][:, None]
    torch.testing.assert_close(loss(logits), expected.sum())
    assert torch.autograd.gradcheck(loss, (logits,))


stand_in_only = pytest.mark.skipif(not ops.install(), reason="mmcv has its own compiled operators")


@pytest.mark.slow
@stand_in_only
def test_one_line_says_that_the_stand_in_is_used() -> None:
    code = "import nm_sparsity.detection.plugin"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.count("torchvision's NMS, RoIAlign and focal loss stand in") == 1


@stand_in_only
def test_any_other_operator_says_how_to_build_mmcv() -> None:
    with pytest.raises(SparsityError, match=r'operator "softnms" needs .* pip install .*onedl-mmcv'):
        mmcv_ops.soft_nms(torch.rand(2, 4), torch.rand(2))


@stand_in_only
def test_max_pooling_says_how_to_build_mmcv() -> None:
    with pytest.raises(SparsityError, match=r'pool_mode="max" needs .* pip install'):
        mmcv_ops.roi_align(torch.rand(1, 1, 4, 4), torch.tensor([[0, 0.0, 0, 3, 3]]), (2, 2), 1.0, 2, "max", True)


def test_own_operators_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A find_spec that sees a compiled module leaves sys.modules as it is."""
    own = type(sys)("mmcv._ext")
    monkeypatch.setitem(sys.modules, "mmcv._ext", own)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert ops.install() is False
    assert sys.modules["mmcv._ext"] is own


def test_the_environment_report_works() -> None:
    from mmcv.utils import collect_env

    assert "MMCV" in collect_env()
