"""Where sentences come from: text files, WMT14, LibreOffice's own help, and two corpora that need no download.

A parallel corpus is a list of (source, target) sentences, a plain one a list of lines.
"""

from __future__ import annotations

import gettext
import html
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from pydoc_data.topics import topics

from num2words import num2words

from nm_sparsity.core.errors import SparsityError
from nm_sparsity.core.experiments import fetch

Pair = tuple[str, str]


def read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 text file.

    Raises:
        SparsityError: if the file is missing, or as `lines_in` does.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise SparsityError(f"cannot read {path}: {error.strerror}") from None
    return lines_in(raw, path)


def lines_in(raw: bytes, where: Path | str) -> list[str]:
    """The lines of UTF-8 text that comes from a place called `where` in messages.

    Raises:
        SparsityError: if it is empty, binary, or not UTF-8, with the line.
    """
    lines = []
    for number, line in enumerate(raw.removesuffix(b"\n").split(b"\n"), 1):
        if b"\0" in line:
            raise SparsityError(f"{where}, line {number}: a binary file (NUL byte); expected UTF-8 text")
        try:
            lines.append(line.decode("utf-8").removesuffix("\r"))
        except UnicodeDecodeError as error:
            raise SparsityError(
                f"{where}, line {number}: not UTF-8 (byte {line[error.start]:#04x} at column {error.start + 1}); "
                "convert it first, e.g. with iconv -t UTF-8"
            ) from None
    if not any(line.strip() for line in lines):
        raise SparsityError(f"{where} holds no text; expected one sentence per line")
    return lines


def read_pairs(source: Path, target: Path) -> list[Pair]:
    """The sentence pairs of two text files with one sentence per line.

    Raises:
        SparsityError: if a file cannot be read or the line counts differ.
    """
    left, right = read_lines(source), read_lines(target)
    if len(left) != len(right):
        raise SparsityError(
            f"{source} has {len(left)} lines, {target} has {len(right)}: line n of one must translate line n of "
            "the other"
        )
    return list(zip(left, right, strict=True))


# --- number-words ---------------------------------------------------------------------------------------------------


def number_words(sentences: int, seed: int) -> list[Pair]:
    """Lists of two to five numbers below 10,000 in English and in German words.

    German says the ones before the tens and writes a number as one word: "forty-two" is "zweiundvierzig".
    """
    rng = random.Random(seed)
    numbers = [[int(10 ** rng.uniform(0, 4)) for _ in range(rng.randint(2, 5))] for _ in range(sentences)]

    def words(language: str) -> list[str]:
        spelled = {n: num2words(n, lang=language) for n in {n for row in numbers for n in row}}
        return ["; ".join(spelled[n] for n in row) for row in numbers]

    return list(zip(words("en"), words("de"), strict=True))


# --- pydoc-topics ---------------------------------------------------------------------------------------------------


def pydoc_topics(seed: int) -> list[str]:
    """The paragraphs of the Python language reference that the interpreter carries for ``help()``, topics shuffled."""
    names = sorted(topics)
    random.Random(seed).shuffle(names)
    return [_one_line(paragraph) for name in names for paragraph in topics[name].split("\n\n")]


# --- WMT14 ----------------------------------------------------------------------------------------------------------

WMT14_TRAIN = ("europarl-v7.de-en", "commoncrawl.de-en", "news-commentary-v9.de-en")
WMT14_ARCHIVES = (
    "https://www.statmt.org/wmt13/training-parallel-europarl-v7.tgz",
    "https://www.statmt.org/wmt13/training-parallel-commoncrawl.tgz",
    "https://www.statmt.org/wmt14/training-parallel-nc-v9.tgz",
    "https://www.statmt.org/wmt14/dev.tgz",
    "https://www.statmt.org/wmt14/test-full.tgz",
)


def wmt14(folder: Path) -> dict[str, list[Pair]]:
    """English-German WMT14 from its unpacked raw files: train, newstest2013 as valid, newstest2014 as test.

    Raises:
        SparsityError: naming what is missing and the archives that hold it.
    """
    files = {path.name: path for path in sorted(folder.rglob("*")) if path.is_file()}

    def both(*candidates: tuple[str, str]) -> list[Pair] | None:
        for english, german in candidates:
            if english in files and german in files:
                if english.endswith(".sgm"):
                    return _sgm_pairs(files[english], files[german])
                return read_pairs(files[english], files[german])
        return None

    train = {name: both((f"{name}.en", f"{name}.de")) for name in WMT14_TRAIN}
    valid = both(
        ("newstest2013.en", "newstest2013.de"),
        ("newstest2013-src.en.sgm", "newstest2013-ref.de.sgm"),
    )
    test = both(
        ("newstest2014.en", "newstest2014.de"),
        ("newstest2014-deen-src.en.sgm", "newstest2014-deen-ref.de.sgm"),
    )
    found = {**train, "newstest2013": valid, "newstest2014": test}
    missing = [name for name, pairs in found.items() if pairs is None]
    if missing:
        raise SparsityError(
            f"{folder} lacks {', '.join(missing)} (.en and .de, or .sgm); fetch and unpack there:\n  "
            + "\n  ".join(WMT14_ARCHIVES)
        )
    return {"train": [p for pairs in train.values() for p in pairs or ()], "valid": valid or [], "test": test or []}


