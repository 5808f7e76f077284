"""Score a run on its test set: ``python -m nm_sparsity.translation.evaluate RUN``.

Translation: detokenized BLEU and chrF by sacreBLEU with their signatures, BLEU by sentence length, sample translations.
Language model: perplexity. Of a sparse run the pattern is verified, and the finalized dense model with zeros, in
``RUN/finalized.pt`` for any fairseq, must give the very same output. Everything also goes to ``RUN/evaluation.json``.
What is no run as it stands (a file, other data, another subset or decoding) is scored alike and written where ``--out``
says, or only printed.
"""

from __future__ import annotations

import logging
import random
import re
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF
from torch import nn

from nm_sparsity.core import SparsityError, frozen, verify
from nm_sparsity.core.experiments.command_line import command_line
from nm_sparsity.core.experiments.finalize import Score, finalize_and_check
from nm_sparsity.core.experiments.folders import results_folder, what_was_written
from nm_sparsity.core.experiments.run import EVALUATION, FINALIZED, write_json
from nm_sparsity.core.files.metadata import METADATA, Metadata
from nm_sparsity.core.model.layers import sparse_layers
from nm_sparsity.core.table import format_table
from nm_sparsity.translation.average import average
from nm_sparsity.translation.corpora import read_lines
from nm_sparsity.translation.prepare import Prepared, check_separate
from nm_sparsity.translation.recipes import checkpoint_of, recorded
from nm_sparsity.translation.runs import batches, data_of, generate, load_run
from nm_sparsity.translation.stock import eval_lm
from nm_sparsity.translation.trainer import read

LENGTHS = (5, 10, 20, 30, 40)
"""Upper ends, in source words, of the bins of BLEU by length."""


