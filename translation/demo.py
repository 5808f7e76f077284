"""From raw text to BLEU in minutes on two cores, with no download: ``python -m nm_sparsity.translation.demo``."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from nm_sparsity.core.experiments.command_line import command_line
from nm_sparsity.translation.study import Study, conduct, plot, results_table

DEMO = Study(
    recipe="tiny_number_words",
    folder=Path("runs/demo-translation"),
    methods=("dense", "sr-ste"),
    patterns=("2:4",),
    seeds=1,
)


@command_line
def main(study: Study = DEMO) -> None:
    """The command line; takes no arguments."""
    print("Transformers that turn numbers in English words into German ones: dense, and 2:4 sparse by SR-STE")
    rows = conduct(study)
    pictures = plot(study)
    print(f"\n{results_table(rows)}\n")
    print(rows[0]["bleu_signature"])
    print("The 2:4 checkpoint is verified; its finalized dense-with-zeros model gives the same translations.\n")
    for sample in rows[-1]["samples"]:
        print(f"  {sample['source']}\n    2:4   {sample['translation']}")
        if sample["translation"] != sample["reference"]:
            print(f"    right {sample['reference']}")
    print(f"\nPictures: {', '.join(map(str, pictures))}\n\nWhat to try next:")
    python, sparse = os.path.relpath(sys.executable), study.folder / "sr-ste-2by4-seed1"
    for what, command in (
        ("is it really 2:4?", f"-m nm_sparsity.core verify {sparse}/checkpoint_best.pt --pattern 2:4"),
        (
            "a harder pattern",
            "-m nm_sparsity.translation.train tiny_number_words --sparsity.pattern 1:4 --run runs/1by4",
        ),
        ("real sentences (Debian)", "-m nm_sparsity.translation.prepare libreoffice --out data/libreoffice"),
        ("your own text", "-m nm_sparsity.translation.prepare --source en.txt --target de.txt --out data/mine"),
        ("all recipes, WMT14's too", "-m nm_sparsity.translation.train --help"),
    ):
        print(f"  {python} {command}\n      {what}")


if __name__ == "__main__":
    sys.exit(main())
