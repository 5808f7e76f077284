"""Scores, studies, and the commands around them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fairseq_tools import arguments, environment, in_subprocess
from torch.nn import functional as F

from nm_sparsity.core import SparsityError, VerificationError, verify
from nm_sparsity.core.experiments.conduct import conduct
from nm_sparsity.core.experiments.run import EVALUATION
from nm_sparsity.core.files.metadata import METADATA
from nm_sparsity.translation import demo, recipes, study
from nm_sparsity.translation import evaluate as module
from nm_sparsity.translation.__main__ import USER_DIR
from nm_sparsity.translation.average import average
from nm_sparsity.translation.corpora import read_lines
from nm_sparsity.translation.evaluate import (
    Options,
    Perplexity,
    Translated,
    evaluate,
    score,
    show,
)
from nm_sparsity.translation.runs import load_run
from nm_sparsity.translation.trainer import read

Fairseq = Callable[[list[str]], None]

REFERENCES = ["the cat sat on the mat", "a well-known dog barked at it", "so it goes on and on and on"]
SOURCES = ["die Katze", "ein Hund bellte die bekannte Katze an", "und so weiter und so fort"]


def test_scores_of_known_translations() -> None:
    perfect = score(SOURCES, REFERENCES, REFERENCES, compounds=True)
    assert perfect.bleu == pytest.approx(100)
    assert perfect.chrf == pytest.approx(100)
    assert perfect.exact == 100
    assert perfect.compound_split_bleu == pytest.approx(100)
    assert {name: count for name, (count, _) in perfect.by_length.items()} == {"1-5": 1, "6-10": 2}
    assert "tok:13a" in perfect.bleu_signature
    # By hand: 5 of 6 words, 3 of 5 bigrams, 2 of 4 trigrams, 1 of 3 four-grams, no brevity penalty.
    one = score(["x"], ["the cat sat on my mat"], ["the cat sat on the mat"])
    assert one.bleu == pytest.approx(100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25, rel=1e-6)
    assert one.exact == 0


def test_compounds_are_split_on_both_sides() -> None:
    """By hand: of "a well - worn dog barked at it" 7 of 8 words, 5 of 7 bigrams, 3 of 6 trigrams, 1 of 5 four-grams."""
    scored = score(["x"], ["a well-worn dog barked at it"], [REFERENCES[1]], compounds=True)
    assert scored.compound_split_bleu == pytest.approx(100 * (7 / 8 * 5 / 7 * 3 / 6 * 1 / 5) ** 0.25, rel=1e-6)
    assert scored.bleu == pytest.approx(100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25, rel=1e-6)


def test_a_run_is_scored_verified_and_finalized(corpus: Path, trained: Path, tmp_path: Path) -> None:
    """The finalized file is of fairseq's own task, holds the masked weights, and translates the same."""
    run = shutil.copytree(trained, tmp_path / "run")
    result = evaluate(Options(run, data=corpus, beam=2, samples=3))
    assert isinstance(result, Translated)
    assert not (run / EVALUATION).exists()  # which is of the run as it stands
    assert evaluate(Options(run, data=corpus, beam=2, samples=3, out=run)) == result
    with pytest.raises(SparsityError, match=r"run holds evaluation\.json, finalized\.pt already: choose another --out"):
        evaluate(Options(run, data=corpus, beam=2, samples=3, out=run))
    written = json.loads((run / EVALUATION).read_text())
    assert written["bleu"] == result.bleu
    assert written["verified"] is True
    assert written["sentences"] == 20
    assert len(result.samples) == 3
    assert "BLEU" in show(result)
    finalized = read(run / "finalized.pt")
    assert finalized["cfg"]["task"]["_name"] == "translation"
    assert len(verify(run / "finalized.pt", "2:4").checked) == 26
    for name, weight in read(run / "checkpoint_best.pt")["model"].items():
        assert torch.equal(finalized["model"][name], weight)
    assert evaluate(Options(run / "finalized.pt", data=corpus, beam=2, samples=3)) == result


