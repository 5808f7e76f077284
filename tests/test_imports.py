"""Importing this package changes nothing in the process that other code would notice."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
PLUGINS = {"nm_sparsity.detection.plugin"}
"""What an engine imports for its effect, since it has no other way to call a plug-in."""

THIRD_PARTY = {
    "core": ("torch", "numpy", "torchvision", "transformers", "lightning", "accelerate"),
    "classification": ("sklearn.datasets", "torchvision", "tyro", "matplotlib.pyplot", "tqdm"),
    "detection": ("matplotlib.pyplot", "pycocotools.coco", "sklearn.datasets", "mmengine.runner", "mmcv", "mmdet"),
    "translation": ("fairseq.trainer", "fairseq_cli.train", "fairseq_cli.eval_lm", "sacrebleu", "matplotlib.pyplot"),
    "benchmarks": ("matplotlib.pyplot", "torchvision"),
}
"""Imported beforehand: what these do to a process is their own affair."""

CHECK = """
import importlib, importlib.util, logging, sys, warnings

modules, third_party = eval(sys.argv[1])
warnings.simplefilter("ignore")
logging.disable(logging.CRITICAL)
for name in ("torch", "torchvision", *third_party):
    if importlib.util.find_spec(name.partition(".")[0]):
        importlib.import_module(name)

def state():
    found = {"excepthook": sys.excepthook, "filters": list(warnings.filters), "mmcv._ext": sys.modules.get("mmcv._ext")}
    if "fairseq.trainer" in sys.modules:
        from fairseq.file_io import PathManager
        from fairseq.trainer import Trainer
        for name in ("save_checkpoint", "load_checkpoint", "train_step"):
            found[name] = vars(Trainer)[name]
        found["copy"] = vars(PathManager)["copy"]
    return found

before = state()
for name in modules:
    importlib.import_module(name)
    after = state()
    changed = [key for key in before if before[key] is not after[key] and before[key] != after[key]]
    assert not changed, f"importing {name} changes {changed}"
"""


def modules(part: str) -> list[str]:
    """All modules of a part but its plug-ins and MMEngine's configs, which are no modules."""
    paths = [path for path in (ROOT / part).rglob("*.py") if "configs" not in path.relative_to(ROOT).parts]
    names = {f"nm_sparsity.{'.'.join(path.relative_to(ROOT).with_suffix('').parts)}" for path in paths}
    return sorted({name.removesuffix(".__init__") for name in names} - PLUGINS)


def run(code: str, *arguments: str) -> None:
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("part", THIRD_PARTY)
def test_importing_any_module_leaves_the_process_as_it_was(part: str) -> None:
    if part in ("detection", "translation") and not find_spec({"detection": "mmdet", "translation": "fairseq"}[part]):
        pytest.skip(f"what {part} needs is not installed")
    run(CHECK, repr((modules(part), THIRD_PARTY[part])))


@pytest.mark.parametrize(
    ("module", "engines"),
    [
        ("nm_sparsity.translation.corpora", ("fairseq", "fairseq_cli", "omegaconf", "hydra")),
        ("nm_sparsity.detection.coco", ("mmdet", "mmcv", "mmengine")),
    ],
)
def test_data_is_read_without_the_engine(module: str, engines: tuple[str, ...]) -> None:
    pytest.importorskip("pycocotools")
    run(f"import sys; sys.modules.update(dict.fromkeys({engines})); import {module}")
