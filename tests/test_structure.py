"""The layout that pyproject.toml and the import rules promise."""

import ast
import os
import shutil
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


def test_the_wheel_holds_every_package_its_data_and_the_compiled_kernel(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check", "install", "--no-deps"]
    source = tmp_path / "source"
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in tracked:
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    subprocess.run([*pip, "--target", str(tmp_path / "site"), str(source)], check=True, capture_output=True)
    installed = tmp_path / "site" / "nm_sparsity"
    for folder in FOLDERS:
        for path in (source / folder).rglob("*.py"):
            assert (installed / path.relative_to(source)).is_file()
    assert not (tmp_path / "site" / "core").exists(), "a top-level core would break other people's software"
    code = (
        "import torch, nm_sparsity.core as core\n"
        "from nm_sparsity.core.masks import cpu\n"
        f"assert core.__file__.startswith({str(installed)!r}), core.__file__\n"
        "assert (cpu.library() is not None) == bool(__import__('shutil').which('c++'))\n"
        "layer = torch.nn.Linear(8, 8); core.sparsify(layer); core.finalize(layer); core.verify(layer)"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)


def test_tests_are_no_package() -> None:
    assert not list((ROOT / "tests").rglob("__init__.py"))
