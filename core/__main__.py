"""The console script ``nm-sparsity``: inspect a model, verify or finalize a checkpoint file."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nm_sparsity.core import checkpoint, grouping, masks, verify
from nm_sparsity.core.config import SparsityConfig
from nm_sparsity.core.errors import SparsityError, command_line
from nm_sparsity.core.flops import count_flops
from nm_sparsity.core.report import SparsityReport
from nm_sparsity.core.rules import Rules


@command_line
def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0: done, 1: the answer is no (a violated pattern) or the input is bad, 2: wrong usage."""
    args = _parser().parse_args(argv)
    action: Any = args.action
    action(args)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="nm-sparsity", description=__doc__)
    actions = parser.add_subparsers(required=True, metavar="inspect|verify|finalize")

    inspect = actions.add_parser(
        "inspect", help="what sparsify would do to a model", description="Print what would be sparse, and why not."
    )
    inspect.add_argument("model", help="a torchvision model name (resnet50) or package.module:function")
    inspect.add_argument("--layout", default="channel", help="channel (default) or kernel")
    inspect.add_argument("--include", action="append", default=[], metavar="GLOB", help="only these layers")
    inspect.add_argument("--input", default="1,3,224,224", help="input shape for counting FLOPs, or none")
    inspect.add_argument("--json", action="store_true", help="print JSON instead of the table")
    inspect.set_defaults(action=_inspect)

    check = actions.add_parser("verify", help="check that a checkpoint is N:M", description="Exit status 1 if not.")
    check.add_argument("file", type=Path)
    check.add_argument("--layout", default="channel", help="for files without metadata: channel (default) or kernel")
    check.set_defaults(action=_verify)

    final = actions.add_parser(
        "finalize",
        help="write a checkpoint's zeros",
        description="Write a plain state dict that is N:M: of a checkpoint of ours, without the dropped values; of any "
        "other file, with --pattern applied to every tensor that it fits.",
    )
    final.add_argument("file", type=Path)
    final.add_argument("output", type=Path)
    final.add_argument("--layout", default="channel", help="for files without metadata: channel (default) or kernel")
    final.set_defaults(action=_finalize)

    for sub, default in ((inspect, "2:4"), (check, None), (final, None)):
        sub.add_argument("--pattern", default=default, help="N:M, e.g. 2:4")
    for sub in (inspect, check, final):
        sub.add_argument("--exclude", action="append", default=[], metavar="GLOB", help="layers that stay dense")
    return parser


def _inspect(args: argparse.Namespace) -> None:
    config = SparsityConfig(
        pattern=args.pattern, layout=args.layout, include=tuple(args.include), exclude=tuple(args.exclude)
    )
    # On the meta device a model of any size is built and run without memory or time.
    with torch.device("meta"):
        model = _build(args.model)
    report = config.sparsify(model)
    if args.input != "none":
        report = _count_flops(model, report, args.input)
    print(report.to_json() if args.json else report)


def _verify(args: argparse.Namespace) -> None:
    print(verify(args.file, args.pattern, args.layout, args.exclude))


def _finalize(args: argparse.Namespace) -> None:
    payload = checkpoint.load(args.file)
    state, metadata = checkpoint.find_parts(payload, args.file)
    if metadata is None:
        if args.pattern is None:
            raise SparsityError(f"{args.file} carries no table of sparse weights; say which pattern: --pattern 2:4")
        metadata = _mask_all(state, args)
    elif args.exclude:
        raise SparsityError(f"{args.file} carries a table of its sparse weights; --exclude is for files without one")
    else:
        metadata = {key: value for key, value in metadata.items() if key not in ("dropped", "state")}
    result = {"state_dict": state, checkpoint.METADATA: metadata}
    verification = verify(result, args.pattern)
    checkpoint.save(args.output, result)
    print(f"{verification}\nwrote {args.output}")


def _mask_all(state: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Mask every tensor of `state` that the pattern fits, in the dict; returns the metadata."""
    rules = Rules.parse(args.pattern, args.layout, (), args.exclude, {}, "dense")
    rules.check_globs(list(state))
    table = {}
    for name, value in state.items():
        pattern, _ = rules.choose(name)
        if pattern is None or not isinstance(value, torch.Tensor) or not value.dtype.is_floating_point:
            continue
        dims = grouping.dims_by_shape(value.dim(), rules.layout)
        if value.dim() < 2 or torch.Size(value.shape[d] for d in dims).numel() % pattern.m:
            continue
        state[name] = masks.keep_largest(value, pattern, dims)
        table[name] = (str(pattern), list(dims))
    return {"format": 1, "method": "one-shot", "hyperparameters": {}, "layout": rules.layout, "layers": table}


def _build(name: str) -> nn.Module:
    module_name, _, function = name.partition(":")
    if not function:
        try:
            from torchvision.models import get_model, get_model_builder, list_models
        except ImportError as error:
            raise SparsityError(f'"{name}" needs torchvision: pip install "nm-sparsity[classification]"') from error
        if name not in list_models():
            close = [known for known in list_models() if known.startswith(name[:4])] or list_models()
            raise SparsityError(
                f'unknown model "{name}"; torchvision has {", ".join(close[:8])} ...; '
                "for a model of your own write package.module:function"
            )
        # Detectors would otherwise fetch a pretrained backbone.
        takes = signature(get_model_builder(name)).parameters
        built: nn.Module = get_model(name, **dict.fromkeys({"weights", "weights_backbone"} & set(takes)))
        return built
    try:
        model = getattr(importlib.import_module(module_name), function)()
    except Exception as error:  # Whatever a user's own code raises.
        raise SparsityError(f'cannot build "{name}": {error}') from error
    if not isinstance(model, nn.Module):
        raise SparsityError(f'"{name}" returned {type(model).__name__}, expected a torch.nn.Module')
    return model


def _count_flops(model: nn.Module, report: SparsityReport, text: str) -> SparsityReport:
    try:
        shape = [int(part) for part in text.split(",")]
    except ValueError:
        raise SparsityError(f'--input takes a shape such as 1,3,224,224, or none; found "{text}"') from None
    try:
        return report.with_flops(*count_flops(model, torch.empty(shape, device="meta")))
    except Exception as error:  # Whatever a user's model raises for an input that is not its own.
        print(f"FLOPs not counted: the model does not take an input of {shape} ({str(error).splitlines()[0]})")
        return report


if __name__ == "__main__":
    raise SystemExit(main())
