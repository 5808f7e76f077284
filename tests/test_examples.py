"""The examples run, and say what they promise."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
CASES: dict[str, tuple[list[str], list[str], str]] = {
    "from_scratch.py": ([], ["--epochs", "2"], "2 weights checked, 0 violate"),
    "fsdp2.py": (TORCHRUN, [], "2 weights checked, 0 violate"),
    "export.py": ([], ["out"], "packed: 0.5"),
    "hf_trainer.py": ([], ["out", "4"], "14 weights checked, 0 violate"),
    "lightning_trainer.py": ([], ["out", "1"], "2 weights checked, 0 violate"),
    "lora.py": ([], ["out"], "14 weights checked, 0 violate"),
}
"""How each is launched, its arguments, and what it prints."""


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_an_example_runs(tmp_path: Path, name: str) -> None:
    launcher, arguments, expected = CASES[name]
    command = [sys.executable, *launcher, str(EXAMPLES / name), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    assert expected in run.stdout


def test_every_example_is_short_and_run_here() -> None:
    lines = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in EXAMPLES.glob("*.py")}
    assert lines.keys() == CASES.keys()
    assert max(lines.values()) <= 60
