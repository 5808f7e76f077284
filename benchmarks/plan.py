"""Whether 2:4 will pay, before any training: `python -m nm_sparsity.benchmarks.plan resnet50 --device h100`, or of a
model of your own `... plan package.module:function --args '[10]' --input 32,3,224,224 --device rtx4090`.

For every layer: can torch run it 2:4 and if not why, the most the hardware could gain by the roofline, and the verdict;
then what the whole model gains. Where `nm_sparsity.benchmarks.inference` has measured a layer's product on that device,
under a CUDA graph, the measurement decides; elsewhere only the roofline's ceiling is known. Elementwise work is left
out, so reality is below.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nm_sparsity.benchmarks import devices, models
from nm_sparsity.benchmarks.devices import DTYPES, Device, Product
from nm_sparsity.benchmarks.report import COMMITTED, DEFAULT_FOLDER, Result
from nm_sparsity.core import NMPattern, SparsityError, sparsify, unsparsify
from nm_sparsity.core.deploy.backends import BACKENDS
from nm_sparsity.core.deploy.candidates import PATTERN, why_not_layer
from nm_sparsity.core.deploy.measure import MARGIN
from nm_sparsity.core.experiments import user_model
from nm_sparsity.core.experiments.command_line import command_line, make_parser
from nm_sparsity.core.model.flops import count_flops
from nm_sparsity.core.table import common_name, format_table

WORTH = 1.05
"""A ceiling below this does not pay, since measured gains stay well below it; nor does a model that gains less."""

NEAR = (0.25, 1.5)
"""Tokens of a measurement over a product's for which it still counts; with more tokens there is more to gain."""

FACTORS = (1, 2, 4, 8, 16, 32, 64, 128)
"""Of the batch, that are tried to find one that pays."""

Shape = tuple[int, int, int]
"""(tokens, rows, columns) of a product."""


@dataclass(frozen=True)
class Measured:
    """Speed-ups of 2:4 products over dense ones that were measured on a device."""

    speedups: Mapping[Shape, float] = field(default_factory=dict)

    def of(self, product: Product, factor: int = 1) -> tuple[int, float] | None:
        """(tokens, speed-up) of the nearest measurement of such a weight, for `factor` times the product's tokens."""
        tokens = product.tokens * factor
        near = [
            (abs(math.log(count / tokens)), count, speedup)
            for (count, *weight), speedup in self.speedups.items()
            if weight == [product.rows, product.columns] and NEAR[0] <= count / tokens <= NEAR[1]
        ]
        return min(near)[1:] if near else None

    def wins_from(self, product: Product) -> int | None:
        """The number of tokens from which on every measurement of such a weight gains."""
        found: int | None = None
        for (count, *weight), speedup in sorted(self.speedups.items(), reverse=True):
            if weight == [product.rows, product.columns]:
                if speedup < MARGIN:
                    break
                found = count
        return found


@dataclass(frozen=True)
class Layer:
    """One weight's product on a device; `why_not` says why torch cannot run it 2:4."""

    name: str
    product: Product
    why_not: str
    ceiling: float
    bound: str
    share: float
    """The part of the dense model's time at the roofline."""
    measured: tuple[int, float] | None = None
    """(tokens, speed-up) where there is a measurement."""
    wins_from: int | None = None
    """Tokens from which on it was measured to gain."""

    @property
    def verdict(self) -> str:
        """Whether it pays, by the measurement if there is one, and why not."""
        if self.why_not:
            return f"no: {self.why_not}"
        if self.measured is None:
            return "may pay (not measured)" if self.ceiling >= WORTH else f"no: at most {self.ceiling:.2f}x"
        tokens, speedup = self.measured
        how = "measured" if tokens == self.product.tokens else f"measured at {tokens:,} tokens"
        if speedup >= MARGIN:
            return f"pays {speedup:.2f}x ({how})"
        later = f"; from {self.wins_from:,} tokens on it does" if self.wins_from is not None else ""
        return f"does not pay: {speedup:.2f}x ({how}){later}"


