"""NMS, RoIAlign and the sigmoid focal loss for an mmcv without its compiled operators.

mmcv's C++/CUDA operators take up to an hour to compile; torchvision ships the ones that the common detectors need,
compiled for CPU and CUDA. `install` registers them as ``mmcv._ext``, the module that ``mmcv.ops`` binds to.
Where mmcv has its own operators, they are used and nothing is registered.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from importlib.metadata import distributions
from types import ModuleType
from typing import Any

import torch
import torchvision
from torch import Tensor

from nm_sparsity.core.errors import SparsityError

logger = logging.getLogger(__name__)

_FORK = any(distributions(name="onedl-mmcv"))
BUILD_HINT = (
    f"{'' if _FORK else 'pip uninstall mmcv-lite; '}MMCV_WITH_OPS=1 pip install --no-build-isolation --no-cache-dir "
    f"--force-reinstall --no-deps {'onedl-mmcv==2.3.6' if _FORK else 'mmcv==2.1.0'}"
)
"""Forks and originals of OpenMMLab's packages must not be mixed."""


def _wide(values: Tensor) -> Tensor:
    """At least float32: torchvision's operators lack kernels for 16 bits, some on the CPU, some everywhere."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def nms(bboxes: Tensor, scores: Tensor, iou_threshold: float, offset: int = 0) -> Tensor:
    """Indices of the boxes that survive, by falling score; a width is ``x2 - x1 + offset``. Boxes: (n, 4) xyxy."""
    bboxes = bboxes + bboxes.new_tensor([0, 0, offset, offset])
    return torchvision.ops.nms(_wide(bboxes), _wide(scores), iou_threshold)


def _require_average(pool_mode: int) -> None:
    if pool_mode != 1:
        raise SparsityError(f'RoIAlign with pool_mode="max" needs mmcv\'s compiled operators: {BUILD_HINT}')


def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Average RoIAlign (He et al., arXiv 1703.06870) of `input` (b, c, h, w) at `rois` (n, 5: image, x1, y1, x2, y2),
    written to `output` (n, c, aligned_height, aligned_width)."""
    _require_average(pool_mode)
    output.copy_(
        torch.ops.torchvision.roi_align(
            _wide(input), _wide(rois), spatial_scale, aligned_height, aligned_width, sampling_ratio, aligned
        )
    )


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """The gradient of `roi_align_forward` with respect to its input, added to `grad_input`."""
    _require_average(pool_mode)
    grad_input += torch.ops.torchvision._roi_align_backward(
        _wide(grad_output),
        _wide(rois),
        spatial_scale,
        aligned_height,
        aligned_width,
        *grad_input.shape,
        sampling_ratio,
        aligned,
    )


def _focal_loss(input: Tensor, target: Tensor, weight: Tensor, gamma: float, alpha: float) -> Tensor:
    one_hot = (target[:, None] == torch.arange(input.shape[1], device=input.device)).to(input.dtype)
    loss: Tensor = torchvision.ops.sigmoid_focal_loss(input, one_hot, alpha, gamma)
    return loss * weight[target][:, None] if weight.numel() else loss


def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Focal loss (Lin et al., arXiv 1708.02002) of logits `input` (n, classes) against labels `target` (n,), where
    label ``classes`` is background; written to `output` (n, classes)."""
    output.copy_(_focal_loss(input, target, weight, gamma, alpha))


def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """The gradient of the summed `sigmoid_focal_loss_forward`, written to `grad_input` (n, classes)."""
    with torch.enable_grad():
        leaf = input.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(_focal_loss(leaf, target, weight, gamma, alpha).sum(), leaf)
    grad_input.copy_(gradient)


def get_compiler_version() -> str:
    """What mmcv's environment report prints for its compiler."""
    return "none (torchvision's operators stand in)"


def get_compiling_cuda_version() -> str:
    """What mmcv's environment report prints for its CUDA compiler."""
    return get_compiler_version()


class _StandIn(ModuleType):
    """``mmcv._ext`` with this module's operators; every other one raises when called, since mmcv.ops binds them all."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*args: object, **kwargs: object) -> None:
            raise SparsityError(f'operator "{name}" needs mmcv\'s compiled operators; build them: {BUILD_HINT}')

        return missing


def install() -> bool:
    """Register the stand-in unless mmcv has its own operators, and say so. Returns whether torchvision's stand in.

    Call before ``mmcv.ops`` is imported; importing `nm_sparsity.detection.plugin` does.
    """
    import mmcv

    name = "mmcv._ext"
    if importlib.util.find_spec(name) is None:
        module = _StandIn(name)
        module.__spec__ = ModuleSpec(name, None)
        module.__file__ = __file__
        operators: list[Callable[..., Any]] = [
            nms,
            roi_align_forward,
            roi_align_backward,
            sigmoid_focal_loss_forward,
            sigmoid_focal_loss_backward,
            get_compiler_version,
            get_compiling_cuda_version,
        ]
        for operator in operators:
            setattr(module, operator.__name__, operator)
        sys.modules[name] = mmcv._ext = module
        logger.warning("mmcv has no compiled operators: torchvision's NMS, RoIAlign and focal loss stand in")
    return isinstance(sys.modules.get(name), _StandIn)
