"""A dense and a 2:4 sparse Mask R-CNN on composed data, in minutes: ``python -m nm_sparsity.detection.demo``.

Both are trained side by side, one CPU core each; then an AP table, curves, and pictures of predictions.
"""

from __future__ import annotations

import sys
from pathlib import Path

from nm_sparsity.core.experiments.command_line import command_line, make_parser, print_next_steps
from nm_sparsity.core.experiments.conduct import show
from nm_sparsity.core.experiments.run import FINALIZED
from nm_sparsity.detection.study import DetectionStudy

DEMO = DetectionStudy(
    pictures="composed",
    out=Path("runs/demo-detection"),
    methods=("dense", "sr-ste"),
    patterns=("2:4",),
    seeds=(0,),
    # The paper's 2e-4 is for 120 epochs of ImageNet: in a run of 1,000 short steps it would do nothing.
    decays=(0.1,),
)


@command_line
def main(study: DetectionStudy = DEMO) -> None:
    """Train what is not there yet, show the comparison, and say what to try next; takes no arguments."""
    print("A small Mask R-CNN on digits on photographs: dense, and 2:4 sparse by SR-STE")
    show(study)
    print(f"Truth above, predictions below: {study.out}/*/predictions.png\n")
    sparse = study.out / study.run("sr-ste", 0, "2:4", 0.1).name
    print_next_steps(
        {
            "is it really 2:4?": f"nm_sparsity.core verify {study.out / FINALIZED} --pattern 2:4",
            "COCO's numbers for each class": f"nm_sparsity.detection.evaluate {study.out}/dense-seed0",
            "what does it find?": f"nm_sparsity.detection.predict {sparse} {study.folder}/test",
            "a harder pattern": f"nm_sparsity.detection.train {study.config} --data {study.folder} --pattern 1:8 "
            "--decay 0.1 --out runs/detection_1to8",
            "your own annotations (PASCAL VOC)": "nm_sparsity.detection.prepare voc --source VOC --out data/mine",
            "more methods, patterns and seeds": "nm_sparsity.detection.study fashion",
        }
    )


if __name__ == "__main__":
    make_parser(__doc__).parse_args()
    sys.exit(main())
