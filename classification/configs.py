"""What a training run of an image classifier is: one frozen dataclass tree; and the recipes, which are such trees."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import tyro

from nm_sparsity.core import SparsityConfig, SparsityError
from nm_sparsity.core.experiments.recipes import Recipes, RunConfig
from nm_sparsity.core.experiments.user_model import parse_arguments


def _require(ok: bool, name: str, expected: str, found: object) -> None:
    if not ok:
        raise SparsityError(f"{name} must be {expected}, found {found}")


@dataclass(frozen=True)
class DataConfig:
    """The images that a run trains and is tested on."""

    name: Literal["digits", "fashion-mnist", "imagefolder"] = "digits"
    """digits: embedded, 8x8. fashion-mnist: 28x28. imagefolder: ROOT/train/CLASS/*.jpg and ROOT/val/CLASS/*.jpg."""
    root: Annotated[Path, tyro.conf.arg(name="data", prefix_name=False)] = Path("data")
    """Where fashion-mnist or the image folders lie."""
    images: int | None = None
    """Train on so many of the training images, the same share of each class; None takes all. Not for imagefolder."""
    image_size: int = 224
    """Side of the crop from imagefolder's images; the small data sets keep their own size."""
    workers: int = 0
    """Processes that load images; 0 loads in the training process."""

    def __post_init__(self) -> None:
        _require(self.images is None or self.images >= 1, "data.images", "at least 1", self.images)
        _require(
            self.images is None or self.name != "imagefolder", "data.images", "left out for imagefolder", self.images
        )
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
    """Epochs of linear warm-up; of a run that is shorter than that, a tenth."""
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
class ClassifierConfig(RunConfig):
    """One training run of an image classifier."""

    # A longer run takes over where a shorter one ended; folders of images move, and machines have other cores.
    may_change = (
        *(*RunConfig.may_change, "epochs", "device", "log_every", "checkpoint_every"),
        *("data.root", "data.workers"),
    )
    renamed: ClassVar[Mapping[str, str]] = {**RunConfig.renamed, "--folder": "--out", "--data.root": "--data"}

    model: str = "resnet8_small"
    """Any classifier of torchvision.models; resnet8_small, resnet20_small or resnet18_small for small images; or your
    own as package.module:function."""
    args: str = "[]"
    """What your own function is called with, as JSON: a list, or an object of named arguments."""
    pretrained: str | None = None
    """Start from trained weights: a torchvision name (DEFAULT, IMAGENET1K_V1, ...) or a state_dict file."""
    data: DataConfig = field(default_factory=DataConfig)
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
    log_every: int = 50
    """Steps between two log lines, each with the SAD across that step."""
    checkpoint_every: int = 0
    """Steps between checkpoints inside an epoch; 0 saves at the end of each epoch only."""

    @property
    def warmup_epochs(self) -> float:
        """How long the learning rate warms up: as asked for, or a tenth of a run that is shorter than that."""
        asked = self.optimizer.warmup_epochs
        return asked if asked <= self.epochs else self.epochs / 10

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulation", "log_every"):
            _require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        _require(self.checkpoint_every >= 0, "checkpoint_every", "0 or more", self.checkpoint_every)
        _require(0 <= self.label_smoothing < 1, "label_smoothing", "at least 0 and below 1", self.label_smoothing)
        _require(self.ema is None or 0 < self.ema < 1, "ema", "above 0 and below 1", self.ema)
        _require(0 <= self.seed < 2**32, "seed", "at least 0 and below 2**32", self.seed)
        arguments = parse_arguments(self.args)
        _require(":" in self.model or not arguments, "args", "left out for a model of torchvision", self.args)
        _require(not (self.pretrained and self.init_from), "pretrained and init_from", "given one at a time", "both")


RECIPES = Recipes[ClassifierConfig]()
"""Every recipe by name."""

get = RECIPES.get


# ImageNet: the recipe of Zhou et al., ICLR 2021 (arXiv 2102.04010). The classifier stays dense, as in their code.

IMAGENET: tuple[tuple[str, str, str, float | None], ...] = (
    ("resnet50", "", "dense", 77.3),
    ("resnet50", "2:4", "sr-ste", 77.0),
    ("resnet50", "4:8", "sr-ste", 77.4),
    ("resnet50", "1:4", "sr-ste", 75.9),
    ("resnet50", "2:8", "sr-ste", 76.4),
    ("resnet50", "1:16", "sr-ste", 71.5),
    ("resnet50", "2:4", "ste", 76.4),
    ("resnet50", "2:4", "asp", 76.8),
    ("resnet18", "", "dense", 71.3),
    ("resnet18", "2:4", "sr-ste", 71.2),
    ("resnet18", "4:8", "sr-ste", None),
    ("resnet18", "1:4", "sr-ste", None),
    ("resnet18", "2:8", "sr-ste", None),
    ("resnet18", "1:16", "sr-ste", None),
    ("resnet18", "2:4", "ste", 69.9),
    ("resnet18", "2:4", "asp", 70.7),
)
"""Model, pattern, method, and the top-1 in percent that the paper publishes, where it does."""


def _name(start: str, pattern: str, method: str) -> str:
    """What a recipe is called: resnet50_dense, resnet50_2to4 (SR-STE), resnet50_2to4_asp, ..."""
    if method == "dense":
        return f"{start}_dense"
    return f"{start}_{pattern.replace(':', 'to')}" + ("" if method == "sr-ste" else f"_{method}")


def _label(pattern: str, method: str) -> str:
    return "dense" if method == "dense" else f"{pattern} {method.upper()}"


def _sparsity(pattern: str, method: str, decay: float) -> SparsityConfig:
    if method == "dense":
        return SparsityConfig(method="dense", exclude=("fc",))
    return SparsityConfig(pattern=pattern, method=method, decay=decay if method == "sr-ste" else None, exclude=("fc",))


def imagenet(model: str, pattern: str, method: str) -> ClassifierConfig:
    """`model` on ImageNet's folders for 120 epochs; ASP for 80 more, after a dense run."""
    return ClassifierConfig(
        model=model,
        data=DataConfig(name="imagefolder", root=Path("data/imagenet"), workers=8),
        sparsity=_sparsity(pattern, method, decay=2e-4),
        optimizer=OptimizerConfig(lr=0.1, momentum=0.9, weight_decay=5e-5, warmup_epochs=5),
        epochs=80 if method == "asp" else 120,
        batch_size=256,
        channels_last=True,
    )


def small(data: DataConfig, pattern: str, method: str, decay: float) -> ClassifierConfig:
    """ResNet-8 on a data set of small images."""
    return ClassifierConfig(
        model="resnet8_small",
        data=data,
        sparsity=_sparsity(pattern, method, decay),
        optimizer=OptimizerConfig(lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4, warmup_epochs=1),
        epochs=20,
        batch_size=64,
    )


for _model, _pattern, _method, _published in IMAGENET:
    _about = f"{_model.replace('resnet', 'ResNet-')} on ImageNet, {_label(_pattern, _method)}"
    if _method == "asp":
        _about += f": 80 epochs after {_model}_dense's 120"
    if _published:
        _about += f" (published {_published}{' with 200' if _method == 'asp' else ''})"
    RECIPES.add(_name(_model, _pattern, _method), _about, imagenet(_model, _pattern, _method))

for _model in ("resnet50", "resnet18"):
    _base = get(f"{_model}_2to4")
    RECIPES.add(
        f"{_model}_2to4_finetune",
        f"{_model.replace('resnet', 'ResNet-')} on ImageNet, 2:4 SR-STE from torchvision's trained weights, 30 epochs",
        replace(
            _base,
            pretrained="IMAGENET1K_V1",
            epochs=30,
            optimizer=replace(_base.optimizer, lr=0.01, warmup_epochs=1),
            # Learning rates that sum to 750 instead of 30,000: the same strength lambda * sum(lr) of 6.
            sparsity=replace(_base.sparsity, decay=0.008),
        ),
    )

# Small images. Runs this short need a larger lambda: here its strength lambda * sum(lr), about 6 on ImageNet, is 1.6
# on the digits and 8 on Fashion-MNIST.
for _data, _decay in (
    (DataConfig(name="digits"), 0.1),
    (DataConfig(name="fashion-mnist", root=Path("data/fashion-mnist")), 0.01),
):
    for _pattern, _method in (("", "dense"), ("2:4", "sr-ste"), ("1:8", "sr-ste"), ("2:4", "asp")):
        RECIPES.add(
            _name(_data.name.replace("-", "_"), _pattern, _method),
            f"ResNet-8 on {_data.name}, {_label(_pattern, _method)}",
            small(_data, _pattern, _method, _decay),
        )
