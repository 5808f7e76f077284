"""What is in a file of any kind: the weights, our table where there is one, and what can be told of them where not.

Read are: PyTorch checkpoints, safetensors files (packed ones of ours too), folders that Hugging Face's
``save_pretrained`` wrote, sharded or not, and ONNX models.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nm_sparsity.core.errors import CheckpointError
from nm_sparsity.core.files import onnx, sealed
from nm_sparsity.core.files.codec import FORMAT, unpack_all
from nm_sparsity.core.files.io import load
from nm_sparsity.core.files.metadata import METADATA, Metadata, find_parts, why_not_counted
from nm_sparsity.core.files.weights import Weight
from nm_sparsity.core.masks.groups import reduction_size
from nm_sparsity.core.model.candidates import candidates, dims_by_shape, reduction_dims, run_length
from nm_sparsity.core.pattern import Layout

_EMBEDDING = re.compile(r"embed|^(wte|wpe|shared)$|relative_attention_bias", re.IGNORECASE)
"""Names of layers that are embeddings in most models."""

_COUNTS = re.compile(r"^(?!.*size).*(layer|depth|block|expert|stage)")
"""Keys of a Hugging Face config that number modules."""


@dataclass(frozen=True)
class Contents:
    """What a file holds."""

    where: str
    """What messages call it."""
    state: dict[str, Any]
    """Name -> tensor."""
    metadata: Metadata | None
    """Our entry, whose table says what is N:M."""
    weights: Callable[[Layout], Iterator[Weight]]
    """Where there is no such table: the tensors of two or more dimensions."""


def read(source: Mapping[str, Any] | str | Path) -> Contents:
    """The contents of a file, a folder or a checkpoint's payload.

    Raises:
        CheckpointError: if there is no such file, or it cannot be read.
        SparsityError: if reading it needs a package that is not installed.
    """
    if isinstance(source, Mapping):
        return _by_shape("the state dict", *find_parts(source, "the state dict"))
    path = Path(source)
    if path.suffix == ".onnx" and path.is_file():
        found = onnx.read(path)
        return Contents(str(path), {weight.name: weight.value for weight in found("channel")}, None, found)
    folder, where = (path, str(path)) if path.is_dir() else (path.parent, str(path))
    state, metadata = _tensors_of_folder(path) if path.is_dir() else _tensors(path)
    config = _hugging_face_config(folder)
    if metadata is None and METADATA in config:
        metadata = Metadata.from_dict(config[METADATA], folder / "config.json")
        metadata.check_fits(state, where)
    if metadata is None and (model := _hugging_face_model(folder, config, state)) is not None:
        return Contents(where, state, None, lambda layout: weights_of_model(model, layout, state))
    return _by_shape(where, state, metadata)


def save_safetensors(path: str | Path, state: Mapping[str, Any], metadata: Metadata) -> None:
    """Write a finalized state dict so that Hugging Face and every other loader of safetensors reads it.

    Of tied weights the first name is written, as Hugging Face does; `read` gives all back.

    Raises:
        SparsityError: for what is no tensor, or if safetensors is not installed.
        CheckpointError: if the file cannot be written.
    """
    tensors, tied = sealed.without_ties(state)
    entry = metadata.finalized().to_dict()
    header = {"format": "pt", METADATA: json.dumps(entry), "tied": json.dumps(tied)}
    sealed.write(path, {name: value.contiguous() for name, value in tensors.items()}, header)


def weights_of_model(model: nn.Module, layout: Layout, state: Mapping[str, Any] | None = None) -> Iterator[Weight]:
    """Those of `model`; with their values in `state`, of what is in it, where `model` has none."""
    for candidate in candidates(model):
        names = [name for name in candidate.names if state is None or isinstance(state.get(name), Tensor)]
        if not names:
            continue
        value = candidate.param if state is None else state[names[0]]
        why_not = candidate.why_not
        if value.dim() != candidate.param.dim():
            why_not = f"it has {value.dim()} dimensions, the model's {candidate.param.dim()}"
        if why_not:
            yield Weight(names[0], value, (), 0, why_not)
            continue
        module = candidate.owners[0][1]
        dims = reduction_dims(module, value.dim(), layout)
        yield Weight(names[0], value, dims, run_length(module, tuple(value.shape), dims))


def _by_shape(where: str, state: dict[str, Any], metadata: Metadata | None) -> Contents:
    """Nothing is known of the layers: (out, in, *kernel) is assumed, and embeddings are told by their names."""

    def weights(layout: Layout) -> Iterator[Weight]:
        embeddings = {sealed.place(value): name for name, value in tensors.items() if _is_embedding(name)}
        for name, value in tensors.items():
            if value.is_nested:  # which has no shape
                yield Weight(name, value, (), 0, why_not_counted(value))
                continue
            dims = dims_by_shape(value.dim(), layout)
            embedding = embeddings.get(sealed.place(value))
            guess = "" if embedding is None else "an embedding" if embedding == name else f"tied to {embedding}"
            guess = guess and f"{guess}, by its name: include it if it is none"
            yield Weight(name, value, dims, reduction_size(value.shape, dims), guess=guess, dims_are_assumed=True)

    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor) and value.dim() > 1}
    return Contents(where, state, metadata, weights)


def _is_embedding(name: str) -> bool:
    return bool(_EMBEDDING.search(name.removesuffix(".weight").rpartition(".")[2]))


def _tensors(path: Path) -> tuple[dict[str, Any], Metadata | None]:
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}")
    if not sealed.is_safetensors(path):
        return find_parts(load(path), path)
    tensors, header = sealed.read(path)
    if header.get("format") == FORMAT:
        state, table = unpack_all(tensors, header, path)
        return find_parts({"state_dict": state, METADATA: Metadata("packed", {}, "channel", table)}, path)
    if METADATA not in header:
        return find_parts(tensors, path)
    try:
        entry, tied = json.loads(header[METADATA]), json.loads(header["tied"])
        state = {**tensors, **{alias: tensors[name] for alias, name in tied.items()}}
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"the metadata of {path} does not fit its tensors: {error}") from error
    return find_parts({"state_dict": state, METADATA: entry}, path)


def _tensors_of_folder(folder: Path) -> tuple[dict[str, Any], Metadata | None]:
    """All tensors of a folder that Hugging Face wrote."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():  # before shards, as Hugging Face does: its index stays when they are replaced
            return _tensors(folder / name)
        index = folder / f"{name}.index.json"
        if index.is_file():
            names = _json(index).get("weight_map")
            if not isinstance(names, dict) or not all(isinstance(file, str) for file in names.values()):
                raise CheckpointError(f"{index} is damaged: it has no weight_map of names to files")
            shards = {file: _tensors(folder / Path(file).name)[0] for file in sorted(set(names.values()))}
            if missing := [name for name, file in names.items() if name not in shards[file]]:
                raise CheckpointError(f"{folder / names[missing[0]]} lacks {missing[0]}, which {index.name} names")
            return {name: shards[file][name] for name, file in names.items()}, None
    files = sorted(path.name for path in folder.iterdir() if path.suffix in (".pt", ".pth", ".safetensors", ".onnx"))
    raise CheckpointError(
        f"{folder} is no folder of a Hugging Face model: it holds no model.safetensors"
        + (f"; name a file in it: {', '.join(files[:4])}" if files else "")
    )


