"""From raw text to what fairseq trains on."""

from __future__ import annotations

import contextlib
import io
import json
import re
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from fairseq.data import Dictionary, data_utils
from fairseq_tools import in_subprocess
from hypothesis import given, settings
from hypothesis import strategies as st

from nm_sparsity.core import SparsityError
from nm_sparsity.translation import corpora
from nm_sparsity.translation import prepare as module
from nm_sparsity.translation.prepare import (
    Prepared,
    check_separate,
    clean,
    normalize,
    prepare,
    prepare_corpus,
    sentence_key,
    separate,
    split,
    unique,
)

sentences = st.text(st.sampled_from("aAbB 1.-é"), max_size=6)
rows = st.lists(st.tuples(sentences, sentences), max_size=30)


def keys(splits: dict[str, list[tuple[str, ...]]], name: str, column: int) -> set[str]:
    return {sentence_key(row[column]) for row in splits[name]}


@given(train=rows, valid=rows, test=rows)
def test_no_sentence_of_one_split_is_in_another(train: list, valid: list, test: list) -> None:
    given_splits = {"train": train, "valid": valid, "test": test}
    try:
        splits = separate(given_splits)
    except SparsityError:
        return
    assert splits["test"] == test
    for column in (0, 1):
        for one, other in (("train", "valid"), ("train", "test"), ("valid", "test")):
            assert not keys(splits, one, column) & keys(splits, other, column)
    for name in ("train", "valid"):  # and nothing else is dropped
        others = [other for other in ("valid", "test") if other != name]
        for row in given_splits[name]:
            shared = any(sentence_key(row[c]) in keys(splits, other, c) for c in (0, 1) for other in others)
            assert (row in splits[name]) != shared


@given(rows)
def test_unique_rows_share_no_sentence(found: list) -> None:
    kept = unique(found)
    for column in (0, 1):
        assert len({sentence_key(row[column]) for row in kept}) == len(kept)
    assert set(kept) <= set(found)
    assert bool(kept) == bool(found)


@given(st.text())
def test_normalized_text_is_one_line(text: str) -> None:
    once = normalize(text)
    assert once == normalize(once)
    assert len(once.splitlines()) <= 1
    assert once == once.strip()


def test_invisible_characters_do_not_cut_words() -> None:
    assert normalize("Sil\u00adbe,\u2060 two\u200cparts\ufeff") == "Silbe, two\u200cparts"
    assert normalize("one\ttwo\u2028three\x00four") == "one two three four"
    assert normalize("e\u2060\u0301") == "é"
    assert normalize("one\u2581two \u2581") == "one two"


def test_cleaning_drops_what_cannot_be_a_translation() -> None:
    good = ("a  fine\u00a0sentence", "ein guter Satz")
    bad = [("", "x"), ("same", "same"), ("x " * 300, "y " * 300), ("a " * 30, "b"), ("x" * 1001, "y" * 1001)]
    assert list(clean([good, *bad])) == [("a fine sentence", "ein guter Satz")]
    assert list(clean([("Cafe\u0301", "Kaffee")])) == [("Café", "Kaffee")]


def test_split_takes_all_and_needs_enough() -> None:
    found = [(str(i), str(-i)) for i in range(100)]
    splits = split(found, None, seed=0)
    assert {name: len(part) for name, part in splits.items()} == {"test": 10, "valid": 10, "train": 80}
    assert sorted(row for part in splits.values() for row in part) == sorted(found)
    with pytest.raises(SparsityError, match=r"100 sentences are left .* too few to set 40 aside"):
        split(found, 40, seed=0)
    for size in (0, -3):
        with pytest.raises(SparsityError, match=f"--held-out must be at least 1, found {size}"):
            split(found, size, seed=0)


def test_the_binaries_are_the_text(corpus: Path) -> None:
    """Read with fairseq's own reader and put together again, piece by piece."""
    prepared = Prepared.read(corpus)
    assert sum(prepared.sentences[name] for name in ("train", "valid", "test")) <= 300
    dictionary = Dictionary.load(str(corpus / "bin" / "dict.en.txt"))
    assert (corpus / "bin" / "dict.de.txt").read_text() == (corpus / "bin" / "dict.en.txt").read_text()
    for name in ("train", "valid", "test"):
        for language in prepared.languages:
            prefix = str(corpus / "bin" / f"{name}.en-de.{language}")
            binary = data_utils.load_indexed_dataset(prefix, dictionary, None)
            lines = corpora.read_lines(corpus / f"{name}.{language}")
            assert len(lines) == prepared.sentences[name] == len(binary)
            found = [dictionary.string(binary[i], "sentencepiece") for i in range(len(binary))]
            if name == "train":
                assert found == lines
            else:  # a character that train does not have is unknown
                assert sum(a == b for a, b in zip(found, lines, strict=True)) >= 0.9 * len(lines)


