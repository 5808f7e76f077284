"""What predict says of a sentence is what evaluate and fairseq say of it; what it adds to a text is the likeliest."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from fairseq_tools import in_subprocess, lm_arguments

from nm_sparsity.translation import predict as module
from nm_sparsity.translation.average import average
from nm_sparsity.translation.corpora import read_lines
from nm_sparsity.translation.evaluate import translate
from nm_sparsity.translation.predict import Options, predict
from nm_sparsity.translation.runs import load_run


def test_sentences_are_translated_as_the_test_set_is(
    corpus: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, task = load_run(trained / "checkpoint_best.pt", corpus)
    expected = translate(model, task, "test", beam=2, lenpen=1.0)
    sentences = list(read_lines(corpus / "test.en"))
    assert predict(Options(trained, beam=2, data=corpus), sentences) == expected
    # A folder, a checkpoint and a finalized file; arguments, a file and the standard input.
    average((trained / "checkpoint_best.pt",), tmp_path / "finalized.pt")
    capsys.readouterr()
    for run, given in (
        (trained / "checkpoint_last.pt", sentences),
        (tmp_path, ["--file", str(corpus / "test.en")]),
        (trained, []),
    ):
        typed = "\n\n".join(f"  {sentence} " for sentence in sentences)
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(typed.encode())))
        assert module.main([str(run), *given, "--data", str(corpus), "--beam", "2"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[:: 1 if given else 2] == expected
        assert given or not any(lines[1::2])


def test_a_text_is_continued_with_what_is_likeliest(text_corpus: Path, tmp_path: Path) -> None:
    in_subprocess("fairseq_cli.train", lm_arguments(text_corpus, tmp_path), cwd=tmp_path)
    (found,) = predict(Options(tmp_path, data=text_corpus, beam=1, length=6), ["The value of"])
    assert found.startswith("The value of")
    # Piece by piece, by hand.
    model, task = load_run(tmp_path / "checkpoint_best.pt", text_corpus)
    import sentencepiece

    dictionary = task.source_dictionary
    bpe = sentencepiece.SentencePieceProcessor(model_file=str(text_corpus / "spm.model"))
    tokens = [dictionary.eos(), *map(dictionary.index, bpe.encode("The value of", out_type=str))]
    start = len(tokens)
    with torch.no_grad():
        while len(tokens) < start + 6:
            logits = model(torch.tensor([tokens]))[0][0, -1]
            logits[[dictionary.pad(), dictionary.unk()]] = -torch.inf
            if (best := int(logits.argmax())) == dictionary.eos():
                break
            tokens.append(best)
    assert found == dictionary.string(torch.tensor(tokens[1:]), "sentencepiece")


def test_what_cannot_be_translated_is_named(
    corpus: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, message in (
        ([str(tmp_path / "none"), "x"], "there is no checkpoint"),
        ([str(tmp_path), "x"], "is it a run folder?"),
        ([str(trained), "x", "--data", str(tmp_path / "none")], "there is no folder"),
        ([str(trained), "x", "--data", str(tmp_path)], "is not a prepared corpus"),
        ([str(trained), "one " * 1100, "--data", str(corpus)], "sentence 1 has 1"),
    ):
        assert module.main(arguments) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert message in error
    assert module.main([str(trained), "one Qµ", "--data", str(corpus), "--beam", "1"]) == 0
    assert "sentence 1 has what the model has never seen: Qµ\n" in capsys.readouterr().err
    for arguments in (["x", "--file", "y"], ["x", "--beam", "0"], ["x", "--length", "0"]):
        with pytest.raises(SystemExit):
            module.main([str(trained), *arguments])


def test_the_standard_input_is_utf_8_text_of_lines(
    corpus: Path, trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What Python takes for the end of a line beside the newline is none."""
    for raw, status, shown in (
        ("one\x0ctwo\x85three\u2028four\r\nfive\n".encode(), 0, ""),
        (b"one\nf\xfcnf\n", 1, "error: the standard input, line 2: not UTF-8 (byte 0xfc at column 2)"),
        (b"", 1, "error: the standard input holds no text"),
    ):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(raw)))
        assert module.main([str(trained), "--data", str(corpus), "--beam", "1"]) == status
        found = capsys.readouterr()
        assert found.out.count("\n") == (2 if status == 0 else 0)
        assert shown in found.err
