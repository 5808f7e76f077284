"""The main job in a few minutes on two cores, with embedded data: ``python -m nm_sparsity.classification.demo``."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from nm_sparsity.classification.study import Study, conduct, results_table
from nm_sparsity.core.experiments.command_line import command_line
from nm_sparsity.core.experiments.finalize import FINALIZED

DEMO = Study(recipe="digits_dense", folder=Path("runs/demo"), patterns=("2:4", "1:8"), seeds=5, epochs=30)


def next_steps(study: Study) -> list[tuple[str, str]]:
    """What to try after the demo: (what it does, command)."""
    python = os.path.relpath(sys.executable)
    module = f"{python} -m nm_sparsity"
    return [
        ("test accuracy of the finalized checkpoint", f"{module}.classification.evaluate {study.folder / FINALIZED}"),
        ("is it really 2:4?", f"{module}.core verify {study.folder / FINALIZED} --pattern {study.patterns[0]}"),
        (
            "a harder pattern",
            f"{module}.classification.train digits_2by4 --sparsity.pattern 1:16 --folder runs/digits_1by16",
        ),
        ("what 2:4 does to ResNet-50", f"{module}.core inspect resnet50 --pattern 2:4"),
        ("all recipes, ImageNet's too", f"{module}.classification.train --help"),
    ]


@command_line
def main(study: Study = DEMO) -> None:
    """The command line; takes no arguments."""
    print(
        f"ResNet-8 on 8x8 digits: dense, STE, SR-STE and ASP at {' and '.join(study.patterns)}, "
        f"{study.seeds} seeds, {study.epochs} epochs"
    )
    rows = conduct(study)
    print(f"\n{results_table(rows)}\n")
    images = rows[0].runs[0]["test/images"]
    print(f"One of the {images} test images is {100 / images:.2f} points; differences of that size mean nothing.")
    print("flips/weight: SAD per sparse weight over the whole run; ASP's epochs count its dense run.")
    print(f"{study.folder / FINALIZED} (SR-STE at {study.patterns[0]}) is verified: every group keeps its pattern.")
    print(f"More in {study.folder / 'report.md'}, accuracy.png and sad.png.\n\nWhat to try next:")
    for what, command in next_steps(study):
        print(f"  {command}\n      {what}")


if __name__ == "__main__":
    sys.exit(main())