def test_a_language_model_has_one_language(text_corpus: Path) -> None:
    assert Prepared.read(text_corpus).languages == ["text"]
    assert {p.name for p in (text_corpus / "bin").glob("*.bin")} == {"train.bin", "valid.bin", "test.bin"}


def test_test_sentences_found_in_train(corpus: Path, tmp_path: Path) -> None:
    check_separate(corpus, ["en", "de"])
    for name in ("train", "test"):
        for language in ("en", "de"):
            text = (corpus / f"{name}.{language}").read_text()
            (tmp_path / f"{name}.{language}").write_text(text)
    leaked = (corpus / "test.de").read_text().splitlines()[3].upper()
    with (tmp_path / "train.de").open("a") as file:
        file.write(leaked + "\n")
    with pytest.raises(SparsityError, match=r"train\.de, line \d+ is in the test set too"):
        check_separate(tmp_path, ["en", "de"])


def test_a_vocabulary_that_does_not_fit(tmp_path: Path) -> None:
    pairs = list(corpora.number_words(100, 0))
    with pytest.raises(SparsityError, match=r"--vocabulary 5000 is more than this corpus allows: at most \d+"):
        prepare(pairs, tmp_path / "out", corpus="x", languages=["en", "de"], vocabulary=5000)
    with pytest.raises(SparsityError, match=r"--vocabulary 4 does not hold every character .*: at least \d+"):
        prepare(pairs, tmp_path / "out", corpus="x", languages=["en", "de"], vocabulary=4)
    assert not (tmp_path / "out").exists()


def test_what_is_there_stays_there(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(SparsityError, match="exists: remove it"):
        prepare([], corpus, corpus="x", languages=["en", "de"], vocabulary=100)
    (tmp_path / "file").touch()
    with pytest.raises(SparsityError, match=r"cannot write to the folder .*file: .*; choose another place"):
        prepare([], tmp_path / "file" / "out", corpus="x", languages=["en", "de"])
    with pytest.raises(SparsityError, match="not a prepared corpus"):
        Prepared.read(tmp_path)
    with pytest.raises(SparsityError, match='unknown corpus "wmt15"; known: number-words'):
        prepare_corpus("wmt15", tmp_path / "out")


def test_wmt14_keeps_its_test_set_as_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = corpora.number_words(200, 5)
    splits = {
        "train": [*pairs, ("Hello .", "Hallo .")],
        "valid": [("Bye.", "Tschüss.")],
        "test": [("Hello .", "Servus")],
    }
    monkeypatch.setattr(module.corpora, "wmt14", lambda folder: splits)
    prepared = prepare_corpus("wmt14", tmp_path / "out", vocabulary=100)
    assert corpora.read_lines(tmp_path / "out" / "test.en") == ["Hello ."]
    assert "Hello ." not in corpora.read_lines(tmp_path / "out" / "train.en")
    assert prepared.sentences["dropped as in two splits"] >= 1


@pytest.mark.slow
def test_the_command_line(tmp_path: Path) -> None:
    pairs = corpora.number_words(200, 0)
    for column, name in enumerate(("text.en", "text.de")):
        (tmp_path / name).write_text("".join(f"{pair[column]}\n" for pair in pairs))
    files = ["--source", str(tmp_path / "text.en"), "--target", str(tmp_path / "text.de")]
    command = "nm_sparsity.translation.prepare"
    printed = json.loads(in_subprocess(command, [*files, "--out", str(tmp_path / "out")]).stdout)
    assert printed["languages"] == ["en", "de"]
    assert 100 < printed["vocabulary"] < 8000  # as much as so little text allows
    (tmp_path / "text.de").write_text("zu kurz\n")
    refused = in_subprocess(command, [*files, "--out", str(tmp_path / "again")], status=1)
    assert refused.stderr.startswith("error: ")
    assert "has 200 lines" in refused.stderr
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ("--source a.en --target b.en", 'source and target are both in "en"'),
        ("--source a.en --target b.de --target-lang german", '"german" is not a language code such as en or pt_BR'),
        ("--source a.txt --target b.de --target-lang de", "cannot tell the language of a.txt"),
        ("number-words --source a.en", "give either a corpus"),
        ("--source a.en", "give either a corpus"),
        ("--source a.en --target b.de --vocabulary 0", "--vocabulary 0 "),
    ],
)
def test_mistakes_on_the_command_line(
    options: str, complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, column in ("a.en", 0), ("b.en", 0), ("a.txt", 0), ("b.de", 1):
        Path(name).write_text("".join(f"{pair[column]}\n" for pair in corpora.number_words(40, 0)))
    assert module.main([*options.split(), "--out", "out"]) == 1
    assert complaint in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))


