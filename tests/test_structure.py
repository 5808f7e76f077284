"""The layout: the floors of core, who imports whom, what is public, and that it builds and installs."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import nm_sparsity

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("core", "classification", "detection", "translation", "benchmarks")
SOURCES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
FLOORS = (
    "errors",
    "pattern",
    "table",
    "masks",
    "methods",
    "model",
    "training",
    "files",
    "deploy",
    "integrations",
    "experiments",
)
"""The parts of core. Each imports only those before it; `core/__init__.py` and `core/__main__.py` see all."""


def imported(path: Path) -> set[str]:
    """The modules that a file imports, with the names that it takes from a package; relative imports have a dot."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_are_absolute_and_tasks_know_only_core(path: Path) -> None:
    folder = path.relative_to(ROOT).parts[0]
    for name in imported(path):
        assert not name.startswith("."), f"{path} imports {name}: write it absolutely"
        parts = name.split(".")
        if parts[0] == "nm_sparsity":
            assert parts[1] in {"core", folder}, f"{folder} must not import {name}"
        else:
            assert parts[0] not in FOLDERS, f"{path} imports {name}: write nm_sparsity.{name}"


def test_each_floor_of_core_imports_only_those_before_it() -> None:
    for path in (ROOT / "core").rglob("*.py"):
        floor = path.relative_to(ROOT / "core").parts[0].removesuffix(".py")
        if floor in ("__init__", "__main__"):
            continue
        assert floor in FLOORS, f"{path} belongs to no floor of core: {', '.join(FLOORS)}"
        allowed = FLOORS[: FLOORS.index(floor) + 1]
        for name in imported(path):
            if name.startswith("nm_sparsity.core."):
                assert name.split(".")[2] in allowed, f"{path} imports {name}, from a floor above its own"


def test_the_package_has_the_public_names_a_version_and_types() -> None:
    from nm_sparsity import finalize, sparsify, verify

    assert {sparsify, finalize, verify} <= {getattr(nm_sparsity.core, name) for name in nm_sparsity.core.__all__}
    assert all(hasattr(nm_sparsity, name) for name in nm_sparsity.__all__)
    assert nm_sparsity.__version__ in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert (ROOT / "nm_sparsity" / "py.typed").is_file()
    assert {path.name for path in (ROOT / "nm_sparsity").iterdir() if path.is_symlink()} == set(FOLDERS)


@pytest.mark.slow
def test_core_needs_little_more_than_torch_and_numpy() -> None:
    others = ["torchvision", "matplotlib", "tensorboard", "tyro", "tqdm", "safetensors", "onnx", "sklearn"]
    code = f"import sys; sys.modules.update(dict.fromkeys({others})); import nm_sparsity.core.__main__"
    subprocess.run([sys.executable, "-c", code], check=True)


def tree(to: Path, links: bool) -> None:
    """The tracked files; without `links` as Python's zipfile leaves them, text files that hold the target's name."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in tracked:
        source, target = ROOT / name, to / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_symlink() and not links:
            target.write_text(os.readlink(source))
        elif source.exists():
            shutil.copy(source, target, follow_symlinks=False)


@pytest.mark.slow
@pytest.mark.parametrize("links", [True, False], ids=["with links", "without links"])
def test_a_release_builds_installs_and_works(tmp_path: Path, links: bool) -> None:
    source, site = tmp_path / "source", tmp_path / "site"
    tree(source, links)
    build = "import sys; from setuptools import build_meta; print(build_meta.build_sdist(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", build, str(tmp_path)], cwd=source, check=True, capture_output=True)
    (release,) = tmp_path.glob("nm_sparsity-*.tar.gz")
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check", "install", "--no-deps"]
    install = [*pip, "--no-build-isolation", "--target", str(site), str(release)]
    subprocess.run(install, cwd=tmp_path, check=True, capture_output=True)

    installed = {str(path.relative_to(site)) for path in (site / "nm_sparsity").rglob("*.py")}
    expected = {f"nm_sparsity/{path.relative_to(source)}" for f in FOLDERS for path in (source / f).rglob("*.py")}
    assert installed == expected | {"nm_sparsity/__init__.py"}
    assert (site / "nm_sparsity" / "py.typed").is_file()
    assert not (site / "core").exists(), "a top-level core would break other people's software"
    code = (
        "import shutil, torch, nm_sparsity\n"
        "from nm_sparsity.core.masks import cpu\n"
        f"assert nm_sparsity.core.__file__.startswith({str(site)!r}), nm_sparsity.core.__file__\n"
        "assert (cpu.library() is not None) == bool(shutil.which('c++'))\n"
        "layer = torch.nn.Linear(8, 8)\n"
        "nm_sparsity.sparsify(layer); nm_sparsity.finalize(layer); nm_sparsity.verify(layer)\n"
        "torch.save(layer.state_dict(), 'layer.pt')\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(site)}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)
    verify = [str(site / "bin" / "nm-sparsity"), "verify", "layer.pt", "--pattern", "2:4"]
    subprocess.run(verify, cwd=tmp_path, env=environment, check=True, capture_output=True)


def test_tests_are_no_package() -> None:
    assert not list((ROOT / "tests").rglob("__init__.py"))
