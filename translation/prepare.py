"""Raw text in, a folder that fairseq trains on out: ``python -m nm_sparsity.translation.prepare CORPUS --out DIR``.

DIR holds ``{train,valid,test}.{en,de}`` (cleaned text), ``spm.model`` (one joint BPE), ``bin/`` (fairseq's binary
format, what ``fairseq-train`` takes) and ``prepared.json`` (what was done, and how many sentences each step left).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import os
import random
import re
import shutil
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

import sentencepiece
from fairseq import options
from fairseq_cli import preprocess

from nm_sparsity.core.errors import SparsityError, command_line
from nm_sparsity.translation import corpora

Row = tuple[str, ...]
"""A sentence in each language: two for translation, one for a language model."""

SPLITS = ("train", "valid", "test")
VOCABULARY = {"number-words": 256, "pydoc-topics": 2000, "libreoffice": 2000, "wmt14": 32000}
MAX_WORDS = 250
MAX_RATIO = 3.0
"""Of the lengths of two sentences in characters, where the longer has more than 20."""


@dataclass
class Prepared:
    """What is in a prepared folder; its ``prepared.json``."""

    corpus: str
    languages: list[str]
    """Source and target of a parallel corpus, ``["text"]`` for a language model."""
    vocabulary: int
    seed: int
    sentences: dict[str, int] = field(default_factory=dict)
    """By split, and what cleaning and the separation of the splits dropped."""
    sentencepiece: str = version("sentencepiece")

    @classmethod
    def read(cls, folder: Path) -> Prepared:
        """Of the folder `folder`.

        Raises:
            SparsityError: if `prepare` did not write it.
        """
        try:
            return cls(**json.loads((folder / "prepared.json").read_text()))
        except (OSError, ValueError, TypeError):
            raise SparsityError(
                f"{folder} is not a prepared corpus; make one with python -m nm_sparsity.translation.prepare"
            ) from None


def make_folder(folder: Path) -> None:
    """Make `folder` and those above it, if they are not there.

    Raises:
        SparsityError: if it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SparsityError(f"cannot make the folder {folder}: {error.strerror}; choose another place") from None


