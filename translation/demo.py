"""From raw text to BLEU in minutes on two cores, with no download: ``python -m nm_sparsity.translation.demo``."""

from __future__ import annotations

import sys
from pathlib import Path

from nm_sparsity.core.experiments.command_line import command_line, make_parser, print_next_steps
from nm_sparsity.core.experiments.conduct import show
from nm_sparsity.core.experiments.run import FINALIZED
from nm_sparsity.translation.study import TranslationStudy

DEMO = TranslationStudy(
    recipe="tiny_number_words",
    out=Path("runs/demo-translation"),
    methods=("dense", "sr-ste"),
    patterns=("2:4",),
    seeds=(1,),
    length=800,
)


@command_line
def main(study: TranslationStudy = DEMO) -> None:
    """Train what is not there yet, show scores and translations, and say what to try next; takes no arguments."""
    print("Transformers that turn numbers in English words into German ones: dense, and 2:4 sparse by SR-STE")
    sparse = show(study)[-1].results[study.seeds[0]]
    print("The 2:4 checkpoint is verified; its finalized dense-with-zeros model gives the same translations.\n")
    for sample in sparse["samples"]:
        print(f"  {sample['source']}\n    2:4   {sample['translation']}")
        if sample["translation"] != sample["reference"]:
            print(f"    right {sample['reference']}")
    print()
    print_next_steps(
        {
            "translate something": f"nm_sparsity.translation.predict {study.out / FINALIZED} 'two thousand and five'",
            "is it really 2:4?": f"nm_sparsity.core verify {study.out / FINALIZED} --pattern 2:4",
            "a harder pattern": f"nm_sparsity.translation.train {study.recipe} --pattern 1:4 --out runs/1to4",
            "real sentences (Debian)": "nm_sparsity.translation.prepare libreoffice --out data/libreoffice",
            "your own text": "nm_sparsity.translation.prepare --source en.txt --target de.txt --out data/mine",
            "all recipes, WMT14's too": "nm_sparsity.translation.train --help",
        }
    )


if __name__ == "__main__":
    make_parser(__doc__).parse_args()
    sys.exit(main())
