"""Every code block and command in README.md and the documentation runs, or says here why it is not run."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("core", "classification", "detection", "translation", "benchmarks")
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *(page for f in FOLDERS if (page := ROOT / f / "README.md").exists()),
]

# Names that a page uses for what the reader brings along.
PREAMBLES = {
    "README.md": """
import torch
from torch import nn
model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
sum_of_lrs = 0.1
example = torch.randn(8, 16, dtype=torch.bfloat16, device="cuda" if torch.cuda.is_available() else "cpu")
def train(model, optimizer):
    model(torch.randn(8, 16)).sum().backward()
    optimizer.step()
""",
}

NOT_RUN = {
    "make demo": "five minutes of training; its module is tested with fewer epochs",
    "make demo-translation": "eight minutes of training; its parts are tested",
    "make demo-detection": "ten minutes of training; its parts are tested",
    "make test": "this is it",
    "pip install .": "test_structure builds the wheel and imports what is in it",
    'pip install ".[classification]"': "as above",
    'MMCV_WITH_OPS=0 pip install ".[detection]"': "as above",
    "python -m nm_sparsity.detection.train tiny_mask_rcnn --data data/composed --pattern 2:4 --decay 0.1 "
    "--out runs/tiny": "minutes of training; tested on fewer images",
    "python -m nm_sparsity.detection.evaluate runs/tiny": "needs the run of the line before",
    "python -m nm_sparsity.detection.predict runs/tiny data/composed/test": "as above",
    "python -m nm_sparsity.detection.demo": "make demo-detection",
    "python -m nm_sparsity.detection.study fashion": "hours of training",
    "python -m nm_sparsity.benchmarks.accelerate runs/demo/finalized.pt --model "
    "nm_sparsity.classification.models:build --args '[\"resnet8_small\", 10]' --input 64,3,8,8": "needs make demo",
    "make bench": "minutes of measuring; each benchmark is tested with small sizes",
}
"""Commands that need data, GPUs or minutes. Training commands among the others run with --print-config."""

RESOLVE = """
import pkgutil, sys
for name in sys.argv[1:]:
    try:
        pkgutil.resolve_name(name.replace(":", "."))
    except (ImportError, AttributeError) as error:
        print(name, error)
"""


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands() -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        for block in blocks(page, "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                command = " ".join(line.split("  #")[0].split())
                if command and not command.startswith("#"):
                    found.append((str(page.relative_to(ROOT)), command))
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    "page",
    [p for p in PAGES if blocks(p, "python")],
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_python_blocks_run(page: Path, tmp_path: Path) -> None:
    source = PREAMBLES.get(str(page.relative_to(ROOT)), "") + "\n".join(blocks(page, "python"))
    script = tmp_path / "page.py"
    script.write_text(source, encoding="utf-8")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    launch = [sys.executable, *(launcher if "init_process_group" in source else []), str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(launch, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]


@pytest.mark.slow
def test_every_name_in_the_documentation_and_in_docstrings_exists() -> None:
    pages = [*PAGES, *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))]
    names = {
        n for page in pages for n in re.findall(r"(?<![\w.])nm_sparsity(?:[.:]\w+)+", page.read_text(encoding="utf-8"))
    }
    names.remove("nm_sparsity.packed")  # a key of packed files
    # In a process of its own: it imports everything, fairseq and MMDetection as well.
    run = subprocess.run([sys.executable, "-c", RESOLVE, *sorted(names)], capture_output=True, text=True, check=True)
    assert not run.stdout, f"these names do not exist:\n{run.stdout}"


def test_links_within_the_repository_lead_somewhere() -> None:
    pages = [*PAGES, *ROOT.glob("*/results/*.md")]
    links = [(page, link) for page in pages for link in re.findall(r"\]\((?!http|#)([^)#]+)", page.read_text("utf-8"))]
    assert len(links) > 50
    assert not [f"{page}: {link}" for page, link in links if not (page.parent / link).exists()]


def test_there_are_commands_and_no_stale_exceptions() -> None:
    written = {command for _, command in commands()}
    assert len(written) > 10
    assert not set(NOT_RUN) - written


@pytest.mark.slow
@pytest.mark.parametrize(("page", "command"), [c for c in dict.fromkeys(commands()) if c[1] not in NOT_RUN])
def test_commands_run(page: str, command: str, tmp_path: Path) -> None:
    words = shlex.split(command)
    if words[0] == "torchrun":
        words = ["python", *words[words.index("-m") :]]
    if ".train" in command and "--print-config" not in words:
        words.append("--print-config")
    folder = str(Path(sys.executable).parent)
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, f"{page}: {command}\n{run.stderr[-2000:]}"
