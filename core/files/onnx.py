"""The weights of an ONNX model, with the dimension along which each is multiplied."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nm_sparsity.core.errors import CheckpointError, SparsityError
from nm_sparsity.core.files.metadata import DAMAGE
from nm_sparsity.core.files.weights import Weight
from nm_sparsity.core.masks.groups import reduction_size
from nm_sparsity.core.model.candidates import dims_by_shape
from nm_sparsity.core.pattern import Layout

_PASSES = {"Identity", "Cast", "DequantizeLinear"}
"""Operators whose first input is the weight that their output stands for."""


class _Product(NamedTuple):
    dims: tuple[int, ...]
    """The dimensions of the tensor along which products are summed."""
    groups: int
    """How many convolution groups lie along them."""


def read(path: Path) -> Callable[[Layout], Iterator[Weight]]:
    """The weights of a model: initialisers and constants of two or more dimensions.

    Raises:
        SparsityError: if onnx is not installed.
        CheckpointError: if the file is no ONNX model.
    """
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError as error:
        raise SparsityError('ONNX files need onnx: pip install "nm-sparsity[export]"') from error
    try:
        model = onnx.load(path)
        graphs = list(_graphs(model.graph))
        values = {initialiser.name: initialiser for graph in graphs for initialiser in graph.initializer}
        nodes = [node for graph in graphs for node in graph.node]
        for node in nodes:
            if node.op_type == "Constant" and node.attribute[0].name == "value":
                values[node.output[0]] = node.attribute[0].t
        tensors = {name: _tensor(numpy_helper.to_array(value)) for name, value in values.items() if len(value.dims) > 1}
    except Exception as error:  # Protobuf, numpy and onnx have errors of their own.
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise CheckpointError(f"{path} is damaged or not an ONNX model: {reason}") from error

    def weights(layout: Layout) -> Iterator[Weight]:
        try:
            found = list(_weights(tensors, nodes, layout))
        except DAMAGE as error:
            raise CheckpointError(f"{path} is damaged: its operators do not fit its weights: {error}") from error
        return iter(found)

    return weights


def _weights(tensors: Mapping[str, Tensor], nodes: list[Any], layout: Layout) -> Iterator[Weight]:
    # Value name -> the tensor that it stands for, and for each dimension of the value the tensor's.
    stands_for = {name: (name, tuple(range(value.dim()))) for name, value in tensors.items()}
    uses: dict[str, set[_Product | str]] = {name: set() for name in tensors}
    for node in nodes:  # in the order of computation
        attributes = {attribute.name: attribute for attribute in node.attribute}
        for position, value in enumerate(node.input):
            if value not in stands_for:
                continue
            name, order = stands_for[value]
            if position == 0 and node.op_type in _PASSES:
                stands_for[node.output[0]] = name, order
            elif node.op_type == "Transpose":
                turned = attributes["perm"].ints if "perm" in attributes else range(len(order))[::-1]
                stands_for[node.output[0]] = name, tuple(order[d] for d in turned)
            else:
                uses[name].add(_use(node.op_type, position, order, attributes, layout))
    for name, value in tensors.items():
        products = [use for use in uses[name] if isinstance(use, _Product)]
        others = sorted(use for use in uses[name] if isinstance(use, str))
        if len(products) == 1 and not others:
            dims, groups = products[0]
            yield Weight(name, value, dims, reduction_size(value.shape, dims) // groups)
        else:
            reason = "multiplied along several dimensions" if products else "used by nothing"
            yield Weight(name, value, (), 0, ", ".join(others) or reason)


def _use(
    operator: str, position: int, order: tuple[int, ...], attributes: Mapping[str, Any], layout: Layout
) -> _Product | str:
    """How an operator multiplies by its input whose dimensions are the tensor's in this `order`; or what else it is."""

    def attribute(name: str, default: int) -> int:
        return int(attributes[name].i) if name in attributes else default

    rank, groups = len(order), 1
    dims: tuple[int, ...]
    if operator == "MatMul" and position < 2:
        dims = (rank - 2,) if position else (rank - 1,)
    elif operator == "Gemm" and position < 2:
        inner_first = attribute("transB", 0) == 0 if position else attribute("transA", 0) == 1
        dims = (0,) if inner_first else (1,)
    elif operator == "Conv" and position == 1:
        dims = dims_by_shape(rank, layout)
    elif operator == "ConvTranspose" and position == 1:
        dims = (0,) if layout == "channel" else (0, *range(2, rank))
        groups = attribute("group", 1)
    elif operator == "Gather":
        return "an embedding"
    else:
        return f"used by {operator}"
    return _Product(tuple(order[d] for d in dims), groups)


def _graphs(graph: Any) -> Iterator[Any]:
    """A graph and those inside its nodes."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                if inner.node or inner.initializer:
                    yield from _graphs(inner)


def _tensor(array: Any) -> Tensor:
    if array.dtype.name == "bfloat16":  # numpy has none; onnx brings its own
        return torch.from_numpy(array.view("int16").copy()).view(torch.bfloat16)
    try:
        return torch.from_numpy(array.copy())
    except TypeError:  # text, or numbers of a kind that torch has not: no weight that can be N:M
        return torch.zeros(array.shape, dtype=torch.uint8)
