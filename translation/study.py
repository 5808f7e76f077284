"""Methods and patterns over seeds on one corpus: ``python -m nm_sparsity.translation.study [RECIPE]``.

Runs that are finished are not repeated, interrupted ones go on. ASP starts from the dense run of its seed and trains
half as long again.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from nm_sparsity.core import make_method
from nm_sparsity.core.experiments.command_line import command_line
from nm_sparsity.core.experiments.conduct import study_command
from nm_sparsity.core.experiments.plots import Curve
from nm_sparsity.core.experiments.run import EVALUATION
from nm_sparsity.core.experiments.study import Column, Plot, Result, Run, Study
from nm_sparsity.translation import recipes
from nm_sparsity.translation.prepare import prepare_corpus


def curve(run: Path, subset: str, name: str) -> Curve:
    """(update, value) of a figure in a run's TensorBoard events: subset ``train_inner``, ``train`` or ``valid``."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    if not (run / "tensorboard" / subset).is_dir():
        return []
    events = EventAccumulator(str(run / "tensorboard" / subset)).Reload()
    if name not in events.Tags()["scalars"]:
        return []
    return [(point.step, point.value) for point in events.Scalars(name)]


TRANSLATION = (
    Column("BLEU", lambda result: result["bleu"]),
    Column("chrF", lambda result: result["chrf"]),
    Column("exact %", lambda result: result["exact"]),
)
LANGUAGE_MODEL = (
    Column("bits/character", lambda result: result["bits_per_character"], digits=3),
    Column("perplexity", lambda result: result["perplexity"], digits=2),
)


@dataclass(frozen=True)
class TranslationStudy(Study):
    """Runs of one recipe, of translation or of a language model."""

    recipe: tyro.conf.Positional[str] = "tiny_libreoffice"
    """The recipe whose corpus, model and optimizer all runs share."""
    out: Path = Path("runs/study-libreoffice")
    """The folder of the runs, the report, the raw results and the pictures."""
    patterns: tuple[str, ...] = ("2:4", "1:4")
    """The N:M patterns."""
    seeds: tuple[int, ...] = (1, 2)
    """The seeds of the runs that are reported."""
    length: Annotated[int, tyro.conf.arg(name="updates")] = 2000
    """Updates of each run; ASP trains half as many after its dense run."""
    decays: tuple[float, ...] = (recipes.DECAY,)
    """The lambdas that SR-STE chooses from, for each pattern on the validation data; a single one is taken as it is."""
    fairseq: tuple[str, ...] = field(default_factory=tuple)
    """More of fairseq-train's options, for all runs."""

    unit = "updates"
    result = EVALUATION
    progress = r"num_updates=(\d+)"
    plots = (
        Plot("learning-curves.png", "update", "validation loss, bits a piece", lambda r: curve(r, "valid", "nll_loss")),
        Plot("sad.png", "update", "SAD of one update", lambda run: curve(run, "train_inner", "sad")),
    )

    @property
    def title(self) -> str:
        return self.recipe

    @property
    def translates(self) -> bool:
        """Whether the recipe is of translation, and not of a language model."""
        return recipes.get(self.recipe).fairseq["task"] == "nm_translation"

    @property
    def columns(self) -> Sequence[Column]:
        return TRANSLATION if self.translates else LANGUAGE_MODEL

    def prepare(self) -> None:
        recipe = recipes.get(self.recipe)
        if not recipe.data.exists():
            print(f"preparing {recipe.data.name}", flush=True)
            prepare_corpus(recipe.data.name, recipe.data)

    def steps(self, method: str) -> int:
        return max(1, self.length // 2) if make_method(method).starts_trained else self.length

    def commands(self, run: Run) -> list[list[str]]:
        more = [f"--max-update={run.steps}", *self.fairseq]
        return [
            ["nm_sparsity.translation.train", self.recipe, *self.options(run), *more],
            ["nm_sparsity.translation.evaluate", str(self.out / run.name)],
        ]

    def validation(self, run: Path) -> float:
        return -min(loss for _, loss in curve(run, "valid", "nll_loss"))

    def notes(self, results: Sequence[Result]) -> list[str]:
        first = results[0]
        if not self.translates:
            return [f"Test text of {first['pieces']:,} pieces of the BPE. Less is better."]
        return [f"Test set of {first['sentences']} sentences, beam {first['beam']}; {first['bleu_signature']}."]


@command_line
def main(arguments: list[str] | None = None) -> None:
    """Run or continue the study that the arguments describe, and print its table."""
    study_command(TranslationStudy, arguments, "python -m nm_sparsity.translation.study")


if __name__ == "__main__":
    sys.exit(main())