def _hugging_face_config(folder: Path) -> dict[str, Any]:
    """The config.json of a folder that Hugging Face wrote; empty if it is none."""
    path = folder / "config.json"
    config = _json(path) if path.is_file() else {}
    return config if {"architectures", METADATA} & config.keys() else {}


def _hugging_face_model(folder: Path, config: Mapping[str, Any], state: Mapping[str, Any]) -> nn.Module | None:
    """The model of a folder, without its weights, if `transformers` has it and it names all tensors of `state`."""
    try:
        if not _builds(config, len(state)):
            return None
        import transformers

        kind = getattr(transformers, config["architectures"][0])
        with torch.device("meta"):
            model: nn.Module = kind(kind.config_class.from_pretrained(folder))
    except Exception:  # No transformers, another version of it, code of the model's own: then shapes must do.
        return None
    known = {name for candidate in candidates(model) for name in candidate.names}
    wanted = {name for name, value in state.items() if isinstance(value, Tensor) and value.dim() > 1}
    return model if wanted <= known else None


def _builds(config: Any, tensors: int) -> bool:
    """Whether building what a config.json says fetches nothing, and has no more layers than the file has tensors."""
    if isinstance(config, list):
        return all(_builds(value, tensors) for value in config)
    if not isinstance(config, dict):
        return True
    counted = [value if isinstance(value, list) else [value] for key, value in config.items() if _COUNTS.match(key)]
    if any(isinstance(number, int | float) and number > tensors for number in chain(*counted)):
        return False
    if any(config.get(key) for key in ("use_pretrained_backbone", "use_timm_backbone")):
        return False
    return all(_builds(value, tensors) for value in config.values())


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no JSON: {error}") from error
    return found if isinstance(found, dict) else {}
