"""What `sparsify` did to each weight of a model, and why."""

from __future__ import annotations

import json
from collections.abc import Sequence
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
    """Multiply-accumulates x 2 of one forward pass with the dense weight, if counted."""

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

    def with_flops(self, flops: dict[str, int]) -> SparsityReport:
        """This report with the dense FLOPs of each weight's layer, by weight name."""
        return replace(self, weights=tuple(replace(w, flops=flops.get(w.name)) for w in self.weights))

    def to_json(self) -> str:
        """The report as one JSON object."""
        rows = [{**asdict(w), "density": w.density} for w in self.weights]
        totals = {
            "method": self.method,
            "parameters": self.parameters,
            "sparse_weights": sum(w.size for w in self.sparse),
            "sparse_density": self.sparse_density,
            "model_density": self.model_density,
        }
        return json.dumps({"weights": rows, **totals}, indent=2)

    def __str__(self) -> str:
        counted = any(w.flops is not None for w in self.weights)
        headers = ["layer", "type", "shape", "pattern", "density", "weights"]
        headers += ["MFLOPs", "sparse"] if counted else []
        rows = []
        for w in self.weights:
            row: list[object] = [w.name.removesuffix(".weight"), w.kind, "x".join(map(str, w.shape))]
            row += [w.pattern, f"{w.density:.4g}", w.size]
            if counted:
                row += ["-" if w.flops is None else f"{f / 1e6:,.1f}" for f in _dense_and_sparse(w)]
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
        counted = [w for w in self.weights if w.flops is not None]
        if counted:
            dense = sum(w.flops or 0 for w in counted)
            sparse = sum((w.flops or 0) * w.density for w in counted)
            text += f"\nFLOPs of a forward pass: {dense / 1e9:.3f} G dense, {sparse / 1e9:.3f} G sparse"
        return text


def _dense_and_sparse(w: WeightReport) -> Sequence[float]:
    flops = w.flops or 0
    return flops, flops * w.density
