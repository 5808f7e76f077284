"""The mask kernels behind ops of the library ``nm_sparsity``, which pick a backend by device.

Every backend fulfils the contract in `reference`. `w` is a dense floating-point tensor of any memory format
whose `axis` has a size divisible by `m`; callers (`nm_sparsity.core.masks`) have checked that.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from nm_sparsity.core.masks import cpu, cuda, reference

_library = torch.library.Library("nm_sparsity", "DEF")
_library.define("keep_largest(Tensor w, int n, int m, int axis) -> Tensor")
_library.define("nm_mask(Tensor w, int n, int m, int axis) -> Tensor")
for _key, _backend in {"CompositeExplicitAutograd": reference, "CPU": cpu, "CUDA": cuda}.items():
    _library.impl("keep_largest", _backend.keep_largest, _key)
    _library.impl("nm_mask", _backend.nm_mask, _key)


@torch.library.register_fake("nm_sparsity::keep_largest", lib=_library)
def _fake_keep_largest(w: Tensor, n: int, m: int, axis: int) -> Tensor:
    return torch.empty_like(w)


@torch.library.register_fake("nm_sparsity::nm_mask", lib=_library)
def _fake_nm_mask(w: Tensor, n: int, m: int, axis: int) -> Tensor:
    return torch.empty_like(w, dtype=torch.bool)


def _straight_through(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    return grad, None, None, None


torch.library.register_autograd("nm_sparsity::keep_largest", _straight_through, lib=_library)


class _StraightThrough(torch.autograd.Function):
    """The op with what an op cannot have, forward-mode derivatives and vmap; slower to call, so only where needed."""

    @staticmethod
    def forward(w: Tensor, n: int, m: int, axis: int) -> Tensor:
        return torch.ops.nm_sparsity.keep_largest(w, n, m, axis)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    backward = staticmethod(_straight_through)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return tangent

    @staticmethod
    def vmap(info: Any, in_dims: Any, w: Tensor, n: int, m: int, axis: int) -> tuple[Tensor, int]:
        return _StraightThrough.apply(w.movedim(in_dims[0], 0), n, m, axis + 1), 0


def keep_largest(w: Tensor, n: int, m: int, axis: int) -> Tensor:
    """`w` with all but the `n` largest of every `m` entries along `axis` set to +0.

    Gradients pass straight through, to dropped entries too (Bengio et al., arXiv 1308.3432).
    """
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return _StraightThrough.apply(w, n, m, axis)
    return torch.ops.nm_sparsity.keep_largest(w, n, m, axis)


def nm_mask(w: Tensor, n: int, m: int, axis: int) -> Tensor:
    """Boolean mask of what `keep_largest` keeps."""
    result: Tensor = torch.ops.nm_sparsity.nm_mask(w.detach(), n, m, axis)
    return result


@torch.no_grad()
def add_dropped_(target: Tensor, w: Tensor, n: int, m: int, axis: int, scale: float | Tensor) -> Tensor:
    """``target += scale * (w - keep_largest(w))`` in place, without autograd; returns `target`."""
    if target.is_cuda:
        return cuda.add_dropped_(target, w, n, m, axis, scale)
    if target.is_cpu and not torch.compiler.is_compiling():
        return cpu.add_dropped_(target, w, n, m, axis, scale)
    return reference.add_dropped_(target, w, n, m, axis, scale)
