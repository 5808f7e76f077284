"""MMDetection configs: find one by name, point it at a data set, make it sparse or dense."""

from __future__ import annotations

import difflib
import inspect
import io
import re
import warnings
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import yaml

from nm_sparsity.core import SparsityConfig, SparsityError
from nm_sparsity.detection import coco
from nm_sparsity.detection.hooks import kind_of, mappings

FOLDER = Path(__file__).parent / "configs"

PLUGIN = "nm_sparsity.detection.plugin"
"""What a sparse config imports."""

_LOADERS = ("train", "val", "test")

_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?e[-+]?\d+", re.IGNORECASE)
"""2e-4: a number to everyone but YAML, for which it is text."""


def names() -> list[str]:
    """The packaged configs that can be trained."""
    return sorted(path.stem for path in FOLDER.glob("*.py") if not path.stem.startswith("sparse_"))


def read(name: str, overrides: Sequence[str] = ()) -> Any:
    """Read the ``mmengine.Config`` called `name`: one of `names`, a file, or ``mmdet::folder/file.py``.

    Args:
        overrides: ``key.of.entry=value``; values are YAML.

    Raises:
        SparsityError: for an unknown name, a config that cannot be read or overridden, or one of MMDetection 2.
    """
    from mmengine.config import Config

    import_mmdet()
    path = FOLDER / f"{name}.py" if name in names() else Path(name)
    try:
        if name.startswith("mmdet::"):
            from mmengine.hub import get_config

            config = get_config(name)
        elif path.is_file():
            config = Config.fromfile(path)
        else:
            raise SparsityError(f'there is no config "{name}": neither a file nor one of {", ".join(names())}')
    except SparsityError:
        raise
    except Exception as error:  # a config is code: it may raise anything
        raise SparsityError(f"cannot read the config {name}: {type(error).__name__}: {error}") from error
    changes = dict(map(_override, overrides))
    _check_names(changes, config)
    try:
        config.merge_from_dict(changes)
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise SparsityError(f"cannot override {' '.join(overrides)}: {error}") from error
    _check_parts(config, name)
    return config


def import_mmdet() -> None:
    """Import MMDetection for the first time, without its complaints of optional packages that nobody asked for."""
    import nm_sparsity.detection.plugin  # noqa: F401  before mmdet, which binds mmcv's operators

    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        import mmdet.apis
        import mmdet.evaluation  # noqa: F401  registers mmdet's scope


def _check_names(changes: Mapping[str, Any], config: Any) -> None:
    """Refuse new top-level entries that MMEngine would ignore, such as ``load_form=dense.pth``."""
    from mmengine.runner import Runner

    optional = ("activation_checkpointing", "compile", "efficient_conv_bn_eval", "find_unused_parameters")
    known = {*config, *inspect.signature(Runner).parameters, *optional, "model_wrapper_cfg", "sync_bn"}
    for key in changes:
        name = key.partition(".")[0]
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            raise SparsityError(
                f'{key}: a config has no entry "{name}"' + (f'; did you mean "{close[0]}"?' if close else "")
            )


def _check_parts(config: Any, name: str) -> None:
    if old := [key for key in ("data", "optimizer", "lr_config", "runner", "total_epochs") if key in config]:
        raise SparsityError(
            f"{name} is a config of MMDetection 2 (it has {', '.join(old)}); this is MMDetection 3, whose configs "
            "have train_dataloader, optim_wrapper and train_cfg: start from the one of the same name in mmdet::"
        )
    parts = ("model", "train_dataloader", "optim_wrapper", "train_cfg")
    if missing := [key for key in parts if not isinstance(config.get(key), Mapping)]:
        raise SparsityError(f"{name} is not an MMDetection training config: it has no {', '.join(missing)}")
    if not isinstance(config.get("custom_hooks") or [], list):
        raise SparsityError(f"{name}: custom_hooks must be a list, found {config.custom_hooks}")


