"""Translate sentences, or continue a text: ``python -m nm_sparsity.translation.predict RUN "A sentence." ...``.

Without sentences and without ``--file`` the lines of the standard input are taken. A line of output for each.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sentencepiece
import torch
import tyro

from nm_sparsity.core import SparsityError
from nm_sparsity.core.experiments.command_line import command_line
from nm_sparsity.core.experiments.folders import find_checkpoint
from nm_sparsity.core.experiments.run import FINALIZED
from nm_sparsity.translation.corpora import lines_in, read_lines
from nm_sparsity.translation.prepare import Prepared, normalize
from nm_sparsity.translation.recipes import BEST, LAST
from nm_sparsity.translation.runs import batches, data_of, generate, load_run
from nm_sparsity.translation.stock import utils
from nm_sparsity.translation.trainer import read


@dataclass(frozen=True)
class Options:
    """What to translate or to continue, with which model."""

    run: tyro.conf.Positional[Path]
    """A run folder (its checkpoint_best.pt), a checkpoint, or a finalized file."""
    sentences: tyro.conf.Positional[tuple[str, ...]] = ()
    """What to translate; for a language model, texts to continue."""
    file: Path | None = None
    """Sentences, one a line, instead."""
    data: Path | None = None
    """The prepared folder, if it is not where the run was trained on."""
    beam: int = 5
    """Beam size."""
    lenpen: float = 1.0
    """Length penalty: above 1 favours longer translations."""
    length: int = 50
    """Pieces that a language model adds, at most."""

    def __post_init__(self) -> None:
        for name in ("beam", "length"):
            if getattr(self, name) < 1:
                raise SparsityError(f"{name} must be at least 1, found {getattr(self, name)}")
        if self.file is not None and self.sentences:
            raise SparsityError("give either sentences or --file")


def predict(options: Options, sentences: Sequence[str]) -> list[str]:
    """The translation of each sentence, or each text with its continuation; of an empty one an empty one.

    Raises:
        SparsityError: if the run or its data cannot be read, or a sentence is too long for the model.
    """
    checkpoint = find_checkpoint(options.run, (BEST, FINALIZED, LAST))
    payload = read(checkpoint)
    folder = data_of(payload, checkpoint, options.data)
    translates = len(Prepared.read(folder).languages) == 2
    model, task = load_run(checkpoint, folder, payload)
    bpe = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spm.model"))

    pieces = [bpe.encode(normalize(sentence), out_type=str) for sentence in sentences]
    tokens = {
        i: task.source_dictionary.encode_line(" ".join(line), add_if_not_exist=False).long()
        for i, line in enumerate(pieces)
        if line
    }
    for i, line in tokens.items():
        if unknown := [pieces[i][at] for at in (line == task.source_dictionary.unk()).nonzero()[:, 0]]:
            print(f"sentence {i + 1} has what the model has never seen: {' '.join(unknown)}", file=sys.stderr)
    limits = utils.resolve_max_positions(task.max_positions(), model.max_positions())
    most = min(limits) if isinstance(limits, tuple) else limits
    for i, line in tokens.items():
        if len(line) > (most if translates else most - options.length):
            raise SparsityError(f"sentence {i + 1} has {len(line)} pieces, more than the model takes ({most}); cut it")
    if not tokens:
        return [""] * len(sentences)
    if translates:
        dataset = task.build_dataset_for_inference(list(tokens.values()), [len(line) for line in tokens.values()])
        samples, longer = batches(model, task, dataset), (2.0, 20)
    else:
        # Of the text, fairseq counts what stands for its beginning too.
        samples, longer = (_prompt(i, line) for i, line in enumerate(tokens.values())), (1.0, options.length - 1)
    found = generate(model, task, samples, options.beam, options.lenpen, longer)
    outputs = dict(zip(tokens, found, strict=True))
    return [outputs.get(i, "") for i in range(len(sentences))]


def _prompt(index: int, line: torch.Tensor) -> dict[str, Any]:
    """A batch of one text to continue; fairseq's own dataset for it does not work with NumPy 2."""
    text = line.roll(1)[None]  # the end of a sentence, which the dictionary put at its end, begins the next one
    return {"id": torch.tensor([index]), "net_input": {"src_tokens": text, "src_lengths": torch.tensor([len(line)])}}


@command_line
def main(arguments: list[str] | None = None) -> None:
    """Print the translation or the continuation of what `arguments`, by default the command line's, give."""
    options = tyro.cli(Options, args=arguments, prog="python -m nm_sparsity.translation.predict", description=__doc__)
    for name in ("fairseq", "fairseq_cli"):
        logging.getLogger(name).setLevel(logging.WARNING)
    given: Sequence[str] = options.sentences
    if options.file is not None:
        given = read_lines(options.file)
    elif not given:
        given = lines_in(sys.stdin.buffer.read(), "the standard input")
    print("\n".join(predict(options, given)))


if __name__ == "__main__":
    sys.exit(main())