def _sgm_pairs(source: Path, target: Path) -> list[Pair]:
    def segments(path: Path) -> list[str]:
        text = "\n".join(read_lines(path))
        return [html.unescape(_one_line(s)) for s in re.findall(r"<seg\b[^>]*>(.*?)</seg>", text, re.S | re.I)]

    left, right = segments(source), segments(target)
    if len(left) != len(right):
        raise SparsityError(f"{source} has {len(left)} segments, {target} has {len(right)}")
    return list(zip(left, right, strict=True))


# --- LibreOffice ----------------------------------------------------------------------------------------------------

LIBREOFFICE_PACKAGES = ("libreoffice-help-de", "libreoffice-help-en-us", "libreoffice-l10n-de")
_HELP = "usr/share/libreoffice/help"
_ELEMENT = re.compile(r'<(p|h[1-6])\s+id="([^"]+)"[^>]*>(.*?)</\1>', re.S)
_ABBREVIATION = r"(?<!z\. B\.)(?<!d\. h\.)(?<!e\.g\.)(?<!i\.e\.)(?<!bzw\.)(?<!usw\.)(?<!etc\.)"
_SENTENCE_END = re.compile(_ABBREVIATION + r"(?<=[.!?:])\s+(?=[\"„“»(]*[A-ZÄÖÜ])")


def libreoffice(cache: Path) -> list[Pair]:
    """English-German sentences of LibreOffice's help and user interface (MPL-2.0), out of three Debian packages.

    The packages (6 MB) are downloaded and unpacked under `cache`/debian with apt and dpkg, without root, once.

    Raises:
        SparsityError: where there is no apt, or its package lists are missing, with the way out.
    """
    root = cache / "debian"
    fetch.debian(LIBREOFFICE_PACKAGES, root)
    return [pair for pairs in (_help_pages(root), _user_interface(root)) for pair in pairs]


def _help_pages(root: Path) -> Iterator[Pair]:
    english = root / "libreoffice-help-en-us" / _HELP / "en-US"
    german = root / "libreoffice-help-de" / _HELP / "de"
    for page in sorted(english.glob("text/**/*.html")):
        translated = german / page.relative_to(english)
        if translated.exists():
            left, right = (
                {key: body for _, key, body in _ELEMENT.findall(path.read_text("utf-8"))} for path in (page, translated)
            )
            for key in left:
                if key in right and "<input" not in left[key]:
                    yield from _sentences(_plain_text(left[key]), _plain_text(right[key]))


def _user_interface(root: Path) -> Iterator[Pair]:
    for path in sorted((root / "libreoffice-l10n-de").rglob("*.mo")):
        with path.open("rb") as file:
            catalog: dict[object, str] = vars(gettext.GNUTranslations(file))["_catalog"]
        for key, translation in catalog.items():
            message = key[0] if isinstance(key, tuple) else key
            if isinstance(message, str) and message and translation:
                message = message.rpartition("\x04")[2]  # after gettext's context
                left, right = ([s for s in t.split("\n") if s.strip()] for t in (message, translation))
                if len(left) == len(right):
                    for a, b in zip(left, right, strict=True):
                        yield from _sentences(*(_plain_text(s.replace("~", "").replace("_", "")) for s in (a, b)))


def _plain_text(markup: str) -> str:
    text = html.unescape(re.sub(r"<[^>]*>", " ", markup)).replace("\u00ad", "").replace("\u200b", "")
    return re.sub(r" ([.,])", r"\1", _one_line(text))


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _sentences(source: str, target: str) -> list[Pair]:
    left, right = _SENTENCE_END.split(source), _SENTENCE_END.split(target)
    return list(zip(left, right, strict=True)) if len(left) == len(right) else [(source, target)]


def easy_subset(pairs: list[Pair], words: int = 3000) -> list[Pair]:
    """Pairs with 3 to 10 English words, all among the `words` most frequent (twice that many in German).

    What a model that trains for minutes on two cores can learn something from.
    """

    def frequent(side: Callable[[Pair], str], limit: int) -> set[str]:
        counts = Counter(word for pair in pairs for word in _tokens(side(pair)))
        return {word for word, _ in counts.most_common(limit)}

    english, german = frequent(lambda p: p[0], words), frequent(lambda p: p[1], 2 * words)
    return [
        (source, target)
        for source, target in pairs
        if 3 <= len(source.split()) <= 10 and english.issuperset(_tokens(source)) and german.issuperset(_tokens(target))
    ]


def _tokens(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text.lower())
