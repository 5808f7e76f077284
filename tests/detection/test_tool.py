"""What a fresh process does: MMDetection's own scripts, and commands where packages are missing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nm_sparsity.core import verify
from nm_sparsity.detection import tool

README = Path(__file__).parents[2] / "detection" / "README.md"


def command(folder: Path, module: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", f"nm_sparsity.detection.{module}", *arguments],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_the_two_lines_of_the_readme_with_mmdetections_own_scripts(
    make_config: Callable[..., Any], tmp_path: Path
) -> None:
    """tools/train.py on a config with the README's two lines gives a verified file that tools/test.py scores, with a
    config that knows nothing of this package."""
    config = make_config(method="dense")
    config.custom_hooks, config.custom_imports = [], {"imports": []}
    config.dump(tmp_path / "dense.py")
    two_lines = re.search(r"```python\n((custom_imports|custom_hooks) = .*?)```", README.read_text(), re.DOTALL)
    assert two_lines is not None
    (tmp_path / "sparse.py").write_text(f'_base_ = "dense.py"\n{two_lines[1]}')

    training = command(tmp_path, "tool", "train", "sparse.py", "--work-dir", "run")
    assert training.returncode == 0, training.stderr[-3000:]
    assert "a short run needs a larger decay" in training.stderr
    assert len(verify(tmp_path / "run" / "epoch_1.pth", "2:4").checked) == 31

    testing = command(tmp_path, "tool", "test", "dense.py", "run/epoch_1.pth", "--cfg-options", "log_level=INFO")
    assert testing.returncode == 0, testing.stderr[-3000:]
    assert "coco/segm_mAP" in testing.stdout + testing.stderr


def test_unknown_scripts_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["tset"], []):
        assert tool.main(arguments) == 1
        assert re.search(r"has no script \"(tset)?\"; it has analysis_tools/.*, test, .*train", capsys.readouterr().err)


@pytest.mark.slow
@pytest.mark.parametrize("module", ["train", "evaluate", "prepare", "demo", "study", "tool"])
def test_missing_packages_are_named_with_the_install_line(tmp_path: Path, module: str) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules.update(mmdet=None, tyro=None)")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    run = command(tmp_path, module, PYTHONPATH=path)
    assert run.returncode == 1
    (line,) = run.stderr.splitlines()
    assert "mmdet, tyro not installed; run: MMCV_WITH_OPS=0 pip install 'nm-sparsity[detection]'" in line
