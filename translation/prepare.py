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

from nm_sparsity.core.errors import SparsityError
from nm_sparsity.core.experiments.command_line import command_line
from nm_sparsity.core.experiments.folders import appearing, make_folder
from nm_sparsity.translation import corpora
from nm_sparsity.translation.stock import options, preprocess

Row = tuple[str, ...]
"""A sentence in each language: two for translation, one for a language model."""

SPLITS = ("train", "valid", "test")
VOCABULARY = {"number-words": 256, "pydoc-topics": 2000, "libreoffice": 2000, "wmt14": 32000}
MAX_WORDS = 250
MAX_CHARACTERS = 1000
"""Also where there are no spaces between words: a sentence has no more pieces than that, and models take 1,024."""
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
    """By split, and how many were found, dropped by cleaning, and dropped as in two splits.

    ``number-words`` and ``libreoffice`` are made without duplicates, and ``libreoffice`` is cleaned and cut down to its
    easy sentences, before "found" is counted.
    """
    sentencepiece: str = version("sentencepiece")

    @classmethod
    def read(cls, folder: Path) -> Prepared:
        """What was prepared in `folder`.

        Raises:
            SparsityError: if `prepare` did not write it.
        """
        try:
            return cls(**json.loads((folder / "prepared.json").read_text()))
        except (OSError, ValueError, TypeError):
            raise SparsityError(
                f"{folder} is not a prepared corpus; make one with python -m nm_sparsity.translation.prepare"
            ) from None


def normalize(text: str) -> str:
    """`text` in NFC on one line with single spaces, without invisible characters such as soft hyphens.

    U+2581 becomes a space: it is what sentencepiece writes for one, and so it comes back as one.
    """
    text = "".join(
        c if c in _JOINERS else _INSTEAD.get(unicodedata.category(c), c) for c in text.replace("\u2581", " ")
    )
    return " ".join(unicodedata.normalize("NFC", text).split())


_JOINERS = "\u200c\u200d"
"""Part of the spelling in Persian and many scripts of India."""

_INSTEAD = {"Cf": "", "Cc": " ", "Zl": " ", "Zp": " "}
"""Format characters lie inside words, control characters and separators between them."""


def sentence_key(text: str) -> str:
    """What makes two sentences the same one: their words, whatever the case, the digits and the punctuation."""
    return " ".join(re.findall(r"[^\W\d_]+", text.casefold())) or text


def clean(rows: Iterable[Row]) -> Iterator[Row]:
    """Normalized rows, without those that are empty, too long, untranslated, or too unequal to be translations."""
    for row in rows:
        texts = tuple(normalize(text) for text in row)
        lengths = [len(text) for text in texts]
        too_long = max(lengths) > MAX_CHARACTERS or max(len(text.split()) for text in texts) > MAX_WORDS
        unequal = max(lengths) > 20 and max(lengths) > MAX_RATIO * min(lengths)
        untranslated = len(texts) > 1 and len(set(texts)) == 1
        if all(texts) and not (too_long or unequal or untranslated):
            yield texts


