"""The main job in a few minutes on two cores, with embedded data: ``python -m nm_sparsity.classification.demo``."""

from __future__ import annotations

import sys
from pathlib import Path

from nm_sparsity.classification.study import ImageStudy
from nm_sparsity.core.experiments.command_line import command_line, make_parser, print_next_steps
from nm_sparsity.core.experiments.conduct import show
from nm_sparsity.core.experiments.run import FINALIZED

DEMO = ImageStudy(
    recipe="digits_dense",
    out=Path("runs/demo"),
    methods=("dense", "ste", "sr-ste+decay=auto", "s-ste", "asp+budget=equal"),
    patterns=("2:4", "1:16"),
    seeds=(0, 1, 2, 3, 4),
    # Ten images a class: with all of them every method is right on 99% of the test images. Chosen by dense runs with
    # seeds 100 and 101 alone, which come to 92% to 93% of the validation images in 60 as in 150 epochs.
    images=100,
    length=100,
    log_every=5,
)


@command_line
def main(study: ImageStudy = DEMO) -> None:
    """Train what is not there yet, show the comparison, and say what to try next; takes no arguments."""
    images = "all" if study.images is None else f"{study.images}"
    print(
        f"ResNet-8 on {images} images of 8x8 digits: {', '.join(study.methods)} at {' and '.join(study.patterns)}, "
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
