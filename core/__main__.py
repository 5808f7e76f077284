"""The console script ``nm-sparsity``: inspect a model, verify or finalize a checkpoint file."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nm_sparsity.core.errors import SparsityError
from nm_sparsity.core.experiments.command_line import command_line
from nm_sparsity.core.experiments.user_model import build, parse_arguments, parse_shape
from nm_sparsity.core.files import sealed
from nm_sparsity.core.files.contents import Contents, read, save_safetensors
from nm_sparsity.core.files.io import save
from nm_sparsity.core.files.metadata import METADATA, Metadata
from nm_sparsity.core.files.verify import refuse_globs, verify
from nm_sparsity.core.masks import keep_largest
from nm_sparsity.core.model.convert import sparsify
from nm_sparsity.core.model.flops import count_flops
from nm_sparsity.core.model.report import SparsityReport
from nm_sparsity.core.model.rules import Rules
from nm_sparsity.core.pattern import Table


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
    inspect.add_argument(
        "model", help="a torchvision model name (resnet50) or package.module:function; the current folder is importable"
    )
    inspect.add_argument("--args", default="[]", help="its arguments as a JSON list or object")
    inspect.add_argument(
        "--input", help="input shape for counting FLOPs, or none; default: 1,3,224,224 for torchvision's models"
    )
    inspect.add_argument("--json", action="store_true", help="print JSON instead of the table")
    inspect.set_defaults(action=_inspect)

    check = actions.add_parser(
        "verify",
        help="check that a file is N:M",
        description="Exit status 0: every weight that should be N:M is, 1: not, or none was found. Takes checkpoints, "
        "safetensors files (packed ones too), folders of Hugging Face models and ONNX files.",
    )
    check.add_argument("file", type=Path)
    check.set_defaults(action=_verify)

    final = actions.add_parser(
        "finalize",
        help="write a checkpoint's zeros",
        description="Write a plain state dict that is N:M: of a checkpoint of ours, without the dropped values; of any "
        "other file, with --pattern applied to every tensor that it fits, but to embeddings.",
    )
    final.add_argument("file", type=Path)
    final.add_argument("output", type=Path, help="PyTorch's format, or safetensors if the name ends so")
    final.set_defaults(action=_finalize)

    for sub, default, about in (
        (inspect, "2:4", ""),
        (check, None, "for files without a table of sparse weights: "),
        (final, None, "for files without a table of sparse weights: "),
    ):
        sub.add_argument("--pattern", default=default, help="N:M, e.g. 2:4")
        sub.add_argument("--layout", default="channel", help=f"{about}channel (default) or kernel")
        globs: dict[str, Any] = {"nargs": "+", "action": "extend", "default": [], "metavar": "GLOB"}
        sub.add_argument("--include", **globs, help=f"{about}only these layers")
        sub.add_argument("--exclude", **globs, help=f"{about}layers that stay dense")
        globs["metavar"] = "GLOB=PATTERN"
        sub.add_argument("--patterns", **globs, help=f"{about}layers that differ; dense is a pattern too")
    return parser


def _choice(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `sparsify` that choose what is sparse."""
    patterns = {}
    for entry in args.patterns:
        glob, equals, pattern = entry.rpartition("=")
        if not equals:
            raise SparsityError(f'--patterns "{entry}" is not GLOB=PATTERN, such as layer4.*=1:4')
        patterns[glob] = pattern
    return {
        "layout": args.layout,
        "include": tuple(args.include),
        "exclude": tuple(args.exclude),
        "patterns": patterns,
    }


def _inspect(args: argparse.Namespace) -> None:
    # On the meta device a model of any size is built and run without memory or time.
    with torch.device("meta"):
        model = build(args.model, parse_arguments(args.args))
    report = sparsify(model, args.pattern, **_choice(args))
    if args.input is not None and args.input != "none":
        report = _count_flops(model, report, args.input)
    elif args.input is None and ":" not in args.model:
        try:
            report = _count_flops(model, report, "1,3,224,224")
        except SparsityError as error:  # A detector, say.
            print(f"FLOPs not counted: {error}", file=sys.stderr)
    print(report.to_json() if args.json else report)


def _verify(args: argparse.Namespace) -> None:
    print(verify(args.file, args.pattern, **_choice(args)))


def _finalize(args: argparse.Namespace) -> None:
    if args.output.resolve() == args.file.resolve():
        raise SparsityError(f"{args.output} is the file that is read: its dropped weights would be lost; name another")
    contents = read(args.file)
    state, metadata = contents.state, contents.metadata
    rules = Rules.parse(args.pattern or "2:4", remainder="dense", **_choice(args))
    if args.file.suffix == ".onnx":
        raise SparsityError(f"{args.file} is a model for inference: finalize what it was exported from")
    if metadata is not None:
        refuse_globs(rules, contents.where)
    elif args.pattern is None:
        raise SparsityError(f"{args.file} carries no table of sparse weights; say which pattern: --pattern 2:4")
    else:
        metadata = _mask_all(contents, rules)
    result = {"state_dict": state, METADATA: metadata.finalized().to_dict()}
    verification = verify(result, args.pattern)
    if args.output.suffix == ".safetensors":
        save_safetensors(args.output, state, metadata)
    else:
        save(args.output, result)
    print(f"{verification}\nwrote {args.output}")


def _mask_all(contents: Contents, rules: Rules) -> Metadata:
    """Mask every tensor of `contents` that the pattern fits, in its state dict; tied ones stay tied."""
    weights = list(contents.weights(rules.layout))
    rules.check_globs([weight.name for weight in weights])
    table: Table = {}
    tied: dict[Any, list[str]] = {}
    for name, value in contents.state.items():
        if isinstance(value, torch.Tensor):
            tied.setdefault(sealed.place(value), []).append(name)
    for weight in weights:
        placement, reason = weight.placement(rules)
        if placement:
            table[weight.name] = placement
            names = tied[sealed.place(weight.value)]
            contents.state.update(dict.fromkeys(names, keep_largest(weight.value, *placement)))
        else:
            print(f"{weight.name} stays dense: {reason}")
    return Metadata("one-shot", {}, rules.layout, table)


def _count_flops(model: nn.Module, report: SparsityReport, text: str) -> SparsityReport:
    shape = parse_shape(text)
    try:
        return report.with_flops(*count_flops(model, torch.empty(shape, device="meta")))
    except Exception as error:  # Whatever a user's model raises for an input that is not its own.
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise SparsityError(f"the model does not take an input of {list(shape)}: {reason}") from error


if __name__ == "__main__":
    raise SystemExit(main())