def split(rows: list[Row], held_out: int | None, seed: int, *, shuffle: bool = True) -> dict[str, list[Row]]:
    """`rows` in three: `held_out` each (default: a tenth, at most 500) to valid and test, the rest to train.

    Raises:
        SparsityError: if too few would remain.
    """
    if held_out is not None and held_out < 1:
        raise SparsityError(f"--held-out must be at least 1, found {held_out}")
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
    """Check that the prepared text in `folder` shares no test sentence with train.

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


def learn_bpe(sentences: Iterable[str], vocabulary: int | None) -> bytes:
    """A sentencepiece BPE model of `vocabulary` pieces, serialized; by default of 8,000, or fewer if there are no more.

    Raises:
        SparsityError: if the text has fewer possible pieces, or more characters.
    """
    model = io.BytesIO()
    size = 8000 if vocabulary is None else vocabulary
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            model_type="bpe",
            vocab_size=size,
            hard_vocab_limit=vocabulary is not None,
            character_coverage=1.0 if size < 10_000 else 0.9999,
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
    vocabulary: int | None = None,
    held_out: int | None = None,
    seed: int = 0,
) -> Prepared:
    """Clean, split, learn the BPE, binarize.

    Args:
        rows: the corpus, or its splits if they are given.
        out: a folder that does not exist yet; it appears only when complete.

    Raises:
        SparsityError: if `out` exists or cannot be made, or nothing is left to train on.
    """
    check_free(out)
    if isinstance(rows, dict):
        found = sum(map(len, rows.values()))
        # Nothing is cleaned away from published valid and test sets.
        splits = {n: list(clean(r)) if n == "train" else [tuple(map(normalize, x)) for x in r] for n, r in rows.items()}
    else:
        found = len(rows)
        splits = split(list(clean(rows)), held_out, seed, shuffle=len(languages) == 2)
    cleaned = sum(map(len, splits.values()))
    splits = separate(splits)
    counts = {name: len(splits[name]) for name in SPLITS}
    kept = sum(counts.values())
    counts |= {"found": found, "dropped by cleaning": found - cleaned, "dropped as in two splits": cleaned - kept}

    bpe = learn_bpe((text for row in splits["train"] for text in row), vocabulary)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=bpe).get_piece_size()
    prepared = Prepared(corpus, languages, pieces, seed, counts)
    with appearing(out) as folder:
        for name in SPLITS:
            for column, language in enumerate(languages):
                text = "".join(f"{row[column]}\n" for row in splits[name])
                (folder / f"{name}.{language}").write_text(text, "utf-8")
        (folder / "spm.model").write_bytes(bpe)
        binarize(folder, languages)
        (folder / "prepared.json").write_text(json.dumps(asdict(prepared), indent=2) + "\n")
    return prepared


def check_free(out: Path) -> None:
    """Check, before any work is done, that `out` can be made.

    Raises:
        SparsityError: if `out` exists, or the folder it is to lie in cannot be made.
    """
    if out.exists():
        raise SparsityError(f"{out} exists: remove it or choose another --out")
    make_folder(out.parent)


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


def _languages(given: Iterable[str | None], paths: Iterable[Path]) -> list[str]:
    """Source and target language, as given or as the files tell.

    Raises:
        SparsityError: if one is no language code, cannot be told, or both are the same.
    """
    found = [_language(name, path) for name, path in zip(given, paths, strict=True)]
    if len(set(found)) == 1:
        raise SparsityError(
            f'source and target are both in "{found[0]}"; name their languages with --source-lang and --target-lang'
        )
    return found


def _language(given: str | None, path: Path) -> str:
    code = re.compile(r"[a-z]{2,3}(_[A-Z]{2})?")
    if given is not None:
        if not code.fullmatch(given):
            raise SparsityError(f'"{given}" is not a language code such as en or pt_BR')
        return given
    for guess in (path.suffix[1:], path.stem):
        if guess != "txt" and code.fullmatch(guess):
            return guess
    raise SparsityError(f"cannot tell the language of {path}: name it with --source-lang / --target-lang")


@command_line
def main(arguments: list[str] | None = None) -> None:
    """Prepare the corpus that `arguments`, by default the command line's, name, and print what was done."""
    parser = argparse.ArgumentParser(prog="python -m nm_sparsity.translation.prepare", description=__doc__)
    parser.add_argument("corpus", nargs="?", help=f"one of {', '.join(VOCABULARY)}; or give text files")
    parser.add_argument("--out", type=Path, required=True, help="the folder to make")
    parser.add_argument("--source", type=Path, help="sentences, one per line")
    parser.add_argument("--target", type=Path, help="their translations, one per line")
    parser.add_argument("--source-lang", help="default: the suffix or name of the file, as in train.en or en.txt")
    parser.add_argument("--target-lang")
    parser.add_argument("--text", type=Path, help="plain text for a language model, instead of a parallel corpus")
    parser.add_argument("--folder", type=Path, default=Path("data"), help="wmt14's raw files; cache of libreoffice")
    parser.add_argument(
        "--vocabulary", type=int, help="pieces of the joint BPE (default for your own text: 8000, or what it allows)"
    )
    parser.add_argument(
        "--held-out", type=int, help="sentences of each of valid and test (default a tenth, at most 500)"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    changes = {"vocabulary": args.vocabulary, "held_out": args.held_out}
    kinds = (args.corpus, args.source or args.target, args.text)
    if sum(map(bool, kinds)) != 1 or bool(args.source) != bool(args.target):
        raise SparsityError(f"give either a corpus ({', '.join(VOCABULARY)}), --source and --target, or --text")
    check_free(args.out)
    if args.corpus:
        prepared = prepare_corpus(args.corpus, args.out, folder=args.folder, seed=args.seed, **changes)
    else:
        rows: list[Row]
        if args.text:
            rows = [(line,) for line in corpora.read_lines(args.text)]
            languages = ["text"]
        else:
            rows = list(corpora.read_pairs(args.source, args.target))
            languages = _languages((args.source_lang, args.target_lang), (args.source, args.target))
        prepared = prepare(
            rows,
            args.out,
            corpus=str(args.text or args.source),
            languages=languages,
            seed=args.seed,
            **changes,
        )
    print(json.dumps(asdict(prepared), indent=2))


if __name__ == "__main__":
    sys.exit(main())