def test_a_finalized_model_that_translates_differently_is_refused(
    corpus: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as one exported from another checkpoint, by mistake."""
    run = shutil.copytree(trained, tmp_path / "run")
    shutil.copy(run / "checkpoint_best.pt", tmp_path / "other.pt")
    payload = torch.load(tmp_path / "other.pt", weights_only=True)
    for name, weight in payload["model"].items():
        if name.startswith("decoder.layers"):
            weight.mul_(-1)
    torch.save(payload, tmp_path / "other.pt")
    monkeypatch.setattr(module, "average", lambda _, out: average((tmp_path / "other.pt",), out))
    with pytest.raises(VerificationError, match=r"finalize changed translations from \["):
        evaluate(Options(run, data=corpus, beam=1, out=run))


def test_an_exported_model_is_scored_too(corpus: Path, trained: Path, tmp_path: Path) -> None:
    average((trained / "checkpoint_best.pt",), tmp_path / "exported.pt")
    exported = evaluate(Options(tmp_path / "exported.pt", data=corpus, beam=1))
    assert exported == evaluate(Options(trained / "checkpoint_best.pt", data=corpus, beam=1))


def test_what_is_not_sparse_is_not_called_so(corpus: Path, trained: Path, tmp_path: Path) -> None:
    payload = torch.load(trained / "checkpoint_best.pt", weights_only=True)
    payload["model"]["decoder.layers.1.fc1.weight"] = torch.ones(32, 16)
    torch.save(payload, tmp_path / "tampered.pt")
    with pytest.raises(VerificationError, match=r"1 of 26 weights break their pattern"):
        evaluate(Options(tmp_path / "tampered.pt", data=corpus))
    with pytest.raises(VerificationError, match="1:4"):
        evaluate(Options(trained / "checkpoint_best.pt", data=corpus, pattern="1:4"))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda payload: [1], "is not a checkpoint of fairseq's"),
        (lambda payload: payload["model"], "is not a checkpoint of fairseq's"),
        (lambda payload: {**payload, "extra_state": None}, "is not a checkpoint of fairseq's"),
        (lambda payload: {**payload, "cfg": {"task": {"data": "data/x/bin"}}}, r"no folder data/x, .* with --data"),
    ],
)
def test_what_is_no_run(
    trained: Path, tmp_path: Path, change: Callable, complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(change(torch.load(trained / "checkpoint_best.pt", weights_only=True)), "file.pt")
    with pytest.raises(SparsityError, match=complaint):
        evaluate(Options(Path("file.pt")))
    if "fairseq" in complaint:
        with pytest.raises(SparsityError, match=complaint):
            average((Path("file.pt"),), Path("average.pt"))


def test_a_run_without_a_validation_yet(corpus: Path, trained: Path, tmp_path: Path) -> None:
    shutil.copy(trained / "checkpoint_last.pt", tmp_path)
    with pytest.raises(SparsityError, match=r"no checkpoint .*best\.pt; .*checkpoint_last\.pt is what there is"):
        evaluate(Options(tmp_path, data=corpus))


@pytest.mark.parametrize("option", [{"beam": 0}, {"beam": -2}, {"samples": -1}, {"subset": "train"}])
def test_options_out_of_range(option: dict, tmp_path: Path) -> None:
    with pytest.raises(SparsityError, match=f"^{next(iter(option))} must be"):
        Options(tmp_path, **option)


def test_a_file_is_decoded_as_its_run(
    corpus: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(module, "translate", lambda *_, **how: seen.append(how) or read_lines(corpus / "test.de"))
    shutil.copy(trained / "checkpoint_best.pt", tmp_path / "best.pt")
    config = recipes.TransformerConfig(beam=3, lenpen=0.6)
    (tmp_path / recipes.CONFIG).write_text(json.dumps({"config": config.to_dict()}))
    evaluate(Options(tmp_path / "best.pt", data=corpus))
    assert seen[0] == {"beam": 3, "lenpen": 0.6}
    for damaged in ("{}", "{", '{"config": 1}'):
        (tmp_path / recipes.CONFIG).write_text(damaged)
        with pytest.raises(SparsityError, match=r"config\.json is not the config of a run of ours"):
            evaluate(Options(tmp_path / "best.pt", data=corpus))


def test_wmt14_also_gets_the_bleu_of_papers(corpus: Path, trained: Path, tmp_path: Path) -> None:
    shutil.copytree(corpus, tmp_path / "wmt14")
    prepared = json.loads((corpus / "prepared.json").read_text())
    (tmp_path / "wmt14" / "prepared.json").write_text(json.dumps({**prepared, "corpus": "wmt14"}))
    result = evaluate(Options(trained / "checkpoint_best.pt", data=tmp_path / "wmt14", beam=1))
    assert isinstance(result, Translated)
    assert result.compound_split_bleu is not None
    assert "with split compounds (13a): compare with no other" in show(result)


def test_leaked_test_sentences_stop_the_evaluation(corpus: Path, trained: Path, tmp_path: Path) -> None:
    leaky = tmp_path / "leaky"
    shutil.copytree(corpus, leaky)
    with (leaky / "train.en").open("a") as file:
        file.write((leaky / "test.en").read_text())
    with pytest.raises(SparsityError, match="is in the test set too"):
        evaluate(Options(trained, data=leaky))


def test_perplexity_is_that_of_the_model(
    text_corpus: Path,
    tmp_path: Path,
    fairseq: Fairseq,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Against the cross-entropy of the logits, taken block by block."""
    config = replace(recipes.get("tiny_pydoc_topics"), data=text_corpus, folder=tmp_path)
    fairseq([*config.arguments(), "--cpu", "--max-update", "3"])
    result = evaluate(Options(tmp_path))
    assert isinstance(result, Perplexity)
    assert "beam" not in json.loads((tmp_path / EVALUATION).read_text())
    assert module.main([str(tmp_path)]) == 0
    assert f"perplexity {result.perplexity:.2f} a piece" in capsys.readouterr().out
    model, task = load_run(tmp_path / "checkpoint_best.pt", text_corpus)
    task.load_dataset("test")
    blocks = task.dataset("test")
    total, pieces = 0.0, 0
    with torch.no_grad():
        for sample in (blocks.collater([blocks[i]]) for i in range(len(blocks))):
            logits = model(**sample["net_input"])[0]
            total += float(F.cross_entropy(logits.flatten(0, 1), sample["target"].flatten(), reduction="sum"))
            pieces += sample["target"].numel()
    assert result.pieces == pieces
    assert result.perplexity == pytest.approx(torch.tensor(total / pieces).exp().item(), rel=1e-4)
    characters = len((text_corpus / "test.text").read_text())
    assert result.bits_per_character == pytest.approx(total / 0.6931471805599453 / characters, rel=1e-4)


SHORT = ("--log-interval=2", "--encoder-layers=1", "--decoder-layers=1")


@pytest.mark.slow
def test_a_study_is_done_once(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Through the commands, with ASP's start from the dense run; a second call trains nothing."""
    shutil.copytree(corpus, tmp_path / "data" / "number-words")
    monkeypatch.chdir(tmp_path)
    short = replace(demo.DEMO, out=Path("runs/study"), methods=("dense", "asp"), length=4, fairseq=SHORT)
    assert demo.main(short) == 0
    shown = capsys.readouterr().out
    results = [json.loads((short.out / name / EVALUATION).read_text()) for name in ("dense-seed1", "asp-2to4-seed1")]
    assert [result["verified"] for result in results] == [False, True]
    assert all(sample["source"] in shown for sample in results[1]["samples"])
    rows = [line.split() for line in shown.splitlines() if line.startswith(("dense ", "asp "))]
    assert [row[2:-5] for row in rows] == [["4"], ["4", "+", "2"]]
    assert [row[-3:] for row in rows] == [[f"{r[n]:.1f}" for n in ("bleu", "chrf", "exact")] for r in results]
    config = json.loads((short.out / "asp-2to4-seed1" / "config.json").read_text())
    assert config["config"]["init_from"] == "runs/study/dense-seed1"
    checkpoint = torch.load(short.out / "asp-2to4-seed1" / "checkpoint_last.pt", weights_only=True)
    assert checkpoint["extra_state"][METADATA]["method"] == "asp"
    assert len(verify(short.out / "finalized.pt", "2:4").checked) == 16
    assert all((short.out / plot.file).stat().st_size > 5000 for plot in short.plots)
    assert "2 of 2 runs" in (short.out / "report.md").read_text()
    # Against what fairseq prints, to three digits.
    losses = re.findall(
        r"'valid' subset .*?\| nll_loss ([\d.]+)", (short.out / "dense-seed1" / "train.log").read_text()
    )
    assert short.validation(short.out / "dense-seed1") == pytest.approx(-min(map(float, losses)), abs=1e-3)
    before = [path.stat().st_mtime_ns for path in sorted(short.out.glob(f"*/{EVALUATION}"))]
    assert demo.main(short) == 0
    assert [path.stat().st_mtime_ns for path in sorted(short.out.glob(f"*/{EVALUATION}"))] == before


@pytest.mark.slow
def test_a_study_compares_language_models(text_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(text_corpus, tmp_path / "data" / "pydoc-topics")
    monkeypatch.chdir(tmp_path)
    small = study.TranslationStudy(
        recipe="tiny_pydoc_topics",
        out=Path("study"),
        methods=("dense", "s-ste"),
        patterns=("2:4",),
        seeds=(1,),
        length=2,
        fairseq=("--log-interval=2", "--decoder-layers=1"),
    )
    rows = conduct(small)
    bits = [json.loads((small.out / row.runs[1].name / EVALUATION).read_text())["bits_per_character"] for row in rows]
    report = (small.out / "report.md").read_text()
    assert "bits/character by seed" in report
    assert f"{bits[1] - bits[0]:+.3f} (one pair)" in report


@pytest.mark.slow
def test_a_run_that_fails_shows_its_end(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(corpus, tmp_path / "data" / "number-words")
    monkeypatch.chdir(tmp_path)
    wrong = replace(demo.DEMO, methods=("dense",), fairseq=("--fp16",))
    with pytest.raises(SparsityError, match=r"(?s) failed; the end of .*error: --fp16 trains a copy of the weights"):
        conduct(wrong)


@pytest.mark.slow
def test_a_users_mistake_ends_without_a_traceback(corpus: Path, tmp_path: Path) -> None:
    """In our commands and in fairseq's own."""
    ours = in_subprocess("nm_sparsity.translation.evaluate", [str(tmp_path / "nothing")], status=1, cwd=tmp_path)
    assert "error: there is no checkpoint" in ours.stderr
    stock = in_subprocess("fairseq_cli.train", arguments(corpus, tmp_path, "--fp16"), status=1)
    for result in (ours, stock):
        assert "Traceback" not in result.stderr
        assert [line for line in result.stderr.splitlines() if line.startswith("error: ")]


def test_a_run_that_logged_nothing_yet_has_no_curve(trained: Path, tmp_path: Path) -> None:
    assert study.curve(tmp_path, "train_inner", "sad") == []
    assert len(study.curve(trained, "train_inner", "sad")) == 8


@pytest.mark.slow
def test_commands_do_not_show_other_libraries_debug_lines() -> None:
    """fairseq's modules set up the log of the whole process when they are imported."""
    code = "import logging, nm_sparsity.translation.study; print(logging.root.level, logging.root.handlers)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.split("\n")[-2] == "30 []"


@pytest.mark.slow
def test_the_readme_runs_as_written(tmp_path: Path) -> None:
    """Its fairseq commands, with fewer updates."""
    text = (USER_DIR / "README.md").read_text()
    commands = text.partition("```sh\n")[2].partition("```")[0]
    assert "--max-update 800" in commands
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    result = subprocess.run(
        [
            "bash",
            "-ec",
            commands.replace("--max-update 800", "--max-update 2").replace("--max-len-a 2", "--max-len-a 0"),
        ],
        cwd=tmp_path,
        env={**environment(), "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "BLEU = " in result.stdout
    assert "0 violate their pattern" in result.stdout
    assert "S-0\t▁two ▁thousand ▁and ▁five" in result.stdout
