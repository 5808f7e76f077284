"""The main job in a few minutes on two cores, with embedded data: ``python -m nm_sparsity.classification.demo``."""

from __future__ import annotations

import sys
from pathlib import Path

from nm_sparsity.classification.study import ImageStudy
from nm_sparsity.core.experiments.command_line import command_line, make_parser, print_next_steps
from nm_sparsity.core.experiments.conduct import show
from nm_sparsity.core.experiments.run import FINALIZED

DEMO = ImageStudy(
    recipe="digits_dense", out=Path("runs/demo"), seeds=(0, 1, 2, 3, 4), length=30, choosing_seeds=(100, 101)
)


@command_line
def main(study: ImageStudy = DEMO) -> None:
    """Train what is not there yet, show the comparison, and say what to try next; takes no arguments."""
    print(
        f"ResNet-8 on 8x8 digits: dense, STE, SR-STE and ASP at {' and '.join(study.patterns)}, "
        f"{len(study.seeds)} seeds, {study.length} epochs"
    )
    show(study)
    product = study.out / FINALIZED
    print(f"{product} (SR-STE at {study.patterns[0]}) is verified: every group keeps its pattern.\n")
    print_next_steps(
        {
            "test accuracy of the finalized checkpoint": f"nm_sparsity.classification.evaluate {product}",
            "is it really 2:4?": f"nm_sparsity.core verify {product} --pattern {study.patterns[0]}",
            "a harder pattern": "nm_sparsity.classification.train digits_2to4 --pattern 1:16 --out runs/digits_1to16",
            "what 2:4 does to ResNet-50": "nm_sparsity.core inspect resnet50 --pattern 2:4",
            "all recipes, ImageNet's too": "nm_sparsity.classification.train --help",
        }
    )


if __name__ == "__main__":
    make_parser(__doc__).parse_args()
    sys.exit(main())
