"""From a finalized checkpoint to a smaller file and a faster model: verify, pack, export, and run it the fastest way.

`python -m nm_sparsity.benchmarks.accelerate runs/demo/finalized.pt --model nm_sparsity.classification.models:build
--args '["resnet8_small", 10]' --input 64,3,8,8`
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from nm_sparsity.benchmarks import models, report
from nm_sparsity.core import SparsityError, verify
from nm_sparsity.core.deploy import runner
from nm_sparsity.core.deploy.child import first_line
from nm_sparsity.core.deploy.onnx import to_onnx
from nm_sparsity.core.experiments import user_model
from nm_sparsity.core.experiments.command_line import command_line, make_parser
from nm_sparsity.core.experiments.folders import make_folder
from nm_sparsity.core.files.checkpoint import restore
from nm_sparsity.core.files.contents import read
from nm_sparsity.core.files.packed import load_packed, save_packed
from nm_sparsity.core.table import format_table

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def accelerate(checkpoint: Path, model: nn.Module, x: Tensor, out: Path, dtype: str = "bf16") -> list[tuple[str, str]]:
    """Do every step, writing the packed and the ONNX file into `out`; returns (step, outcome) of each."""
    steps = [("verify", str(verify(checkpoint)).splitlines()[-1])]
    state = read(checkpoint).state
    restore(model, state)
    model.eval()
    try:
        with torch.no_grad():
            model(x)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        shape = "x".join(map(str, x.shape))
        reason = first_line(error)
        raise SparsityError(f"the model does not take an input of {shape} ({x.dtype}): {reason}") from error
    # Never the name of the checkpoint, which may be of safetensors and lie in `out`.
    packed = save_packed(out / f"{checkpoint.stem}.packed.safetensors", checkpoint)
    same = all(torch.equal(value, state[name]) for name, value in load_packed(packed).items())
    dense_bytes = sum(value.nbytes for value in state.values())
    size = packed.stat().st_size
    outcome = "gives the same weights back" if same else "does NOT give the same weights back"
    steps.append(("pack", f"{packed}: {size / dense_bytes:.3f} of {dense_bytes / 1e6:.2f} MB, {outcome}"))
    try:
        steps.append(("ONNX", str(to_onnx(model, (x,), out / f"{checkpoint.stem}.onnx"))))
    except SparsityError as error:
        steps.append(("ONNX", f"not run: {error}"))
    if not torch.cuda.is_available():
        return [*steps, ("compress and time", "not run: needs an NVIDIA GPU")]

    device, kept = torch.device("cuda"), DTYPES[dtype]
    x = x.to(device, kept if x.is_floating_point() else x.dtype)
    try:
        fast = runner.accelerate(model.to(device, kept), x)
    except SparsityError as error:
        return [*steps, ("compress and time", f"not run: {error}")]
    return [*steps, ("accelerate", f"{fast.report.runs}: {fast.report.speedup:.2f}x\n{fast.report}")]


@command_line
def main(argv: Sequence[str] | None = None) -> None:
    """Take a checkpoint through all steps from the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("checkpoint", type=Path, help="a finalized checkpoint of ours")
    parser.add_argument("--model", required=True, help="package.module:function, or the name of a benchmark model")
    parser.add_argument("--args", default="[]", help="the function's arguments as a JSON list or object")
    parser.add_argument("--input", required=True, help="shape of an input, e.g. 64,3,32,32")
    parser.add_argument("--vocabulary", type=int, help="the input is token ids below this")
    parser.add_argument("--out", type=Path, default=Path(report.DEFAULT_FOLDER), help="folder for the files")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="on the GPU (default bf16)")
    args = parser.parse_args(argv)
    x = models.random_inputs(user_model.parse_shape(args.input), args.vocabulary)
    model, _ = models.build_named(args.model, args.args)
    out = make_folder(args.out)
    steps = accelerate(args.checkpoint, model, x, out, args.dtype)
    print(format_table(["step", "outcome"], [(step, outcome.partition("\n")[0]) for step, outcome in steps]))
    for _, outcome in steps:
        if details := outcome.partition("\n")[2]:
            print(f"\n{details}")


if __name__ == "__main__":
    raise SystemExit(main())