@dataclass(frozen=True)
class Plan:
    """What 2:4 can gain on a model, layer by layer and as a whole."""

    layers: tuple[Layer, ...]
    ceiling: float
    """Of the whole model, with the layers that torch can run."""
    hardware_ceiling: float
    """Of the whole model, if every N:M layer had a kernel."""
    measured: Measured = field(default_factory=Measured)

    def expected(self, factor: int = 1) -> float:
        """Amdahl's law over what was measured: layers that gain run 2:4, all others stay dense.

        Args:
            factor: of the batch.
        """
        gained = 0.0
        for layer in self.layers:
            found = None if layer.why_not else self.measured.of(layer.product, factor)
            if found is not None and found[1] >= MARGIN:
                gained += layer.share * (1 - 1 / found[1])
        return 1 / (1 - gained)

    def batch_to_pay(self, batch: int) -> int | None:
        """The smallest multiple of `batch` by a power of two at which the measurements say that the model gains."""
        return next((batch * factor for factor in FACTORS if self.expected(factor) >= WORTH), None)

    def alike(self) -> dict[str, list[Layer]]:
        """The layers by a name for all that have the same product, verdict and place: ``layers.*.out``."""
        groups: dict[tuple[str, Product, str], list[Layer]] = {}
        for layer in self.layers:
            kind = re.sub(r"\d+", "*", layer.name)
            groups.setdefault((kind, layer.product, layer.verdict), []).append(layer)
        return {common_name([layer.name for layer in group]): group for group in groups.values()}

    def __str__(self) -> str:
        headers = ["layers", "", "tokens", "weight", "bound", "of time", "ceiling", "verdict"]
        rows: list[list[object]] = []
        for name, layers in self.alike().items():
            first = layers[0]
            row = [name.removesuffix(".weight"), len(layers), first.product.tokens]
            row += [f"{first.product.rows}x{first.product.columns}", first.bound]
            row += [f"{sum(layer.share for layer in layers):.1%}", f"{first.ceiling:.2f}x", first.verdict]
            rows.append(row)
        able = [layer for layer in self.layers if not layer.why_not]
        known = [layer for layer in able if layer.measured is not None]
        lines = [format_table(headers, rows)]
        if known:
            pays = sum(layer.verdict.startswith("pays") for layer in known)
            lines.append(
                f"{pays} of {len(self.layers)} layers pay; the whole model gains {self.expected():.2f}x by what was "
                f"measured for {len(known)} of the {len(able)} layers that torch can run"
            )
        else:
            lines.append(f"{sum(layer.ceiling >= WORTH for layer in able)} of {len(self.layers)} layers may pay")
        lines.append(
            f"at most {self.ceiling:.2f}x with torch's kernels ({self.hardware_ceiling:.2f}x if every sparse layer had "
            "one)"
        )
        return "\n".join(lines)


def plan(
    model: nn.Module,
    inputs: Tensor,
    device: Device,
    pattern: str = "2:4",
    dtype: str = "bf16",
    exclude: Sequence[str] = (),
    measured: Measured | None = None,
) -> Plan:
    """Plan for a model, which is run once (free on the meta device) and left as it was.

    Raises:
        SparsityError: for an unknown dtype, a device without tensor cores for it, or inputs that do not fit.
    """
    device.check(dtype)
    itemsize = DTYPES[dtype].itemsize
    try:
        total, flops = count_flops(model, inputs)
    except Exception as error:  # Whatever a user's own code raises.
        shape = "x".join(map(str, inputs.shape))
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise SparsityError(f"the model does not take an input of {shape} ({inputs.dtype}): {reason}") from error
    modules = dict(model.named_modules())
    report = sparsify(model, pattern, exclude=exclude)
    unsparsify(model)

    rest = max(0, total - sum(flops.values())) / device.peak(itemsize)
    found = []
    for weight in report.weights:
        if weight.name not in flops:
            continue
        owner, _, parameter = weight.name.rpartition(".")
        rows, columns = weight.shape[0], weight.size // weight.shape[0]
        tokens = flops[weight.name] // (2 * weight.size)
        product = Product(tokens, rows, columns, itemsize, _reuse(modules[owner]))
        why = weight.note if not weight.sparse else ""
        why = why or ("" if NMPattern.parse(pattern).implies(PATTERN) else "the hardware runs only 2:4")
        why = why or ("" if device.sparse_tensor_cores else f"{device.name} has no sparse tensor cores")
        eligible = not why
        why = why or why_not_layer(modules[owner], parameter, weight.shape, DTYPES[dtype], BACKENDS["cusparselt"])
        found.append((weight.name, product, why, eligible))
    measured = measured or Measured()
    dense = rest + sum(product.dense_seconds(device) for _, product, _, _ in found)
    layers = tuple(
        Layer(
            name,
            product,
            why,
            product.ceiling(device) if eligible else 1.0,
            product.bound(device),
            product.dense_seconds(device) / dense,
            None if why else measured.of(product),
            None if why else measured.wins_from(product),
        )
        for name, product, why, eligible in found
    )

    def ceiling(counts: Any) -> float:
        gained = sum(layer.share * (1 - 1 / layer.ceiling) for layer in layers if counts(layer))
        return 1 / (1 - gained)

    return Plan(layers, ceiling(lambda layer: not layer.why_not), ceiling(lambda layer: True), measured)


