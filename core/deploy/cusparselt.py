"""cuSPARSELt with its plans kept: the op ``nm_sparsity::linear_2to4``, and `compress` for its weights.

torch builds and destroys descriptors and plan in every call, which takes 0.35 to 0.6 ms of host time on an H100. Here
a thread makes them once for each product and keeps the `MOST_PLANS` last used.
"""

from __future__ import annotations

import ctypes
import threading
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from ctypes import byref, c_float, c_int, c_size_t, c_void_p
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nm_sparsity.core.deploy.library import CONSTANTS, Resources, library
from nm_sparsity.core.errors import SparsityError

MOST_PLANS = 1024
"""That a thread keeps."""

_ALIGNMENT = 16
"""Of operands, in bytes."""


class Algorithm(NamedTuple):
    """A kernel of cuSPARSELt, by its numbers: split-k 1 is none, -1 is by segments; the mode counts above 1 only."""

    id: int = 0
    split_k: int = 1
    split_k_mode: int = -1


class Operands(NamedTuple):
    """What cuSPARSELt is told of the operands of one dtype."""

    type: int
    compute: int
    multiple: int
    """Of the tokens."""
    outputs: tuple[torch.dtype, ...]
    """Dtypes of the result, the one to take unless another is asked for first."""
    epilogue: bool
    """Whether bias and activation run within the product."""


_TYPES = {
    torch.float32: CONSTANTS["CUDA_R_32F"],
    torch.float16: CONSTANTS["CUDA_R_16F"],
    torch.bfloat16: CONSTANTS["CUDA_R_16BF"],
    torch.int8: CONSTANTS["CUDA_R_8I"],
    torch.int32: CONSTANTS["CUDA_R_32I"],
    torch.float8_e4m3fn: CONSTANTS["CUDA_R_8F_E4M3"],
}
_FLOAT, _INT = CONSTANTS["CUSPARSE_COMPUTE_32F"], CONSTANTS["CUSPARSE_COMPUTE_32I"]
_FP16, _BF16, _INT8, _FP8 = torch.float16, torch.bfloat16, torch.int8, torch.float8_e4m3fn
OPERANDS = {
    _FP16: Operands(_TYPES[_FP16], _FLOAT, 8, (_FP16,), True),
    _BF16: Operands(_TYPES[_BF16], _FLOAT, 8, (_BF16,), True),
    _INT8: Operands(_TYPES[_INT8], _INT, 16, (torch.int32, _FP16, _BF16), False),
    _FP8: Operands(_TYPES[_FP8], _FLOAT, 16, (_BF16, _FP16, torch.float32), False),
}
"""By dtype. The bias of 8-bit products is added by torch: in which type the library reads it is not documented."""

ACTIVATIONS = {
    "": None,
    "relu": CONSTANTS["CUSPARSELT_MATMUL_ACTIVATION_RELU"],
    "gelu_tanh": CONSTANTS["CUSPARSELT_MATMUL_ACTIVATION_GELU"],
}
"""By name. The library's GELU is the tanh form."""


class Product(NamedTuple):
    """A product ``y[tokens, rows] = x[tokens, columns] @ w[rows, columns].T`` as a plan is made for it."""

    device: int
    dtype: torch.dtype
    out_dtype: torch.dtype
    rows: int
    columns: int
    tokens: int
    bias: int
    """Its address; 0 is none."""
    activation: str
    scaled: bool
    algorithm: Algorithm | tuple[int, int, int]


