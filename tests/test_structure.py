"""The layout that pyproject.toml and the import rules promise."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("core", "classification", "detection", "translation", "benchmarks")
SOURCES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]


def imported(path: Path) -> set[str]:
    """Absolute names of the modules that a file imports; relative imports start with a dot."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            names |= {f"{module}.{alias.name}" for alias in node.names} if module == "nm_sparsity" else {module}
    return names


def test_the_package_list_is_the_tree() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    in_tree = {
        "nm_sparsity." + ".".join(path.parent.relative_to(ROOT).parts)
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("__init__.py")
    }
    assert set(setuptools["packages"]) == in_tree
    assert setuptools["package-dir"] == {f"nm_sparsity.{folder}": folder for folder in FOLDERS}
    assert {link.name for link in (ROOT / ".typing" / "nm_sparsity").iterdir()} == set(FOLDERS)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_are_absolute_and_tasks_know_only_core(path: Path) -> None:
    folder = path.relative_to(ROOT).parts[0]
    allowed = {"core", folder}
    for name in imported(path):
        assert not name.startswith("."), f"{path} imports {name}: write it absolutely"
        parts = name.split(".")
        if parts[0] == "nm_sparsity":
            assert parts[1] in allowed, f"{folder} must not import {name}"
        else:
            assert parts[0] not in FOLDERS, f"{path} imports {name}: write nm_sparsity.{name}"


def test_core_needs_little_more_than_torch_and_numpy() -> None:
    others = ["torchvision", "matplotlib", "tensorboard", "tyro", "tqdm", "safetensors", "onnx", "sklearn"]
    code = f"import sys; sys.modules.update(dict.fromkeys({others})); import nm_sparsity.core.__main__"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_core_under_another_name_is_refused() -> None:
    run = subprocess.run([sys.executable, "-c", "import core"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode != 0
    assert "import this package as nm_sparsity.core" in run.stderr


def test_tests_are_no_package() -> None:
    assert not list((ROOT / "tests").rglob("__init__.py"))