LINE = st.one_of(
    st.binary(max_size=12),
    st.text(max_size=12).map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.sampled_from(
        [
            *(b"", b" ", b"\t", b"\r", b"a\rb", b"\0", b"\xff\xfe", b"\xef\xbb\xbfbegin", b"\x1b[31mred\x1b[0m"),
            *(
                text.encode()
                for text in ("\u2028", "\u00a0", "\u2581", "\u0085", "\u200b", "\u0301", "e\u0301", "\ufffd")
            ),
            *(b"<s> </s> <pad> <unk>", b"<unk>", b"#fairseq:overwrite", b"madeupword0000", b"two 3 4", b"-- --out x"),
            *("one \u2581 two\u2581three and four".encode(), "\u2581one\u2581".encode()),
            *(b"x" * 5000, b"y " * 3000, "\u4e2d".encode() * 999, "\U0001f600".encode() * 40),
        ]
    ),
)
"""A line of a file, those above all that break readers."""


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_corpus_is_prepared_whole_or_refused_in_a_line(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A good corpus of which lines are replaced, removed or repeated, or the files cut."""
    folder = tmp_path_factory.mktemp("fuzzed")
    pairs = corpora.number_words(60, 0)
    for column, name in enumerate(("a.en", "a.de")):
        lines = [pair[column].encode() for pair in pairs]
        for _ in range(data.draw(st.integers(0, 4))):
            at = data.draw(st.integers(0, len(lines) - 1))
            lines[at : at + data.draw(st.sampled_from([1, 1, 1, 1, 0, 50]))] = [data.draw(LINE)]
        end = data.draw(st.sampled_from([b"\n", b"\n", b"\r\n", b"\n\n", b""]))
        (folder / name).write_bytes(b"\n".join(lines) + end)
    plain = data.draw(st.booleans())
    given_files = ["--text=a.en"] if plain else ["--source=a.en", "--target=a.de"]
    vocabulary = data.draw(st.sampled_from([[], [], ["--vocabulary=90"], ["--vocabulary=20"]]))
    said = io.StringIO()
    with contextlib.chdir(folder), redirect_stderr(said), redirect_stdout(io.StringIO()):
        status = module.main([*given_files, *vocabulary, "--out=out"])
    if status:
        assert re.fullmatch(r"error: [^\n]{10,400}\n", said.getvalue()), said.getvalue()
        assert sorted(path.name for path in folder.iterdir()) == ["a.de", "a.en"]
        return
    prepared = Prepared.read(folder / "out")
    for name in ("train", "valid", "test"):
        for language in prepared.languages:
            texts = corpora.read_lines(folder / "out" / f"{name}.{language}")
            assert len(texts) == prepared.sentences[name]
            assert texts == [module.normalize(text) for text in texts]
    check_separate(folder / "out", prepared.languages)
    # What fairseq reads is what was written: each sentence, cut into pieces that give it back.
    bin_, name, dictionary_name = folder / "out" / "bin", *(("train", "") if plain else ("train.en-de.en", ".en"))
    dictionary = Dictionary.load(str(bin_ / f"dict{dictionary_name}.txt"))
    dataset = data_utils.load_indexed_dataset(str(bin_ / name), dictionary)
    texts = corpora.read_lines(folder / "out" / f"train.{prepared.languages[0]}")
    assert [dictionary.string(line, "sentencepiece") for line in dataset] == texts