def _override(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise SparsityError(f'"{text}" is not of the form key=value, e.g. train_cfg.max_epochs=24')
    try:
        return key, float(value) if _EXPONENT.fullmatch(value) else yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise SparsityError(f'"{text}": the value is not YAML: {error}') from None


def set_data(config: Any, folder: Path) -> None:
    """Train and evaluate on a data set in COCO's format: paths, classes, and the heads' numbers of classes.

    Args:
        folder: what `prepare` wrote, or a COCO 2017 folder. It is tested on ``test`` where that is annotated, else on
            ``val``.

    Raises:
        SparsityError: if the training annotations cannot be read, or `config` is of another kind of data.
    """
    year = "2017" if (folder / "train2017").is_dir() else ""

    def annotations(split: str) -> Path:
        return folder / "annotations" / f"instances_{split}{year}.json"

    loaders = [loader for loader in _LOADERS if config.get(f"{loader}_dataloader")]
    parts = [(loader, _innermost(config[f"{loader}_dataloader"].dataset), "CocoDataset") for loader in loaders]
    parts += [(loader, config.get(f"{loader}_evaluator"), "CocoMetric") for loader in loaders if loader != "train"]
    for loader, part, kind in parts:
        found = kind_of(part)
        if found != kind:
            raise SparsityError(
                f"--data needs a config of COCO data: {loader} has {found} where {kind} is expected; start from one "
                "whose name ends in _coco, or describe the data in a config of your own"
            )
    classes = coco.class_names(annotations("train"))
    for loader in loaders:
        split = "val" if loader == "test" and not annotations("test").is_file() else loader
        file = annotations(split)
        _innermost(config[f"{loader}_dataloader"].dataset).update(
            data_root=f"{folder}/",
            ann_file=f"annotations/{file.name}",
            data_prefix={"img": f"{split}{year}/"},
            metainfo={"classes": classes},
        )
        if loader != "train":
            config[f"{loader}_evaluator"].ann_file = str(file)
    for head in heads(config.model):
        head["num_classes"] = len(classes)


def heads(model: Mapping[str, Any]) -> list[Any]:
    """The parts of the config `model` that tell classes apart; an RPN tells objects from background, whatever class."""
    parts = mappings({name: part for name, part in model.items() if name != "rpn_head"})
    return [part for part in parts if "num_classes" in part]


def check_data(config: Any) -> None:
    """Check the COCO files that `config` reads, without decoding images.

    Raises:
        DataError: with what is missing or wrong.
    """
    from mmdet.datasets import CocoDataset

    loaders = [config[f"{loader}_dataloader"] for loader in _LOADERS if config.get(f"{loader}_dataloader")]
    masks = any(step.get("with_mask") for step in mappings(loaders))
    checked = set()
    for loader in loaders:
        dataset = _innermost(loader.dataset)
        if kind_of(dataset) != "CocoDataset":
            continue
        root = Path(dataset.get("data_root") or "")
        files = root / dataset.get("ann_file", ""), root / dataset.get("data_prefix", {}).get("img", "")
        if files in checked:
            continue
        checked.add(files)
        # A label is a category's place in its file: in another order, the labels of one split mean another's.
        classes = tuple({**CocoDataset.METAINFO, **(dataset.get("metainfo") or {})}["classes"])
        names = tuple(name for name in coco.check(*files, masks=masks).categories if name in classes)
        if names != classes:
            raise coco.DataError(
                f"{files[0]} has the categories {_some(names)} of the {len(classes)} classes of the config, "
                f"{_some(classes)}; all splits need all of them, in the same order"
            )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "") if names else "(none)"


def set_sparsity(config: Any, sparsity: SparsityConfig | None, **measuring: Any) -> None:
    """Make `config` sparse as given, or dense with ``None``; any NMSparseHook in it is replaced.

    Args:
        measuring: the hook's other options, interval and per_layer.
    """
    imports = config.get("custom_imports") or {"imports": []}
    if PLUGIN not in imports["imports"]:
        imports["imports"] = [*imports["imports"], PLUGIN]
    config.custom_imports = imports
    ours = hooks_of(config)
    hooks = [hook for hook in config.get("custom_hooks") or [] if hook not in ours]
    if sparsity is not None:
        options = {key: value for key, value in vars(sparsity).items() if value not in (None, (), {})}
        hooks.append({"type": "NMSparseHook", **options, **measuring})
    config.custom_hooks = hooks


def hooks_of(config: Any) -> list[Any]:
    """The entries of NMSparseHook in ``custom_hooks``."""
    return [hook for hook in config.get("custom_hooks") or [] if kind_of(hook) == "NMSparseHook"]


def _innermost(dataset: Any) -> Any:
    while "dataset" in dataset:
        dataset = dataset["dataset"]
    return dataset
