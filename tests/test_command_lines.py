"""What users mistype, at every command: an exit status and a line that says so, never a traceback, never a success."""

from __future__ import annotations

import importlib
import json
import pickle
import shlex
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from nm_sparsity.core import finalize, sparsify
from nm_sparsity.core.files.checkpoint import split
from nm_sparsity.core.files.io import save
from nm_sparsity.core.files.metadata import METADATA

BAD = {
    "core": """
        nonsense
        inspect
        inspect resnet51
        inspect resnet18 --pattern 4:2
        inspect resnet18 --pattern 2:4:8
        inspect resnet18 --pattern two:four
        inspect resnet18 --pattern 2:{digits}
        inspect resnet18 --pattern ""
        inspect resnet18 --layout rows
        inspect resnet18 --exclude
        inspect resnet18 --exclude layer9
        inspect resnet18 --exclude layer1 typo*
        inspect resnet18 --include nothing
        inspect resnet18 --patterns layer1
        inspect resnet18 --patterns layer1=4:2
        inspect resnet18 --patterns layer9=2:4
        inspect resnet18 --patterns =2:4
        inspect resnet18 --input 1,3
        inspect resnet18 --input 1,three,224,224
        inspect resnet18 --input 1,3,-224,224
        inspect resnet18 --input 99999999999999999999,3,224,224
        inspect resnet18 --args 5
        inspect resnet18 --args [3]
        inspect resnet18 --args "[1, 2, 3, 4, 5, 6, 7, 8, 9]"
        inspect resnet18 --jsn
        inspect no_module:build
        inspect mine:nothing
        inspect mine:
        inspect :build
        inspect mine:returns_none
        inspect mine:raises
        inspect mine:exits
        inspect mine:build --args "[1]"
        inspect mine:build --args "[[[[["
        inspect mine:build --args "{{"
        inspect mine:build --input 1,2
        inspect broken:build
        verify
        verify none.pt
        verify nested.pt --pattern 2:4
        finalize nested.pt out.pt --pattern 2:4
        verify text.pt
        verify empty.pt
        verify cut.pt
        verify evil.pt
        verify list.pt --pattern 2:4
        verify number.pt --pattern 2:4
        verify names.pt --pattern 2:4
        verify flipped.pt
        verify metadata.pt
        verify dense.pt
        verify dense.pt --pattern 2:4
        verify dense.pt --pattern 2:7
        verify dense.pt --pattern 2:4 --exclude *
        verify dense.pt --pattern 2:4 --exclude typo*
        verify bias.pt --pattern 2:4
        verify sparse.pt --pattern 1:4
        verify sparse.pt --pattern 1:16
        verify sparse.pt --exclude 0
        verify sparse.pt --include 0
        verify sparse.pt --patterns 0=1:4
        verify sparse.pt --pattern 2:
        verify sparse.pt --layout columns
        verify damaged.safetensors --pattern 2:4
        verify text.onnx --pattern 2:4
        verify folder --pattern 2:4
        verify hf --pattern 2:4
        verify file/inside.pt
        verify /proc/self/mem
        verify {long}
        verify whole.pt --pattern 2:4
        verify int8.pt --pattern 2:4
        verify sparse_tensor.pt --pattern 2:4
        finalize
        finalize sparse.pt
        finalize none.pt out.pt
        finalize text.pt out.pt --pattern 2:4
        finalize dense.pt out.pt
        finalize dense.pt dense.pt --pattern 2:4
        finalize dense.pt ./dense.pt --pattern 2:4
        finalize dense.pt out.pt --pattern 4:2
        finalize dense.pt out.pt --pattern 2:7
        finalize dense.pt out.pt --pattern 2:4 --exclude typo
        finalize dense.pt out.pt --pattern 2:4 --exclude *
        finalize sparse.pt out.pt --exclude 0
        finalize sparse.pt out.pt --pattern 1:4
        finalize sparse.pt file/out.pt
        finalize sparse.pt /proc/self/out.pt
        finalize sparse.pt folder
        finalize sparse.pt {long}
        finalize bias.pt out.pt --pattern 2:4
        finalize text.onnx out.pt --pattern 2:4
        finalize int8.pt out.pt --pattern 2:4
        finalize flipped.pt out.safetensors
        finalize mixed.pt out.safetensors --pattern 2:4
    """,
    "classification.train": """
        nonsense
        digits_2to4 --pattern 4:2
        digits_2to4 --method nonsense
        digits_2to4 --decay -1
        digits_2to4 --decay nan
        digits_2to4 --decay much
        digits_2to4 --exclude typo
        digits_2to4 --patterns fc 2:9 typo 1:4
        digits_2to4 --layout rows
        digits_2to4 --remainder none
        digits_2to4 --hyperparameters speed 3
        digits_2to4 --epochs 0
        digits_2to4 --epochs -3
        digits_2to4 --epochs many
        digits_2to4 --batch-size 0
        digits_2to4 --batch-size 1000000
        digits_2to4 --accumulation 0
        digits_2to4 --optimizer.lr 0
        digits_2to4 --optimizer.lr inf
        digits_2to4 --optimizer.momentum 1.5
        digits_2to4 --optimizer.name lbfgs
        digits_2to4 --seed -1
        digits_2to4 --device tpu
        digits_2to4 --amp fp8
        digits_2to4 --ema 2
        digits_2to4 --label-smoothing 1
        digits_2to4 --log-every 0
        digits_2to4 --model resnet51
        digits_2to4 --model mine:nothing
        digits_2to4 --model mine:returns_none
        digits_2to4 --model mine:exits
        digits_2to4 --model mine:tiny
        digits_2to4 --args 5
        digits_2to4 --pretrained none.pt --model resnet18
        digits_2to4 --pretrained NONSENSE --model resnet18
        digits_2to4 --init-from none.pt
        digits_2to4 --init-from text.pt
        digits_2to4 --init-from folder
        digits_2to4 --init-from sparse.pt
        digits_2to4_asp --out run
        digits_2to4 --resume
        digits_2to4 --out file
        digits_2to4 --out /proc/self/run
        digits_2to4 --out {long}
        digits_2to4 --no-such-option
        digits_2to4 --data.name imagefolder --data none
        digits_2to4 --data.name imagefolder --data images
        digits_2to4 --data.name imagefolder --data broken_images
        digits_2to4 --data.name fashion-mnist --data none
        digits_2to4 --data.name fashion-mnist --data idx
        digits_2to4 --data.name cifar
        digits_2to4 --data.workers -1
        digits_2to4 --data.image-size 0
        file
        folder
        text.pt
    """,
    "classification.evaluate": """
        .
        none.pt
        text.pt
        evil.pt
        flipped.pt
        folder
        dense.pt
        dense.pt --config nonsense
        dense.pt --config digits_2to4
        sparse.pt
        sparse.pt --config digits_2to4
        dense.pt --config digits_2to4 --split train
        dense.pt --config digits_2to4 --batch-size 0
        dense.pt --config digits_2to4 --device tpu
        dense.pt --config digits_2to4 --model mine:exits
        dense.pt --config digits_2to4 --out file
        names.pt --config digits_2to4
        --config digits_2to4
    """,
    "classification.predict": """
        none.pt picture.png
        sparse.pt
        dense.pt picture.png
        dense.pt picture.png --config digits_2to4
        sparse.pt none.png --config digits_2to4
        sparse.pt text.pt --config digits_2to4
        sparse.pt picture.png --top 0
        sparse.pt picture.png --config digits_2to4 --classes none
        sparse.pt picture.png --config digits_2to4 --classes picture.png
    """,
    "classification.study": """
        nonsense
        digits_dense --methods nonsense
        digits_dense --patterns 4:2
        digits_dense --seeds 1 1
        digits_dense --epochs 0
        digits_dense --decays -1
        digits_dense --decays
        digits_dense --jobs -1
        digits_dense --out file
        digits_dense --out /proc/self/study
        digits_dense --reference nonsense
    """,
    "detection.train": """
        nonsense
        file
        mmdet::nonsense/none.py
        tiny_mask_rcnn --data none
        tiny_mask_rcnn --data folder
        tiny_mask_rcnn --data coco_text
        tiny_mask_rcnn --data coco_list
        tiny_mask_rcnn --data coco_empty
        tiny_mask_rcnn --pattern 4:2
        tiny_mask_rcnn --method nonsense
        tiny_mask_rcnn --decay -1
        tiny_mask_rcnn --pattern 2:4 --hyperparameters speed 3
        tiny_mask_rcnn train_cfg.max_epochs
        tiny_mask_rcnn =3
        tiny_mask_rcnn trian_cfg.max_epochs=3
        tiny_mask_rcnn load_form=dense.pth
        tiny_mask_rcnn load_from=none.pth
        tiny_mask_rcnn --seed x
        tiny_mask_rcnn --launcher nonsense
        tiny_mask_rcnn --launcher pytorch
        tiny_mask_rcnn --out file
        tiny_mask_rcnn --resume
        mine.py
        broken.py
    """,
    "detection.evaluate": """
        none
        folder
        file
        folder --checkpoint none.pth
        text.pt --config tiny_mask_rcnn --out file
        folder --pictures x
        file --config nonsense
        text.pt --config tiny_mask_rcnn
        text.pt --config folder
    """,
    "detection.predict": """
        none picture.png --out out
        folder picture.png --out out
        text.pt picture.png --out out
        dense.pt picture.png --out out
        sparse.pt picture.png --out out --config nonsense
        sparse.pt picture.png --out out --config tiny_mask_rcnn
        sparse.pt picture.png --out out --score 2
        sparse.pt --out
        none
        none file
        folder file
        folder folder
        folder folder --score x
        folder folder --score 2
        file folder --config nonsense
        text.pt file --config tiny_mask_rcnn
    """,
    "detection.prepare": """
        nonsense
        coco --data none
        coco --data folder
        coco --out folder
        composed
        composed --out file
        composed --out /proc/self/x
        composed --out out --train 0
        composed --out out --val -1
        composed --out out --size 0
        composed --out out --size 100000
        composed --out out --seed -1
        fashion --out out --source none
        fashion --out out --source idx
        voc --source none --out out
        voc --source folder --out out
        voc --source voc --out out
        voc --source voc --out out --val-share 2
        voc --source voc --out out --val-share nan
    """,
    "detection.study": """
        nonsense
        fashion --methods nonsense
        composed --patterns 4:2
        composed --seeds 1 1
        composed --epochs 0
        composed --out file
        composed --config nonsense
    """,
    "detection.tool": """
        nonsense
        ../tools/train
        ""
    """,
    "translation.prepare": """
        --out out
        nonsense --out out
        number-words
        number-words --out folder
        number-words --out file/x
        number-words --out /proc/self/x
        number-words --out {long}
        --out out --source a.en --target a.de --vocabulary 0
        --out out --source a.en --target a.de --vocabulary 3
        --out out --source a.en --target a.de --vocabulary 1000000
        --out out --source a.en --target a.de --held-out 0
        --out out --source a.en --target a.de --held-out 1000000
        number-words --out out --seed x
        number-words --out out --text a.en
        --out out --source a.en
        --out out --source none.en --target a.de
        --out out --source a.en --target none.de
        --out out --source a.en --target short.de
        --out out --source a.en --target a.en
        --out out --source a.en --target latin1.de
        --out out --source text.pt --target a.de
        --out out --source a.en --target a.de --source-lang English
        --out out --source empty.en --target empty.de
        --out out --text none.txt
        --out out --text empty.en
        --out out --text folder
        wmt14 --out out --folder none
    """,
    "translation.train": """
        nonsense
        tiny_number_words --data none
        tiny_number_words --data folder
        tiny_number_words --data file
        tiny_number_words --data damaged_corpus
        tiny_number_words --pattern 4:2
        tiny_number_words --method nonsense
        tiny_number_words --decay nan
        tiny_number_words --seed x
        tiny_number_words --beam none
    """,
    "translation.evaluate": """
        none
        folder
        text.pt
        dense.pt
        sparse.pt
        evil.pt
        none --subset train
        none --out file
        none --beam 0
        none --samples -1
    """,
    "translation.average": """
        --out out.pt
        none.pt --out out.pt
        text.pt --out out.pt
        dense.pt --out out.pt
        sparse.pt
        evil.pt --out out.pt
    """,
    "translation.predict": """
        none sentence
        folder sentence
        text.pt sentence
        sparse.pt sentence
        evil.pt sentence
        sparse.pt sentence --beam 0
        sparse.pt sentence --length 0
        sparse.pt sentence --file a.en
        sparse.pt --file none.en
    """,
    "translation.study": """
        nonsense
        tiny_number_words --methods nonsense
        tiny_number_words --patterns 4:2
        tiny_number_words --seeds 1 1
        tiny_number_words --updates 0
        tiny_number_words --out file
    """,
    "benchmarks.plan": """
        nonsense
        mine:build
        mine:build --input 1,2
        mine:build --input 1,x
        mine:nothing --input 1,8
        mine:exits --input 1,8
        resnet18 --device nonsense
        resnet18 --dtype fp128
        resnet18 --batch 0
        resnet18 --pattern 4:2
        resnet18 --exclude typo
        resnet18 --input 1,2
    """,
    "benchmarks.accelerate": """
        nested.pt --model mine:build --input 1,8 --out out
        none.pt --model mine:build --input 1,8 --out out
        text.pt --model mine:build --input 1,8 --out out
        dense.pt --model mine:build --input 1,8 --out out
        sparse.pt --model mine:build --input 1,9 --out out
        sparse.pt --model mine:build --input one --out out
        sparse.pt --model mine:nothing --input 1,8 --out out
        sparse.pt --model nonsense --input 1,8 --out out
        sparse.pt --model mine:build --args 3 --input 1,8 --out out
        sparse.pt --model mine:build --input 1,8 --out file
        sparse.pt --model mine:tiny --input 1,8 --out out
        sparse.pt --model mine:build --input 1,8 --vocabulary 0 --out out
        sparse.pt --input 1,8
    """,
    "benchmarks.masks": """
        --rounds 0
        --device tpu
        --threads 0
        --out file
        --nonsense
    """,
    "benchmarks.training": """
        --only nonsense --quick --out out
        --rounds 0
        --minutes 0
        --device cuda:99
        --out /proc/self/x
    """,
    "benchmarks.inference": """
        --only nonsense
        --dtype fp128
        --minutes -1
        --device nonsense
        --out file
    """,
    "benchmarks.suite": """
        --minutes 0
        --minutes nan
        --device nonsense
        --out file
        nonsense
    """,
    "benchmarks.tune": """
        nonsense
        resnet18
        resnet18 --device cpu
        resnet18 --device nonsense
        resnet18 --tokens many --device cpu
        resnet18 --dtype fp128
    """,
    "benchmarks.report": """
        nonsense
    """,
}
"""Command -> lines of arguments, each wrong in one way. Names stand for what `folder` makes."""

