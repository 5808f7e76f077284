"""What `sparsify` did to each weight of a model, and why."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace

from nm_sparsity.core.pattern import NMPattern
from nm_sparsity.core.table import format_table


@dataclass(frozen=True)
class WeightReport:
    """One weight: `pattern` is "2:4" or, for a dense one, "dense" with the reason in `note`."""

    name: str
    kind: str
    shape: tuple[int, ...]
    pattern: str
    note: str = ""
    flops: int | None = None
    """FLOPs of its product in a dense forward pass, if counted."""

    @property
    def sparse(self) -> bool:
        """Whether the weight has an N:M pattern."""
        return self.pattern != "dense"

    @property
    def density(self) -> float:
        """The fraction of the weight that is kept."""
        return NMPattern.parse(self.pattern).density if self.sparse else 1.0

    @property
    def size(self) -> int:
        """The number of weights, dropped ones included."""
        size = 1
        for extent in self.shape:
            size *= extent
        return size


@dataclass(frozen=True)
class SparsityReport:
    """Every weight of a model. Prints as an aligned table; `to_json` for machines."""

    weights: tuple[WeightReport, ...]
    parameters: int
    """The number of all parameters of the model, biases and norms included."""
    method: str = ""
    flops: int | None = None
    """FLOPs of a dense forward pass, if counted."""

    @property
    def sparse_flops(self) -> float | None:
        """FLOPs of a forward pass without the products of dropped weights, if counted."""
        if self.flops is None:
            return None
        return self.flops - sum((w.flops or 0) * (1 - w.density) for w in self.sparse)

    @property
    def sparse(self) -> tuple[WeightReport, ...]:
        """The weights that have an N:M pattern."""
        return tuple(w for w in self.weights if w.sparse)

    @property
    def sparse_density(self) -> float:
        """Kept weights / weights, over the sparse ones; 1 if there are none."""
        total = sum(w.size for w in self.sparse)
        return sum(w.size * w.density for w in self.sparse) / total if total else 1.0

    @property
    def model_density(self) -> float:
        """Kept parameters / parameters, over the whole model."""
        dropped = sum(w.size * (1 - w.density) for w in self.sparse)
        return 1 - dropped / self.parameters if self.parameters else 1.0

    def with_flops(self, total: int, flops: dict[str, int]) -> SparsityReport:
        """This report with the FLOPs of a dense forward pass, in total and by weight name (see `count_flops`)."""
        weights = tuple(replace(w, flops=flops.get(w.name)) for w in self.weights)
        return replace(self, weights=weights, flops=total)

    def to_json(self) -> str:
        """The report as one JSON object."""
        rows = [{**asdict(w), "density": w.density} for w in self.weights]
        totals = {
            "method": self.method,
            "parameters": self.parameters,
            "sparse_weights": sum(w.size for w in self.sparse),
            "sparse_density": self.sparse_density,
            "model_density": self.model_density,
            "flops": self.flops,
            "sparse_flops": self.sparse_flops,
        }
        return json.dumps({"weights": rows, **totals}, indent=2)

    def __str__(self) -> str:
        headers = ["layer", "type", "shape", "pattern", "density", "weights"]
        headers += [] if self.flops is None else ["MFLOPs", "sparse"]
        rows = []
        for w in self.weights:
            row: list[object] = [w.name.removesuffix(".weight"), w.kind, "x".join(map(str, w.shape))]
            row += [w.pattern, w.density, w.size]
            if self.flops is not None:
                row += [None, None] if w.flops is None else [w.flops / 1e6, w.flops * w.density / 1e6]
            rows.append([*row, w.note])
        return format_table([*headers, "note"], rows) + "\n" + self.summary()

    def summary(self) -> str:
        """The totals in one or two lines."""
        text = (
            f"{len(self.sparse)} of {len(self.weights)} weights sparse"
            + (f" ({self.method})" if self.method else "")
            + f": {sum(w.size for w in self.sparse):,} of {self.parameters:,} parameters, "
            f"density {self.sparse_density:.4g} in them, {self.model_density:.4g} in the model"
        )
        if self.flops is not None and self.sparse_flops is not None:
            text += f"\nFLOPs of a forward pass: {self.flops / 1e9:.3f} G dense, {self.sparse_flops / 1e9:.3f} G sparse"
        return text
