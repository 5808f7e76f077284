"""MMDetection configs: find one by name, point it at a data set, make it sparse or dense."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from nm_sparsity.core import SparsityConfig, SparsityError
from nm_sparsity.detection import coco

FOLDER = Path(__file__).parent / "configs"


def names() -> list[str]:
    """The packaged configs that can be trained."""
    return sorted(path.stem for path in FOLDER.glob("*.py") if not path.stem.startswith("sparse_"))


def read(name: str, overrides: Sequence[str] = ()) -> Any:
    """The ``mmengine.Config`` called `name`: one of `names`, a file, or ``mmdet::folder/file.py``.

    Args:
        overrides: ``key.of.entry=value``; values are YAML.

    Raises:
        SparsityError: for an unknown name, or a config of MMDetection 2.
    """
    import mmdet  # noqa: F401  registers mmdet's scope
    from mmengine.config import Config

    path = FOLDER / f"{name}.py" if name in names() else Path(name)
    try:
        if name.startswith("mmdet::"):
            from mmengine.hub import get_config

            config = get_config(name)
        elif path.is_file():
            config = Config.fromfile(path)
        else:
            raise SparsityError(f'there is no config "{name}": neither a file nor one of {", ".join(names())}')
    except (SyntaxError, KeyError, OSError, AttributeError, ImportError) as error:
        raise SparsityError(f"cannot read the config {name}: {type(error).__name__}: {error}") from error
    _check_version(config, name)
    try:
        config.merge_from_dict(dict(map(_override, overrides)))
    except (KeyError, TypeError) as error:
        raise SparsityError(f"cannot override {' '.join(overrides)}: {error}") from error
    return config


def _check_version(config: Any, name: str) -> None:
    if old := [key for key in ("data", "optimizer", "lr_config", "runner", "total_epochs") if key in config]:
        raise SparsityError(
            f"{name} is a config of MMDetection 2 (it has {', '.join(old)}); this is MMDetection 3, whose configs "
            "have train_dataloader, optim_wrapper and train_cfg: start from the one of the same name in mmdet::"
        )
    if missing := [key for key in ("model", "train_dataloader", "optim_wrapper", "train_cfg") if key not in config]:
        raise SparsityError(f"{name} is not an MMDetection training config: it has no {', '.join(missing)}")


def _override(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals:
        raise SparsityError(f'"{text}" is not of the form key=value, e.g. train_cfg.max_epochs=24')
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise SparsityError(f'"{text}": the value is not YAML: {error}') from None


def set_data(config: Any, folder: Path) -> None:
    """Train and evaluate on a data set that `prepare` wrote: paths, classes, and the heads' numbers of classes.

    It is tested on ``test`` where there is one, else on ``val``.
    """
    test = "test" if (folder / "test").is_dir() else "val"
    classes: tuple[str, ...] = ()
    for loader, split in (("train", "train"), ("val", "val"), ("test", test)):
        file = folder / "annotations" / f"instances_{split}.json"
        classes = classes or coco.check(file, folder / split).categories
        _innermost(config[f"{loader}_dataloader"].dataset).update(
            type="CocoDataset",
            data_root=f"{folder}/",
            ann_file=f"annotations/{file.name}",
            data_prefix={"img": f"{split}/"},
            metainfo={"classes": classes},
        )
        if loader != "train":
            config[f"{loader}_evaluator"].ann_file = str(file)
    for head in _with_classes(config.model):
        head["num_classes"] = len(classes)


def check_data(config: Any) -> None:
    """Check the COCO files that `config` reads, without decoding images.

    Raises:
        DataError: with what is missing or wrong.
    """
    checked = set()
    for loader in ("train_dataloader", "val_dataloader", "test_dataloader"):
        dataset = _innermost(config[loader].dataset) if config.get(loader) else {}
        if dataset.get("type") == "CocoDataset":
            root = Path(dataset.get("data_root") or "")
            files = root / dataset["ann_file"], root / dataset["data_prefix"]["img"]
            if files not in checked:
                checked.add(files)
                coco.check(*files)


def set_sparsity(config: Any, sparsity: SparsityConfig | None) -> None:
    """Make `config` sparse as given, or dense with ``None``; any NMSparseHook in it is replaced."""
    imports = config.get("custom_imports") or {"imports": []}
    if "nm_sparsity.detection" not in imports["imports"]:
        imports["imports"] = [*imports["imports"], "nm_sparsity.detection"]
    config.custom_imports = imports
    hooks = [hook for hook in config.get("custom_hooks", []) if hook["type"] != "NMSparseHook"]
    if sparsity is not None:
        options = {key: value for key, value in vars(sparsity).items() if value not in (None, (), {})}
        hooks.append({"type": "NMSparseHook", **options})
    config.custom_hooks = hooks


def _innermost(dataset: Any) -> Any:
    while "dataset" in dataset:
        dataset = dataset["dataset"]
    return dataset


def _with_classes(config: Any) -> Iterator[Any]:
    if isinstance(config, Mapping):
        if "num_classes" in config:
            yield config
        config = list(config.values())
    if isinstance(config, list | tuple):
        for entry in config:
            yield from _with_classes(entry)


def to_json(config: Any) -> Any:
    """A config as plain JSON values."""
    return json.loads(json.dumps(config.to_dict(), default=str))
