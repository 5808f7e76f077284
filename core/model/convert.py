"""One call turns a model N:M sparse in place, another makes it dense again with the zeros written."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from nm_sparsity.core.errors import SparsityError
from nm_sparsity.core.methods import Method, WeightState, make_method
from nm_sparsity.core.model import bank, record
from nm_sparsity.core.model.candidates import Candidate, candidates, find_ties_outside, reduction_dims, why_not_pattern
from nm_sparsity.core.model.layers import SparseLayer, convert, revert, sparse_class, sparse_layers, sparse_weights
from nm_sparsity.core.model.report import SparsityReport, WeightReport
from nm_sparsity.core.model.rules import Rules
from nm_sparsity.core.model.strength import warn_if_of_another_length, warn_if_weak
from nm_sparsity.core.model.wrappers import unwrap
from nm_sparsity.core.pattern import NMPattern


def sparsify(
    model: nn.Module,
    pattern: str | NMPattern = "2:4",
    *,
    method: str | Method = "sr-ste",
    layout: str = "channel",
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    patterns: Mapping[str, str] | None = None,
    remainder: str = "dense",
    trust: Iterable[type[nn.Module] | str] = (),
    **hyperparameters: Any,
) -> SparsityReport:
    """Make every eligible layer of `model` N:M sparse, in place: same Parameters, same state-dict names.

    Args:
        model: any module; a DistributedDataParallel is unwrapped.
        pattern: for every layer that nothing below names, e.g. ``"2:4"``.
        method: the name of one, see `method_names`, or a `Method` object.
        layout: ``"channel"`` (M consecutive input channels: what sparse Tensor Cores need) or ``"kernel"``
            (M consecutive weights of a flattened filter: the paper's original).
        include: globs of the layers to convert; default all. A glob matches a layer or any ancestor of it.
        exclude: globs of layers that stay dense; it beats `include` and `patterns`.
        patterns: glob -> pattern (or ``"dense"``) for layers that differ; the last match wins.
        remainder: ``"dense"`` leaves a weight whose reduction size is not a multiple of M dense,
            ``"error"`` raises.
        trust: subclasses of supported layers, or ``"package.module:Class"``, that have a forward of their own and
            multiply in it with their weight as it is. Those that are not known to stay dense.
        hyperparameters: the method's, e.g. ``decay=2e-4``, and the options of every method, e.g. ``dense_until=0.1``;
            what changes over the run needs ``total_steps``, the number of its optimizer steps.

    Returns:
        A report of every weight: its pattern, or why it stays dense. ``print(report)``.

    Raises:
        SparsityError: for a malformed argument, a glob that matches nothing, a second call, or an FSDP-wrapped or
            compiled model (convert first, then wrap).
    """
    model = _convertible(model)
    chosen_method = make_method(method, **hyperparameters)
    chosen_method.check_complete()
    rules = Rules.parse(pattern, layout, include, exclude, {} if patterns is None else patterns, remainder, trust)

    rules.check_trust(model)
    found = list(candidates(model, rules.trust))
    find_ties_outside(model, found)
    rules.check_globs([name for candidate in found for name in candidate.names])
    plan = [_plan(candidate, rules, chosen_method) for candidate in found]

    by_module: dict[int, tuple[nn.Module, dict[str, WeightState]]] = {}
    for candidate, (_, state) in zip(found, plan, strict=True):
        if state is not None:
            for _, module, param_name in candidate.owners:
                by_module.setdefault(id(module), (module, {}))[1][param_name] = state
    for module, weights in by_module.values():
        # Whatever a class of the user's raises, nothing is converted yet.
        sparse_class(type(module), tuple(weights))  # type: ignore[arg-type]
    for module, weights in by_module.values():
        convert(module, weights)
    bank.attach(model)
    made = {name: state for name, _, state in sparse_weights(model)}
    record.attach(model, record.Record(chosen_method.name, chosen_method.hyperparameters(), rules.layout, weights=made))

    report = SparsityReport(
        tuple(row for row, _ in plan), sum(p.numel() for p in _initialised(model)), chosen_method.name
    )
    if chosen_method.trains_sparse:
        _warn(report, model)
    return report


def finalize(model: nn.Module) -> SparsityReport:
    """Write the zeros into the same Parameters and give every layer its dense class back, in place.

    Returns:
        A report of every weight that is now N:M.

    Raises:
        SparsityError: if the model was never sparsified, is finalized already, is still FSDP-wrapped, or its method has
            not made it N:M yet.
    """
    model = unwrap(model)
    found = record.live(model, "finalize")
    rows = []
    for name, param, state in sparse_weights(model):
        if isinstance(param, DTensor):
            raise SparsityError(
                f"{name} is sharded by FSDP: gather a full state dict first, load it into an unwrapped "
                "sparsified model, and finalize that"
            )
        rows.append(WeightReport(name, "", tuple(param.shape), str(state.pattern)))
    _check_classes(model)
    if reason := unfinished(model):
        raise SparsityError(
            f"cannot finalize {type(model).__name__}: {reason}; train to the end, or unsparsify it and sparsify it "
            "with another method"
        )
    warn_if_weak(model)
    warn_if_of_another_length(model)
    if lost := record.lost(model):
        warnings.warn(
            f"sparsify made {', '.join(lost)} sparse, but its layer was replaced since or the weight taken out of it: "
            "it is not N:M, and verify will say so (call unsparsify on a layer before you replace it by a dense one)",
            UserWarning,
            stacklevel=2,
        )
    with torch.no_grad():
        for _, param, state in sparse_weights(model):
            param.copy_(state.value(param))
    table = {**lost, **record.table(model)}  # what was lost stays expected, so that verify finds it missing
    _revert_all(model)
    record.detach(model)
    record.attach(model, replace(found, table=table, weights={}))
    return SparsityReport(tuple(rows), sum(p.numel() for p in model.parameters()), found.method)


def unfinished(model: nn.Module) -> str:
    """Why the values of the sparse weights of `model` are not N:M yet: where its method is in the run; else empty."""
    for name, param, state in sparse_weights(unwrap(model)):
        sharded = isinstance(param, DTensor)
        if not state.selects and not sharded and (reason := state.why_unfinished(name, state.value(param))):
            return reason
    return ""


def unsparsify(model: nn.Module) -> None:
    """Undo `sparsify`, in place: the dense classes come back with the shadow weights.

    These are dense while masks move; where a mask was fixed (by "asp", at `fix_at`), what it drops is zero since. A
    finalized model keeps its zeros; it only forgets what it was, so that it can be sparsified anew.

    Raises:
        SparsityError: if the model was never sparsified.
    """
    model = unwrap(model)
    if not any(True for _ in record.records(model)):
        record.live(model, "unsparsify")
    _check_classes(model)
    _revert_all(model)
    record.detach(model)


def _check_classes(model: nn.Module) -> None:
    """Raise a `SparsityError` if a sparse layer cannot get its dense class back."""
    for name, layer in sparse_layers(model):
        if SparseLayer not in type(layer).__bases__:
            raise SparsityError(
                f'the sparse layer "{name}" was made a {type(layer).__name__} since sparsify (parametrized or sharded '
                "by itself, say): undo that first"
            )


def _revert_all(model: nn.Module) -> None:
    bank.detach(model)
    for _, layer in list(sparse_layers(model)):
        assert isinstance(layer, nn.Module)
        revert(layer)


def _plan(candidate: Candidate, rules: Rules, method: Method) -> tuple[WeightReport, WeightState | None]:
    param = candidate.param
    names = candidate.names
    shape = () if isinstance(param, nn.UninitializedParameter) or param.is_nested else tuple(param.shape)
    notes = [f"tied with {', '.join(names[1:])}"] if len(names) > 1 else []

    def row(pattern: str, *more: str) -> WeightReport:
        return WeightReport(
            names[0],
            type(candidate.owners[0][1]).__name__,
            shape,
            pattern,
            "; ".join(filter(None, [*more, *notes])),
        )

    choices = list(dict.fromkeys(rules.choose(name) for name in names))  # in the owners' order
    wanted, why_dense = min(choices, key=lambda choice: choice[0] is not None)
    if candidate.why_not:
        return row("dense", candidate.why_not), None
    if wanted is None:
        return row("dense", why_dense), None
    if len(choices) > 1:
        raise SparsityError(
            f"{' and '.join(names)} share one weight, but the globs in patterns give them different patterns; "
            "name them alike"
        )
    all_dims = {reduction_dims(module, param.dim(), rules.layout) for _, module, _ in candidate.owners}
    if len(all_dims) > 1:
        return row("dense", "tied between layers that group it along different dimensions"), None
    dims = all_dims.pop()
    for _, module, _ in candidate.owners:
        reason = why_not_pattern(module, shape, wanted, dims)
        if reason and rules.remainder == "error":
            raise SparsityError(
                f"{names[0]} of shape {shape} cannot be {wanted}: {reason}; exclude it, choose another pattern or "
                'layout, or use remainder="dense"'
            )
        if reason:
            return row("dense", reason), None
    if not method.trains_sparse:
        return row("dense", f'method "{method.name}"'), None
    untrained = "" if param.requires_grad else "masked, not trained (requires_grad is False)"
    return row(str(wanted), untrained), WeightState(wanted, dims, method)


def _convertible(model: nn.Module) -> nn.Module:
    if type(model).__name__ == "OptimizedModule":
        raise SparsityError("the model is compiled already: call sparsify first, then torch.compile")
    model = unwrap(model)
    for name, module in model.named_modules():
        if type(module).__name__ == "FullyShardedDataParallel" or any(
            isinstance(p, DTensor) for p in module._parameters.values()
        ):
            raise SparsityError(
                f'the model is sharded by FSDP or tensor parallelism at "{name}": call sparsify first, then wrap'
            )
        if isinstance(module, SparseLayer) or record.of(module) is not None:
            where = f' (found at "{name}")' if name else ""
            raise SparsityError(
                f"the model was sparsified before{where}: call unsparsify(model) first to change the pattern"
            )
    return model


def _initialised(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if not isinstance(p, nn.UninitializedParameter)]


def _warn(report: SparsityReport, model: nn.Module) -> None:
    if not report.sparse:
        warnings.warn("sparsify converted no layer: see the notes in the report it returns", UserWarning, stacklevel=3)
    half = [name for name, p, _ in sparse_weights(model) if p.element_size() < 4]
    if half:
        warnings.warn(
            f"{half[0]} and {len(half) - 1} more sparse weights are half precision, which rounds the decay of dropped "
            "weights away: keep fp32 weights and train under autocast",
            UserWarning,
            stacklevel=3,
        )
