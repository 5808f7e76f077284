"""A finalized model as ONNX."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from nm_sparsity.core.deploy.child import first_line
from nm_sparsity.core.errors import SparsityError
from nm_sparsity.core.model.layers import sparse_layers
from nm_sparsity.core.model.modes import evaluating
from nm_sparsity.core.model.wrappers import unwrap


def to_onnx(model: nn.Module, inputs: tuple[Any, ...], path: str | Path, **options: Any) -> Path:
    """Write a finalized `model` as ONNX, its zeros in place, for runtimes that find 2:4 weights themselves (TensorRT).

    Args:
        inputs: an example of the model's positional arguments.
        options: for `torch.onnx.export`, e.g. ``dynamic_shapes``.

    Raises:
        SparsityError: if the model is not finalized, torch cannot export it, or the packages onnx and onnxscript are
            missing.
    """
    model = unwrap(model)
    if any(True for _ in sparse_layers(model)):
        raise SparsityError(f"{type(model).__name__} still trains sparse: call finalize(model) first")
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise SparsityError(f'ONNX export needs {error.name}: pip install "nm-sparsity[export]"') from error
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        size = sum(t.nbytes for t in model.state_dict().values())
        options.setdefault("external_data", size > 1 << 30)  # a single file may have 2 GiB
        with evaluating(model):
            torch.onnx.export(model, inputs, str(path), dynamo=True, verbose=False, **options)
    except OSError as error:
        raise SparsityError(f"cannot write {path}: {error.strerror or error}") from error
    except torch.onnx.OnnxExporterError as error:
        cause = first_line(error.__cause__ or error)  # its own message is of many lines, about torch
        raise SparsityError(f"torch cannot export {type(model).__name__} to ONNX: {cause}") from error
    return path