def measurements(device: Device, dtype: str, folders: Iterable[str | Path] = (DEFAULT_FOLDER, COMMITTED)) -> Measured:
    """What `nm_sparsity.benchmarks.inference` measured on `device`: of each product the best 2:4 way in a CUDA graph.

    Later files count more than earlier ones.
    """
    found: dict[Shape, float] = {}
    files = [path for folder in folders for path in Path(folder).glob("products_*.json")]
    for path in sorted(files, key=lambda path: path.stem.rsplit("_", 1)[-1]):
        result = Result.load(path)
        if devices.recognise(result.device) == device:
            best: dict[Shape, float] = {}
            for row in result.rows:
                if row.get("dtype") == dtype and row.get("launch") == "graph" and row.get("speedup"):
                    rows, columns = map(int, row["weight"].split("x"))
                    shape = (row["tokens"], rows, columns)
                    best[shape] = max(best.get(shape, 0.0), row["speedup"])
            found |= best
    return Measured(found)


def _reuse(module: nn.Module) -> float:
    """The `reuse` of a layer's `Product`; what a stride skips is not read."""
    if not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return 1.0
    covered = math.prod(k / s for k, s in zip(module.kernel_size, module.stride, strict=True))
    return max(1.0, covered) / module.groups


def for_workload(
    name: str,
    batch: int,
    device: Device,
    pattern: str = "2:4",
    dtype: str = "bf16",
    measured: Measured | None = None,
) -> Plan:
    """Plan for one of our benchmark models or a torchvision one, on the meta device.

    Raises:
        SparsityError: for an unknown name.
    """
    setup = models.workload(name)
    with torch.device("meta"):
        inputs = setup.inputs(batch, "meta")
        return plan(setup.build(), inputs, device, pattern, dtype, setup.exclude, measured)


@command_line
def main(argv: Sequence[str] | None = None) -> None:
    """Print the plan for a model from the command line."""
    parser = make_parser(__doc__)
    models.add_model_arguments(parser)
    parser.add_argument("--input", help="shape of an input with its batch, e.g. 32,3,224,224 (your own model needs it)")
    parser.add_argument("--vocabulary", type=int, help="the input is token ids below this")
    parser.add_argument("--exclude", nargs="+", action="extend", metavar="GLOB", help="layers that stay dense")
    parser.add_argument("--pattern", default="2:4", help="N:M (default 2:4)")
    parser.add_argument("--device", default="h100", help=f"{', '.join(devices.DEVICES)} (default h100)")
    parser.add_argument("--batch", type=int, default=32, help="examples at a time, without --input (default 32)")
    parser.add_argument("--dtype", default="bf16", help=f"{', '.join(DTYPES)} (default bf16)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    args = parser.parse_args(argv)
    device = devices.find(args.device)
    model, inputs, exclude = _named(args)
    result = plan(model, inputs, device, args.pattern, args.dtype, exclude, measurements(device, args.dtype))
    if not args.json:
        shape = "x".join(map(str, inputs.shape))
        print(f"{args.model}, {args.pattern}, input {shape}, {args.dtype}\n{device}\n{result}")
        if any(layer.measured is not None for layer in result.layers) and result.expected() < WORTH:
            more = result.batch_to_pay(batch := inputs.shape[0])
            print(
                f"it would pay from batch {more} on" if more else f"no batch up to {batch * FACTORS[-1]} makes it pay"
            )
        return
    rows = [
        {
            "layer": layer.name,
            **vars(layer.product),
            "ceiling": layer.ceiling,
            "measured": layer.measured and layer.measured[1],
            "verdict": layer.verdict,
        }
        for layer in result.layers
    ]
    totals = {"measured": result.expected(), "ceiling": result.ceiling, "hardware_ceiling": result.hardware_ceiling}
    print(json.dumps({"model": args.model, "device": device.name, **totals, "layers": rows}, indent=2))


def _named(args: argparse.Namespace) -> tuple[nn.Module, Tensor, Sequence[str]]:
    """The model that a command line names and an input of it, on the meta device; what stays dense in it."""
    if args.batch < 1:
        raise SparsityError("--batch must be at least 1")
    inputs = args.input and models.random_inputs(user_model.parse_shape(args.input), args.vocabulary, "meta")
    with torch.device("meta"):
        model, setup = models.build_named(args.model, args.args)
    if inputs is None:
        if setup is None:
            raise SparsityError(f"{args.model} needs the shape of an input, e.g. --input 32,3,224,224")
        inputs = setup.inputs(args.batch, "meta")
    return model, inputs, args.exclude or (() if setup is None else setup.exclude)


if __name__ == "__main__":
    raise SystemExit(main())
