"""The console script ``nm-sparsity``: inspect a model, verify or finalize a checkpoint file."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nm_sparsity.core.errors import SparsityError
from nm_sparsity.core.experiments.command_line import command_line
from nm_sparsity.core.experiments.user_model import build
from nm_sparsity.core.files.io import load, save
from nm_sparsity.core.files.metadata import METADATA, Metadata, find_parts
from nm_sparsity.core.files.verify import placements_by_shape, verify
from nm_sparsity.core.masks import keep_largest
from nm_sparsity.core.model.convert import sparsify
from nm_sparsity.core.model.flops import count_flops
from nm_sparsity.core.model.report import SparsityReport
from nm_sparsity.core.model.rules import Rules


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
    # On the meta device a model of any size is built and run without memory or time.
    with torch.device("meta"):
        model = build(args.model)
    report = sparsify(model, args.pattern, layout=args.layout, include=args.include, exclude=args.exclude)
    if args.input != "none":
        report = _count_flops(model, report, args.input)
    print(report.to_json() if args.json else report)


def _verify(args: argparse.Namespace) -> None:
    print(verify(args.file, args.pattern, args.layout, args.exclude))


def _finalize(args: argparse.Namespace) -> None:
    payload = load(args.file)
    state, metadata = find_parts(payload, args.file)
    if metadata is None:
        if args.pattern is None:
            raise SparsityError(f"{args.file} carries no table of sparse weights; say which pattern: --pattern 2:4")
        metadata = _mask_all(state, args)
    elif args.exclude:
        raise SparsityError(f"{args.file} carries a table of its sparse weights; --exclude is for files without one")
    result = {"state_dict": state, METADATA: metadata.finalized().to_dict()}
    verification = verify(result, args.pattern)
    save(args.output, result)
    print(f"{verification}\nwrote {args.output}")


def _mask_all(state: dict[str, Any], args: argparse.Namespace) -> Metadata:
    """Mask every tensor of `state` that the pattern fits, in the dict."""
    rules = Rules.parse(args.pattern, args.layout, (), args.exclude, {}, "dense")
    rules.check_globs(list(state))
    table = {name: placement for name, placement, _ in placements_by_shape(state, rules) if placement}
    for name, placement in table.items():
        state[name] = keep_largest(state[name], *placement)
    return Metadata("one-shot", {}, rules.layout, table)


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
