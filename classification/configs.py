"""What a training run is: one frozen dataclass tree, the recipes that return one, and the command line over them."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_type_hints

import tyro

from nm_sparsity.core import NMPattern, SparsityConfig, SparsityError
from nm_sparsity.core.experiments.run import as_json
from nm_sparsity.core.table import format_table


def _require(ok: bool, name: str, expected: str, found: object) -> None:
    if not ok:
        raise SparsityError(f"{name} must be {expected}, found {found}")


@dataclass(frozen=True)
class DataConfig:
    """Which images."""

    name: Literal["digits", "fashion-mnist", "imagefolder"] = "digits"
    """digits: embedded, 8x8. fashion-mnist: 28x28. imagefolder: ROOT/train/CLASS/*.jpg and ROOT/val/CLASS/*.jpg."""
    root: Path = Path("data")
    """Where fashion-mnist or the image folders lie."""
    image_size: int = 224
    """Side of the crop from imagefolder's images; the small data sets keep their own size."""
    workers: int = 0
    """Processes that load images; 0 loads in the training process."""

    def __post_init__(self) -> None:
        _require(self.image_size >= 8, "data.image_size", "at least 8", self.image_size)
        _require(self.workers >= 0, "data.workers", "0 or more", self.workers)


@dataclass(frozen=True)
class OptimizerConfig:
    """How weights move. The rate warms up linearly, then falls to 0 along a cosine, step by step."""

    name: Literal["sgd", "adamw"] = "sgd"
    """The optimizer."""
    lr: float = 0.1
    """Peak learning rate."""
    warmup_epochs: float = 0.0
    """Epochs of linear warm-up."""
    momentum: float = 0.9
    """SGD's momentum."""
    nesterov: bool = False
    """Nesterov momentum for SGD."""
    weight_decay: float = 5e-5
    """L2 penalty for SGD, decoupled decay for AdamW; on every parameter."""
    clip_norm: float | None = None
    """Largest norm of the whole gradient; None does not clip."""

    def __post_init__(self) -> None:
        _require(0 < self.lr < math.inf, "optimizer.lr", "above 0", self.lr)
        _require(0 <= self.warmup_epochs < math.inf, "optimizer.warmup_epochs", "0 or more", self.warmup_epochs)
        _require(0 <= self.momentum < 1, "optimizer.momentum", "at least 0 and below 1", self.momentum)
        _require(0 <= self.weight_decay < math.inf, "optimizer.weight_decay", "0 or more", self.weight_decay)
        _require(self.clip_norm is None or self.clip_norm > 0, "optimizer.clip_norm", "above 0", self.clip_norm)
        _require(
            not (self.nesterov and self.name == "sgd") or self.momentum > 0,
            "optimizer.momentum",
            "above 0 for nesterov",
            self.momentum,
        )


@dataclass(frozen=True)
class Config:
    """One training run."""

    folder: Path = Path("runs/classification")
    """The run's folder: config, metrics, checkpoints, summary."""
    resume: bool = False
    """Continue the run in this folder from its latest checkpoint."""
    model: str = "resnet8_small"
    """Any classifier of torchvision.models, or resnet8_small, resnet20_small, resnet18_small for small images."""
    pretrained: str | None = None
    """Start from trained weights: a torchvision name (DEFAULT, IMAGENET1K_V1, ...) or a state_dict file."""
    init_from: Path | None = None
    """Start from another run of ours (its folder or a checkpoint): ASP's trained dense model."""
    data: DataConfig = field(default_factory=DataConfig)
    sparsity: SparsityConfig = field(default_factory=lambda: SparsityConfig(exclude=("fc",)))
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    epochs: int = 30
    """Passes over the training images."""
    batch_size: int = 64
    """Images an optimizer step, over all processes and accumulated parts."""
    accumulation: int = 1
    """Parts that each process's share of a batch is computed in, to save memory."""
    label_smoothing: float = 0.0
    """Share of the target spread evenly over the classes."""
    ema: float | None = None
    """Decay of a moving average of the weights, which is then what is evaluated and finalized; None keeps none."""
    amp: Literal["none", "bf16", "fp16"] = "none"
    """Mixed precision; fp16 scales the loss."""
    channels_last: bool = False
    """NHWC memory format."""
    device: str = "auto"
    """cpu, cuda, or auto: CUDA where there is one."""
    seed: int = 0
    """Seeds the initial weights, the order of images and their augmentation."""
    log_every: int = 50
    """Steps between two log lines, each with the SAD across that step."""
    checkpoint_every: int = 0
    """Steps between checkpoints inside an epoch; 0 saves at the end of each epoch only."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulation", "log_every"):
            _require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        _require(self.checkpoint_every >= 0, "checkpoint_every", "0 or more", self.checkpoint_every)
        _require(0 <= self.label_smoothing < 1, "label_smoothing", "at least 0 and below 1", self.label_smoothing)
        _require(self.ema is None or 0 < self.ema < 1, "ema", "above 0 and below 1", self.ema)
        _require(0 <= self.seed < 2**32, "seed", "at least 0 and below 2**32", self.seed)
        _require(
            self.optimizer.warmup_epochs <= self.epochs,
            "optimizer.warmup_epochs",
            f"at most epochs = {self.epochs}",
            self.optimizer.warmup_epochs,
        )
        _require(
            not (self.pretrained and self.init_from),
            "pretrained and init_from",
            "given one at a time",
            "both",
        )
        if self.sparsity.method != "dense":
            NMPattern.parse(self.sparsity.pattern)

    def to_dict(self) -> dict[str, Any]:
        """The tree as JSON types; `from_dict` reads it back."""
        tree: dict[str, Any] = as_json(self)
        return tree

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> Config:
        """The config that `to_dict` wrote.

        Raises:
            SparsityError: for a field that does not exist or a value out of range.
        """
        config: Config = _from_dict(cls, tree)
        return config


def _from_dict(cls: type[Any], tree: Mapping[str, Any]) -> Any:
    hints = get_type_hints(cls)
    unknown = sorted(set(tree) - set(hints))
    if unknown:
        raise SparsityError(f"{cls.__name__} has no field {', '.join(unknown)}; it has {', '.join(sorted(hints))}")

    def value(name: str, found: Any) -> Any:
        if is_dataclass(hints[name]):
            return _from_dict(hints[name], found)
        if isinstance(found, list):
            return tuple(found)
        return Path(found) if found is not None and "Path" in str(hints[name]) else found

    return cls(**{name: value(name, found) for name, found in tree.items()})


RECIPES: dict[str, Callable[[], Config]] = {}
"""Every recipe by name."""


def recipe(function: Callable[[], Config]) -> Callable[[], Config]:
    """Decorator: a function without arguments becomes a recipe whose run folder is runs/<its name>."""
    name = function.__name__

    def named() -> Config:
        return replace(function(), folder=Path("runs") / name)

    named.__doc__ = function.__doc__
    RECIPES[name] = named
    return named


# ImageNet: the recipe of Zhou et al., ICLR 2021 (arXiv 2102.04010). The classifier stays dense, as in their code.


def imagenet(model: str, pattern: str | None, method: str = "sr-ste") -> Config:
    """`model` on ImageNet's folders, 120 epochs; a `pattern` of None trains it dense."""
    return Config(
        model=model,
        data=DataConfig(name="imagefolder", root=Path("data/imagenet"), workers=8),
        sparsity=_sparsity(pattern, method, decay=2e-4),
        optimizer=OptimizerConfig(lr=0.1, momentum=0.9, weight_decay=5e-5, warmup_epochs=5),
        epochs=120,
        batch_size=256,
        channels_last=True,
    )


def _sparsity(pattern: str | None, method: str, decay: float) -> SparsityConfig:
    if pattern is None:
        return SparsityConfig(method="dense", exclude=("fc",))
    return SparsityConfig(pattern=pattern, method=method, decay=decay if method == "sr-ste" else None, exclude=("fc",))


@recipe
def resnet50_dense() -> Config:
    """ResNet-50 on ImageNet, dense (published 77.3)."""
    return imagenet("resnet50", None)


@recipe
def resnet50_2by4() -> Config:
    """ResNet-50 on ImageNet, 2:4 SR-STE (published 77.0)."""
    return imagenet("resnet50", "2:4")


@recipe
def resnet50_4by8() -> Config:
    """ResNet-50 on ImageNet, 4:8 SR-STE (published 77.4)."""
    return imagenet("resnet50", "4:8")


@recipe
def resnet50_1by4() -> Config:
    """ResNet-50 on ImageNet, 1:4 SR-STE (published 75.9)."""
    return imagenet("resnet50", "1:4")


@recipe
def resnet50_2by8() -> Config:
    """ResNet-50 on ImageNet, 2:8 SR-STE (published 76.4)."""
    return imagenet("resnet50", "2:8")


@recipe
def resnet50_1by16() -> Config:
    """ResNet-50 on ImageNet, 1:16 SR-STE (published 71.5)."""
    return imagenet("resnet50", "1:16")


@recipe
def resnet50_2by4_ste() -> Config:
    """ResNet-50 on ImageNet, 2:4 STE (published 76.4)."""
    return imagenet("resnet50", "2:4", method="ste")


@recipe
def resnet50_2by4_asp() -> Config:
    """ResNet-50 on ImageNet, 2:4 ASP: 80 epochs after resnet50_dense's 120 (published 76.8 with 200)."""
    return replace(imagenet("resnet50", "2:4", method="asp"), epochs=80)


@recipe
def resnet50_2by4_finetune() -> Config:
    """ResNet-50 on ImageNet, 2:4 SR-STE from torchvision's trained weights, 30 epochs."""
    config = imagenet("resnet50", "2:4")
    return replace(
        config, pretrained="IMAGENET1K_V1", epochs=30, optimizer=replace(config.optimizer, lr=0.01, warmup_epochs=1)
    )


@recipe
def resnet18_dense() -> Config:
    """ResNet-18 on ImageNet, dense (published 71.3)."""
    return imagenet("resnet18", None)


@recipe
def resnet18_2by4() -> Config:
    """ResNet-18 on ImageNet, 2:4 SR-STE (published 71.2)."""
    return imagenet("resnet18", "2:4")


@recipe
def resnet18_4by8() -> Config:
    """ResNet-18 on ImageNet, 4:8 SR-STE."""
    return imagenet("resnet18", "4:8")


@recipe
def resnet18_1by4() -> Config:
    """ResNet-18 on ImageNet, 1:4 SR-STE."""
    return imagenet("resnet18", "1:4")


@recipe
def resnet18_2by8() -> Config:
    """ResNet-18 on ImageNet, 2:8 SR-STE."""
    return imagenet("resnet18", "2:8")


@recipe
def resnet18_1by16() -> Config:
    """ResNet-18 on ImageNet, 1:16 SR-STE."""
    return imagenet("resnet18", "1:16")


@recipe
def resnet18_2by4_ste() -> Config:
    """ResNet-18 on ImageNet, 2:4 STE (published 69.9)."""
    return imagenet("resnet18", "2:4", method="ste")


@recipe
def resnet18_2by4_asp() -> Config:
    """ResNet-18 on ImageNet, 2:4 ASP: 80 epochs after resnet18_dense's 120 (published 70.7 with 200)."""
    return replace(imagenet("resnet18", "2:4", method="asp"), epochs=80)


@recipe
def resnet18_2by4_finetune() -> Config:
    """ResNet-18 on ImageNet, 2:4 SR-STE from torchvision's trained weights, 30 epochs."""
    return replace(resnet50_2by4_finetune(), model="resnet18")


# Small images. Runs this short need a larger lambda: here its strength lambda * sum(lr), about 6 on ImageNet, is 1.6
# on the digits and 8 on Fashion-MNIST.


def small(data: DataConfig, pattern: str | None, method: str = "sr-ste") -> Config:
    """ResNet-8 on a small data set; a `pattern` of None trains it dense."""
    return Config(
        model="resnet8_small",
        data=data,
        sparsity=_sparsity(pattern, method, decay=0.1 if data.name == "digits" else 0.01),
        optimizer=OptimizerConfig(lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4, warmup_epochs=1),
        epochs=20,
        batch_size=64,
    )


DIGITS = DataConfig(name="digits")
FASHION_MNIST = DataConfig(name="fashion-mnist", root=Path("data/fashion-mnist"))


@recipe
def digits_dense() -> Config:
    """ResNet-8 on the embedded digits, dense."""
    return small(DIGITS, None)


@recipe
def digits_2by4() -> Config:
    """ResNet-8 on the embedded digits, 2:4 SR-STE."""
    return small(DIGITS, "2:4")


@recipe
def digits_1by8() -> Config:
    """ResNet-8 on the embedded digits, 1:8 SR-STE."""
    return small(DIGITS, "1:8")


@recipe
def digits_2by4_asp() -> Config:
    """ResNet-8 on the embedded digits, 2:4 ASP after digits_dense."""
    return small(DIGITS, "2:4", method="asp")


@recipe
def fashion_mnist_dense() -> Config:
    """ResNet-8 on Fashion-MNIST, dense."""
    return small(FASHION_MNIST, None)


@recipe
def fashion_mnist_2by4() -> Config:
    """ResNet-8 on Fashion-MNIST, 2:4 SR-STE."""
    return small(FASHION_MNIST, "2:4")


@recipe
def fashion_mnist_1by8() -> Config:
    """ResNet-8 on Fashion-MNIST, 1:8 SR-STE."""
    return small(FASHION_MNIST, "1:8")


def get(name: str) -> Config:
    """The config of the recipe `name`.

    Raises:
        SparsityError: for an unknown name, with the known ones.
    """
    if name not in RECIPES:
        raise SparsityError(f'unknown config "{name}"; known configs: {", ".join(RECIPES)}')
    return RECIPES[name]()


def from_command_line(arguments: Sequence[str], prog: str) -> Config:
    """``CONFIG [--field value ...]`` -> the recipe with its overrides; ``CONFIG --help`` lists the fields.

    Without arguments or with ``--help`` alone it prints the recipes, with ``--print-config`` the resulting config,
    and exits.

    Raises:
        SparsityError: for an unknown recipe.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"usage: {prog} CONFIG [--print-config] [--field value ...]    ({prog} CONFIG --help lists the fields)\n")
        print(format_table(("config", "what it trains"), [(name, make.__doc__) for name, make in RECIPES.items()]))
        sys.exit(0 if arguments else 2)
    overrides = [argument for argument in arguments[1:] if argument != "--print-config"]
    base = get(arguments[0])
    if any(override.startswith("--sparsity.method") for override in overrides):
        # A recipe's lambda belongs to its method; another one starts from its own default.
        base = replace(base, sparsity=replace(base.sparsity, decay=None))
    config = tyro.cli(Config, default=base, args=overrides, prog=f"{prog} {arguments[0]}")
    if len(overrides) < len(arguments) - 1:
        print(json.dumps(config.to_dict(), indent=2))
        sys.exit(0)
    return config


def difference(one: Config, other: Config) -> list[str]:
    """The fields in which two configs differ, as ``name: one -> other``; where and how they run is left out."""
    ignored = {"folder", "resume", "device", "log_every", "checkpoint_every"}
    return [
        f"{f.name}: {getattr(one, f.name)} -> {getattr(other, f.name)}"
        for f in fields(Config)
        if f.name not in ignored and getattr(one, f.name) != getattr(other, f.name)
    ]
