"""Linear layers of fp8 (e4m3), with one scale each for the weight and the input: dense by torch, 2:4 by cuSPARSELt."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nm_sparsity.core import SparsityError, satisfies
from nm_sparsity.core.deploy import cusparselt
from nm_sparsity.core.deploy.backends import Backend
from nm_sparsity.core.deploy.cache import Cache, Problem, flat
from nm_sparsity.core.deploy.search import bin_of, search
from nm_sparsity.core.model.modes import evaluating

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max


class Float8Linear(nn.Module):
    """``x @ w.T + bias`` with x and w rounded to fp8, from a layer of bf16; the input's scale is fixed beforehand."""

    def __init__(self, layer: nn.Linear, largest_input: float, tokens: int) -> None:
        super().__init__()
        self.rows, self.tokens = layer.out_features, tokens
        weight = layer.weight.detach()
        scales = torch.tensor([max(largest_input, 1e-6), max(float(weight.abs().max()), 1e-6)], device=weight.device)
        self.register_buffer("scales", scales / LARGEST)
        self.weight = nn.Parameter((weight.float() / scales[1] * LARGEST).to(FP8), requires_grad=False)
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().clone(), requires_grad=False)
        self.algorithms: tuple[int, ...] | None = None
        """Of a 2:4 weight; None for a dense one."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) in bf16 -> (..., out_features) in bf16."""
        scales: Any = self.scales  # tensors: numbers of each layer would be compiled into it
        rounded = (x.float() / scales[0]).clamp(-LARGEST, LARGEST).to(FP8)
        if self.algorithms is not None:
            op: Any = torch.ops.nm_sparsity.linear_2to4
            y: Tensor = op(rounded, self.weight, None, None, self.rows, 1.0, "", x.dtype, self.algorithms)
            y = y * (scales[0] * scales[1]).to(x.dtype)
            return y if self.bias is None else y + self.bias
        y = torch._scaled_mm(
            rounded.reshape(-1, x.shape[-1]),
            self.weight.t(),
            scale_a=scales[0],
            scale_b=scales[1],
            bias=self.bias,
            out_dtype=x.dtype,
            use_fast_accum=True,
        )
        return y.reshape(*x.shape[:-1], self.rows)


def convert(model: nn.Module, x: Tensor) -> None:
    """Replace the linear layers of `model` (bf16), in place, that 2:4 fp8 takes by sizes, with scales fitted to `x`."""
    largest: dict[nn.Module, tuple[float, int]] = {}

    def note(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        before = largest.get(layer, (0.0, 0))[0]
        largest[layer] = max(before, float(args[0].abs().max())), args[0].numel() // args[0].shape[-1]

    linears = [m for m in model.modules() if type(m) is nn.Linear and not (m.in_features % 32 or m.out_features % 32)]
    handles = [layer.register_forward_pre_hook(note) for layer in linears]
    with evaluating(model):
        model(x)
    for handle in handles:
        handle.remove()
    for holder in list(model.modules()):
        for name, child in holder.named_children():
            if isinstance(child, nn.Linear) and child in largest and satisfies(child.weight, "2:4"):
                setattr(holder, name, Float8Linear(child, *largest[child]))


def to_semi_structured(model: nn.Module, backend: Backend) -> dict[str, int]:
    """Compress the weights of all `Float8Linear` of `model`, in place; returns how many.

    Raises:
        SparsityError: if the device has no such products.
    """
    layers = [module for module in model.modules() if isinstance(module, Float8Linear)]
    device = layers[0].weight.device
    if reason := backend.why_not_device(device):
        raise SparsityError(f"{backend.name} is not available: {reason}")
    problems = [
        Problem("float8_e4m3fn", "bfloat16", layer.rows, layer.weight.shape[1], bin_of(layer.tokens))
        for layer in layers
    ]
    cache = Cache(device)
    search(problems, device, cache)
    for layer, problem in zip(layers, problems, strict=True):
        layer.algorithms = flat(cache.bins(problem))
        layer.weight = nn.Parameter(cusparselt.compress(layer.weight), requires_grad=False)
    return {"sparse_layers": len(layers)}