class _Plan(Resources):
    """Everything that the library needs for one product."""

    def __init__(self, handle: _Handle, product: Product) -> None:
        super().__init__(handle.library)
        self.handle, self.matmul = handle, handle.library.matmul
        try:
            self._build(handle.address, product)
        except BaseException:
            self.close()
            raise

    def _build(self, handle: int, product: Product) -> None:
        operands = OPERANDS[product.dtype]
        make, row, column = (
            partial(self.make, handle=handle),
            *(CONSTANTS[f"CUSPARSE_ORDER_{o}"] for o in ("ROW", "COL")),
        )
        weight = _structured(make, product.dtype, product.rows, product.columns)
        # The product is W X^T, so Y^T in column order is Y in row order.
        x, y = (
            make("DenseDescriptorInit", "MatDescriptorDestroy", *size, _ALIGNMENT, kind, order)
            for size, kind, order in (
                ((product.tokens, product.columns, product.columns), operands.type, row),
                ((product.rows, product.tokens, product.rows), _TYPES[product.out_dtype], column),
            )
        )
        matmul = make(
            "MatmulDescriptorInit",
            None,
            CONSTANTS["CUSPARSE_OPERATION_NON_TRANSPOSE"],
            CONSTANTS["CUSPARSE_OPERATION_TRANSPOSE"],
            weight,
            x,
            y,
            y,
            operands.compute,
        )
        attributes: list[tuple[str, Any]] = []
        if product.bias:
            attributes.append(("BIAS_POINTER", c_void_p(product.bias)))
        if ACTIVATIONS[product.activation] is not None:
            name = "RELU" if product.activation == "relu" else "GELU"
            attributes.append((f"ACTIVATION_{name}", c_int(1)))
        if product.scaled:
            attributes.append(("ALPHA_VECTOR_SCALING", c_int(1)))
        for name, value in attributes:
            self.library.call(
                "MatmulDescSetAttribute",
                handle,
                matmul,
                CONSTANTS[f"CUSPARSELT_MATMUL_{name}"],
                byref(value),
                ctypes.sizeof(value),
            )
        default = CONSTANTS["CUSPARSELT_MATMUL_ALG_DEFAULT"]
        selection = make("MatmulAlgSelectionInit", "MatmulAlgSelectionDestroy", matmul, default)
        self._selection = selection
        wanted = Algorithm(*product.algorithm)
        self._algorithm("Set", handle, selection, "ALG_CONFIG_ID", wanted.id)
        if wanted.split_k != 1:
            self._algorithm("Set", handle, selection, "SPLIT_K", wanted.split_k)
        if wanted.split_k > 1:
            self._algorithm("Set", handle, selection, "SPLIT_K_MODE", wanted.split_k_mode)
        self.address = make("MatmulPlanInit", "MatmulPlanDestroy", matmul, selection)
        self.entries = -(-_compressed_size(self.library, handle, weight)[0] // product.dtype.itemsize)
        """What `compress` makes of the weight has so many."""
        size = c_size_t()
        self.library.call("MatmulGetWorkspace", handle, self.address, byref(size))
        self.workspace = size.value
        """Bytes."""

    @property
    def most(self) -> int:
        """The algorithms' ids are below this."""
        return self._algorithm("Get", self.handle.address, self._selection, "ALG_CONFIG_MAX_ID", 0)

    def _algorithm(self, what: str, handle: int, selection: int, name: str, value: int) -> int:
        number = c_int(value)
        attribute = CONSTANTS[f"CUSPARSELT_MATMUL_{name}"]
        self.library.call(f"MatmulAlg{what}Attribute", handle, selection, attribute, byref(number), 4)
        return number.value


def _structured(make: Any, dtype: torch.dtype, rows: int, columns: int) -> int:
    shape, order = (rows, columns, columns), CONSTANTS["CUSPARSE_ORDER_ROW"]
    half = CONSTANTS["CUSPARSELT_SPARSITY_50_PERCENT"]
    address: int = make(
        "StructuredDescriptorInit", "MatDescriptorDestroy", *shape, _ALIGNMENT, OPERANDS[dtype].type, order, half
    )
    return address


def _compressed_size(library: Any, handle: int, descriptor: int) -> tuple[int, int]:
    """(bytes of a compressed matrix, of the memory to compress it in)."""
    size, scratch = c_size_t(), c_size_t()
    library.call("SpMMACompressedSize2", handle, descriptor, byref(size), byref(scratch))
    return size.value, scratch.value


class _Handle(Resources):
    """What every call needs of a device."""

    def __init__(self) -> None:
        super().__init__(library())
        self.address = self.make("Init", "Destroy")


class _Thread(threading.local):
    """Handles and plans of one thread, as torch keeps handles: the library need not be safe for threads."""

    def __init__(self) -> None:
        self.handles: dict[int, _Handle] = {}
        self.plans: OrderedDict[tuple[Any, ...], _Plan] = OrderedDict()

    def handle(self, device: int) -> _Handle:
        if device not in self.handles:
            self.handles[device] = _Handle()
        return self.handles[device]

    def plan(self, product: tuple[Any, ...]) -> _Plan:
        """The plan of what has the fields of a `Product`."""
        plan = self.plans.get(product)
        if plan is None:
            plan = _Plan(self.handle(product[0]), Product(*product))
            self.plans[product] = plan
            if len(self.plans) > MOST_PLANS:
                self.plans.popitem(last=False)[1].close()
        else:
            self.plans.move_to_end(product)
        return plan


_thread = _Thread()


def forget() -> None:
    """Destroy the plans and handles that this thread keeps, and find the library anew when it is needed."""
    for kept in (*_thread.plans.values(), *_thread.handles.values()):
        kept.close()
    _thread.plans.clear()
    _thread.handles.clear()
    library.cache_clear()


def compress(matrix: Tensor) -> Tensor:
    """The compressed form of a contiguous 2:4 matrix, of its dtype: values and 2-bit indices, in the library's order.

    What breaks the pattern is lost: check it before.

    Raises:
        SparsityError: without cuSPARSELt.
        CuSparseLtError: if it refuses.
    """
    matrix = matrix.detach().contiguous()
    rows, columns = matrix.shape
    with _on(matrix.get_device()):
        handle, resources = _thread.handle(matrix.get_device()).address, Resources(library())
        try:
            make = partial(resources.make, handle=handle)
            descriptor = _structured(make, matrix.dtype, rows, columns)
            size, scratch = _compressed_size(resources.library, handle, descriptor)
            entries = -(-size // matrix.element_size())
            packed = matrix.new_empty((rows, entries // rows) if entries % rows == 0 else (entries,))
            buffer = torch.empty(scratch, dtype=torch.uint8, device=matrix.device)
            resources.library.call(
                "SpMMACompress2",
                handle,
                descriptor,
                1,
                CONSTANTS["CUSPARSE_OPERATION_NON_TRANSPOSE"],
                matrix.data_ptr(),
                packed.data_ptr(),
                buffer.data_ptr(),
                _stream(matrix.get_device()),
            )
        finally:
            resources.close()
    return packed


def algorithms_of(product: Product) -> int:
    """How many algorithms the library has for a product; their ids count from 0."""
    with _on(product.device):
        return _thread.plan(product).most


def linear(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    out_features: int,
    alpha: float = 1.0,
    activation: str = "",
    out_dtype: torch.dtype | None = None,
    algorithms: Sequence[int] = (),
) -> Tensor:
    """``activation(alpha * scale * (x @ w.T) + bias)`` with w the matrix that was compressed to `packed`.

    Registered as ``torch.ops.nm_sparsity.linear_2to4``. For inference: it has no gradient.

    Args:
        x: (..., in_features) in the dtype of `packed`, any strides.
        packed: what `compress` made of w (out_features, in_features).
        bias: (out_features,) in the dtype of the result.
        scale: (out_features,) in fp32, of 8-bit operands only.
        alpha: a number in place of `scale`.
        activation: a name of `ACTIVATIONS`.
        out_dtype: one of the `Operands.outputs`; by default their first.
        algorithms: four numbers for each bin of tokens, ascending: the most tokens in it, then those of an `Algorithm`.
            More tokens than in any take the last one's. By default the library's own choice.

    Returns:
        (..., out_features), contiguous.

    Raises:
        SparsityError: for operands that do not fit, or without cuSPARSELt.
        CuSparseLtError: if it refuses the product.
    """
    dtype, columns = x.dtype, x.shape[-1]
    out_dtype = out_dtype or _default_output(dtype)
    operands = _check(x, packed, bias, scale, out_features, alpha, activation, out_dtype)
    device = x.get_device()
    rows = x.reshape(-1, columns)
    tokens = len(rows)
    padded = tokens + -tokens % operands.multiple
    rows = F.pad(rows, (0, 0, 0, padded - tokens)) if padded != tokens else rows.contiguous()
    if rows.data_ptr() % _ALIGNMENT:  # a view into other memory
        rows = rows.clone()
    shape = (*x.shape[:-1], out_features)
    y = x.new_empty(shape if padded == tokens else (padded, out_features), dtype=out_dtype)
    if tokens:
        within = operands.epilogue
        product = (  # a plain tuple is faster made than a `Product`, and equal to it
            device,
            dtype,
            out_dtype,
            out_features,
            columns,
            padded,
            bias.data_ptr() if bias is not None and within else 0,
            activation if within else "",
            scale is not None,
            choose(algorithms, tokens),
        )
        with _on(device):
            plan = _thread.plan(product)
            if packed.numel() != plan.entries:
                raise SparsityError(
                    f"the input has {columns} features, which do not fit the 2:4 weight of {out_features} outputs"
                )
            workspace = torch.empty(plan.workspace, dtype=torch.uint8, device=x.device) if plan.workspace else None
            out = y.data_ptr()
            status = plan.matmul(
                plan.handle.address,
                plan.address,
                (_ONE if alpha == 1.0 else byref(c_float(alpha))) if scale is None else scale.data_ptr(),
                packed.data_ptr(),
                rows.data_ptr(),
                _ZERO,
                out,
                out,
                None if workspace is None else workspace.data_ptr(),
                byref(c_void_p(_stream(device))),
                1,
            )
        if status:
            plan.library.fail(f"cusparseLtMatmul of {tokens} x {columns} by {out_features} x {columns}", status)
        if not within:
            y = y if bias is None else y.add_(bias)
            y = activate(y, activation)
    return y if padded == tokens else y[:tokens].view(shape)


_ZERO, _ONE = byref(c_float(0.0)), byref(c_float(1.0))


def activate(y: Tensor, activation: str) -> Tensor:
    """The activation of that name in `ACTIVATIONS`, by torch."""
    if activation == "relu":
        return F.relu(y)
    return F.gelu(y, approximate="tanh") if activation else y


def _default_output(dtype: torch.dtype) -> torch.dtype:
    if dtype not in OPERANDS:
        raise SparsityError(
            f"cuSPARSELt has no 2:4 product of {_name(dtype)}; it has {', '.join(map(_name, OPERANDS))}"
        )
    return OPERANDS[dtype].outputs[0]


def _check(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    out_features: int,
    alpha: float,
    activation: str,
    out_dtype: torch.dtype,
) -> Operands:
    operands = OPERANDS[x.dtype]
    if x.dtype != packed.dtype:
        raise SparsityError(
            f"the input is {_name(x.dtype)} and the 2:4 weight {_name(packed.dtype)}: convert the input"
        )
    for vector in (bias, scale):
        if vector is None:
            continue
        if vector.numel() != out_features or not vector.is_contiguous():
            raise SparsityError(f"bias and scale need one entry for each of {out_features} outputs, side by side")
        if vector.device != x.device:
            raise SparsityError(f"the input is on {x.device}, bias or scale on {vector.device}: move them together")
    if x.device != packed.device:
        raise SparsityError(f"the input is on {x.device} and the 2:4 weight on {packed.device}: move the input")
    if not packed.is_contiguous():
        raise SparsityError("the 2:4 weight is not as compress made it: it has gaps in memory")
    if out_dtype not in operands.outputs:
        known = ", ".join(map(_name, operands.outputs))
        raise SparsityError(f"a 2:4 product of {_name(x.dtype)} gives {known}, not {_name(out_dtype)}")
    if bias is not None and bias.dtype != out_dtype:
        raise SparsityError(f"the bias is {_name(bias.dtype)} and the result {_name(out_dtype)}: convert the bias")
    if activation not in ACTIVATIONS:
        raise SparsityError(f'unknown activation "{activation}"; known: {", ".join(filter(None, ACTIVATIONS))}')
    if scale is not None and (alpha != 1.0 or operands.epilogue or scale.dtype != torch.float32):
        raise SparsityError("a vector of scales must be fp32, of 8-bit operands, and without alpha")
    return operands


def choose(algorithms: Sequence[int], tokens: int) -> tuple[int, int, int]:
    """The numbers of the `Algorithm` that `algorithms` (see `linear`) has for so many tokens."""
    last = len(algorithms) - 4
    for start in range(0, len(algorithms), 4):
        if tokens <= algorithms[start] or start == last:
            return algorithms[start + 1], algorithms[start + 2], algorithms[start + 3]
    return 0, 1, -1


def _on(device: int) -> AbstractContextManager[Any]:
    """A block in which a CUDA device is the current one; -1 is the host's memory."""
    if device < 0 or torch._C._cuda_getDevice() == device:
        return _NOTHING
    return torch.cuda.device(device)


_NOTHING = nullcontext()


def _stream(device: int) -> int:
    return torch._C._cuda_getCurrentRawStream(device) if device >= 0 else 0


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


_library = torch.library.Library("nm_sparsity", "FRAGMENT")
_library.define(
    "linear_2to4(Tensor x, Tensor packed, Tensor? bias, Tensor? scale, int out_features, float alpha=1.0, "
    'str activation="", ScalarType? out_dtype=None, int[] algorithms=[]) -> Tensor'
)
_library.define("no_gradient(Tensor grad, SymInt[] size) -> Tensor")
_library.impl("linear_2to4", linear, "CompositeExplicitAutograd")


@torch.library.register_fake("nm_sparsity::linear_2to4", lib=_library)
def _fake_linear(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    out_features: int,
    alpha: float = 1.0,
    activation: str = "",
    out_dtype: torch.dtype | None = None,
    algorithms: Sequence[int] = (),
) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features), dtype=out_dtype or _default_output(x.dtype))


def no_gradient(*_: object) -> Any:
    """What backward comes to: an error, and no silent zero.

    Raises:
        SparsityError: always.
    """
    raise SparsityError("a compressed 2:4 layer is for inference and has no gradient: train the model before")


_library.impl("no_gradient", no_gradient, "CompositeExplicitAutograd")


@torch.library.register_fake("nm_sparsity::no_gradient", lib=_library)
def _fake_no_gradient(grad: Tensor, size: Sequence[int]) -> Tensor:
    return grad.new_empty(size)


def _note_sizes(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.sizes = [t.shape if isinstance(t, Tensor) else None for t in inputs]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    # An op, so that a compiled backward holds it, and compiling inference does not fail.
    return tuple(None if size is None else torch.ops.nm_sparsity.no_gradient(grad, size) for size in ctx.sizes)


torch.library.register_autograd("nm_sparsity::linear_2to4", _backward, setup_context=_note_sizes, lib=_library)
