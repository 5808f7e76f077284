"""Layers with compressed 2:4 weights, for inference."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from nm_sparsity.core.deploy.backends import Backend


class SemiStructured:
    """What these layers have beside their class's own attributes."""

    backend: Backend
    algorithms: tuple[int, ...] = ()
    """As `cusparselt.linear` takes them."""
    activation: str = ""
    """A name of `cusparselt.ACTIVATIONS` that follows the product."""


class SemiStructuredLinear(SemiStructured, nn.Linear):
    """A linear layer with a compressed 2:4 weight, and the activation behind it if there is one."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features); any strides."""
        return self.backend.linear(
            x, self.weight, self.out_features, self.bias, self.activation, algorithms=self.algorithms
        )

    def extra_repr(self) -> str:
        """Beside the sizes what computes the layer."""
        return f"{nn.Linear.extra_repr(self)}, {_about(self)}"


class SemiStructuredConv2d(SemiStructured, nn.Conv2d):
    """A 1 x 1 convolution as a product over channels-last pixels, with a compressed 2:4 weight."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., C_in, H, W) -> (..., C_out, H', W') in channels-last format."""
        pixels = x[..., :: self.stride[0], :: self.stride[1]].movedim(-3, -1)
        y = self.backend.linear(
            pixels, self.weight, self.out_channels, self.bias, self.activation, algorithms=self.algorithms
        )
        return y.movedim(-1, -3)

    def extra_repr(self) -> str:
        """Beside the sizes what computes the layer."""
        return f"{nn.Conv2d.extra_repr(self)}, {_about(self)}"


def _about(layer: SemiStructured) -> str:
    return f"2:4 by {layer.backend.name}" + (f", {layer.activation}" if layer.activation else "")


def compressed(
    layer: nn.Module, backend: Backend, algorithms: tuple[int, ...] = (), activation: str = "", weight: Any = None
) -> nn.Module:
    """`layer` (linear or 1 x 1 convolution, its weight 2:4) with a compressed weight, as another module; see `become`.

    `weight` is the compressed one, if there is it already.
    """
    new: Any = copy.copy(layer)
    new._parameters = dict(layer._parameters)
    dense: Any = layer.weight
    if weight is None:
        weight = backend.compress(dense.detach().flatten(1).contiguous())
    new.weight = nn.Parameter(weight, requires_grad=False)
    new.__class__ = SemiStructuredLinear if isinstance(layer, nn.Linear) else SemiStructuredConv2d
    new.backend, new.algorithms, new.activation = backend, algorithms, activation
    return new


def become(layer: nn.Module, other: nn.Module) -> None:
    """Make `layer` what `other` is, in place."""
    layer.__dict__.update(other.__dict__)
    layer.__class__ = other.__class__