@dataclass(frozen=True)
class Options:
    """What to score, and how to decode."""

    run: tyro.conf.Positional[Path]
    """A run folder (its checkpoint_best.pt) or a checkpoint file."""
    data: Path | None = None
    """The prepared folder, if it is not where the run was trained on."""
    subset: str = "test"
    """valid or test."""
    beam: int | None = None
    """Beam size; default: the recipe's, or 5."""
    lenpen: float | None = None
    """Length penalty, above 1 favours longer translations; default: the recipe's, or 1."""
    samples: int = 10
    """Translations to show."""
    pattern: Annotated[str | None, tyro.conf.arg(metavar="N:M")] = None
    """What the weights are expected to be; default: what the run was trained with."""
    out: Path | None = None
    """The folder to write into; by default that of a run which is scored as it stands, else nothing is written."""

    def __post_init__(self) -> None:
        if self.subset not in ("valid", "test"):
            raise SparsityError(f'subset must be "valid" or "test", found "{self.subset}"')
        for name, least in (("beam", 1), ("samples", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise SparsityError(f"{name} must be at least {least}, found {value}")

    @property
    def as_it_stands(self) -> Path | None:
        """The run folder, if it is scored on its own test set and with its own decoding."""
        asked = self.data, self.beam, self.lenpen
        return self.run if self.run.is_dir() and asked == (None, None, None) and self.subset == "test" else None


@dataclass
class Translated:
    """Scores of a translation model; BLEU and chrF in points, `exact` in percent of sentences."""

    bleu: float
    bleu_signature: str
    chrf: float
    chrf_signature: str
    exact: float
    sentences: int
    by_length: dict[str, tuple[int, float]]
    """Source words -> sentences, BLEU."""
    compound_split_bleu: float | None
    """Tokenized BLEU with hyphenated compounds split, the tradition of papers on WMT14; compare with no other."""
    samples: list[dict[str, str]] = field(default_factory=list)


@dataclass
class Perplexity:
    """Score of a language model, per piece of the BPE."""

    perplexity: float
    bits_per_character: float
    pieces: int


def translate(model: Any, task: Any, subset: str, beam: int, lenpen: float) -> list[str]:
    """The detokenized translation of every sentence of `subset`, in order."""
    task.load_dataset(subset)
    return generate(model, task, batches(model, task, task.dataset(subset)), beam, lenpen, (2.0, 20))


def score(sources: list[str], hypotheses: list[str], references: list[str], compounds: bool = False) -> Translated:
    """BLEU, chrF and their kin of detokenized `hypotheses`."""
    bleu, chrf = BLEU(), CHRF()
    total = bleu.corpus_score(hypotheses, [references]).score
    by_length = {}
    for low, high in zip((0, *LENGTHS), (*LENGTHS, sys.maxsize), strict=True):
        chosen = [i for i, source in enumerate(sources) if low < len(source.split()) <= high]
        if chosen:
            part = BLEU().corpus_score([hypotheses[i] for i in chosen], [[references[i] for i in chosen]])
            name = f"{low + 1}-{high}" if high != sys.maxsize else f"over {low}"
            by_length[name] = (len(chosen), part.score)
    return Translated(
        total,
        str(bleu.get_signature()),
        chrf.corpus_score(hypotheses, [references]).score,
        str(chrf.get_signature()),
        100 * sum(h == r for h, r in zip(hypotheses, references, strict=True)) / len(references),
        len(references),
        by_length,
        compound_split_bleu(hypotheses, references) if compounds else None,
    )


def compound_split_bleu(hypotheses: list[str], references: list[str]) -> float:
    """BLEU of 13a tokens, with the hyphen of compounds a token of its own on both sides."""
    tokenizer = BLEU().tokenizer

    def split(text: str) -> str:
        return re.sub(r"(?<=\S)-(?=\S)", " ##AT##-##AT## ", tokenizer(text))

    bleu = BLEU(tokenize="none", force=True)
    return bleu.corpus_score([split(h) for h in hypotheses], [[split(r) for r in references]]).score


def perplexity(model: nn.Module, task: Any, subset: str, text: list[str]) -> Perplexity:
    """Perplexity by fairseq's own ``eval_lm``."""
    task.load_dataset(subset)
    dataset = task.dataset(subset)
    batches = task.eval_lm_dataloader(dataset, batch_size=16, num_workers=0)
    with torch.no_grad(), frozen(model):
        result = eval_lm([model], task.source_dictionary, batches, target_dictionary=task.target_dictionary)
    pieces = int(sum(dataset.sizes))
    bits = float(result["loss"])
    characters = sum(len(line) + 1 for line in text)
    return Perplexity(2**bits, bits * pieces / characters, pieces)


def evaluate(options: Options) -> Translated | Perplexity:
    """Score, verify and finalize; write ``evaluation.json`` and, if sparse, ``finalized.pt``, see `results_folder`.

    Raises:
        SparsityError: if the data or the checkpoint does not fit, or test sentences are in the training text.
        VerificationError: if a weight breaks its pattern, or the finalized model translates differently.
    """
    checkpoint = checkpoint_of(options.run)
    payload = read(checkpoint)
    entry = payload["extra_state"].get(METADATA)
    sparse = entry is not None and bool(Metadata.from_dict(entry, checkpoint).layers)
    if sparse or options.pattern:
        verify(payload, options.pattern)
    folder = data_of(payload, checkpoint, options.data)
    prepared = Prepared.read(folder)
    out = results_folder(options.as_it_stands, options.out, (EVALUATION, FINALIZED))
    model, task = load_run(checkpoint, folder, payload)
    check_separate(folder, prepared.languages)
    decoding = _decoding(options, checkpoint.parent) if len(prepared.languages) == 2 else {}
    texts = [read_lines(folder / f"{options.subset}.{language}") for language in prepared.languages]

    def scores(model: nn.Module) -> Score:
        if len(texts) == 1:
            return asdict(perplexity(model, task, options.subset, texts[0]))
        sources, references = texts
        hypotheses = translate(model, task, options.subset, **decoding)
        if len(hypotheses) != len(references):
            raise SparsityError(
                f"{folder}/bin holds {len(hypotheses)} sentences, {folder}/{options.subset}.* {len(references)}: "
                "prepare the corpus again"
            )
        scored = score(sources, hypotheses, references, compounds=prepared.corpus == "wmt14")
        for i in random.Random(0).sample(range(len(sources)), min(options.samples, len(sources))):
            scored.samples.append({"source": sources[i], "translation": hypotheses[i], "reference": references[i]})
        return {"translations": hypotheses, **asdict(scored)}

    def reload(end: nn.Module) -> nn.Module:
        if out is None:
            return end
        average((checkpoint,), out / FINALIZED)
        exported: nn.Module = load_run(out / FINALIZED, folder)[0]
        return exported

    trainable = any(True for _ in sparse_layers(model))  # unlike an exported one, which is dense with zeros already
    found = dict(finalize_and_check(model, scores, reload=reload).score if trainable else scores(model))
    found.pop("translations", None)
    result = Translated(**found) if decoding else Perplexity(**found)
    if out is not None:
        how = {"checkpoint": str(checkpoint), "subset": options.subset, **decoding, "verified": sparse}
        write_json(out / EVALUATION, {**asdict(result), **how})
    return result


def _decoding(options: Options, run: Path) -> dict[str, Any]:
    """Beam and length penalty: as asked for, or the recipe's, or fairseq's own."""
    asked = {"beam": options.beam, "lenpen": options.lenpen}
    known = {"beam": 5, "lenpen": 1.0, **recorded(run)}
    return {name: known[name] if value is None else value for name, value in asked.items()}


def show(result: Translated | Perplexity) -> str:
    """The scores as text."""
    if isinstance(result, Perplexity):
        return (
            f"perplexity {result.perplexity:.2f} a piece, {result.bits_per_character:.3f} bits a character "
            f"({result.pieces} pieces)"
        )
    lines = [
        f"BLEU {result.bleu:.2f}   ({result.bleu_signature})",
        f"chrF {result.chrf:.2f}   ({result.chrf_signature})",
        f"exact {result.exact:.1f}% of {result.sentences} sentences",
    ]
    if result.compound_split_bleu is not None:
        lines.append(
            f"BLEU {result.compound_split_bleu:.2f} tokenized with split compounds (13a): compare with no other"
        )
    table = [(words, count, f"{bleu:.1f}") for words, (count, bleu) in result.by_length.items()]
    lines += ["", format_table(("source words", "sentences", "BLEU"), table)]
    for sample in result.samples:
        lines += ["", *(f"{name:12}{text}" for name, text in sample.items())]
    return "\n".join(lines)


@command_line
def main(arguments: list[str] | None = None) -> None:
    """Score what `arguments`, by default the command line's, name, and print the scores."""
    options = tyro.cli(Options, args=arguments, prog="python -m nm_sparsity.translation.evaluate", description=__doc__)
    for name in ("fairseq", "fairseq_cli"):
        logging.getLogger(name).setLevel(logging.WARNING)
    result = evaluate(options)
    print(show(result), what_was_written((EVALUATION,), options.out or options.as_it_stands), sep="\n")


if __name__ == "__main__":
    sys.exit(main())
