"""The mask kernels as ops of the library ``nm_sparsity``, for tracing, and the short way to them for plain tensors.

Every kernel fulfils the contract in `reference`. `w` is a dense floating-point tensor of any memory format
whose `axis` has a size divisible by `m`; callers (`nm_sparsity.core.masks`) have checked that.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensorMode
from torch.autograd import forward_ad
from torch.export._trace import custom_triton_ops_decomposition_disabled

from nm_sparsity.core.masks import cuda, reference
from nm_sparsity.core.masks.backends import covering, rounds_to
from nm_sparsity.core.masks.memory import lines_in_memory

_PLAIN = (torch.nn.Parameter, Tensor)
# Bound once: every read of a sparse weight asks.
_is_tracing = torch.compiler.is_dynamo_compiling
_dispatch_modes = torch._C._len_torch_dispatch_stack
_transforms_active = torch._C._are_functorch_transforms_active
_tracer = torch._C._get_tracing_state


def keep_largest(w: Tensor, n: int, m: int, axis: int, dtype: torch.dtype | None = None) -> Tensor:
    """`w` with all but the `n` largest of every `m` entries along `axis` set to +0, rounded to `dtype` if one is given.

    Gradients pass straight through, to dropped entries too (Bengio et al., arXiv 1308.3432), in `w`'s dtype.
    """
    if is_plain(w):
        return straight_through(w, _keep_largest(w.detach() if w.requires_grad else w, n, m, axis, dtype))
    watched = _transforms_active() or forward_ad._current_level >= 0
    masked: Any = _Transformable.apply if watched else torch.ops.nm_sparsity.keep_largest
    result: Tensor = masked(w, n, m, axis, dtype)
    return result


def straight_through(w: Tensor, value: Tensor) -> Tensor:
    """`value`, made of `w` without autograd, with a gradient that goes to all of `w` (Bengio et al., arXiv 1308.3432).

    A plain tensor with a version counter of its own.
    """
    return StraightThrough.apply(w, value) if w.requires_grad and torch.is_grad_enabled() else value


def soft_threshold(w: Tensor, n: int, m: int, axis: int, scale: Tensor) -> Tensor:
    """`reference.soft_threshold`, without a gradient; `scale` is 0-dim."""
    w = w.detach()
    if is_plain(w):
        return _soft_threshold(w, n, m, axis, scale)
    if _transforms_active() or forward_ad._current_level >= 0:
        return reference.soft_threshold(w, n, m, axis, scale)
    result: Tensor = torch.ops.nm_sparsity.soft_threshold(w, n, m, axis, scale)
    return result


def nm_mask(w: Tensor, n: int, m: int, axis: int) -> Tensor:
    """Boolean mask of what `keep_largest` keeps."""
    w = w.detach()
    return _nm_mask(w, n, m, axis) if is_plain(w) else torch.ops.nm_sparsity.nm_mask(w, n, m, axis)


def is_watched() -> bool:
    """Whether a tracer, a dispatch mode or a transform sees what is computed, not autograd alone."""
    return (
        _is_tracing()
        or _dispatch_modes() > 0
        or _transforms_active()
        or forward_ad._current_level >= 0
        or _tracer() is not None
    )


def is_plain(w: Tensor) -> bool:
    """Whether nothing but autograd sees what is computed with `w`: no tensor subclass, and one that has memory."""
    return not is_watched() and type(w) in _PLAIN and not w.is_meta


def _keep_largest(w: Tensor, n: int, m: int, axis: int, dtype: torch.dtype | None = None) -> Tensor:
    if dtype is not None and not rounds_to(w.dtype, dtype):
        return _keep_largest(w, n, m, axis).to(dtype)
    if (found := covering(w, m, (axis,))) is None:
        return reference.keep_largest(w, n, m, axis).to(dtype or w.dtype)
    backend, lines = found
    out = torch.empty_like(w, dtype=dtype)
    backend.select("keep", w, out, lines, n, m)
    return out


def _soft_threshold(w: Tensor, n: int, m: int, axis: int, scale: Tensor) -> Tensor:
    out = torch.empty_like(w)
    if (found := covering(w, m, (axis,))) is None:
        return out.copy_(reference.soft_threshold(w, n, m, axis, scale))
    backend, lines = found
    backend.select("soft", w, out, lines, n, m, scale)
    return out


def _nm_mask(w: Tensor, n: int, m: int, axis: int) -> Tensor:
    out = torch.empty_like(w, dtype=torch.bool)
    if (found := covering(w, m, (axis,))) is None:
        return out.copy_(reference.nm_mask(w, n, m, axis))
    backend, lines = found
    backend.select("mask", w, out, lines, n, m)
    return out


_library = torch.library.Library("nm_sparsity", "DEF")
_library.define("keep_largest(Tensor w, int n, int m, int axis, ScalarType? dtype=None) -> Tensor")
_library.define("soft_threshold(Tensor w, int n, int m, int axis, Tensor scale) -> Tensor")
_library.define("nm_mask(Tensor w, int n, int m, int axis) -> Tensor")
_library.impl("keep_largest", _keep_largest, "CompositeExplicitAutograd")
_library.impl("soft_threshold", _soft_threshold, "CompositeExplicitAutograd")
_library.impl("nm_mask", _nm_mask, "CompositeExplicitAutograd")


@torch.library.register_fake("nm_sparsity::keep_largest", lib=_library)
def _fake_keep_largest(w: Tensor, n: int, m: int, axis: int, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty_like(w, dtype=dtype)


@torch.library.register_fake("nm_sparsity::soft_threshold", lib=_library)
def _fake_soft_threshold(w: Tensor, n: int, m: int, axis: int, scale: Tensor) -> Tensor:
    return torch.empty_like(w)


@torch.library.register_fake("nm_sparsity::nm_mask", lib=_library)
def _fake_nm_mask(w: Tensor, n: int, m: int, axis: int) -> Tensor:
    return torch.empty_like(w, dtype=torch.bool)


def _straight_through(ctx: Any, grad: Any) -> tuple[Any, None, None, None, None]:
    return grad, None, None, None, None  # autograd itself brings it to the dtype of `w`


torch.library.register_autograd("nm_sparsity::keep_largest", _straight_through, lib=_library)


def _visible_to_compilers(result: str, mode: Any, op: Any, types: Any, args: Any, kwargs: Any) -> Any:
    """Under torch.compile a CUDA weight's op becomes the launch itself, as `torch.library.triton_op` does it."""
    w, n, m, axis, last = (*args, *kwargs.values(), None)[:5]
    scale, dtype = (last, None) if result == "soft" else (None, last)
    lines = lines_in_memory(w, m, (axis,))
    direct = w.is_cuda and cuda.available() and rounds_to(w.dtype, dtype or w.dtype)
    if lines is None or not direct or custom_triton_ops_decomposition_disabled():
        return mode.__torch_dispatch__(op, types, args, kwargs)
    with mode:
        out = torch.empty_like(w, dtype=dtype)
        cuda.select(result, w, out, lines, n, m, scale, traced=True)
        return out


for _op, _result in (("nm_sparsity::keep_largest", "keep"), ("nm_sparsity::soft_threshold", "soft")):
    torch.library.register_torch_dispatch(
        _op, FunctionalTensorMode, partial(_visible_to_compilers, _result), lib=_library
    )


class StraightThrough(torch.autograd.Function):
    """A value made of `w` without autograd, whose gradient goes to all of `w`: a tenth of what autograd through an op
    costs."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Transformable(torch.autograd.Function):
    """`keep_largest` with what neither an op nor `StraightThrough` has: forward-mode derivatives and vmap."""

    @staticmethod
    def forward(w: Tensor, n: int, m: int, axis: int, dtype: torch.dtype | None) -> Tensor:
        masked: Tensor = torch.ops.nm_sparsity.keep_largest(w, n, m, axis, dtype)
        return masked

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    backward = staticmethod(_straight_through)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return tangent

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, w: Tensor, n: int, m: int, axis: int, dtype: torch.dtype | None
    ) -> tuple[Tensor, int]:
        return _Transformable.apply(w.movedim(in_dims[0], 0), n, m, axis + 1, dtype), 0
