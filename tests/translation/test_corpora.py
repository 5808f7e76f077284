"""Where sentences come from, and what is said of files that hold none."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from nm_sparsity.core import SparsityError
from nm_sparsity.translation import corpora


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_text_files_are_read_line_by_line(tmp_path: Path) -> None:
    source, target = write(tmp_path / "en", "a b\r\nc\n"), write(tmp_path / "de", "ä\nö")
    assert corpora.read_pairs(source, target) == [("a b", "ä"), ("c", "ö")]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "holds no text"),
        (b" \n\n", "holds no text"),
        (b"good\nb\0d\n", "line 2: a binary file"),
        (b"good\nfine\ncaf\xe9 au lait\n", "line 3: not UTF-8 .byte 0xe9 at column 4"),
        ("good\nfine\n".encode("utf-16"), "line 1: "),
    ],
)
def test_a_file_without_text_is_named_with_its_line(tmp_path: Path, content: bytes, complaint: str) -> None:
    with pytest.raises(SparsityError, match=complaint):
        corpora.read_lines(write(tmp_path / "bad.txt", content))


def test_unequal_line_counts_and_missing_files(tmp_path: Path) -> None:
    source, target = write(tmp_path / "en", "a\nb\nc\n"), write(tmp_path / "de", "a\nb\n")
    with pytest.raises(SparsityError, match=r"en has 3 lines, .*de has 2"):
        corpora.read_pairs(source, target)
    with pytest.raises(SparsityError, match=r"cannot read .*fr: No such file"):
        corpora.read_lines(tmp_path / "fr")


def test_number_words_say_the_same_numbers() -> None:
    """Against a hand-written dictionary of the German ones."""
    ones = {
        "one": "eins", "two": "zwei", "three": "drei", "four": "vier", "five": "fünf", "six": "sechs",
        "seven": "sieben", "eight": "acht", "nine": "neun", "forty-two": "zweiundvierzig", "ninety": "neunzig",
        "one thousand and one": "eintausendeins",
    }  # fmt: skip
    found = set()
    for english, german in corpora.number_words(2000, seed=1):
        left, right = english.split("; "), german.split("; ")
        assert len(left) == len(right)
        for word, translation in zip(left, right, strict=True):
            if word in ones:
                assert translation == ones[word]
                found.add(word)
    assert found >= {"one", "nine", "forty-two"}
    assert corpora.number_words(5, seed=1) == corpora.number_words(5, seed=1) != corpora.number_words(5, seed=2)


def test_pydoc_topics_are_english_paragraphs() -> None:
    lines = corpora.pydoc_topics(seed=0)
    assert len(lines) > 1000
    assert all("\n" not in line for line in lines)
    assert sum(" the " in line for line in lines) > len(lines) / 4


def wmt14_folder(folder: Path) -> Path:
    for name in corpora.WMT14_TRAIN:
        write(folder / "training" / f"{name}.en", f"English of {name}.\n")
        write(folder / "training" / f"{name}.de", f"Deutsch aus {name}.\n")
    write(folder / "dev" / "newstest2013.en", "one\ntwo\n")
    write(folder / "dev" / "newstest2013.de", "eins\nzwei\n")
    sgm = '<refset><doc docid="1">\n<seg id="1">{0} &amp; co</seg>\n<seg id="2">  {0}\n again </seg>\n</doc></refset>\n'
    write(folder / "test-full" / "newstest2014-deen-src.en.sgm", sgm.format("English"))
    write(folder / "test-full" / "newstest2014-deen-ref.de.sgm", sgm.format("Deutsch"))
    return folder


def test_wmt14_is_read_from_the_archives_own_files(tmp_path: Path) -> None:
    splits = corpora.wmt14(wmt14_folder(tmp_path))
    assert splits["train"][1] == ("English of commoncrawl.de-en.", "Deutsch aus commoncrawl.de-en.")
    assert len(splits["train"]) == 3
    assert splits["valid"] == [("one", "eins"), ("two", "zwei")]
    assert splits["test"] == [("English & co", "Deutsch & co"), ("English again", "Deutsch again")]


def test_missing_wmt14_files_are_named_with_what_to_fetch(tmp_path: Path) -> None:
    folder = wmt14_folder(tmp_path)
    (folder / "training" / "commoncrawl.de-en.de").unlink()
    with pytest.raises(SparsityError, match=r"(?s)lacks commoncrawl\.de-en .*training-parallel-commoncrawl\.tgz"):
        corpora.wmt14(folder)


def gettext_catalog(messages: dict[str, str]) -> bytes:
    """A .mo file, as the gettext manual describes the format."""
    entries = sorted({"": "Content-Type: text/plain; charset=UTF-8\n", **messages}.items())
    keys, values = [k.encode() for k, _ in entries], [v.encode() for _, v in entries]
    count, offset = len(entries), 28 + 16 * len(entries)
    tables: list[list[int]] = [[], []]
    for table, texts in zip(tables, (keys, values), strict=True):
        for text in texts:
            table += [len(text), offset]
            offset += len(text) + 1
    numbers = [0x950412DE, 0, count, 28, 28 + 8 * count, 0, 0, *tables[0], *tables[1]]
    return struct.pack(f"<{len(numbers)}I", *numbers) + b"".join(text + b"\0" for text in (*keys, *values))


def test_libreoffice_is_read_from_unpacked_packages(tmp_path: Path) -> None:
    root = tmp_path / "debian"
    pages = "usr/share/libreoffice/help"
    page = '<h1 id="t" dir="auto">{}</h1><p id="p1" class="x">{}</p><p id="only{}">-</p>'
    english = page.format("Line <b>Breaks</b>", "It ends. Then it starts &amp; goes on .", "en")
    german = page.format("Zeilen<b>umbr&uuml;che</b>", "Es endet. Dann f&auml;ngt es an.", "de")
    write(root / "libreoffice-help-en-us" / pages / "en-US/text/swriter/a.html", english)
    write(root / "libreoffice-help-de" / pages / "de/text/swriter/a.html", german)
    catalog = gettext_catalog({"menu\x04~Save All": "~Alles speichern"})
    write(root / "libreoffice-l10n-de/usr/lib/sw.mo", catalog)
    assert corpora.libreoffice(tmp_path) == [
        ("Line Breaks", "Zeilen umbrüche"),
        ("It ends.", "Es endet."),
        ("Then it starts & goes on.", "Dann fängt es an."),
        ("Save All", "Alles speichern"),
    ]


def test_libreoffice_without_apt_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SparsityError, match=rf"no apt-get on this machine; .*{tmp_path}/debian/PACKAGE"):
        corpora.libreoffice(tmp_path)


def test_easy_subset_keeps_short_sentences_of_frequent_words() -> None:
    pairs = [("the cat sat", "die Katze saß")] * 3 + [("the cat", "die Katze"), ("a rare zebra sat", "die Katze saß")]
    assert corpora.easy_subset(pairs, words=3) == pairs[:3]