ROOT = Path(__file__).resolve().parent.parent
HERE = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for part in ("classification", "detection", "translation", "benchmarks")
    for path in (ROOT / part).glob("*.py")
    if "@command_line" in path.read_text(encoding="utf-8")
}
"""The modules that are commands; `core` is one by itself."""
LINES = [
    (command, line.strip())
    for command, lines in BAD.items()
    if command in {*HERE, "core"}
    for line in lines.strip().splitlines()
]
NEEDS = {"detection": "mmdet", "translation": "fairseq"}
MODULE = """
import torch
def build(): return torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
def tiny(): return torch.nn.Linear(3, 3)
def returns_none(): return None
def raises(): raise ZeroDivisionError
def exits(): raise SystemExit(0)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files that are wrong in one way each, and a few that are right."""
    d = tmp_path_factory.mktemp("here")
    for name in ("folder", "hf", "idx", "voc/Annotations", "voc/JPEGImages", "damaged_corpus"):
        (d / name).mkdir(parents=True)
    for name, text in {
        "file": "text",
        "text.pt": "learning rate: 0.1",
        "empty.pt": "",
        "text.onnx": "text",
        "hf/config.json": "[" * 9999,
        "hf/model.safetensors": "text",
        "mine.py": MODULE,
        "broken.py": "def (",
        "a.en": "".join(f"the cat number {i} sees a dog\n" for i in range(40)),
        "a.de": "".join(f"die Katze Nummer {i} sieht einen Hund\n" for i in range(40)),
        "short.de": "eine Zeile\n",
        "empty.en": "",
        "empty.de": "",
        "damaged_corpus/prepared.json": "{",
        "idx/train-images-idx3-ubyte": "text",
        "voc/Annotations/a.xml": "<annotation>",
    }.items():
        (d / name).write_text(text)
    (d / "latin1.de").write_bytes("größer\n".encode("latin-1") * 40)
    for name, content in {
        "text": "text",
        "list": "[]",
        "empty": '{"images": [], "annotations": [], "categories": []}',
    }.items():
        for split_name in ("train", "val", "test"):
            (d / f"coco_{name}" / split_name).mkdir(parents=True)
            (d / f"coco_{name}" / "annotations").mkdir(exist_ok=True)
            (d / f"coco_{name}" / "annotations" / f"instances_{split_name}.json").write_text(content)
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(d / "picture.png")
    for part in ("train", "val"):
        (d / "images" / part).mkdir(parents=True)
        for kind in "ab":
            (d / "broken_images" / part / kind).mkdir(parents=True)
            (d / "broken_images" / part / kind / "x.jpeg").write_text("no picture")

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    dense = {name: value.clone() for name, value in model.state_dict().items()}
    sparsify(model, "2:4", method="ste")
    state, metadata = split(model)
    finalize(model)
    for name, payload in {
        "list.pt": [1, 2],
        "number.pt": 3,
        "names.pt": {0: torch.zeros(8, 8), 1: torch.zeros(8)},
        "dense.pt": dense,
        "bias.pt": {"0.bias": torch.zeros(8)},
        "sparse.pt": {"state_dict": state, METADATA: metadata},
        "metadata.pt": {"state_dict": state, METADATA: {**metadata, "layers": {"0.weight": ("2:4", [7])}}},
        "int8.pt": {"0.weight": torch.zeros(8, 8, dtype=torch.int8)},
        "mixed.pt": {"0.weight": torch.zeros(8, 8), "epoch": 3},
    }.items():
        save(d / name, payload)
    torch.save({"w": torch.eye(8).to_sparse()}, d / "sparse_tensor.pt")
    with warnings.catch_warnings(action="ignore"):  # of a prototype
        torch.save({"0.weight": torch.nested.nested_tensor([torch.eye(8), torch.eye(9)])}, d / "nested.pt")
    torch.save(model, d / "whole.pt")
    (d / "evil.pt").write_bytes(pickle.dumps({"state_dict": {"a": Path}}))
    whole = (d / "sparse.pt").read_bytes()
    (d / "cut.pt").write_bytes(whole[: len(whole) // 2])
    at = whole.index(state["0.weight"].numpy().tobytes()) + 9
    (d / "flipped.pt").write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
    (d / "damaged.safetensors").write_bytes((99).to_bytes(8, "little") + b'{"a": {}}')
    return d


def words(line: str) -> list[str]:
    for name, text in {"{digits}": "4" * 5000, "{long}": "n" * 300, "{{": "{"}.items():
        line = line.replace(name, text)
    return shlex.split(line)


@pytest.mark.filterwarnings("ignore")  # the engines' own, at their first import
@pytest.mark.parametrize(("command", "line"), LINES, ids=[f"{command} {line}" for command, line in LINES])
def test_a_mistake_is_an_exit_status_and_a_line(
    command: str, line: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    if (package := NEEDS.get(command.split(".")[0])) is not None:
        pytest.importorskip(package)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [command])
    name = "nm_sparsity.core.__main__" if command == "core" else f"nm_sparsity.{command}"
    main: Any = importlib.import_module(name).main
    before = {path for path in folder.rglob("*") if path.is_file()}
    capfd.readouterr()
    with warnings.catch_warnings(action="ignore"):
        try:
            status = main(words(line))
        except SystemExit as leaving:
            status = leaving.code
    out, err = capfd.readouterr()
    assert status not in (0, None), f"it succeeds: {out[-500:]}"
    assert err.strip(), "it says nothing"
    assert "Traceback" not in err + out
    assert len(err) < 4000, "what is wrong is lost in it"
    if status == 1:
        assert any(one.startswith("error: ") for one in err.splitlines()), err
    left = {path for path in folder.rglob("*") if path.is_file()} - before
    assert not [path for path in left if path.name.endswith((".pt", ".tmp", ".lock", ".safetensors"))], left


def test_the_table_is_large_and_names_every_command() -> None:
    assert len(LINES) >= 200
    takes_nothing = {f"{task}.demo" for task in ("classification", "detection", "translation")}
    assert HERE - takes_nothing <= set(BAD)


@pytest.mark.slow
def test_as_a_process_too(folder: Path) -> None:
    run = [sys.executable, "-m", "nm_sparsity.core", "verify", "text.pt"]
    result = subprocess.run(run, cwd=folder, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr == "error: text.pt is not a PyTorch checkpoint\n"


@pytest.mark.slow
def test_the_current_folder_is_importable_and_a_closed_pipe_is_no_error(folder: Path) -> None:
    command = f"{sys.executable} -m nm_sparsity.core inspect mine:build --input 1,8 --json"
    result = subprocess.run(command, shell=True, cwd=folder, capture_output=True, text=True, check=True)
    assert json.loads(result.stdout)["flops"] == 2 * 2 * 64
    closed = subprocess.run(f"{command} | true", shell=True, cwd=folder, capture_output=True, text=True, check=False)
    assert closed.stderr == ""
