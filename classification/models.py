"""The dense models: torchvision's classifiers by name, its ResNets for small images, and anybody's own."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import torchvision
from torch import Tensor, nn
from torchvision.models import get_model, get_model_weights, list_models
from torchvision.models.resnet import BasicBlock, conv1x1, conv3x3

from nm_sparsity.core import SparsityError
from nm_sparsity.core.experiments import user_model
from nm_sparsity.core.experiments.user_model import Arguments
from nm_sparsity.core.files.checkpoint import restore
from nm_sparsity.core.files.io import load
from nm_sparsity.core.files.metadata import find_parts

SMALL: dict[str, tuple[Sequence[int], int]] = {
    "resnet8_small": ((1, 1, 1), 16),
    "resnet20_small": ((3, 3, 3), 16),
    "resnet18_small": ((2, 2, 2, 2), 64),
}
"""Blocks in each stage and channels of the first; each stage after it doubles the channels and halves the image."""


def build(name: str, classes: int, arguments: Arguments = ()) -> nn.Module:
    """A dense classifier (batch, 3, height, width) -> (batch, `classes`), freshly initialised.

    Args:
        arguments: those of the function, where `name` is a ``package.module:function`` that makes the model.

    Raises:
        SparsityError: for a name that is neither in `SMALL`, nor a classifier of torchvision.models, nor a function
            that can be called.
    """
    if ":" in name:
        return user_model.build(name, arguments)
    if name in SMALL:
        return small_resnet(*SMALL[name], classes)
    known = list_models(module=torchvision.models)
    if name not in known:
        raise SparsityError(
            f'unknown model "{name}"; known models: {", ".join([*SMALL, *known])}; '
            "for a model of your own write package.module:function"
        )
    # These two return a tuple in training unless told not to. Their trained weights take images scaled as here, which
    # no state dict says: so they are scaled whatever the weights come from.
    theirs = {"aux_logits": False, "init_weights": True, "transform_input": True}
    model: nn.Module = get_model(name, num_classes=classes, **(theirs if name in ("googlenet", "inception_v3") else {}))
    return model


def small_resnet(depths: Sequence[int], width: int, classes: int) -> nn.Module:
    """He et al.'s ResNet for small images (arXiv 1512.03385, section 4.2): 3x3 stem, no max-pool.

    `depths` counts torchvision's basic blocks in each stage; stage i has ``width * 2**i`` channels.
    """
    parts: list[tuple[str, nn.Module]] = [
        ("conv1", conv3x3(3, width)),
        ("bn1", nn.BatchNorm2d(width)),
        ("relu", nn.ReLU(inplace=True)),
    ]
    channels = width
    for i, depth in enumerate(depths):
        out = width * 2**i
        stride = 1 if i == 0 else 2
        shortcut = None
        if stride > 1:
            shortcut = nn.Sequential(conv1x1(channels, out, stride), nn.BatchNorm2d(out))
        blocks = [BasicBlock(channels, out, stride, shortcut), *(BasicBlock(out, out) for _ in range(depth - 1))]
        parts.append((f"layer{i + 1}", nn.Sequential(*blocks)))
        channels = out
    parts += [("avgpool", nn.AdaptiveAvgPool2d(1)), ("flatten", nn.Flatten()), ("fc", nn.Linear(channels, classes))]
    model = nn.Sequential(OrderedDict(parts))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model


def load_pretrained(model: nn.Module, name: str, source: str) -> list[str]:
    """Load trained weights into the dense `model`, built as `name`; returns the names left at their initial values.

    `source` is a state_dict file or the name of torchvision's weights for `name` (fetched and cached by torchvision).
    A last layer for another number of classes is left as it is; everything else must fit.

    Raises:
        SparsityError: if `source` is neither, or does not fit.
    """
    state = _state_dict(name, source)
    own = model.state_dict()
    classifier = [key for key in list(own)[-2:] if key in state and state[key].shape != own[key].shape]
    for key in [key for key in state if key.startswith(("AuxLogits.", "aux1.", "aux2."))]:
        del state[key]
    for key in classifier:
        state[key] = own[key]
    restore(model, state, None)
    return classifier


def _state_dict(name: str, source: str) -> dict[str, Tensor]:
    path = Path(source)
    if path.is_file():
        return find_parts(load(path), path)[0]
    if name not in list_models(module=torchvision.models):
        raise SparsityError(f'"{source}" is not a file, and torchvision has no trained {name}; give a state_dict file')
    known = get_model_weights(name)
    if source != "DEFAULT" and source not in known.__members__:
        names = ", ".join(["DEFAULT", *known.__members__])
        raise SparsityError(f'"{source}" is neither a file nor weights of torchvision for {name}: {names}')
    try:
        return dict(known[source].get_state_dict(progress=True, check_hash=True))
    except OSError as error:
        raise SparsityError(
            f"torchvision could not fetch {known[source].url} ({error}); fetch it elsewhere and give --pretrained FILE"
        ) from None