def normalize(text: str) -> str:
    """`text` in NFC, without control and soft-hyphen characters, on one line with single spaces."""
    text = unicodedata.normalize("NFC", text)
    return " ".join("".join(" " if unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp") else c for c in text).split())


def sentence_key(text: str) -> str:
    """What makes two sentences the same one: their words, whatever the case, the digits and the punctuation."""
    return " ".join(re.findall(r"[^\W\d_]+", text.casefold())) or text


def clean(rows: Iterable[Row]) -> Iterator[Row]:
    """Normalized rows, without those that are empty, too long, untranslated, or too unequal to be translations."""
    for row in rows:
        texts = tuple(normalize(text) for text in row)
        lengths = [len(text) for text in texts]
        unequal = max(lengths) > 20 and max(lengths) > MAX_RATIO * min(lengths)
        untranslated = len(texts) > 1 and len(set(texts)) == 1
        if all(texts) and not unequal and not untranslated and all(len(t.split()) <= MAX_WORDS for t in texts):
            yield texts


def split(rows: list[Row], held_out: int | None, seed: int, *, shuffle: bool = True) -> dict[str, list[Row]]:
    """`rows` in three: `held_out` each (default: a tenth, at most 500) to valid and test, the rest to train.

    Raises:
        SparsityError: if too few would remain.
    """
    size = min(500, len(rows) // 10) if held_out is None else held_out
    if not 0 < size <= len(rows) // 4:
        raise SparsityError(
            f"{len(rows)} sentences are left after cleaning: too few to set {size} aside for each of valid and test"
        )
    if shuffle:
        rows = random.Random(seed).sample(rows, len(rows))
    return {"test": rows[:size], "valid": rows[size : 2 * size], "train": rows[2 * size :]}


def separate(splits: Mapping[str, list[Row]]) -> dict[str, list[Row]]:
    """The splits such that no sentence of one is in another, on either side: test keeps all, then valid, then train.

    Raises:
        SparsityError: if a split has nothing left.
    """
    columns = max((len(row) for rows in splits.values() for row in rows), default=0)
    taken: list[set[str]] = [set() for _ in range(columns)]
    separated = {}
    for name in ("test", "valid", "train"):
        rows = splits[name]
        separated[name] = [row for row in rows if not _overlaps(row, taken)]
        if not separated[name]:
            raise SparsityError(f"every sentence of {name} is also in a split it must not share any with")
        for row in separated[name]:
            for keys, text in zip(taken, row, strict=True):
                keys.add(sentence_key(text))
    return {name: separated[name] for name in SPLITS}


def check_separate(folder: Path, languages: list[str]) -> None:
    """Hold that the prepared text in `folder` shares no test sentence with train.

    Raises:
        SparsityError: with the first sentence found in both.
    """
    for language in languages:
        test = {sentence_key(text) for text in corpora.read_lines(folder / f"test.{language}")}
        for number, text in enumerate(corpora.read_lines(folder / f"train.{language}"), 1):
            if sentence_key(text) in test:
                raise SparsityError(
                    f"{folder}/train.{language}, line {number} is in the test set too: "
                    f"{text[:60]!r}; prepare the corpus again"
                )


def _overlaps(row: Row, taken: list[set[str]]) -> bool:
    return any(sentence_key(text) in keys for keys, text in zip(taken, row, strict=True))


def unique(rows: Iterable[Row]) -> list[Row]:
    """`rows` without those that share a sentence, on either side, with an earlier one."""
    kept: list[Row] = []
    taken: list[set[str]] = []
    for row in rows:
        taken = taken or [set() for _ in row]
        if not _overlaps(row, taken):
            kept.append(row)
            for keys, text in zip(taken, row, strict=True):
                keys.add(sentence_key(text))
    return kept


def learn_bpe(sentences: Iterable[str], vocabulary: int) -> bytes:
    """A sentencepiece BPE model of `vocabulary` pieces, serialized.

    Raises:
        SparsityError: if the text has fewer possible pieces, or more characters.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocabulary,
            character_coverage=1.0 if vocabulary < 10_000 else 0.9999,
            normalization_rule_name="identity",
            input_sentence_size=5_000_000,
            shuffle_input_sentence=True,
            minloglevel=2,
        )
    except RuntimeError as error:
        if most := re.search(r"value <= (\d+)", str(error)):
            reason = f"is more than this corpus allows: at most {most[1]}"
        elif least := re.search(r"required_chars\. \d+ vs (\d+)", str(error)):
            reason = f"does not hold every character of this corpus: at least {least[1]}"
        else:
            reason = f"is refused by sentencepiece: {error}"
        raise SparsityError(f"--vocabulary {vocabulary} {reason}") from None
    return model.getvalue()


def binarize(folder: Path, languages: list[str]) -> None:
    """Write ``folder/bin`` from the split text files with fairseq's own preprocess and one joint dictionary."""
    pieces = folder / "pieces"
    pieces.mkdir()
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spm.model"))
    for name in SPLITS:
        for language in languages:
            lines = corpora.read_lines(folder / f"{name}.{language}")
            encoded = (" ".join(tokens) + "\n" for tokens in model.encode(lines, out_type=str))
            with (pieces / f"{name}.{language}").open("w", encoding="utf-8") as file:
                file.writelines(encoded)
    arguments = [f"--{name}pref={pieces / name}" for name in SPLITS]
    if len(languages) == 2:
        arguments += ["--source-lang", languages[0], "--target-lang", languages[1], "--joined-dictionary"]
    else:
        arguments = [f"{argument}.{languages[0]}" for argument in arguments] + ["--only-source"]
    arguments += ["--destdir", str(folder / "bin"), "--workers", "1"]
    with _quiet(preprocess.logger), contextlib.redirect_stderr(io.StringIO()):
        preprocess.main(options.get_preprocessing_parser().parse_args(arguments))
    shutil.rmtree(pieces)


@contextlib.contextmanager
def _quiet(logger: logging.Logger) -> Iterator[None]:
    """Without the progress of `logger`, and without the log file it opens."""
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)
        for handler in list(logger.handlers):
            logger.removeHandler(handler)
            handler.close()


def prepare(
    rows: list[Row] | dict[str, list[Row]],
    out: Path,
    *,
    corpus: str,
    languages: list[str],
    vocabulary: int,
    held_out: int | None = None,
    seed: int = 0,
) -> Prepared:
    """Clean, split, learn the BPE, binarize.

    Args:
        rows: the corpus, or its splits if they are given.
        out: a folder that does not exist yet; it appears only when complete.

    Raises:
        SparsityError: if `out` exists, or nothing is left to train on.
    """
    if out.exists():
        raise SparsityError(f"{out} exists: remove it or choose another --out")
    if isinstance(rows, dict):
        found = sum(map(len, rows.values()))
        # The published valid and test sets are scored as they are.
        splits = {n: list(clean(r)) if n == "train" else [tuple(map(normalize, x)) for x in r] for n, r in rows.items()}
    else:
        found = len(rows)
        splits = split(list(clean(rows)), held_out, seed, shuffle=len(languages) == 2)
    cleaned = sum(map(len, splits.values()))
    splits = separate(splits)
    counts = {name: len(splits[name]) for name in SPLITS}
    kept = sum(counts.values())
    counts |= {"found": found, "dropped by cleaning": found - cleaned, "dropped as in two splits": cleaned - kept}

    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name in SPLITS:
        for column, language in enumerate(languages):
            text = "".join(f"{row[column]}\n" for row in splits[name])
            (partial / f"{name}.{language}").write_text(text, "utf-8")
    (partial / "spm.model").write_bytes(learn_bpe((text for row in splits["train"] for text in row), vocabulary))
    binarize(partial, languages)
    prepared = Prepared(corpus, languages, vocabulary, seed, counts)
    (partial / "prepared.json").write_text(json.dumps(asdict(prepared), indent=2) + "\n")
    os.replace(partial, out)
    return prepared


def prepare_corpus(
    name: str, out: Path, *, folder: Path = Path("data"), seed: int = 0, **changes: int | None
) -> Prepared:
    """Prepare a corpus known by name; `folder` holds WMT14's raw files, or caches what is downloaded.

    Raises:
        SparsityError: for an unknown name, or raw files that are missing.
    """
    rows: list[Row] | dict[str, list[Row]]
    if name == "number-words":
        rows = list(unique(corpora.number_words(12_000, seed)))
    elif name == "pydoc-topics":
        rows = [(line,) for line in corpora.pydoc_topics(seed)]
    elif name == "libreoffice":
        rows = unique(corpora.easy_subset(unique(clean(corpora.libreoffice(folder)))))  # type: ignore[arg-type]
    elif name == "wmt14":
        rows = {name: list(pairs) for name, pairs in corpora.wmt14(folder).items()}
    else:
        raise SparsityError(f'unknown corpus "{name}"; known: {", ".join(VOCABULARY)}, or give --source and --target')
    settings = {"vocabulary": VOCABULARY[name], **{key: value for key, value in changes.items() if value is not None}}
    languages = ["text"] if name == "pydoc-topics" else ["en", "de"]
    return prepare(rows, out, corpus=name, languages=languages, seed=seed, **settings)


def _language(given: str | None, path: Path) -> str:
    for guess in (given, path.suffix[1:], path.stem):
        if guess and guess != "txt" and re.fullmatch(r"[a-z]{2,3}(_[A-Z]{2})?", guess):
            return guess
    raise SparsityError(f"cannot tell the language of {path}: name it with --source-lang / --target-lang")


@command_line
def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m nm_sparsity.translation.prepare", description=__doc__)
    parser.add_argument("corpus", nargs="?", help=f"one of {', '.join(VOCABULARY)}; or give text files")
    parser.add_argument("--out", type=Path, required=True, help="the folder to make")
    parser.add_argument("--source", type=Path, help="sentences, one a line")
    parser.add_argument("--target", type=Path, help="their translations, one a line")
    parser.add_argument("--source-lang", help="default: the suffix or name of the file, as in train.en or en.txt")
    parser.add_argument("--target-lang")
    parser.add_argument("--text", type=Path, help="plain text for a language model, instead of a parallel corpus")
    parser.add_argument("--folder", type=Path, default=Path("data"), help="wmt14's raw files; cache of libreoffice")
    parser.add_argument("--vocabulary", type=int, help="pieces of the joint BPE (default 8000 for your own text)")
    parser.add_argument(
        "--held-out", type=int, help="sentences of each of valid and test (default a tenth, at most 500)"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    changes = {"vocabulary": args.vocabulary, "held_out": args.held_out}
    if sum(map(bool, (args.corpus, args.source and args.target, args.text))) != 1:
        raise SparsityError(f"give either a corpus ({', '.join(VOCABULARY)}), --source and --target, or --text")
    if args.corpus:
        prepared = prepare_corpus(args.corpus, args.out, folder=args.folder, seed=args.seed, **changes)
    else:
        rows: list[Row]
        if args.text:
            rows = [(line,) for line in corpora.read_lines(args.text)]
            languages = ["text"]
        else:
            rows = list(corpora.read_pairs(args.source, args.target))
            languages = [_language(args.source_lang, args.source), _language(args.target_lang, args.target)]
        prepared = prepare(
            rows,
            args.out,
            corpus=str(args.text or args.source),
            languages=languages,
            vocabulary=args.vocabulary or 8000,
            held_out=args.held_out,
            seed=args.seed,
        )
    print(json.dumps(asdict(prepared), indent=2))


if __name__ == "__main__":
    sys.exit(main())
